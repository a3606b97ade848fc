"""What a run leaves to read: config.json, metrics.jsonl, report.html, and lines on the console."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from shutil import which

import psutil
import torch

from plumbing.base.common import fail, only_shows, read_json, write_atomically
from plumbing.base.console import say
from plumbing.data.sources import DATA_SETS

MODULES = {"pillow": "PIL"}  # of packages that are called otherwise
SAMPLES = 4  # validations whose samples are on the page, beside the first one's
LINE = """KL_prcp is how far the policy on the picture is from the policy on the masked one, KL_ref
how far it is from the policy before training (nats a token); H is its entropy, gamma the weight of
KL_prcp (once it is 0, the masked picture is not scored), val the accuracy on held-out questions,
grad the norm of the gradient, length that of a response in tokens."""


def opening(cfg, why):
    """The first lines of a run: what was chosen, and why; and what a step's line will say."""
    nucleus = ", responses come from the nucleus, ratios are those of the whole distribution"
    lora = f", LoRA of rank {cfg.lora_rank}" if cfg.lora_rank else ""
    return (
        f"model {cfg.model} ({why['model']}), data {cfg.data}, validation on "
        f"{cfg.val_data or 'nothing (--val_data)'}, algorithm {cfg.algo}{lora}, settings of "
        f"{why['preset']}; all of them are in {cfg.out}/config.json\n"
        f"sampler {cfg.sampler} ({why['sampler']}){nucleus * (cfg.top_p < 1)}\n{LINE}"
    )


def settings_table(cfg, origin):
    """--print_config: every knob, its value, and where that comes from, as lines."""
    knobs = {name: repr(value) for name, value in dataclasses.asdict(cfg).items()}
    wide, long = (max(map(len, texts)) + 2 for texts in (knobs, knobs.values()))
    return [f"{k:<{wide}}{v:<{long}}{origin.get(k, 'default')}" for k, v in knobs.items()]


VERSIONS = "torch transformers tokenizers safetensors datasets pillow numpy sympy"


def write_config(out, cfg, rows=None, model=None):
    """The configuration that is used, with what else a run depends on: commit, versions, its rows
    (plumbing.data.sources.fingerprint) and its model's revision on the hub. A run that is resumed
    keeps what it was before as `history`, and says what differs. Ends with a sentence if its rows
    do, unless cfg.other_rows."""
    out.mkdir(parents=True, exist_ok=True)
    describe = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    git = subprocess.run(describe, capture_output=True, text=True) if which("git") else None
    installed = {p: version(p) for p in VERSIONS.split() if find_spec(MODULES.get(p, p))}
    about = {
        "config": dataclasses.asdict(cfg),
        "splits": DATA_SETS[cfg.val_data].splits if cfg.val_data in DATA_SETS else {},
        "command": sys.argv,
        "commit": (git and git.stdout.strip()) or None,
        "python": platform.python_version(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "versions": installed,
        "rows": rows,
        "revision": model.name if model and model.parent.name == "snapshots" else None,
    }
    if cfg.resume and (before := read_json(out / "config.json")):
        known = {k: before.get(k) for k in about if k not in ("config", "splits")}
        if before.get("rows", rows) != rows and not cfg.other_rows:
            then = f"--data {cfg.data} holds {rows}, and {before['rows']} when this run began"
            fail(f"{then}; give the same ones, or --other_rows to go on with these")
        if differs := changes(known, about):
            say(f"note: since this run was last at work, these have changed: {', '.join(differs)}")
        about["history"] = [*before.get("history", []), known]
    write_atomically(out / "config.json", json.dumps(about, indent=1))


def changes(before, about):
    """What a run depends on that is not as it was -> ["torch 2.12.0 then, 2.13.0 now", ...]"""
    flat = [{**x, **(x.get("versions") or {})} for x in (before, about)]
    watched = ["commit", "python", "rows", "revision", *VERSIONS.split()]
    pairs = [(name, *(x.get(name) for x in flat)) for name in watched]
    return [f"{name} {a} then, {b} now" for name, a, b in pairs if a != b]


def read_metrics(out):
    """metrics.jsonl as a list of dicts; a line that is none, cut short by a crash or otherwise, is
    left out."""
    lines, path = [], out / "metrics.jsonl"
    for text in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def cut_metrics(out, step):
    """Drop the lines of steps that will be run again after a resume."""
    kept = [json.dumps(m) + "\n" for m in read_metrics(out) if m["step"] <= step]
    write_atomically(out / "metrics.jsonl", "".join(kept))


def log(out, metrics, other=None):
    """Append one step's line to metrics.jsonl. other: what --log opened, if anything; there the
    phases' seconds are called phases/<name>."""
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(metrics) + "\n")
    if other:
        numbers = {k: v for k, v in metrics.items() if k not in ("step", "phases")}
        numbers |= {f"phases/{name}": v for name, v in metrics.get("phases", {}).items()}
        other.send(numbers, metrics["step"])


