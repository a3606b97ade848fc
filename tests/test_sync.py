"""The check that the sampler follows the trainer: what it finds, and that it changes nothing."""

import contextlib
import copy
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import both_families

import plumbing.run.sync
import rollout
from plumbing.run.sync import SYNC_TOLERANCE, check_sync, perturbed
from rollout import TransformersSampler


def values(policy):
    return {name: p.detach().clone() for name, p in policy.vlm.named_parameters()}


def unchanged(before, policy):
    now = values(policy)
    return before.keys() == now.keys() and all(torch.equal(x, now[k]) for k, x in before.items())


def each_is_found(names, policy, processors, cfg, prompts):
    """Is each of these tensors missed that a sampler with weights of its own is not sent?"""
    sampler = TransformersSampler(copy.deepcopy(policy.vlm), processors[0], policy.banned, cfg)
    before, whole, limit = values(policy), rollout.full_parameters, SYNC_TOLERANCE["float32"]
    check = lambda: check_sync(sampler, policy, prompts[:1], [(0, "sync")], limit)
    assert check() < limit / 20
    for lost in names:
        others = lambda policy, lost=lost: (x for x in whole(policy) if x[0] != lost)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rollout, "full_parameters", others)
            with pytest.raises(SystemExit, match="does not have the trainer's weights"):
                check()
    assert unchanged(before, policy)


def test_a_tensor_of_each_kind_that_is_not_synced_is_found(policy, processors, cfg, prompts):
    kinds = {re.sub(r"\.\d+\.", ".", name): name for name in values(policy)}
    assert len(kinds) > 20
    each_is_found([*kinds.values()][::2], policy, processors, cfg, prompts)


@pytest.mark.slow
@both_families
def test_each_tensor_that_is_not_synced_is_found(policy, processors, cfg, prompts):
    each_is_found(values(policy), policy, processors, cfg, prompts)


def test_rounding_is_no_alarm_even_beside_large_key_biases(policy, processors, cfg, prompts):
    """A trainer in float32 and a sampler in bfloat16, with key biases as Qwen2.5-VL has them: of
    hundreds, in channels that turn slowly with the position."""
    for layer in policy.vlm.model.language_model.layers:
        channels = layer.self_attn.k_proj.bias.data.view(-1, layer.self_attn.head_dim)
        channels[:, layer.self_attn.head_dim // 2 - 1] += 200
    vlm = copy.deepcopy(policy.vlm).to(torch.bfloat16)
    sampler = TransformersSampler(vlm, processors[0], policy.banned, cfg)
    names, limit = [(0, "sync", i) for i in range(4)], SYNC_TOLERANCE["bfloat16"]
    assert 0 < check_sync(sampler, policy, prompts[:4], names, limit) < limit / 4


def test_stale_factors_of_a_product_are_not_the_product():
    """Of a LoRA's two matrices, where turning all signs would leave the product as it was."""
    g = torch.Generator().manual_seed(0)
    pair = torch.nn.ParameterList([torch.randn(s, generator=g) for s in ((48, 4), (4, 64))])
    stale = (pair[0] @ pair[1]).detach()
    with perturbed(pair):
        assert (pair[0] @ pair[1] - stale).norm() > 0.5 * stale.norm()
    assert torch.equal(pair[0] @ pair[1], stale)


def test_it_is_undone_to_the_last_bit_when_something_fails(policy):
    before = values(policy)
    with pytest.raises(RuntimeError), perturbed(policy):
        assert not any(torch.equal(x, before[n]) for n, x in values(policy).items())
        raise RuntimeError
    assert unchanged(before, policy)


@pytest.mark.parametrize("before, perturbed, fine", [(0.1, 0.3, True), (0.1, 0.5, False)])
def test_a_deep_model_that_rounds_is_no_alarm(policy, monkeypatch, before, perturbed, fine):
    """0.3 nats are more than the tolerance, and three times what the weights as they are differ by.
    What differs too much from the start is refused, whatever happens when it is perturbed."""
    for gaps, passes in (([before, perturbed], fine), ([0.26, 0.1], False)):
        left = [*gaps]
        monkeypatch.setattr(plumbing.run.sync, "gap_after_sync", lambda *_, x=left: x.pop(0))
        idle, limit = SimpleNamespace(sync=lambda policy: None), SYNC_TOLERANCE["bfloat16"]
        refused = pytest.raises(SystemExit, match="does not have")
        with contextlib.nullcontext() if passes else refused:
            assert check_sync(idle, policy, [], [], limit) == perturbed
