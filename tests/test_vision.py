"""The vision tower in the form for GPUs is transformers' own tower, in values and gradients."""

from types import SimpleNamespace

import pytest
import torch
from conftest import both_families
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoModelForImageTextToText

from plumbing.models import vision
from plumbing.models.families import family_of
from plumbing.models.weights import load_vlm

# Patches along t, h, w. Some are cut into windows of several sizes, one is smaller than a window.
GRID = torch.tensor([[1, 8, 8], [1, 10, 14], [1, 2, 4], [1, 18, 6]])


def distance(folder, prepared):
    """Transformers' tower and this one, on noise: the largest relative gap, gradients included."""
    load, found = AutoModelForImageTextToText.from_pretrained, []
    own = load(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    for vlm in (own, prepared):
        family, noise = family_of(vlm.config), torch.Generator().manual_seed(0)
        width = vlm.model.visual.patch_embed.proj.weight[0].numel()
        pixels = torch.randn(int(GRID.prod(-1).sum()), width, generator=noise)
        features = torch.cat(family.features(vlm.model.get_image_features(pixels, GRID)))
        (features * torch.randn(features.shape, generator=noise)).sum().backward()
        gradients = {name: p.grad for name, p in family.tower(vlm).named_parameters()}
        found.append({"features": features.detach()} | gradients)
    a, b = found
    assert a.keys() == b.keys()  # parameters keep their names
    return max(((a[k] - b[k]).abs().max() / a[k].abs().max()).item() for k in a)


@both_families
def test_on_a_cpu_not_a_bit_differs_with_layers_made_again(folder):
    prepared = load_vlm(folder)
    assert prepared.model.visual.config._attn_implementation == vision.ATTENTION
    assert prepared.config.text_config._attn_implementation == "sdpa"
    prepared.gradient_checkpointing_enable({"use_reentrant": False})
    assert distance(folder, prepared.train()) == 0


@both_families
def test_on_cuda_the_patch_projection_is_a_matrix_product(folder, monkeypatch):
    monkeypatch.setattr(vision.PatchProjection, "forward", vision.PatchProjection.product)
    assert 0 < distance(folder, load_vlm(folder)) < 1e-5


def stand_in(query, key, value, begin, *others, scale):
    """varlen_attn for a CPU, with its shapes, (N, heads, d) each: one call with a mask."""
    assert begin.dtype == torch.int32 and torch.equal(begin, others[0])
    assert others[1] == others[2] == begin.diff().max()
    piece = torch.bucketize(torch.arange(len(query)), begin, right=True)
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    mask = piece[:, None] == piece
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1)


@both_families
def test_one_call_for_all_windows_is_a_call_for_each(folder, monkeypatch):
    calls = []

    def counted(*args, **settings):
        calls.append(len(args[3]) - 1)  # pieces
        return stand_in(*args, **settings)

    monkeypatch.setattr(vision, "in_one_call", lambda query: True)
    monkeypatch.setattr(vision, "varlen_attn", counted)
    prepared = load_vlm(folder)
    assert distance(folder, prepared) < 2e-6
    assert len(calls) == len(prepared.model.visual.blocks) and min(calls) == len(GRID)
    assert (max(calls) > len(GRID)) == (prepared.config.model_type == "qwen2_5_vl")  # windows


def test_what_the_one_call_takes(monkeypatch):
    def takes(dtype, d, capability):
        """A query on a CUDA device, as far as is asked of it."""
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        asked = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 2, 3, d), device=None)
        return vision.in_one_call(asked)

    bf16, ampere = torch.bfloat16, (8, 0)
    taken = [(bf16, 80, ampere), (torch.float16, 72, (12, 0)), (bf16, 256, (9, 0))]
    refused = [(torch.float32, 80, (9, 0)), (bf16, 84, (9, 0)), (bf16, 264, (9, 0))]
    refused += [(bf16, 80, (7, 5))]  # Turing
    assert all(takes(*x) for x in taken) and not any(takes(*x) for x in refused)
    assert not vision.in_one_call(torch.zeros(1, 2, 3, 80, dtype=bf16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen_attn needs a CUDA device")
@pytest.mark.parametrize("d", [64, 72, 80])
def test_the_real_call_is_the_stand_in(d):
    """Forwards and backwards, with the heads of the real towers."""
    begin, told = torch.tensor([0, 64, 100, 356, 360], dtype=torch.int32), []
    x, weights = torch.randn(2, 3, 360, 16, d, generator=torch.Generator().manual_seed(d))
    both = (stand_in, "cpu", torch.float32), (varlen_attn, "cuda", torch.bfloat16)
    for run, device, dtype in both:
        q, k, v = (t.to(device, dtype).requires_grad_() for t in x)
        out = run(q, k, v, *[begin.to(device)] * 2, 256, 256, scale=d**-0.5)
        (out * weights[0].to(device, dtype)).sum().backward()
        told.append([t.detach().float().cpu() for t in (out, q.grad, k.grad, v.grad)])
    for a, b in zip(*told):
        assert (a - b).abs().max() < 0.03 * a.abs().max()
