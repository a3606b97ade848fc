"""Does a run fit? What each GPU holds in each phase of it, as sums, before anything is loaded.

    python -m plumbing.fit --model qwen2.5-vl-7b --gpus 4 --memory 80     (and any flag of train.py)

GB are 10^9 bytes; docs/gpus.md has a table of machines, and says what this does not know. A `model`
is what plumbing.models.shapes.without_weights makes of a name.
"""

import sys
from dataclasses import dataclass

from plumbing.base.optimizer import whole_gradients
from plumbing.models.families import family_of
from plumbing.models.shapes import without_weights
from plumbing.models.weights import DTYPES
from plumbing.run.checkpoint import bytes_of
from plumbing.run.config import Config, parser, prefill_tokens, resolve
from policy import LOGITS_AT_ONCE

# Bytes of a GPU that no tensor of ours accounts for: the CUDA context, NCCL, cuBLAS workspaces,
# what an engine that sleeps keeps (CUDA graphs), and fragments. An estimate, not a measurement.
OUTSIDE = 3e9
# Bytes that an engine needs beside its weights and the responses to one prompt: for CUDA graphs,
# logits and workspaces; and for each token of its largest prefill, three times what the widest
# layer of Qwen2.5-VL's tower makes of it (4 patches, 2 x 3,420 channels in bfloat16). Estimates.
ENGINE_ROOM, PREFILL_ROOM = 2e9, 160e3
# An update is planned with a picture of so many tokens in every so many tokens of a pass.
PICTURED, PICTURE_EVERY = 1024, 8192


def size(module):
    """Its parameters, those of a tied head once."""
    return sum(p.numel() for p in module.parameters())


def counts(model, cfg):
    """-> (how many parameters are trained, how many frozen); LoRA adds r (in + out) to a layer."""
    matrices = [p for p in model.model.language_model.layers.parameters() if p.dim() == 2]
    adapters = cfg.lora_rank * sum(sum(W.shape) for W in matrices)
    return (adapters, size(model)) if adapters else (size(model), 0)


def kept(layer, config, heads):
    """Numbers that a decoder layer makes of a token, or a vision block of a patch, and keeps for
    its backward pass. heads: channels of the queries and of the keys of all heads together"""
    parts = dict(layer.named_modules())
    norms = 2 * 4 * config.hidden_size  # two, of four each: in float32 (two), scaled, weighted
    # Queries and keys turned, values, output; with norms of queries and keys, three more of those.
    attention = (5 if "self_attn.q_norm" in parts else 2) * heads
    # Gate, up, silu of the gate, product; where there is no gate, before and after the activation.
    return norms + attention + (4 if "mlp.gate_proj" in parts else 2) * config.intermediate_size


def activations(model, cfg, world, exchange, tokens):
    """Bytes that an update takes beside what it always holds, at the worst moment of a pass of so
    many tokens: at its logits, or backwards through a layer. exchange: every pass exchanges its
    gradients; b: bytes of a number where nothing else is said"""
    text, vision = model.config.text_config, model.config.vision_config
    layers, blocks = model.model.language_model.layers, family_of(model.config).tower(model).blocks
    b, again, trained = DTYPES[cfg.dtype].itemsize, cfg.activation_checkpointing, not cfg.lora_rank
    patches = max(1, round(tokens / PICTURE_EVERY)) * PICTURED * vision.spatial_merge_size**2
    # FSDP2 gathers the weights of what is in no layer and no block, the root, for the whole pass;
    # and those of the layer at hand and, ahead of time, of the next one.
    root, layer = size(model) - size(layers) - size(blocks), size(layers[0])
    gathered = b * (root + 2 * layer)
    # Pixels of the picture and of the masked one in float32, and of the one in cfg.dtype.
    pixels = (4 + 4 + b) * patches * 3 * vision.temporal_patch_size * vision.patch_size**2
    # What a forward pass leaves behind: with activation checkpointing the inputs of all layers and
    # blocks, else what they keep (a frozen tower: nothing). Twice where pi_mask has a gradient too.
    projections, width = layers[0].self_attn, vision.hidden_size
    heads = projections.q_proj.out_features + projections.k_proj.out_features
    of_layer, of_block = kept(layers[0], text, heads), kept(blocks[0], vision, 2 * width)
    left = len(layers) * tokens * (text.hidden_size if again else of_layer)
    left += len(blocks) * patches * (width if again else of_block * trained)
    left *= b * (2 if cfg.masked_branch == "grad" else 1)
    # The head's gradient. At a slice of logits it is there beside four tables of float32: logits,
    # the same shifted, softmax, gradient; and then thrice: slices before, this one, and their sum.
    head = b * text.vocab_size * text.hidden_size * trained
    logits = max(4 * 4 * LOGITS_AT_ONCE + head, 3 * head)
    # Backwards through a layer: what it keeps, made again; two gradients inside its MLP and two of
    # its width; and that of the MLP's last matrix.
    numbers = (of_layer if again else 0) + 2 * text.intermediate_size + 2 * text.hidden_size
    backwards = b * (tokens * numbers + text.intermediate_size * text.hidden_size * trained)
    # The gradient of the layer before is on its way to its shards, in float32. Where gradients add
    # up whole it is counted with them, and only its shards are new.
    moving = 4 * layer * trained * (1 if exchange else 1 / world)
    return gathered + pixels + left + max(logits, head + backwards + moving)


