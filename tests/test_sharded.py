"""Two processes over gloo: what each holds, and what they send each other. The file is also the
script that both of them run."""

import os
import pickle
import subprocess
import sys

import torch
import torch.distributed as dist
from conftest import ROOT

from plumbing.config import resolve
from plumbing.data import encode
from plumbing.optimiser import Optimiser
from plumbing.policy import banned_tokens, copy_of, load_policy, load_processors, load_vlm
from plumbing.processes import PATIENCE, Processes
from rollout import TransformersSampler
from toy.task import ToyData


def given(folder, processes, **flags):
    cfg = resolve({"model": folder, "data": "toy", "dtype": "float32", **flags}, False)[0]
    processors = load_processors(folder, cfg)
    banned = banned_tokens(folder, processors[0])
    return cfg, processors, banned, load_policy(folder, banned, cfg, processes)


def local(policy):
    return [p.to_local().detach().clone() for p in policy.parameters()]


def gradients(folder, processes):
    """Whole and exchanged at the end, or exchanged at every pass: one update to rounding."""
    cfg, processors, _, policy = given(folder, processes, lr=1e-3)
    optimiser, start = Optimiser(policy, cfg), local(policy)
    data = ToyData("train", 6)
    prompts = [encode(data[i], *processors) for i in range(processes.rank, 6, 2)]
    updated = []
    for memory in (float("inf"), 1.0):
        for p, x in zip(policy.parameters(), start):
            p.to_local().detach().copy_(x)
        optimiser.memory, whole = memory, []
        optimiser.adamw.state.clear()
        for i, prompt in enumerate(prompts):
            optimiser.sync_gradients(policy, now=i == len(prompts) - 1)
            rows = policy.pack([prompt], [[prompt.ids[-9:], prompt.ids[-5:]]])
            (-policy(rows, rows.pixels).logp.sum()).backward()
            whole.append(next(policy.parameters()).grad is None)
        # Before the last pass there is a shard of the gradient only where it is exchanged.
        assert whole == [memory > 1, memory > 1, False]
        optimiser.step(policy)
        updated.append(local(policy))
    a, b, x = (torch.cat([p.flatten() for p in tensors]) for tensors in (*updated, start))
    assert (a - b).norm() < 1e-3 * (a - x).norm() and (a - x).abs().max() > 5e-4


def reference(folder, processes):
    """A copy of the policy's shards is what the model folder says, and the policy's no longer."""
    cfg, processors, banned, policy = given(folder, processes)
    twin, read = (
        copy_of(policy, folder, cfg, processes),
        load_policy(folder, banned, cfg, processes),
    )
    for a, b in zip(local(twin), local(read), strict=True):
        assert torch.equal(a, b)
    buffers = zip(twin.named_buffers(), read.named_buffers(), strict=True)
    assert all(n == m and torch.equal(a, b) for (n, a), (m, b) in buffers)
    prompt = encode(ToyData("train", 1)[0], *processors)
    rows = policy.pack([prompt], [[prompt.ids[-9:], prompt.ids[-5:]]])
    with torch.no_grad():
        before = twin(rows, rows.pixels).logp
        assert torch.equal(before, read(rows, rows.pixels).logp)
        policy.reshard()
        for p in policy.parameters():
            p.to_local().mul_(1.1)
        twin.reshard()
        assert torch.equal(before, twin(rows, rows.pixels).logp)
        assert not torch.equal(before, policy(rows, rows.pixels).logp)


def responses(folder, processes):
    """What --sampler hf makes is sent without the batch that it was sampled in."""
    cfg, processors, banned, policy = given(folder, processes, max_response_tokens=40)
    sampler = TransformersSampler(load_vlm(folder), processors[0], banned, cfg)
    sampler.sync(policy)
    prompts = [encode(ToyData("train", 8)[i], *processors) for i in range(8)]
    rollouts = sampler.generate(prompts, 4, [(0, "sent", i) for i in range(8)])
    for r in rollouts:
        tokens = sum(map(len, r.tokens))
        for x in (*r.tokens, *r.logprobs):
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
        # 8 bytes a token id and 4 a log-prob, about half a kilobyte for each of 8 tensors, texts.
        assert len(pickle.dumps(r)) < 12 * tokens + 8 * 600 + sum(map(len, r.texts))
    mine = [(t, p) for r in rollouts for t, p in zip(r.tokens, r.logprobs)]
    everything = processes.gather(mine)
    assert len(everything) == 2 * len(mine)
    for (t, p), (u, q) in zip(mine, everything[processes.rank * len(mine) :]):
        assert torch.equal(t, u) and torch.equal(p, q)


def machine(folder, processes):
    """Collectives wait for a download; with --cpu_offload each process has its share of cores."""
    group = dist.distributed_c10d._get_default_group()
    assert group._get_backend(torch.device("cpu")).options._timeout == PATIENCE
    processes.use_cores()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert torch.get_num_threads() == max(1, cores // 2)


def test_two_processes(folder):
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    done = subprocess.run(
        [sys.executable, *launch, __file__, str(folder)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_reference_in_one_process_is_the_model_again(folder, policy):
    cfg, processes = resolve({"model": str(folder), "data": "toy"}, False)[0], Processes()
    twin = copy_of(policy, folder, cfg, processes)
    before = dict(load_vlm(folder).named_parameters())
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    now = dict(twin.vlm.named_parameters())
    assert now.keys() == before.keys()
    assert all(torch.equal(x, now[name]) for name, x in before.items())


if __name__ == "__main__":
    here = Processes()
    for part in (machine, gradients, reference, responses):
        part(sys.argv[1], here)
    here.leave()
