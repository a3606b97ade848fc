"""What one process of a training run holds, built once, in the order in which things can go wrong:
data first, since what is wrong with it shows in seconds; then models; then the sampler.

Memory, per process, with N parameters over W processes: weights, gradients and Adam's two moments
in float32 are 16 N / W bytes, the reference 4 N / W; while gradients add up over the passes of an
update they are whole, 4 N; and the sampler holds its own whole copy (2 N in bfloat16, shared by
--tensor_parallel processes).
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from masking import Masker
from plumbing.common import fail
from plumbing.config import Config
from plumbing.data import Stream
from plumbing.engine import SYNC_TOLERANCE, build_sampler, check_sync
from plumbing.families import TOYS
from plumbing.grader import Grader
from plumbing.optimiser import Optimiser
from plumbing.policy import (
    DTYPES,
    Policy,
    banned_tokens,
    load_processors,
    load_vlm,
    sharded_policy,
)
from plumbing.processes import Processes
from plumbing.sources import Rows, Selection, left_out, load, shared_rows
from rollout import Sampler
from toy.lessons import build
from toy.task import SPLITS

ROOM = 20e9  # bytes for activations that --sleep -1 leaves beside an awake engine


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
    reference: Policy | None  # the policy before training, where beta needs it
    optimiser: Optimiser
    sampler: Sampler
    masker: Masker
    grader: Grader

    def close(self):
        """Let go of the grader's processes, the engine and the process group."""
        self.grader.close()
        self.sampler.close()
        self.processes.leave()


def setup(cfg):
    """Config -> Parts. Collective: every process of the run calls it."""
    processes = Processes()
    # Rank 0 makes or fetches the model, the others wait for it.
    folder = model_folder(cfg.model, cfg) if processes.first else None
    processes.barrier()
    folder = folder or model_folder(cfg.model, cfg)
    processors = load_processors(folder, cfg)
    examples = load(cfg.data, "train", 1_000_000, cfg.seed, cfg)
    examples = usable(examples, processors, cfg, processes)
    stream = Stream(examples, cfg.seed, *processors)
    validation = {}
    for split in validation_splits(cfg.val_data):
        data = load(cfg.val_data, split, cfg.eval_questions, 0, cfg)
        validation[split] = usable(data, processors, cfg, processes)
        if processes.first:
            warn_of_shared_rows(examples, validation[split])
    masker = Masker(cfg, processors[1], processes.device)

    banned = banned_tokens(folder, processors[0]).to(processes.device)
    policy = load_policy(folder, banned, cfg, processes)
    reference = None
    if cfg.beta > 0:
        reference = load_policy(folder, banned, cfg, processes).requires_grad_(False)
    if cfg.activation_checkpointing:
        policy.vlm.gradient_checkpointing_enable({"use_reentrant": False})
    vlm = policy.vlm
    if processes.sharded and cfg.sampler == "hf":  # the sampler's own whole copy
        vlm = load_vlm(folder, DTYPES[cfg.dtype]).to(processes.device)
    parameters = sum(p.numel() for p in policy.parameters())
    level = sleep_level_here(parameters, cfg, processes)
    settings = cfg if level == cfg.sleep else replace(cfg, sleep=level)
    sampler = build_sampler(settings, folder, vlm, processors, banned, processes.world)
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
    )


def model_folder(name, cfg):
    """A local folder as it is; a hub name downloaded once; the toy made once."""
    if name in TOYS:
        return build(cfg.warm_steps, name, cfg.trust)
    if Path(name).is_dir():
        return whole_model(Path(name))
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except Exception as error:
        kind = type(error).__name__
        fail(f"model {name!r} is neither a folder here nor reachable on the hub ({kind})")


def whole_model(folder):
    """A local folder, if it holds a model."""
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        fail(f"{folder} holds an adapter only; merge it into its base model, and give that folder")
    if not (folder / "config.json").exists():
        fail(f"{folder} holds no model: there is no config.json")
    return folder


def load_policy(folder, banned, cfg, processes):
    """The policy of a model folder: sharded over the processes, or whole in the only one."""
    if processes.sharded:
        return sharded_policy(folder, banned, cfg, processes.device)
    return Policy(load_vlm(folder), banned, cfg.temperature, cfg.packing == "flat")


def usable(data, processors, cfg, processes):
    """The rows of a data set that can be used.

    Every process checks a share of them; those that cannot be used are named in a file.
    """
    if not isinstance(data, Rows):
        return data
    share = slice(processes.rank, None, processes.world)
    mine = data.faults(*processors, cfg.max_prompt_tokens, share, processes.first)
    faults = dict(processes.gather(list(mine.items())))
    if processes.first:
        left_out(Path(cfg.out), data, faults, cfg.strict)
    return Selection(data, faults)


def warn_of_shared_rows(train, held_out):
    """A row that is trained on says nothing as a row to validate on. Of files and hub names; the
    toy's splits share no picture."""
    if isinstance(train, Selection) and isinstance(held_out, Selection):
        if same := shared_rows(train.rows, held_out.rows):
            print(
                f"warning: {len(same)} of {len(held_out.rows)} rows of {held_out.rows.name} are "
                f"in {train.rows.name} too, the first is row {same[0]}: the policy is trained on "
                "what it is validated on"
            )


def splits_of(data):
    """The splits that an evaluation of this data set reports."""
    return SPLITS if data == "toy" else ["test"]


def validation_split(val_data):
    """The split that a run watches while it trains, and that settings are chosen on."""
    return "val" if val_data == "toy" else "test"


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
    gap = check_sync(parts.sampler, policy, prompts, names, tolerance, processes.device)
    difference = f"log-probs differ by {gap:.1e} nats a token from the trainer's"
    say(f"weights reach the sampler: with every sign turned, {difference}")


def sleep_level_here(parameters, cfg, processes):
    """What the engine must give back while training; --sleep -1 is decided by this GPU's memory."""
    if cfg.sleep >= 0 or processes.device.type != "cuda":
        return cfg.sleep
    memory = torch.cuda.get_device_properties(processes.device).total_memory
    return sleep_level(
        parameters, processes.world, cfg.beta > 0, memory, cfg.gpu_memory_utilization
    )


def sleep_level(parameters, world, reference, memory, utilization):
    """0 if all that the top of this file counts, and ROOM, fit beside an awake engine, else 2."""
    needed = ((16 + 4 * reference) / world + 4) * parameters + ROOM
    return 0 if needed <= (1 - utilization) * memory else 2
