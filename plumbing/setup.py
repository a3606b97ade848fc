"""What one process of a training run holds, built once, in the order in which things can go wrong:
data first, since what is wrong with it shows in seconds; then models; then the sampler.

Memory, per process, with N parameters over W processes: weights, gradients and Adam's two moments
in float32 are 16 N / W bytes, the reference 4 N / W; while gradients add up over the passes of an
update they may be whole, 4 N (optimiser.whole_gradients); and the sampler holds its own whole copy
(2 N in bfloat16, shared by --tensor_parallel processes). With LoRA N counts the adapters, there is
no reference, and the frozen model takes 2 bytes a parameter over W.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from masking import Masker
from plumbing.checkpoint import check_space
from plumbing.common import fail
from plumbing.compiled import compile_layers
from plumbing.config import Config
from plumbing.console import doing, say
from plumbing.data import Stream, encode_with
from plumbing.engine import SYNC_TOLERANCE, build_sampler, check_sync
from plumbing.families import TOYS
from plumbing.grader import Grader
from plumbing.logs import open_log
from plumbing.lora import count
from plumbing.optimiser import Optimiser, whole_gradients
from plumbing.policy import (
    DTYPES,
    Policy,
    WithoutAdapters,
    banned_tokens,
    copy_of,
    find_model,
    load_policy,
    load_processors,
    load_vlm,
    shape_of,
)
from plumbing.processes import Processes, device_memory
from plumbing.sources import load, usable, validation_split, warn_of_shared_rows
from rollout import Sampler
from toy.lessons import build
from toy.task import SPLITS

# Bytes for activations that --sleep -1 leaves beside an awake engine, with activation checkpointing
# and without it: those of Qwen2.5-VL-3B at 16,384 tokens.
ROOM = {True: 20e9, False: 100e9}


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
    optimiser: Optimiser
    sampler: Sampler  # asleep until its first sync
    masker: Masker
    grader: Grader
    log: object  # of plumbing/logs.py; None without --log

    def close(self):
        """Let go of the grader's processes, the engine, the process group and what --log named."""
        if self.log:
            self.log.close()
        self.grader.close()
        self.sampler.close()
        self.processes.leave()


def setup(cfg):
    """Config -> Parts. Collective: every process of the run calls it."""
    processes = Processes()
    log = open_log(cfg, processes.first)
    examples, held_out = open_data(cfg)
    folder = processes.one_by_one(lambda: model_folder(cfg.model, cfg))
    must_fit(folder, cfg, processes)
    processors = load_processors(folder, cfg)
    second = cfg.second_pictures
    examples = usable(examples, processors, cfg.max_prompt_tokens, cfg, processes, second)
    stream = Stream(examples, cfg.seed, *processors, partial(encode_with, second))
    validation = {}
    for split, data in held_out.items():
        validation[split] = usable(data, processors, cfg.max_prompt_tokens, cfg, processes)
        if processes.first:
            warn_of_shared_rows(examples, validation[split])
    masker = Masker(cfg, processors[1], processes.device)
    check_space(shape_of(folder, cfg), cfg.steps, cfg, say)

    banned = banned_tokens(folder, processors[0]).to(processes.device)
    with doing(f"loading the policy, {folder}", aloud=True):
        policy = load_policy(folder, banned, cfg, processes)
    reference = None
    if cfg.beta > 0 and cfg.lora_rank:
        reference = WithoutAdapters(policy)
    elif cfg.beta > 0:
        reference = copy_of(policy, folder, cfg, processes).requires_grad_(False)
    if cfg.compile:
        for model in (m for m in (policy, reference) if isinstance(m, Policy)):
            compile_layers(model)
    if cfg.activation_checkpointing:
        policy.vlm.gradient_checkpointing_enable({"use_reentrant": False})
    vlm = policy.vlm
    if processes.sharded and cfg.sampler == "hf":  # the sampler's own whole copy
        with doing("loading the sampler's copy", aloud=True):
            vlm = load_vlm(folder, DTYPES[cfg.dtype]).to(processes.device)
    level = sleep_level_here(policy, cfg, processes)
    settings = cfg if level == cfg.sleep else replace(cfg, sleep=level)
    sampler = build_sampler(settings, folder, vlm, processors, banned, processes.world)
    # A resumed run makes the optimiser's state before the first sync; there is no room for both.
    sampler.sleep()
    if cfg.cpu_offload:
        processes.use_cores()
    optimiser = Optimiser(policy, cfg)
    return Parts(
        cfg,
        processes,
        folder,
        processors,
        stream,
        validation,
        policy,
        reference,
        optimiser,
        sampler,
        masker,
        Grader(),
        log,
    )