def of_groups(groups):
    """True means over the responses of a step, of all processes."""
    rewards = torch.stack([g.rewards for g in groups])  # (prompts, G)
    mean = lambda name: torch.stack([g.values(name) for g in groups]).mean().item()
    lengths = [len(t) for g in groups for t in g.rollout.tokens]
    finished = sum(f for g in groups for f in g.rollout.finished)
    return {
        "reward": rewards.mean().item(),
        "accuracy": mean("accuracy"),
        "format": mean("format"),
        "equal_groups": (rewards == rewards[:, :1]).all(-1).float().mean().item(),
        "response_tokens": sum(lengths) / len(lengths),
        "cut_off": 1 - finished / len(lengths),
    }


def of_totals(totals):
    """{name: (2,) tensor, a sum and the number of tokens it is over} of papo.metrics_of -> means"""
    pairs = {name: pair.tolist() for name, pair in totals.items()}
    return {name: total / max(1, count) for name, (total, count) in pairs.items()}


def of_time(clock, groups):
    """How long a step took, its phases, and the response tokens a second."""
    taken, tokens = step_seconds(clock), sum(len(t) for g in groups for t in g.rollout.tokens)
    return taken | {"tokens_per_second": tokens / taken["seconds"]}


def step_seconds(clock):
    """How long a step took, and its phases."""
    phases = {name: round(value, 4) for name, value in clock.seconds.items()}
    return {"seconds": clock.so_far(), "phases": phases}


