"""What sft.py runs with: its knobs and recipes, and what one of its processes holds, built once."""

import math
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from plumbing.checkpoint import check_space
from plumbing.common import fail
from plumbing.config import MODELS, Config, borrow, knob, lora_rate, preset_of
from plumbing.console import doing, say
from plumbing.conversations import Conversations, encode_conversation
from plumbing.data import Stream
from plumbing.families import TOYS, family_of
from plumbing.logs import open_log
from plumbing.optimiser import Optimiser, cosine
from plumbing.policy import (
    Policy,
    banned_tokens,
    find_model,
    load_policy,
    load_processors,
    shape_of,
)
from plumbing.processes import Processes
from plumbing.sources import load, opened, usable, validation_split, warn_of_shared_rows
from reward import FORMS
from toy.model import keep, new_policy, processor, tokenizer

SFT = """Supervised fine-tuning on conversations with pictures.

In brackets: what holds where neither the recipe (RECIPES in plumbing/supervised.py) nor the model
(MODELS in plumbing/config.py) says otherwise. What a run uses is written into its config.json."""
TOY_ROWS = 2048  # of the toy's training data, which is made on demand, an epoch

# How a model is fine-tuned; laid over the knobs' defaults and the model's row of MODELS.
RECIPES = {
    # Fine-R1 (arXiv 2602.07605), stage 1: its script LLaMA-Factory/cot_sft_3b.sh, 4 processes of 4
    # passes of 4 rows, in a program that freezes the vision tower by default.
    "fine_r1": dict(
        epochs=10,
        prompts_per_update=64,
        lr=5e-6,
        warmup_updates=6,
        weight_decay=0.1,
        cutoff=4096,
        freeze_vision=True,
        save_every=100,
        eval_every=10,
    ),
    # From random weights, tower included, to a policy that answers in the right form.
    "toy": dict(
        epochs=8,
        prompts_per_update=64,
        lr=2e-3,
        warmup_updates=30,
        weight_decay=0.01,
        cutoff=512,
        save_every=64,
        eval_every=32,
    ),
}


@dataclass
class SftConfig:
    """Every knob of sft.py; those of train.py that it shares are borrowed from there."""

    recipe: str = knob(
        "",
        "settings to start from; default: toy for --data toy, else fine_r1",
        RECIPES,
        part="What is learned, from what, and where it goes",
    )
    model: str = borrow(
        "model",
        help="Hugging Face name or folder; or toy, or toy-qwen3: the toy before it has learned "
        "anything; default: toy without a CUDA device, else Qwen2.5-VL-3B",
    )
    data: str = borrow(
        "data",
        help="hub name, parquet/json/jsonl file or folder of conversations (docs/data.md), or "
        "'toy', which is the default of the toy",
    )
    val_data: str = borrow("val_data", help="as --data, for the validation loss; default: none")
    problem_column: str = borrow("problem_column")
    response_column: str = knob("response", "column of --data with the response to learn")
    images_column: str = borrow("images_column")
    reward: str = borrow(
        "reward",
        help="a problem with a response is asked in the form of this reward of train.py",
    )
    strict: bool = borrow("strict")
    out: str = borrow("out", help="output folder; default: out/<model>-sft")
    seed: int = borrow("seed")
    epochs: float = knob(1.0, "times that every row is learned from", above=0)
    steps: int = borrow("steps", default=0, help="updates; 0: as --epochs says", above=None, low=0)
    resume: bool = borrow("resume")
    prompts_per_update: int = borrow(
        "prompts_per_update",
        help="conversations per update, over all processes",
        part="Batch and model",
    )
    tokens_per_forward: int = borrow("tokens_per_forward")
    cutoff: int = knob(4096, "longer conversations are left out", above=0)
    freeze_vision: bool = knob(False, "the vision tower stays as it is")
    lora_rank: int = borrow("lora_rank")
    lora_alpha: float = borrow("lora_alpha")
    merge: bool = borrow("merge")
    lr: float = borrow("lr", part="The optimiser")
    warmup_updates: int = borrow("warmup_updates")
    weight_decay: float = borrow("weight_decay")
    max_grad_norm: float = borrow("max_grad_norm")
    min_pixels: int = borrow("min_pixels", part="Pictures, memory and speed")
    max_pixels: int = borrow("max_pixels")
    dtype: str = borrow("dtype")
    packing: str = borrow("packing")
    activation_checkpointing: bool = borrow("activation_checkpointing")
    cpu_offload: bool = borrow("cpu_offload")
    eval_every: int = borrow("eval_every", part="Watching and saving")
    eval_questions: int = borrow("eval_questions", help="conversations in a validation")
    save_every: int = borrow("save_every")
    keep: int = borrow("keep")
    log: str = borrow("log")
    hint_right: float = borrow("hint_right")

    # The schedule reaches to the last step, so a resumed run must keep to it.
    free_on_resume: ClassVar = Config.free_on_resume - {"steps"}
    temperature: ClassVar = 1.0  # the likelihood is that of the logits as they are