@dataclass(frozen=True)
class Plan:
    """What a run takes, in bytes. phases: {phase: {what: bytes on each GPU}}"""

    phases: dict
    totals: dict  # {phase: bytes on each GPU}
    fits: bool
    disk: float  # of the checkpoints while one more is being saved
    missing: float  # what the engine lacks within its own share
    exchange: bool  # whether every pass exchanges gradients


def plan(model, cfg, world, memory):
    """What a run of cfg on `world` GPUs of `memory` bytes takes -> Plan"""
    (trained, frozen), b = counts(model, cfg), DTYPES[cfg.dtype].itemsize
    text, vllm = model.config.text_config, cfg.sampler == "vllm"
    exchange = not whole_gradients(trained, memory)
    # Shards of masters, Adam's moments and a reference in float32. What LoRA freezes is kept in
    # cfg.dtype, and is the reference.
    shard = 4 * trained / world
    always = dict(weights=shard + b * frozen / world, moments=2 * shard)
    always |= dict(reference=shard if cfg.beta > 0 and not frozen else 0)
    gradients = shard if exchange else 4 * trained
    copy = b * size(model)  # the engine's weights
    awake = cfg.gpu_memory_utilization * memory if vllm else copy
    asleep = 0 if vllm and cfg.sleep else awake
    tensor = 6 * text.vocab_size * text.hidden_size  # the largest, in float32 and bfloat16
    # A group is never split, however small --tokens_per_forward.
    group = cfg.max_prompt_tokens + cfg.group_size * cfg.max_response_tokens
    passing = activations(model, cfg, world, exchange, max(cfg.tokens_per_forward, group))
    phases = {
        "update": dict(gradients=gradients, activations=passing, engine=asleep),
        "roll-out": dict(engine=awake),
        "wake-up": dict(activations=tensor, engine=max(asleep, copy)),
        "resume": dict(gradients=shard, engine=asleep),
    }
    phases = {name: always | parts | dict(outside=OUTSIDE) for name, parts in phases.items()}
    # Keys and values of the responses to one prompt.
    keys = model.model.language_model.layers[0].self_attn.k_proj.out_features
    cache = 2 * b * text.num_hidden_layers * keys * group
    room = ENGINE_ROOM + PREFILL_ROOM * prefill_tokens(cfg, cuda=True)
    missing = copy + cache + room - awake if vllm else 0
    disk = bytes_of(trained, frozen, cfg) * ((cfg.keep or -(-cfg.steps // cfg.save_every)) + 1)
    totals = {phase: sum(parts.values()) for phase, parts in phases.items()}
    fits = max(totals.values()) <= memory and missing <= 0
    return Plan(phases, totals, fits, disk, missing, exchange)


def gb(n):
    return f"{n / 1e9:.1f}"


def verdict(model, cfg, world, memory):
    """-> (Plan, "" if it fits, or one sentence with what is short and what makes room)"""
    made = plan(model, cfg, world, memory)
    if made.fits:
        return made, ""
    phase = max(made.totals, key=made.totals.get)
    needed, advice = made.totals[phase], "--lora_rank 16 or more GPUs make room"
    short = f"{phase} needs {gb(needed)} GB on each of {world} GPUs that have {gb(memory)}"
    if made.missing > needed - memory:
        share = f"--gpu_memory_utilization {cfg.gpu_memory_utilization} of {gb(memory)} GB"
        short, advice = f"the engine needs {gb(made.missing)} GB more than its {share}", "raise it"
    if world == 1 and memory < 32e9 and not cfg.card:
        advice = "--card 24gb has settings for such a card"
    return made, f"this does not fit: {short}; {advice} (docs/gpus.md)"


def phase_table(made):
    """A Plan as a Markdown table, a line a phase, GB on each GPU."""
    parts = "weights moments gradients reference activations engine outside".split()
    lines = ["| phase | " + " | ".join(parts) + " | all |", "|---" * (len(parts) + 2) + "|"]
    for phase, row in made.phases.items():
        cells = [gb(row.get(part, 0)) for part in parts] + [gb(made.totals[phase])]
        lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    """Print what a run would take; exit with a sentence if it does not fit."""
    p = parser(Config, __doc__.split("\n")[0])
    p.add_argument("--gpus", type=int, default=1, help="processes, one on each GPU")
    p.add_argument("--memory", type=float, default=80, help="of one GPU, in GB of 10^9 bytes")
    flags = vars(p.parse_args())
    world, memory = flags.pop("gpus"), 1e9 * flags.pop("memory")
    cfg = resolve({"sampler": "vllm"} | flags, cuda=True)[0]
    cfg.check(world, cuda=True)
    model = without_weights(cfg.model)
    made, short = verdict(model, cfg, world, memory)
    N, how = sum(counts(model, cfg)), "at every pass" if made.exchange else "once an update"
    print(f"{cfg.model}, {N / 1e9:.2f} billion parameters; {world} x {gb(memory)} GB\n")
    print(f"{phase_table(made)}\n")
    print(f"gradients are exchanged {how}; {gb(made.disk)} GB of checkpoints")
    print(f"error: {short}" if short else "it fits")
    sys.exit(bool(short))


if __name__ == "__main__":
    main()
