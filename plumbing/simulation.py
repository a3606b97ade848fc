"""What an update takes of a GPU's memory, found by running this project's own code without memory.

`train.update`, the policy, the objective, FSDP2 and the optimiser run as they do in training, as
one process of a group whose other processes do not exist, on tensors without values, whose bytes a
ledger counts (plumbing/ledger.py).

Two things are not the GPU's own. FlexAttention and the attention of the vision tower are stand_in,
which keeps what those kernels keep. And the device is called a CPU, where collectives do not run on
streams of their own.

A model is simulated with a few layers of each kind. Every further layer adds the same to what is
always there, and to what is there until its own backward pass; tests/test_fit.py compares this with
a deeper simulation.
"""

import copy
import json
import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
import torch.distributed as dist

import train
from papo import Denominators
from plumbing.data import Prompt
from plumbing.ledger import Ledger, stand_in
from plumbing.lora import count
from plumbing.memory import Measured
from plumbing.optimiser import Optimiser
from plumbing.policy import Scores, empty_policy, shape_of
from plumbing.processes import Processes

# Layers and vision blocks that are simulated. Qwen3-VL taps three blocks, here the first three, and
# the growth is read off the last two.
LAYERS, BLOCKS = 4, 5
PICTURED = 1024  # tokens of the picture of each simulated prompt, 64 x 64 patches
WORDS = 100  # and of its text
FEW_TOKENS = 2048


def shallow(settings, layers, blocks):
    """The settings of a model with so many decoder layers and vision blocks."""
    few = copy.deepcopy(settings)
    few["text_config"]["num_hidden_layers"] = layers
    few["vision_config"]["depth"] = blocks
    if taps := few["vision_config"].get("deepstack_visual_indexes"):
        few["vision_config"]["deepstack_visual_indexes"] = list(range(len(taps)))
    few["text_config"].pop("layer_types", None)
    return few


@contextmanager
def folder_of(settings):
    """A folder with nothing but this config.json, while the block lasts."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(settings))
        yield folder


def settings_of(folder):
    """The settings in a model folder's config.json, as transformers completes them."""
    from transformers import AutoConfig

    return json.loads(AutoConfig.from_pretrained(folder).to_json_string(use_diff=False))


def count_parameters(settings, cfg):
    """How many parameters a policy of these settings trains, and how many are frozen; a tied head
    counts once."""
    with folder_of(settings) as folder:
        return count(shape_of(folder, cfg))


class Watched(Optimiser):
    """An optimiser that tells a ledger where an update is. The pass that counts is the last one,
    beside what the others have left. exchange: every pass exchanges its gradients."""

    def __init__(self, policy, cfg, ledger, exchange):
        super().__init__(policy, cfg)
        self.ledger, self.exchange, self.before = ledger, exchange, ledger.live
        self.starts = watch(policy, ledger)

    def sync_gradients(self, policy, now):
        policy.set_requires_gradient_sync(now or self.exchange)
        if now:
            self.gradients = self.ledger.live - self.before
            self.ledger.section, self.ledger.peaks = "start", {}
            for lives in self.starts.values():
                lives.clear()

    def step(self, policy):
        self.peaks = dict(self.ledger.peaks)
        return super().step(policy)


def watch(policy, ledger):
    """Sections of a pass: "start", where the mask of (tokens, tokens) is made; "layers", forwards
    and down to the backward pass of the vision tower; that is "blocks"; "end", from the tower's
    first block on.

    -> {"layers", "blocks": [bytes that were live when each of them began, in forward order]}
    """
    blocks, layers = policy.family.tower(policy.vlm).blocks, policy.vlm.model.language_model.layers
    starts = {"layers": [], "blocks": []}

    def name_section(block, name):
        def when_its_gradient_comes(module, args, out):
            if out.requires_grad:
                out.register_hook(lambda grad: setattr(ledger, "section", name))

        block.register_forward_hook(when_its_gradient_comes)

    for name, modules in (("layers", layers), ("blocks", blocks)):
        for module in modules:
            module.register_forward_pre_hook(lambda *_, to=starts[name]: to.append(ledger.live))

    def forwards(*_):
        if ledger.section == "start":
            ledger.section = "layers"

    blocks[0].register_forward_pre_hook(forwards)
    name_section(blocks[-1], "blocks")
    name_section(blocks[0], "end")
    return starts


