"""What each GPU holds in each phase of a run, as sums; and the nearest settings that fit.

With N parameters over W GPUs, a GPU holds for each parameter that is trained 4 / W bytes of weights
and 8 / W of Adam's moments in float32, and its gradients; 4 / W bytes of the reference; and for a
parameter that is frozen (an adapter's base) 2 / W in bfloat16. What comes and goes during an update
is measured by whoever calls.
"""

from dataclasses import asdict, dataclass, replace
from itertools import combinations

from plumbing.checkpoint import bytes_of
from plumbing.engine import prefill_tokens
from plumbing.optimiser import whole_gradients
from plumbing.setup import sleep_level

# Bytes of a GPU that no tensor of ours accounts for: the CUDA context, NCCL, cuBLAS workspaces,
# what an engine that sleeps keeps (CUDA graphs), and fragments. An estimate, not a measurement.
OUTSIDE = 3e9
# Bytes that an engine needs beside its weights and the responses to one prompt: for CUDA graphs,
# logits and workspaces; and for each token of its largest prefill, three times what the widest
# layer of Qwen2.5-VL's tower makes of a picture's token (4 patches, 2 x 3,420 channels in bfloat16
# each). Estimates, not measurements.
ENGINE_ROOM, PREFILL_ROOM = 2e9, 160e3


@dataclass(frozen=True)
class Model:
    """A model before it is loaded: its config.json as a dict, how many parameters it has, and how
    many of them are frozen."""

    settings: dict
    parameters: int
    frozen: int = 0

    @property
    def trained(self):
        return self.parameters - self.frozen


@dataclass(frozen=True)
class Measured:
    """Bytes in one process; `peak` holds all of them, and what else an update takes at its worst
    moment."""

    parameters: int  # their number, of the whole model
    weights: float
    moments: float
    gradients: float  # that have added up before an update's last pass
    peak: float


@dataclass(frozen=True)
class State:
    """Bytes that one process holds all the time, and between the passes of an update."""

    weights: float
    moments: float
    gradients: float
    reference: float


def state(trained, frozen, world, exchange, reference):
    """The bytes of a model with so many parameters that are trained and that are frozen -> State

    exchange: gradients are kept as shards; reference: whether there is one. It is a float32 copy of
    what is trained; where something is frozen, the frozen part alone is the reference.
    """
    return State(
        weights=(4 * trained + 2 * frozen) / world,
        moments=8 * trained / world,
        gradients=4 * trained / (world if exchange else 1),
        reference=4 * trained / world if reference and not frozen else 0,
    )


@dataclass(frozen=True)
class Plan:
    """What a run takes, in bytes. phases: {phase: {what: bytes on each GPU}}"""

    phases: dict
    memory: float
    level: int  # --sleep, decided
    host: float  # of one process's shards in host memory
    disk: float  # of the checkpoints while one more is being saved
    missing: float  # what the engine lacks within its own share
    exchange: bool  # whether every pass exchanges gradients

    @property
    def totals(self):
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def fits(self):
        return max(self.totals.values()) <= self.memory and self.missing <= 0


def pass_tokens(cfg):
    """Tokens of the longest pass: a group is never split, however small --tokens_per_forward."""
    longest = cfg.max_prompt_tokens + cfg.group_size * cfg.max_response_tokens
    return max(cfg.tokens_per_forward, longest)


