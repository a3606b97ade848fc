"""One PAPO-G step, phase by phase: with each prompt computed once, with it computed for every
response, GRPO, and with --compile the first with compiled layers.

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
from shapes import SHAPES, build, prompts  # puts the project on the path

import train
from groups import Group
from papo import Denominators, group_advantages
from plumbing.common import Clock
from plumbing.compiled import compile_layers
from plumbing.config import default_sampler, resolve
from plumbing.data import Stream
from plumbing.report import memory_gb
from plumbing.setup import setup
from rollout import Rollout

PHASES = ["pack", "old", "masked", "reference", "update", "sync"]


class Fixed(Stream):
    """A stream of these prompts."""

    def __init__(self, prompts):
        super().__init__(prompts, 0, None, None)

    def __getitem__(self, position):
        return self.examples[position % len(self.examples)]


def alone(groups):
    """Every response as a group of its own: its prompt and picture are then computed for it
    alone."""
    return [
        Group(g.position, g.prompt_tokens, Rollout([t], [lp], [f], [x]), [s], [c], a[None])
        for g in groups
        for t, lp, f, x, s, c, a in zip(
            *vars(g.rollout).values(), g.scores, g.counted, g.advantages
        )
    ]


def train_on(parts, groups, prompts, step, per_update):
    """The training phases of train.train_step -> {phase: seconds}, extra memory in GB at the peak

    prompts: {position: Prompt} of the groups
    """
    clock, cuda = Clock(), parts.processes.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e9
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = memory_gb()["host_memory_gb"]
    slices = [groups[i : i + per_update] for i in range(0, len(groups), per_update)]
    with clock("pack"):
        updates = [train.micro_batches(s, prompts, parts, step) for s in slices]
    train.score_before(updates, parts, clock)
    with clock("update"):
        for s, batches in zip(slices, updates):
            lengths = [n for g in s for n in g.lengths]
            train.update(batches, Denominators(sum(lengths), len(lengths)), parts)
    with clock("sync"):
        parts.sampler.sync(parts.policy)
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else most_host_memory()
    return clock.seconds, peak - before


def compiled_when_asked(parts):
    """Compile the layers of policy and reference -> a function that says whether they run so."""
    models = (parts.policy, parts.reference)
    layers = [layer for m in models for layer in m.vlm.model.language_model.layers]
    for model in models:
        compile_layers(model)
    fast = [layer.forward for layer in layers]

    def choose(compiled):
        for layer, forward in zip(layers, fast):
            vars(layer).pop("forward", None)
            if compiled:
                layer.forward = forward

    return choose


def most_host_memory():
    """This process's peak since it was last cleared, in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e9


