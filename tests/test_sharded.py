"""Two processes over gloo: what each holds, and what they send. They run this file themselves."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TORCHRUN, call

from plumbing.base.optimizer import Optimizer
from plumbing.base.processes import PATIENCE, Processes
from plumbing.data.prompts import encode
from plumbing.models.weights import banned_tokens, copy_of, load_policy, load_processors, load_vlm
from plumbing.run.config import resolve
from plumbing.run.setup import policy_maker
from rollout import TransformersSampler
from toy.task import ToyData


def given(folder, processes, **flags):
    cfg = resolve({"model": folder, "data": "toy", "dtype": "float32", **flags}, False)[0]
    processors, data = load_processors(folder, cfg), ToyData("train", 8)
    make = policy_maker(banned_tokens(folder, processors[0]), cfg, processes)
    policy = load_policy(folder, make, cfg, processes)
    return cfg, [encode(data[i], *processors) for i in range(8)], policy


def pack(policy, prompt):
    return policy.pack([prompt], [[prompt.ids[-9:], prompt.ids[-5:]]])


def local(policy):
    return [p.to_local().detach().clone() for p in policy.parameters()]


def gradients(folder, processes):
    """Whole and exchanged at the end, or exchanged at every pass: one update to rounding."""
    cfg, prompts, policy = given(folder, processes, lr=1e-3)
    optimizer, start, updated = Optimizer(policy, cfg), local(policy), []
    for memory in (float("inf"), 1.0):
        for p, x in zip(policy.parameters(), start):
            p.to_local().detach().copy_(x)
        optimizer.memory, whole = memory, []
        optimizer.adamw.state.clear()
        for i, prompt in enumerate(prompts[processes.rank : 6 : 2]):
            optimizer.sync_gradients(policy, now=i == 2)
            rows = pack(policy, prompt)
            (-policy(rows, rows.pixels).logp.sum()).backward()
            whole.append(next(policy.parameters()).grad is None)
        # Before the last pass there is a shard of the gradient only where it is exchanged.
        assert whole == [memory > 1, memory > 1, False]
        optimizer.step(policy)
        updated.append(local(policy))
    a, b, x = (torch.cat([p.flatten() for p in tensors]) for tensors in (*updated, start))
    assert (a - b).norm() < 1e-3 * (a - x).norm() and (a - x).abs().max() > 5e-4


def reference(folder, processes):
    """A copy of the policy's shards is what the model folder says, and the policy's no longer."""
    cfg, prompts, policy = given(folder, processes)
    make = policy_maker(policy.banned, cfg, processes)
    twin, read = copy_of(policy, folder, make, cfg, processes), given(folder, processes)[2]
    pairs = zip(local(twin) + [*twin.buffers()], local(read) + [*read.buffers()], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    rows = pack(policy, prompts[0])
    with torch.no_grad():
        before = twin(rows, rows.pixels).logp
        policy.reshard()
        for p in policy.parameters():
            p.to_local().mul_(1.1)
        twin.reshard()
        assert torch.equal(before, twin(rows, rows.pixels).logp)
        assert not torch.equal(before, policy(rows, rows.pixels).logp)


def responses(folder, processes):
    """What --sampler hf makes is sent without the batch that it was sampled in."""
    cfg, prompts, policy = given(folder, processes, max_response_tokens=40)
    vlm, tok = load_vlm(folder), load_processors(folder, cfg)[0]
    sampler = TransformersSampler(vlm, tok, policy.banned, cfg)
    rollouts = sampler.generate(prompts, 4, [(0, "sent", i) for i in range(8)])
    for r in rollouts:
        for x in (*r.tokens, *r.logprobs):
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


@pytest.mark.slow
def test_two_processes(folder):
    call(*TORCHRUN, 2, __file__, folder, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_reference_in_one_process_is_the_model_again(folder, policy, cfg):
    twin = copy_of(policy, folder, None, cfg, Processes(alone=True))
    for p in policy.parameters():
        p.data += 1.0
    pairs = zip(twin.vlm.parameters(), load_vlm(folder).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


if __name__ == "__main__":
    here = Processes()
    gloo = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    assert gloo.options._timeout == PATIENCE  # collectives wait for a download
    for part in (gradients, reference, responses):
        part(sys.argv[1], here)
    here.leave()