def pass_of(policy, tokens, group_size):
    """-> Packed of `tokens` tokens, without pixels: a picture to each 8,192, and long responses"""
    config, count = policy.vlm.config, max(1, round(tokens / 8192))
    side = config.vision_config.spatial_merge_size * math.isqrt(PICTURED)
    ids = torch.full((PICTURED + WORDS,), config.image_token_id)
    ids[PICTURED:] = 0
    prompt = Prompt(None, ids, None, torch.tensor([[1, side, side]]))
    length = (tokens // count - len(ids)) // group_size
    response = torch.zeros(length, dtype=torch.long)
    return policy.pack([prompt] * count, [[response] * group_size] * count)


def micro_batch(rows, policy, cfg, ledger):
    """A MicroBatch of these rows, under the ledger that is entered."""
    vision, rows = policy.vlm.config.vision_config, copy.copy(rows)
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    rows.pixels = torch.empty(rows.grid.prod(-1).sum().item(), width)
    rows.masked_pixels = torch.empty_like(rows.pixels)
    for name in ("group", "part"):  # the only values that a mask of (tokens, tokens) is made of
        setattr(rows, name, ledger.fake.from_tensor(getattr(rows, name)))
    values = torch.zeros(rows.scored.shape)  # (B, G, R)
    pictured = torch.ones(len(values)) > 0
    batch = train.MicroBatch(rows, torch.zeros(values.shape[:2]), pictured, values)
    batch.ref = values if cfg.beta else None
    batch.credit = None if cfg.credit == "none" else values
    if cfg.masked_branch == "kept":
        batch.masked = Scores(values, values if cfg.entropy == "exact" else None)
    return batch


def simulate(settings, cfg, world, tokens, exchange, depth=(LAYERS, BLOCKS)):
    """One update on one of `world` GPUs, whose last pass has `tokens` tokens -> Measured

    settings: the model's config.json as a dict; exchange: every pass exchanges its gradients;
    depth: the decoder layers and vision blocks that are run, of those that there are. There must be
    no process group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    cfg = replace(cfg, packing="flat", cpu_offload=False)  # cpu_offload is summed in memory.py
    banned = torch.zeros(settings["text_config"]["vocab_size"], dtype=torch.bool)
    there = settings["text_config"]["num_hidden_layers"], settings["vision_config"]["depth"]
    few = shallow(settings, *map(min, depth, there))
    ledger, processes = Ledger(), Processes(alone=True)
    processes.world = world
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        with ledger, folder_of(few) as folder:
            policy = empty_policy(folder, banned, cfg, "cpu")
            weights = ledger.live
            for name in ("stand_in", "flash_stand_in"):  # a "flash" is handed all rows of a tower
                ALL_ATTENTION_FUNCTIONS.register(name, stand_in)
            policy.family.use_attention(policy.vlm, "stand_in")
            policy.family.tower(policy.vlm).config._attn_implementation = "flash_stand_in"
            if cfg.activation_checkpointing:
                policy.vlm.gradient_checkpointing_enable({"use_reentrant": False})
        # Of the first pass only the gradients count, whose size is that of the weights.
        rows = [pass_of(policy, n, cfg.group_size) for n in (FEW_TOKENS, tokens)]
        with ledger:
            batches = [micro_batch(x, policy, cfg, ledger) for x in rows]
            optimiser = Watched(policy, cfg, ledger, exchange)
            parts = SimpleNamespace(
                policy=policy, cfg=cfg, optimiser=optimiser, processes=processes
            )
            train.update(batches, Denominators(tokens, cfg.group_size), parts)
            moments = ledger.live - optimiser.before
        return deepened(Measured(0, weights, moments, optimiser.gradients, 0), settings, parts)
    finally:
        dist.destroy_process_group()


def deepened(few, settings, parts):
    """What was measured with a few layers and blocks -> Measured of the whole model

    A further layer adds its shards of weights and of both moments; its gradients, whole or a shard;
    and, until its backward pass is over, what its forward pass has left.
    """
    policy, optimiser = parts.policy, parts.optimiser
    blocks, layers = policy.family.tower(policy.vlm).blocks, policy.vlm.model.language_model.layers
    more = {
        "layers": settings["text_config"]["num_hidden_layers"] - len(layers),
        "blocks": settings["vision_config"]["depth"] - len(blocks),
    }
    peaks = dict(optimiser.peaks)
    N, shards, trained_shards, held = sum(p.numel() for p in policy.parameters()), 0, 0, 0
    for name, modules in (("layers", layers), ("blocks", blocks)):
        own = [*modules[-1].parameters()]
        shard = sum(p.to_local().numel() * p.element_size() for p in own)
        trained = [p for p in own if p.requires_grad]  # in float32
        whole = 4 * sum(p.numel() for p in trained)
        part = 4 * sum(p.to_local().numel() for p in trained)
        gradient = part if optimiser.exchange else whole
        before, last = optimiser.starts[name][len(modules) - 2 : len(modules)]
        left = {"start": gradient, "layers": gradient + last - before, "end": part}
        left["blocks"] = left["layers" if name == "blocks" else "end"]
        for section in peaks:
            peaks[section] += more[name] * (shard + left[section])
        N += more[name] * sum(p.numel() for p in own)
        shards, trained_shards = shards + more[name] * shard, trained_shards + more[name] * part
        held += more[name] * gradient
    moments = few.moments + 2 * trained_shards
    weights, gradients = few.weights + shards, few.gradients + held
    return Measured(N, weights, moments, gradients, max(peaks.values()) + moments)
