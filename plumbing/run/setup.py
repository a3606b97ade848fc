"""What one process of a training run holds, built once, in the order in which things can go wrong:
data first, since what is wrong with it shows in seconds; then models; then the sampler.

Memory, per process, with N parameters over W processes: weights, gradients and Adam's two moments
in float32 are 16 N / W bytes, the reference 4 N / W; while gradients add up over the passes of an
update they may be whole, 4 N (optimizer.whole_gradients); and the sampler holds its own whole copy
(2 N in bfloat16). With LoRA N counts the adapters, there is no reference, and the frozen model
takes 2 bytes a parameter over W.
"""

import os
import sysconfig
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import torch

from masking import Masker
from plumbing.base.common import fail
from plumbing.base.console import doing, say
from plumbing.base.logs import open_log
from plumbing.base.optimizer import Optimizer
from plumbing.base.processes import Processes, device_memory
from plumbing.data.prompts import Stream, encode
from plumbing.data.sources import load, splits_of, usable, validation_split, warn_of_shared_rows
from plumbing.grading.workers import Grader
from plumbing.models.families import TOYS
from plumbing.models.weights import (
    DTYPES,
    banned_tokens,
    copy_of,
    find_model,
    load_policy,
    load_processors,
    load_vlm,
    shape_of,
)
from plumbing.run.checkpoint import check_space
from plumbing.run.config import Config
from policy import Policy, WithoutAdapters
from reward import FORMS
from rollout import Sampler, TransformersSampler

WARM = Path(__file__).parents[2] / "toy" / "warm"  # the policies of families.TOYS


@dataclass(frozen=True)
class Parts:
    """What a training run is made of, by name."""

    cfg: Config
    processes: Processes
    folder: Path  # of the model that the run starts from
    processors: tuple  # (tokenizer, image processor)
    stream: Stream  # of training prompts
    validation: dict  # {split: examples}; empty without --val_data
    policy: Policy
    reference: Policy | WithoutAdapters | None  # the policy before training, where beta needs it
    optimizer: Optimizer
    sampler: Sampler  # asleep until its first sync
    masker: Masker
    grader: Grader
    log: object  # of plumbing/base/logs.py; None without --log

    def close(self):
        """Let go of the grader's processes, the engine, the process group and what --log named."""
        if self.log:
            self.log.close()
        self.grader.close()
        self.sampler.close()
        self.processes.leave()


def setup(cfg):
    """Config -> Parts. Collective: every process of the run calls it."""
    if cfg.sampler == "vllm" and find_spec("vllm") is None:
        fail("--sampler vllm: vLLM is not installed; requirements.txt brings it, or give hf")
    processes = Processes()
    log = open_log(cfg, processes.first)
    examples, held_out = open_data(cfg)
    folder = processes.one_by_one(lambda: model_folder(cfg.model))
    must_fit(folder, cfg, processes)
    processors = load_processors(folder, cfg)
    second = cfg.second_pictures
    examples = usable(examples, processors, cfg.max_prompt_tokens, cfg, processes, second)
    stream = Stream(examples, cfg.seed, *processors, partial(encode, second=second))
    validation = {}
    for split, data in held_out.items():
        validation[split] = usable(data, processors, cfg.max_prompt_tokens, cfg, processes)
        if processes.first:
            warn_of_shared_rows(examples, validation[split])
    masker = Masker(cfg, processors[1], processes.device)
    check_space(shape_of(folder, cfg), cfg.steps, cfg, say)

    banned = banned_tokens(folder, processors[0]).to(processes.device)
    make = policy_maker(banned, cfg, processes)
    with doing(f"loading the policy, {folder}", aloud=True):
        policy = load_policy(folder, make, cfg, processes)
    reference = None
    if cfg.beta > 0 and cfg.lora_rank:
        reference = WithoutAdapters(policy)
    elif cfg.beta > 0:
        reference = copy_of(policy, folder, make, cfg, processes).requires_grad_(False)
    if cfg.activation_checkpointing:
        policy.vlm.gradient_checkpointing_enable({"use_reentrant": False})
    vlm = policy.vlm
    if processes.sharded and cfg.sampler == "hf":  # the sampler's own whole copy
        with doing("loading the sampler's copy", aloud=True):
            vlm = load_vlm(folder, DTYPES[cfg.dtype]).to(processes.device)
    sampler = build_sampler(cfg, folder, vlm, processors, banned, processes.world)
    # A resumed run makes the optimizer's state before the first sync; there is no room for both.
    sampler.sleep()
    optimizer = Optimizer(policy, cfg)
    data = cfg, processes, folder, processors, stream, validation
    return Parts(*data, policy, reference, optimizer, sampler, masker, Grader(), log)


