"""With --compile the policy says the same, and so do its gradients."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import both_families, random_responses

from plumbing import lora
from plumbing.common import generator
from plumbing.compiled import check_compiler, compile_layers
from plumbing.policy import Policy, WithoutAdapters, load_vlm, sharded_policy
from plumbing.processes import gathered
from rollout import TransformersSampler

pytestmark = pytest.mark.slow


@pytest.fixture(params=["aot_eager", "inductor"])
def backend(request, monkeypatch):
    """aot_eager traces and differentiates as torch.compile does, but generates no code, which takes
    a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=request.param))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    return counters["frames"]


@pytest.fixture
def packed(policy, prompts, processors):
    """n -> n prompts with their responses as rows, of another length for each n."""

    def pack(n):
        return policy.pack(prompts[:n], random_responses(prompts[:n], processors[0], seed=n))

    return pack


def another(folder, policy, cfg, rank=0):
    """The policy again; with adapters of this rank that have learned something."""
    vlm = lora.add_adapters(load_vlm(folder), replace(cfg, lora_rank=rank))
    for i, layer in enumerate(lora.adapters(vlm)):
        B = layer.lora_B.weight.data
        B.copy_(0.1 * torch.randn(B.shape, generator=generator("teach", i)))
    return Policy(vlm, policy.banned)


def gradients(policy, rows):
    """-> log-probs, and every weight's gradient"""
    policy.zero_grad()
    logp = policy(rows, rows.pixels).logp
    logp.sum().backward()
    grads = (p.grad for p in policy.parameters() if p.requires_grad)
    return logp.detach(), [gathered(g).clone() for g in grads]


def same(a, b):
    """Are two results of `gradients` equal to 1e-5 of the largest number of each?"""
    assert torch.allclose(a[0], b[0], atol=1e-5, rtol=0) and a[0].any()
    for x, y in zip(a[1], b[1], strict=True):
        assert torch.allclose(x, y, atol=1e-5 * max(1.0, x.abs().max().item()), rtol=0)
    return True


@both_families
def test_compiled_layers_say_the_same(folder, policy, packed, cfg, backend):
    """Over rows of several lengths, forwards, backwards and without a gradient."""
    compiled = another(folder, policy, cfg)
    compile_layers(compiled)
    assert list(compiled.state_dict()) == list(policy.state_dict())
    for n in (1, 2, 3):
        rows = packed(n)
        said = gradients(policy, rows)
        assert same(said, gradients(compiled, rows))
        with torch.no_grad():
            assert torch.allclose(compiled(rows, rows.pixels).logp, said[0], atol=1e-5, rtol=0)
    assert 0 < backend["ok"] < 20  # it was compiled, and not for each layer and length


def test_a_sampler_does_not_compile(folder, policy, prompts, processors, cfg):
    """Its cache grows with every token."""
    compiled, calls = another(folder, policy, cfg), torch._dynamo.utils.counters["frames"]
    compile_layers(compiled)
    before = calls["total"]
    names = [(1, i) for i in range(2)]
    plain, same_again = (
        TransformersSampler(p.vlm, processors[0], p.banned, cfg).generate(
            prompts[:2], 2, names, limit=6
        )
        for p in (policy, compiled)
    )
    for a, b in zip(plain, same_again):
        assert all(torch.equal(x, y) for x, y in zip(a.tokens + a.logprobs, b.tokens + b.logprobs))
    assert calls["total"] == before


@pytest.mark.parametrize("rank", [0, 4])
def test_compiled_layers_are_made_again_in_the_backward_pass(
    folder, policy, packed, cfg, backend, rank
):
    """--activation_checkpointing, and --lora_rank with its reference."""
    plain, compiled = (another(folder, policy, cfg, rank) for _ in range(2))
    compile_layers(compiled)
    compiled.vlm.gradient_checkpointing_enable({"use_reentrant": False})
    compiled.train()
    for n in (1, 3):
        rows = packed(n)
        assert same(gradients(plain, rows), gradients(compiled, rows))
        if rank:
            told = [WithoutAdapters(p)(rows, rows.pixels).logp for p in (plain, compiled)]
            assert torch.allclose(*told, atol=1e-5, rtol=0)
            seen = plain(rows, rows.pixels).logp
            assert not torch.allclose(told[0], seen, atol=1e-3)
    assert 0 < backend["ok"] < 20


def test_compiled_layers_of_a_sharded_policy(folder, policy, packed, cfg, backend):
    """FSDP2 gathers a layer's weights before the compiled code runs, and takes gradients back."""
    rows = packed(2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = replace(cfg, dtype="float32")
        sharded = sharded_policy(folder, policy.banned, whole, torch.device("cpu"))
        compile_layers(sharded)
        assert same(gradients(policy, rows), gradients(sharded, rows))
    finally:
        dist.destroy_process_group()
    assert 0 < backend["ok"] < 20


def test_without_a_compiler_a_sentence_says_what_to_do(monkeypatch):
    check_compiler()
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    with pytest.raises(SystemExit, match="needs a C.. compiler.*leave the flag out"):
        check_compiler()