def memory_gb():
    """This process's memory now and at its peak; with a device, that of the device, whose memory
    now includes the vLLM engine's share, and whose peak leaves out what the engine gives back when
    it sleeps. On a platform that keeps no peak, it is the one now."""
    found = dict.fromkeys(["host_memory_gb", "peak_memory_gb"], psutil.Process().memory_info().rss)
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["device_memory_gb"] = total - free
        # torch counts an engine's pool as allocated while it sleeps too (vLLM's issue 17117).
        cumem = sys.modules.get("vllm.device_allocator.cumem")
        pool = cumem and cumem.CuMemAllocator.instance  # None where the engine never sleeps
        pooled = pool.get_current_usage() if pool else 0
        found["peak_memory_gb"] = torch.cuda.max_memory_allocated() - pooled
    elif find_spec("resource"):  # which Windows lacks
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes on a Mac, KiB elsewhere
        found["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {name: size / 1e9 for name, size in found.items()}


# Figure 11 of the paper: how a run looks whose perception loss is being hacked. (metric, the factor
# of its running median that is too much, or below 1 too little; a change that is only noise.)
# KL_prcp moves most in sound runs.
SIGNS_OF_COLLAPSE = [
    ("perception_kl", 5.0, 0.05),
    ("clip_high_fraction", 3.0, 0.002),
    ("masked_entropy", 2.0, 0.1),
    ("entropy", 2.0, 0.1),
    ("reward", 0.5, 0.1),
]
RECENT, BEFORE, LEAST = 3, 50, 3  # steps


def is_anomalous(metrics, sign):
    """Has a signal left, by the newest of these lines? What counts is the distance from the usual,
    as a share of its size, so a reward may be below 0. -> (bool, the mean of its last RECENT steps,
    the median of up to BEFORE steps ahead of those, of which there must be LEAST)"""
    name, factor, floor = sign
    values = list(islice((m[name] for m in reversed(metrics) if name in m), RECENT + BEFORE))
    now, past = sum(values[:RECENT]) / RECENT, values[RECENT:]
    usual = statistics.median(past) if len(past) >= LEAST else math.inf
    moved = now - usual if factor > 1 else usual - now
    return moved > max(abs((factor - 1) * usual), floor), now, usual


def collapse_warnings(metrics):
    """Lines of metrics so far -> warnings of signals that have left at the newest step. Nothing is
    remembered, so they are the same after a resume."""
    lines = []
    for sign in SIGNS_OF_COLLAPSE:
        anomalous, now, usual = is_anomalous(metrics, sign)
        if anomalous and not is_anomalous(metrics[:-1], sign)[0]:
            lines.append(
                f"warning: {sign[0]} is {now:.4g}, its running median {usual:.4g}: the perception "
                "loss may be collapsing the policy; see report.html, then go on from an earlier "
                "checkpoint with half the --gamma, or with --eta1 and --eta2 at 0.03 to 0.05"
            )
    return lines


def first_anomaly(metrics, factor=None):
    """Lines of a whole run -> {signal: the first step at which it had left, if it has}, in order of
    steps. factor: one for all signals that rise, its inverse for the reward; default: the warnings'
    """
    left = {}
    for name, own, floor in SIGNS_OF_COLLAPSE:
        sign = name, (factor if own > 1 else 1 / factor) if factor else own, floor
        lines = [line for line in metrics if name in line]
        for end in range(1, len(lines) + 1):
            if is_anomalous(lines[max(0, end - RECENT - BEFORE) : end], sign)[0]:
                left[name] = lines[end - 1]["step"]
                break
    return dict(sorted(left.items(), key=lambda item: item[1]))


def console_line(m, steps):
    """One step on one line."""
    parts = [f"step {m['step']:>{len(str(steps))}}/{steps}", f"reward {m['reward']:.3f}"]
    parts += [f"accuracy {100 * m['accuracy']:.1f} %"]
    terms = [("KL_prcp", "perception_kl"), ("KL_ref", "ref_kl"), ("H", "entropy")]
    parts += [f"{label} {m[key]:.4f}" for label, key in terms if key in m]
    parts += [f"gamma {m['gamma']:.2g}"] if m["gamma"] else []
    parts += [f"val {100 * m['val_accuracy']:.1f} %"] if "val_accuracy" in m else []
    parts += [f"hint followed {100 * m['val_followed']:.1f} %"] if "val_followed" in m else []
    parts += [f"grad {m['grad_norm']:.2f}", f"length {m['response_tokens']:.1f}"]
    return "  ".join([*parts, f"{m['seconds']:.1f} s"])


def load_run(out):
    """What a run's folder holds for page.html: about is config.json, samples are [(step, what
    plumbing/report/samples.py keeps)], the newest first, meanings say what is asked in a split, and
    left when signs of a collapse were seen. Raises ValueError if it holds no run."""
    said = {name: read_json(out / f"{name}.json", say) for name in ("config", "evaluation")}
    if "config" not in said["config"]:
        raise ValueError(f"{out} holds no run: there is no config.json of one")
    metrics, settings = read_metrics(out), said["config"]["config"]
    last = metrics[-1]["step"] if metrics else 0
    # A resumed run may find samples of steps that it will run again.
    known = {int(p.stem): p for p in (out / "samples").glob("*.json") if p.stem.isdecimal()}
    steps, samples = sorted((step for step in known if step <= last), reverse=True), []
    for step in steps[:SAMPLES] + steps[SAMPLES:][-1:]:
        with only_shows(f"{known[step]} cannot be read"):
            samples.append((step, json.loads(known[step].read_text("utf-8"))))
    meanings = said["config"].get("splits", {}) if "algo" in settings else {}
    left = first_anomaly(metrics) if settings.get("gamma") else {}
    about = {"name": out.name, "about": said["config"], "evaluation": said["evaluation"]}
    return about | dict(metrics=metrics, samples=samples, meanings=meanings, left=left)


def write_page(out):
    """report.html and curves.png of a run, as far as it has come."""
    with only_shows("report.html is not written"):
        from plumbing.report import page  # with what draws, which takes a second to import

        page.write(out / "report.html", [load_run(out)], out / "curves.png")