def open_data(cfg):
    """-> (rows to train on, {split: rows to validate on}), before a model is downloaded or learned
    for them"""
    examples = load(cfg.data, "train", 1_000_000, cfg.seed, cfg)
    splits = validation_splits(cfg.val_data)
    return examples, {s: load(cfg.val_data, s, cfg.eval_questions, 0, cfg) for s in splits}


def model_folder(name, cfg):
    """The toy, made once; a local folder as it is; a hub name downloaded once."""
    return build(cfg.warm_steps, name, cfg.trust) if name in TOYS else find_model(name)


def must_fit(folder, cfg, processes):
    """On GPUs, end with a sentence if this run does not fit on them. Collective."""
    if processes.device.type == "cuda":
        memory = device_memory(processes.device)
        with doing("planning what each GPU has to hold", aloud=True):
            asked = [why_not(folder, cfg, processes.world, memory)] if processes.first else []
        (short,) = processes.gather(asked)
        if short:
            fail(short)


def why_not(folder, cfg, world, memory):
    """Why a run does not fit on `world` GPUs of `memory` bytes, as a sentence; "" if it does.

    Asked of plumbing/fit.py in a process of its own: its group of processes that do not exist
    cannot live beside a real one. It sees no GPU, and nothing of the run that it belongs to. A
    planner that breaks, on a model that it cannot simulate, stops no run.
    """
    question = dict(folder=str(folder), cfg=asdict(cfg), world=world, memory=memory)
    program, root = [sys.executable, "-m", "plumbing.fit", "--question"], Path(__file__).parents[1]
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = kept | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        program,
        input=json.dumps(question),
        cwd=root,
        env=environment,
        text=True,
        capture_output=True,
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        say(f"note: whether this run fits is not known, the planner stopped ({why})")
        return ""
    return json.loads(done.stdout.splitlines()[-1])


def splits_of(data):
    """The splits that an evaluation of this data set reports."""
    return SPLITS if data == "toy" else ["test"]


def validation_splits(val_data):
    """All splits of --val_data that a run reads; none without it."""
    return dict.fromkeys([validation_split(val_data), *splits_of(val_data)]) if val_data else []


def check_sampler(parts, say, questions=4):
    """Perturb, sync, compare: does the sampler follow the trainer? Says by how much they differ;
    where they share their weights there is nothing to check."""
    policy, processes, cfg = parts.policy, parts.processes, parts.cfg
    if getattr(parts.sampler, "vlm", None) is policy.vlm:
        return
    first = processes.rank * questions
    prompts = [*parts.stream.read(range(first, first + questions)).values()]
    names = [(cfg.seed, "check sync", processes.rank, i) for i in range(len(prompts))]
    tolerance = SYNC_TOLERANCE[cfg.dtype]
    with doing("checking that weights reach the sampler"):
        gap = check_sync(parts.sampler, policy, prompts, names, tolerance, processes.device)
    difference = f"log-probs differ by {gap:.1e} nats a token from the trainer's"
    say(f"weights reach the sampler: with every tensor changed, {difference}")


def sleep_level_here(policy, cfg, processes):
    """What the engine must give back while training; --sleep -1 is decided by this GPU's memory."""
    if cfg.sleep >= 0 or processes.device.type != "cuda":
        return cfg.sleep
    memory = device_memory(processes.device)
    return sleep_level(*count(policy), processes.world, memory, cfg)


def sleep_level(trained, frozen, world, memory, cfg):
    """0 if all that the top of this file counts, and ROOM, fit beside an awake engine, else 2.

    trained, frozen: how many parameters; memory: of each process's device, in bytes
    """
    copies = 16 + 4 * (cfg.beta > 0 and not cfg.lora_rank)
    needed = (copies * trained + 2 * frozen) / world + whole_gradients(trained, memory)
    needed += ROOM[cfg.activation_checkpointing]
    return 0 if needed <= (1 - cfg.gpu_memory_utilization) * memory else 2