def open_data(cfg):
    """-> (rows to train on, {split: rows to validate on}), before a model is downloaded or learned
    for them"""
    asked = FORMS[cfg.reward].instruction
    examples = load(cfg.data, "train", 1_000_000, cfg.seed, cfg, asked)
    val = cfg.val_data  # all its splits that a run reads
    splits = dict.fromkeys([validation_split(val), *splits_of(val)]) if val else {}
    return examples, {s: load(val, s, cfg.eval_questions, 0, cfg, asked) for s in splits}


def model_folder(name):
    """The toy's warm start; a local folder as it is; a hub name downloaded once."""
    return WARM / name if name in TOYS else find_model(name)


def must_fit(folder, cfg, processes):
    """On GPUs, end with a sentence if a run does not fit, or Triton cannot compile. Collective."""
    if processes.device.type == "cuda":
        found = {"a C compiler (gcc)": os.environ.get("CC") or which("gcc") or which("clang")}
        found["Python.h (python3-dev)"] = Path(sysconfig.get_path("include"), "Python.h").exists()
        if lacks := [name for name, there in found.items() if not there]:
            fail(f"kernels for the GPU are compiled here, and {' and '.join(lacks)} is missing")
        from plumbing.fit import verdict
        from plumbing.models.shapes import without_weights

        asked, memory = [], device_memory(processes.device)
        if processes.first:
            asked = [verdict(without_weights(folder), cfg, processes.world, memory)[1]]
        (short,) = processes.gather(asked)
        if short:
            fail(short)


def check_sampler(parts, say, questions=4):
    """Perturb, sync, compare: does the sampler follow the trainer? Says by how much they differ;
    where they share their weights there is nothing to check."""
    policy, processes, cfg = parts.policy, parts.processes, parts.cfg
    if getattr(parts.sampler, "vlm", None) is policy.vlm:
        return
    from plumbing.run.sync import SYNC_TOLERANCE, check_sync

    first = processes.rank * questions
    prompts = [*parts.stream.read(range(first, first + questions)).values()]
    seeds = [(cfg.seed, "check sync", processes.rank, i) for i in range(len(prompts))]
    tolerance = SYNC_TOLERANCE[cfg.dtype]
    with doing("checking that weights reach the sampler"):
        gap = check_sync(parts.sampler, policy, prompts, seeds, tolerance, processes.device)
    difference = f"log-probs differ by {gap:.1e} nats a token from the trainer's"
    say(f"weights reach the sampler: with every tensor changed, {difference}")


def policy_maker(banned, cfg, processes):
    """-> f(vlm) -> Policy, in the layout for this device: rows on a CPU, on a GPU one flat row"""
    flat = processes.device.type == "cuda"  # FlexAttention has no backward pass on a CPU
    return partial(Policy, banned=banned, temperature=cfg.temperature, flat=flat)


def build_sampler(cfg, folder, vlm, processors, banned, world=1):
    """The sampler of cfg.sampler. vlm: what the transformers sampler samples with; vLLM loads its
    own copy from the folder. processors: (tokenizer, image processor)"""
    if cfg.sampler == "vllm":
        from plumbing.run.engine import VLLMSampler

        return VLLMSampler(folder, processors, banned, cfg, world)
    return TransformersSampler(vlm, processors[0], banned, cfg)


def lone_sampler(cfg, folder, processors):
    """A sampler of the model in a folder, without a trainer; where there is a GPU, it is on it."""
    vlm, banned = None, banned_tokens(folder, processors[0])
    if cfg.sampler == "hf":
        with doing(f"loading {folder}", aloud=True):
            device = "cuda" if torch.cuda.is_available() else "cpu"
            vlm = load_vlm(folder, DTYPES[cfg.dtype]).to(device)
    return build_sampler(cfg, folder, vlm, processors, banned)