def resolve(flags, cuda):
    """Flags given on the command line -> SftConfig"""
    flags = dict(flags)
    flags["model"] = flags.get("model") or ("Qwen/Qwen2.5-VL-3B-Instruct" if cuda else "toy")
    toy = flags["model"] in TOYS
    flags["data"] = flags.get("data") or ("toy" if toy else "")
    if not flags["data"]:
        fail("--data is needed: a file or folder of conversations, or a hub name; see --help")
    flags["packing"] = flags.get("packing") or ("flat" if cuda else "rows")
    flags.setdefault("activation_checkpointing", cuda)
    preset = preset_of(flags["model"], flags["data"])
    flags["out"] = flags.get("out") or f"out/{flags['model'] if toy else preset}-sft"
    flags["recipe"] = flags.get("recipe") or ("toy" if flags["data"] == "toy" else "fine_r1")
    known = {f.name for f in fields(SftConfig)} - {"steps"}
    shared = {name: value for name, value in MODELS[preset].items() if name in known}
    settings = shared | RECIPES[flags["recipe"]]
    if flags.get("lora_rank"):
        settings["lr"] = lora_rate(settings["lr"])
    return SftConfig(**settings | flags)


@dataclass(frozen=True)
class Parts:
    """What a run of sft.py is made of, by name."""

    cfg: SftConfig
    processes: Processes
    folder: Path  # of the model that the run starts from
    stream: Stream  # of conversations
    validation: Stream | None  # None without --val_data
    policy: Policy
    optimiser: Optimiser
    updates_per_epoch: int
    steps: int
    log: object  # of plumbing/logs.py; None without --log

    def close(self):
        """Let go of the process group and of what --log named."""
        if self.log:
            self.log.close()
        self.processes.leave()


def setup(cfg):
    """SftConfig -> Parts. Collective: every process of the run calls it."""
    processes = Processes()
    log = open_log(cfg, processes.first)
    rows, held_out = conversations(cfg.data, "train", cfg), None
    if cfg.val_data:
        held_out = conversations(cfg.val_data, validation_split(cfg.val_data), cfg)
    folder = processes.one_by_one(lambda: model_folder(cfg))
    processors = load_processors(folder, cfg)
    stream, validation = stream_of(rows, processors, cfg, processes), None
    if cfg.val_data:
        validation = stream_of(held_out, processors, cfg, processes)
        if processes.first:
            warn_of_shared_rows(stream.examples, validation.examples)

    # The last update of an epoch is smaller where the rows do not divide.
    per_epoch = math.ceil(len(stream.examples) / cfg.prompts_per_update)
    steps = cfg.steps or math.ceil(cfg.epochs * per_epoch)
    shape = shape_of(folder, cfg)
    if cfg.freeze_vision:
        family_of(shape.config).tower(shape).requires_grad_(False)
    check_space(shape, steps, cfg, say)

    # Nothing is banned: the softmax of the likelihood runs over the whole vocabulary, so the
    # tokens that must not be sampled become less likely too.
    banned = torch.zeros_like(banned_tokens(folder, processors[0]), device=processes.device)
    with doing(f"loading the policy, {folder}", aloud=True):
        policy = load_policy(folder, banned, cfg, processes)
    if cfg.freeze_vision:
        policy.family.tower(policy.vlm).requires_grad_(False)
    if cfg.activation_checkpointing:
        policy.vlm.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.cpu_offload:
        processes.use_cores()
    optimiser = Optimiser(policy, cfg, cosine(cfg.warmup_updates, steps))
    run = (policy, optimiser, per_epoch, steps, log)
    return Parts(cfg, processes, folder, stream, validation, *run)


def model_folder(cfg):
    """The folder of the model; the untrained toy is made in the run's own."""
    if cfg.model not in TOYS:
        return find_model(cfg.model)
    folder, tok = Path(cfg.out) / "untrained", tokenizer()
    return keep((new_policy(tok, cfg.model), tok, processor(cfg.model)), folder)


def conversations(name, split, cfg):
    """A data set of conversations by name. Ends with a sentence if it cannot be read."""
    if name == "toy":
        return load(name, split, TOY_ROWS, cfg.seed, cfg)
    columns = (cfg.problem_column, cfg.response_column, cfg.images_column)
    asked = FORMS[cfg.reward].instruction
    return opened(name, partial(Conversations, name, split, columns, instruction=asked))


def stream_of(data, processors, cfg, processes):
    """The Stream of those conversations that can be used. Collective."""
    data = usable(data, processors, cfg.cutoff, cfg, processes)
    return Stream(data, cfg.seed, *processors, encode_conversation)