def plan(model, cfg, world, memory, measure):
    """What a run of cfg on `world` GPUs of `memory` bytes takes -> Plan

    measure(cfg, exchange) -> Measured of one update (plumbing/simulation.py)
    """
    text, N = model.settings["text_config"], model.parameters
    exchange = cfg.cpu_offload or not whole_gradients(model.trained, memory)
    measured = measure(cfg, exchange)
    passing = measured.peak - measured.weights - measured.moments - measured.gradients
    held = state(model.trained, model.frozen, world, exchange, cfg.beta > 0)
    shard, host = held.moments / 2, 0.0
    if cfg.cpu_offload:
        host, shard, held = sum(asdict(held).values()), 0.0, State(0, 0, 0, 0)
    copy = (2 if cfg.dtype == "bfloat16" else 4) * N / cfg.tensor_parallel
    vllm = cfg.sampler == "vllm"
    awake = cfg.gpu_memory_utilization * memory if vllm else copy
    always = {"weights": held.weights, "moments": held.moments, "reference": held.reference}
    tensor = 6 * text["vocab_size"] * text["hidden_size"]  # the largest, in float32 and bfloat16

    def phases(level):
        asleep = awake if level == 0 or not vllm else 0.0
        return {
            "update": always | dict(gradients=held.gradients, activations=passing, engine=asleep),
            "roll-out": always | dict(engine=awake),
            "wake-up": always | dict(activations=tensor, engine=max(asleep, copy)),
            "resume": always | dict(gradients=shard, engine=asleep),
        }

    level = cfg.sleep
    if level < 0:
        level = sleep_level(model.trained, model.frozen, world, memory, cfg)
    rows = {phase: parts | {"outside": OUTSIDE} for phase, parts in phases(level).items()}
    room = ENGINE_ROOM + PREFILL_ROOM * prefill_tokens(cfg, cuda=True)
    missing = copy + cache_bytes(text, cfg) / cfg.tensor_parallel + room - awake
    saved = (cfg.keep or -(-cfg.steps // cfg.save_every)) + 1
    disk = saved * bytes_of(model.trained, model.frozen, cfg)
    return Plan(rows, memory, level, host, disk, missing if vllm else 0.0, exchange)


def cache_bytes(text, cfg):
    """Keys and values of the responses to one prompt in the engine, in cfg.dtype."""
    width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    heads = text.get("num_key_value_heads") or text["num_attention_heads"]
    size = 2 if cfg.dtype == "bfloat16" else 4
    tokens = cfg.max_prompt_tokens + cfg.group_size * cfg.max_response_tokens
    return 2 * size * text["num_hidden_layers"] * heads * width * tokens


# What can be changed, in the order in which it is tried: what costs least first.
MOVES = [
    ("--activation_checkpointing", dict(activation_checkpointing=True)),
    ("--sleep 2", dict(sleep=2)),
    ("--gpu_memory_utilization 0.4", dict(gpu_memory_utilization=0.4)),
    ("--gpu_memory_utilization 0.3", dict(gpu_memory_utilization=0.3)),
    ("--gpu_memory_utilization 0.6", dict(gpu_memory_utilization=0.6)),
    ("--tokens_per_forward 8192", dict(tokens_per_forward=8192)),
    ("--lora_rank 16", dict(lora_rank=16)),
    ("2 times as many GPUs", 2),
    ("4 times as many GPUs", 4),
    ("--cpu_offload", dict(cpu_offload=True)),
    ("--no_ref_kl", dict(no_ref_kl=True, beta=0.0)),
    ("8 times as many GPUs", 8),
]


def moved(cfg, world, moves):
    """-> (cfg, world) after these moves, or None where one changes nothing or two are one flag."""
    flags = [name.split()[0] if name.startswith("--") else "GPUs" for name, _ in moves]
    for _, change in moves:
        if isinstance(change, int):
            world *= change
        elif (changed := replace(cfg, **change)) == cfg:
            return None
        else:
            cfg = changed
    return (cfg, world) if len(flags) == len(set(flags)) else None


def nearest(model_of, cfg, world, memory, measure, most=3):
    """Settings that fit, with as few moves as possible -> up to `most` lists of moves

    model_of(cfg) -> Model, since LoRA freezes it.

    What comes and goes is measured on `world` GPUs; on more of them it is a little less. It is not
    measured where all the rest is too much already.
    """

    def fits(there):
        model = model_of(there[0])
        nothing = lambda *_: Measured(model.parameters, 0, 0, 0, 0)
        return all(plan(model, *there, memory, how).fits for how in (nothing, measure))

    found = []
    for size in (1, 2, 3):
        for moves in combinations(MOVES, size):
            there = moved(cfg, world, moves)
            names = [name for name, _ in moves]
            more = any("GPUs" in name for name in names)
            if more and any("GPUs" in name for way in found for name in way):
                continue  # fewer of them do
            if there and fits(there):
                found.append(names)
                if len(found) == most:
                    return found
        if found:
            return found
    return found
