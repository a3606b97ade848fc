"""The vision tower in the form for GPUs is transformers' own tower, in values and gradients."""

import pytest
import torch
import torch.distributed as dist
from conftest import both_families, random_responses
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoModelForImageTextToText

from plumbing import vision
from plumbing.families import family_of
from plumbing.policy import Policy, load_vlm, sharded_policy


@pytest.fixture
def own(folder):
    """The model as transformers loads it."""
    load = AutoModelForImageTextToText.from_pretrained
    return load(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


# Patches along t, h, w. Some are cut into windows of several sizes, one is smaller than a window.
GRID = torch.tensor([[1, 8, 8], [1, 10, 14], [1, 2, 4], [1, 18, 6]])


def look(vlm):
    """What the tower makes of pictures of noise, all of it, and the gradient of every weight."""
    family = family_of(vlm.config)
    width = family.patch_projection(vlm).weight[0].numel()
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randn(int(GRID.prod(-1).sum()), width, generator=noise)
    features = torch.cat(family.features(vlm.model.get_image_features(pixels, GRID)))
    vlm.zero_grad()
    (features * torch.randn(features.shape, generator=noise)).sum().backward()
    tower = family.tower(vlm).named_parameters()
    return features.detach(), {name: p.grad.clone() for name, p in tower}


def furthest(a, b):
    """Largest difference of two looks, each tensor's in units of its own largest number."""
    pairs = [(a[0], b[0]), *((a[1][name], b[1][name]) for name in a[1])]
    return max(((x - y).abs().max() / x.abs().max()).item() for x, y in pairs)


@both_families
def test_on_a_cpu_not_a_bit_differs(own, folder):
    prepared = load_vlm(folder)
    assert prepared.model.visual.config._attn_implementation == vision.ATTENTION
    assert own.model.visual.config._attn_implementation == "sdpa"
    assert furthest(look(own), look(prepared)) == 0
    assert prepared.config.text_config._attn_implementation == "sdpa"


@pytest.fixture
def products(monkeypatch):
    """Patches are projected as on CUDA -> how many they were, call by call."""
    product, calls = vision.PatchProjection.product, []

    def counted(self, patches):
        calls.append(len(patches))
        return product(self, patches)

    monkeypatch.setattr(vision.PatchProjection, "forward", counted)
    return calls


@both_families
def test_the_patch_projection_is_a_matrix_product(own, folder, products):
    prepared = load_vlm(folder)
    assert furthest(look(own), look(prepared)) < 1e-5
    assert products == [GRID.prod(-1).sum()]
    mine, theirs = prepared.state_dict(), own.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@both_families
def test_the_patch_projection_of_a_sharded_tower(
    folder, policy, prompts, processors, products, cfg
):
    """FSDP2 gathers the weight with the rest of the model, and takes its gradient back."""
    rows = policy.pack(prompts[:2], random_responses(prompts[:2], processors[0]))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = sharded_policy(folder, policy.banned, cfg, torch.device("cpu"))
        for one in (policy, sharded):
            one(rows, rows.pixels).logp.sum().backward()
        weights = [p.family.patch_projection(p.vlm).weight.grad for p in (policy, sharded)]
        assert torch.allclose(weights[0], weights[1].full_tensor(), atol=1e-4)
        assert weights[0].abs().max() > 0.1 and products == [len(rows.pixels)] * 2
    finally:
        dist.destroy_process_group()


def stand_in(query, key, value, begin, *others, scale):
    """varlen_attn for a CPU, with its shapes, (N, heads, d) each: one call with a mask."""
    assert begin.dtype == torch.int32 and torch.equal(begin, others[0])
    assert others[1] == others[2] == begin.diff().max()
    piece = torch.bucketize(torch.arange(len(query)), begin, right=True)
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    mask = piece[:, None] == piece
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1)


@both_families
def test_one_call_for_all_windows_is_a_call_for_each(own, folder, monkeypatch):
    calls = []

    def counted(*args, **settings):
        calls.append(len(args[3]) - 1)  # pieces
        return stand_in(*args, **settings)

    monkeypatch.setattr(vision, "in_one_call", lambda query: True)
    monkeypatch.setattr(vision, "varlen_attn", counted)
    prepared = load_vlm(folder)
    assert furthest(look(own), look(prepared)) < 2e-6
    blocks = prepared.model.visual.blocks
    assert len(calls) == len(blocks) and min(calls) == len(GRID)
    windows = prepared.config.model_type == "qwen2_5_vl"
    assert (max(calls) > len(GRID)) == windows


@pytest.mark.parametrize(
    "dtype, d, capability, taken",
    [
        (torch.bfloat16, 80, (8, 0), True),  # an A100
        (torch.float16, 72, (12, 0), True),
        (torch.bfloat16, 256, (9, 0), True),
        (torch.float32, 80, (9, 0), False),
        (torch.bfloat16, 84, (9, 0), False),
        (torch.bfloat16, 264, (9, 0), False),
        (torch.bfloat16, 80, (7, 5), False),  # Turing
        (torch.bfloat16, 80, None, False),  # no CUDA device
    ],
)
def test_what_the_one_call_takes(dtype, d, capability, taken):
    assert vision.varlen_takes(dtype, d, capability) is taken
    if capability is None:
        assert not vision.in_one_call(torch.zeros(1, 2, 3, d, dtype=dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen_attn needs a CUDA device")
def test_the_real_call_is_the_stand_in():
    """Forwards and backwards, with the heads of the real towers."""
    begin = torch.tensor([0, 64, 100, 356, 360], dtype=torch.int32)
    for d in (64, 72, 80):
        x, weights = torch.randn(2, 3, 360, 16, d, generator=torch.Generator().manual_seed(d))
        told = []
        for run, device in ((stand_in, "cpu"), (varlen_attn, "cuda")):
            dtype = torch.bfloat16 if device == "cuda" else torch.float32
            q, k, v = (t.to(device, dtype).requires_grad_() for t in x)
            at = begin.to(device)
            out = run(q, k, v, at, at, 256, 256, scale=d**-0.5)
            (out * weights[0].to(device, dtype)).sum().backward()
            told.append([t.detach().float().cpu() for t in (out, q.grad, k.grad, v.grad)])
        for a, b in zip(*told):
            assert (a - b).abs().max() < 0.03 * a.abs().max()


@both_families
def test_checkpointed_layers_attend_in_the_same_way(own, folder, prompts, processors):
    """Through the whole policy, with the layers made again in the backward pass."""
    gradients = []
    for vlm in (own, load_vlm(folder)):
        policy = Policy(vlm, torch.zeros(vlm.config.text_config.vocab_size, dtype=torch.bool))
        if vlm is not own:
            vlm.gradient_checkpointing_enable({"use_reentrant": False})
            policy.train()
        rows = policy.pack(prompts[:2], random_responses(prompts[:2], processors[0]))
        policy(rows, rows.pixels).logp.sum().backward()
        gradients.append([p.grad for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
