"""The check that the sampler follows the trainer: what it finds, what it leaves alone, and that it
changes nothing."""

import copy

import pytest
import torch

import rollout
from plumbing.engine import SYNC_TOLERANCE, check_sync, perturbed
from rollout import TransformersSampler

SAYS = "does not have the trainer's weights"


def copies(policy, dtype=torch.float32):
    """Weights of its own for a sampler, as with several processes."""
    return copy.deepcopy(policy.vlm).to(dtype)


def values(policy):
    return {name: p.detach().clone() for name, p in policy.vlm.named_parameters()}


def assert_same(before, policy):
    now = values(policy)
    assert all(torch.equal(x, now[name]) for name, x in before.items())


@pytest.mark.parametrize(
    "toy_name",
    ["toy", pytest.param("toy-qwen3", marks=pytest.mark.slow)],
    indirect=True,
    scope="session",
)
def test_each_tensor_that_is_not_synced_is_found(policy, processors, cfg, prompts, monkeypatch):
    sampler = TransformersSampler(copies(policy), processors[0], policy.banned, cfg)
    before, whole, limit = values(policy), rollout.full_parameters, SYNC_TOLERANCE["float32"]

    def check():
        return check_sync(sampler, policy, prompts[:1], [(0, "sync")], limit)

    assert check() < limit / 20
    for lost in before:
        monkeypatch.setattr(
            rollout,
            "full_parameters",
            lambda policy, lost=lost: (pair for pair in whole(policy) if pair[0] != lost),
        )
        with pytest.raises(SystemExit, match=SAYS):
            check()
    assert_same(before, policy)


def test_rounding_is_no_alarm_even_beside_large_key_biases(policy, processors, cfg, prompts):
    """A trainer in float32 and a sampler in bfloat16, as it is and with key biases as Qwen2.5-VL
    has them: of hundreds, in channels that turn slowly with the position."""
    names, before = [(0, "sync", i) for i in range(4)], values(policy)
    for size in (0, 200):
        for layer in policy.vlm.model.language_model.layers:
            bias = layer.self_attn.k_proj.bias
            channels = bias.data.view(-1, layer.self_attn.head_dim)
            channels[:, layer.self_attn.head_dim // 2 - 1] += size
        sampler = TransformersSampler(
            copies(policy, torch.bfloat16), processors[0], policy.banned, cfg
        )
        limit = SYNC_TOLERANCE["bfloat16"]
        assert 0 < check_sync(sampler, policy, prompts[:4], names, limit) < limit / 4
        assert set(before) == {name for name, _ in policy.vlm.named_parameters()}


def test_stale_factors_of_a_product_are_not_the_product():
    """Of a LoRA's two matrices, where turning all signs would leave the product as it was; one of
    them is zero when a run starts."""
    g = torch.Generator().manual_seed(0)
    pair = torch.nn.ParameterList([torch.randn(48, 4, generator=g), torch.zeros(4, 64)])
    for x in (torch.zeros(4, 64), torch.randn(4, 64, generator=g)):
        pair[1].data.copy_(x)
        stale = (pair[0] @ pair[1]).detach()
        with perturbed(pair):
            change = (pair[0] @ pair[1] - stale).norm()
            assert change > 0.5 * max(stale.norm(), 1.0)
        assert torch.equal(pair[0] @ pair[1], stale)


def test_it_is_undone_to_the_last_bit_when_something_fails(policy):
    before = values(policy)
    with pytest.raises(RuntimeError), perturbed(policy):
        assert not any(torch.equal(x, before[n]) for n, x in values(policy).items())
        raise RuntimeError
    assert_same(before, policy)
