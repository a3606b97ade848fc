"""One PAPO-G step, phase by phase: with each prompt computed once, with it computed for every
response, and GRPO.

    python bench/step.py                                              # the toy model on a CPU
    python bench/step.py --shape qwen2.5-vl-3b --prompts 32 --group 5 --response 512 \\
        --pixels 401408 --words 100

All variants train on the same rollouts, in turn, within one process, so that a busy machine slows
them alike. Responses are all of the same length (EOS is banned). The first round warms up and is
not counted. Times are medians in seconds; memory is what a variant's training phases add at their
peak. Prints a table and one JSON line.
"""

import argparse
import ctypes
import gc
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from shapes import SHAPES, noise, random_model  # puts the project on the path

import train
from papo import Denominators, group_advantages
from plumbing.base.common import Clock
from plumbing.run.config import default_sampler, resolve
from plumbing.run.setup import setup
from rollout import Group, Rollout

PHASES = ["pack", "old", "masked", "reference", "update", "sync"]


def alone(groups):
    """Every response as a group of its own: its prompt is then computed for it alone."""
    return [
        Group(g.position, g.prompt_tokens, Rollout([t], [lp], [f], [x]), [s], a[None])
        for g in groups
        for t, lp, f, x, s, a in zip(*vars(g.rollout).values(), g.scores, g.advantages)
    ]


def peak_memory(restart=False):
    """GB at this process's peak since the last restart, on its GPU or else of the host; 0 where the
    host is not Linux, which alone tells."""
    if torch.cuda.is_available():
        if restart:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 1e9
    process = Path("/proc/self")
    if not (process / "clear_refs").exists():
        return 0.0
    if restart:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        (process / "clear_refs").write_text("5")  # the peak starts again from here
    (peak,) = (x for x in (process / "status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 / 1e9


def train_on(parts, groups, prompts, step, per_update):
    """The training phases of train.train_step -> {phase: seconds, and "memory": GB at the peak}"""
    gc.collect()
    clock, before = Clock(), peak_memory(restart=True)
    slices = [groups[i : i + per_update] for i in range(0, len(groups), per_update)]
    with clock("pack"):
        updates = [train.micro_batches(s, prompts, parts, step) for s in slices]
    fixed = [train.score_before(b, u > 0, parts, clock) for u, b in enumerate(updates)]
    with clock("update"):
        for s, batches, known in zip(slices, updates, fixed):
            lengths = [n for g in s for n in g.lengths]
            N = Denominators(sum(lengths), len(lengths))
            train.update(list(zip(batches, known)), N, parts)
    with clock("sync"):
        parts.sampler.sync(parts.policy)
    return clock.seconds | {"memory": peak_memory() - before}


def measured(parts, args):
    """{variant: {phase: seconds, and "memory": GB}}, medians over the rounds"""
    cfg = parts.cfg
    grpo = replace(parts, cfg=replace(cfg, gamma=0.0))
    variants = {"papo_g": parts, "papo_g, unshared": parts, "grpo": grpo}
    found = {name: [] for name in variants}
    for r in range(args.rounds + 1):
        parts.sampler.sync(parts.policy)
        clock = Clock()
        groups, read, _ = train.collect(parts, train.Progress(step=r), clock)
        for g in groups:  # random weights earn no reward; any advantage will do
            g.advantages = group_advantages(torch.arange(args.group).float())
        parts.sampler.sleep()
        names = [*variants]
        for name in names[r % len(names) :] + names[: r % len(names)]:
            each, per_update = groups, cfg.prompts_per_update
            if name.endswith("unshared"):
                each, per_update = alone(groups), per_update * args.group
            seconds = train_on(variants[name], each, read, r, per_update)
            sampling = {"roll out": clock.seconds["rollout"], "reward": clock.seconds["reward"]}
            found[name].append(sampling | dict.fromkeys(PHASES, 0.0) | seconds)
    medians = {}
    for name, rounds in found.items():
        m = {phase: statistics.median(x[phase] for x in rounds[1:]) for phase in rounds[0]}
        m["training"] = sum(m[phase] for phase in PHASES)
        medians[name] = m | {"step": m["training"] + m["roll out"] + m["reward"]}
    return medians


def main():
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--shape", choices=SHAPES, default="toy")
    p.add_argument("--sampler", choices=["vllm", "hf"], default=default_sampler(cuda)[0])
    for name, default, text in [
        ("prompts", 16, "prompts per step"),
        ("group", 8, "G, responses per prompt"),
        ("response", 24, "tokens per response"),
        ("pixels", 28224, "of each picture"),
        ("words", 28, "tokens of text per prompt"),
        ("updates", 2, "optimizer updates per step"),
        ("rounds", 5, "timed rounds"),
    ]:
        p.add_argument(f"--{name}", type=int, default=default, help=text)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = random_model(args.shape, scratch, "cuda" if cuda else "cpu")
        flags = dict(model=str(folder), data="toy", algo="papo_g", sampler=args.sampler, lr=1e-9)
        flags |= dict(prompts_per_step=args.prompts, group_size=args.group, mask_unit="patch")
        flags |= dict(prompts_per_update=args.prompts // args.updates, max_pixels=1280 * 28 * 28)
        flags |= dict(max_prompt_tokens=4096 if cuda else 512, max_response_tokens=args.response)
        flags |= dict(dtype="bfloat16" if cuda else "float32", tokens_per_forward=8192)
        parts = setup(resolve(flags, cuda)[0])
        for holder in (parts.policy, parts.reference, parts.sampler):
            holder.banned[parts.processors[0].eos_token_id] = True
        parts.stream.examples = noise(args.prompts, args.pixels, args.words)
        medians, length = measured(parts, args), len(parts.stream[0].ids)
        parts.close()
    shared, unshared, grpo = medians.values()
    ratios = {
        "update_speedup": unshared["update"] / shared["update"],
        "training_speedup": unshared["training"] / shared["training"],
        "memory_ratio": shared["memory"] / max(1e-9, unshared["memory"]),
        "papo_over_grpo": shared["step"] / grpo["step"] - 1,
    }
    where = torch.cuda.get_device_name() if cuda else "CPU"
    print(f"{args.shape}, {where}, {args.sampler}, prompts of {length} tokens; s, and memory in GB")
    print(f"{'':<12}" + "".join(f"{name:>18}" for name in medians))
    for phase in shared:
        print(f"{phase:<12}" + "".join(f"{m[phase]:>18.3f}" for m in medians.values()))
    for name, value in ratios.items():
        print(f"{name:<18}{value:.2f}")
    print(json.dumps({**vars(args), "prompt": length, "seconds": medians, **ratios}))


if __name__ == "__main__":
    main()