def main():
    """Build, warm up, measure in turn."""
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--shape", choices=SHAPES, default="toy")
    p.add_argument("--sampler", choices=["vllm", "hf"], default=default_sampler(cuda)[0])
    p.add_argument(
        "--activation_checkpointing", action=argparse.BooleanOptionalAction, default=cuda
    )
    p.add_argument("--compile", action="store_true", help="compare with compiled layers too")
    p.add_argument(
        "--folder", help="where the model is written, and found again; default: a temporary folder"
    )
    for name, default, text in [
        ("prompts", 16, "prompts per step"),
        ("group", 8, "G, responses per prompt"),
        ("response", 24, "tokens per response"),
        ("pixels", 28224, "of each picture"),
        ("words", 28, "tokens of text per prompt"),
        ("updates", 2, "optimiser updates per step"),
        ("tokens_per_forward", 8192, "of a training pass"),
        ("rounds", 5, "timed rounds"),
    ]:
        p.add_argument(f"--{name}", type=int, default=default, help=text)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = build(args.shape, args.folder or scratch, "cuda" if cuda else "cpu")
        cfg, _ = resolve(
            {
                "model": str(folder),
                "data": "toy",
                "sampler": args.sampler,
                "algo": "papo_g",
                "group_size": args.group,
                "lr": 1e-9,
                "prompts_per_step": args.prompts,
                "prompts_per_update": args.prompts // args.updates,
                "mask_unit": "patch",
                "max_prompt_tokens": 4096 if cuda else 512,
                "max_response_tokens": args.response,
                "max_pixels": 1280 * 28 * 28,
                "activation_checkpointing": args.activation_checkpointing,
                "tokens_per_forward": args.tokens_per_forward,
                "dtype": "bfloat16" if cuda else "float32",
            },
            cuda,
        )
        parts = setup(cfg)
        for holder in (parts.policy, parts.reference, parts.sampler):
            holder.banned[parts.processors[0].eos_token_id] = True
        stream = Fixed(prompts(args.prompts, args.pixels, args.words, *parts.processors))
        parts = replace(parts, stream=stream)
        variants = {
            "papo_g": (parts, False),
            "papo_g, unshared": (parts, True),
            "grpo": (replace(parts, cfg=replace(cfg, gamma=0.0)), False),
        }
        choose = lambda compiled: None
        if args.compile:
            variants["papo_g, compiled"] = (parts, False)
            choose = compiled_when_asked(parts)
        times = {
            name: {phase: [] for phase in ["roll out", "reward", *PHASES, "memory"]}
            for name in variants
        }
        for r in range(args.rounds + 1):
            parts.sampler.sync(parts.policy)
            clock = Clock()
            groups, read, _ = train.collect(parts, train.Progress(step=r), clock)
            for g in groups:  # random weights earn no reward; any advantage will do
                g.advantages = group_advantages(torch.arange(args.group).float())
            sampling = {"roll out": clock.seconds["rollout"], "reward": clock.seconds["reward"]}
            parts.sampler.sleep()
            first = r % len(variants)
            for name in [*variants][first:] + [*variants][:first]:
                variant, unshared = variants[name]
                choose(name.endswith("compiled"))
                per_update = cfg.prompts_per_update * (args.group if unshared else 1)
                trained = alone(groups) if unshared else groups
                seconds, memory = train_on(variant, trained, read, r, per_update)
                if r:
                    for phase, value in {**sampling, **seconds, "memory": memory}.items():
                        times[name][phase].append(value)
        P = len(parts.stream[0].ids)
        parts.close()
    median = {
        n: {k: statistics.median(v) if v else 0.0 for k, v in t.items()} for n, t in times.items()
    }
    for m in median.values():
        m["training"] = sum(m[k] for k in PHASES)
        m["step"] = m["training"] + m["roll out"] + m["reward"]
    where = torch.cuda.get_device_name() if cuda else "CPU"
    print(
        f"{args.shape}, {where}, {args.sampler}: {args.prompts} prompts of {P} tokens, "
        f"G = {args.group}, responses of {args.response} tokens, {args.updates} updates"
    )
    print(f"{'':<12}" + "".join(f"{n:>18}" for n in median))
    for k in ["roll out", "reward", *PHASES, "training", "step", "memory"]:
        print(
            f"{k:<12}"
            + "".join(f"{m[k]:>15.3f}{' GB' if k == 'memory' else ' s '}" for m in median.values())
        )
    shared, unshared, grpo, *compiled = (median[n] for n in variants)
    ratios = {
        "update_speedup": unshared["update"] / shared["update"],
        "training_speedup": unshared["training"] / shared["training"],
        "memory_ratio": shared["memory"] / max(1e-9, unshared["memory"]),
        "papo_over_grpo": shared["step"] / grpo["step"] - 1,
    }
    for m in compiled:
        ratios["compiled_speedup"] = shared["training"] / m["training"]
        print(f"compiled: training {ratios['compiled_speedup']:.2f} x as fast")
    print(
        f"each prompt once: update {ratios['update_speedup']:.2f} x, training "
        f"{ratios['training_speedup']:.2f} x as fast, {ratios['memory_ratio']:.2f} of the memory; "
        f"PAPO-G costs {100 * ratios['papo_over_grpo']:.0f} % more than GRPO"
    )
    print(json.dumps({**vars(args), "prompt": P, "seconds": median, **ratios}))


if __name__ == "__main__":
    main()
