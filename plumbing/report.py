"""What a run leaves to read: config.json, metrics.jsonl, curves.png, report.html, and lines on the
console.

    python -m plumbing.report out/toy-grpo out/toy-papo_g    # two runs side by side, on one page
    python -m plumbing.report out/toy-grpo                   # one run's own page again
"""

import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from plumbing.common import Parser, fail, may_write, pyplot, write_atomically
from plumbing.logs import numbers
from plumbing.page import Run, render
from toy.task import SPLITS

PANELS = [
    ("reward and accuracy", ["reward", "accuracy", "val_accuracy", "val_followed"]),
    ("KL to the masked picture (nats a token)", ["perception_kl"]),
    ("entropy (nats a token)", ["entropy", "masked_entropy"]),
    ("KL to the reference", ["ref_kl"]),
    ("clipped tokens", ["clip_high_fraction", "clip_low_fraction", "perception_clamped"]),
    ("gradient norm; credit", ["grad_norm", "credited_tokens", "credit_weight"]),
    ("response length (tokens)", ["response_tokens"]),
    ("seconds a step", ["seconds"]),
]
# On the page also, after those that curves.png has room for.
MORE_PANELS = [("loss: minus J, or of sft.py minus log pi", ["loss", "val_loss"])]
SAMPLES = 4  # validations whose samples are on the page, beside the first one's


def opening(cfg, why):
    """The first lines of a run: what was chosen, and why."""
    nucleus = (
        ": responses come from the nucleus, log-probs and ratios are those of the whole "
        "distribution"
    )
    lora = f", LoRA of rank {cfg.lora_rank}" if cfg.lora_rank else ""
    falling = f" falling to 0 over {cfg.anneal_steps} steps" if cfg.anneal_steps else ""
    return (
        f"model {cfg.model} ({why['model']}), data {cfg.data}, validation on "
        f"{cfg.val_data or 'nothing (--val_data)'}, algorithm {cfg.algo}{lora}, settings of "
        f"{why['settings']}, output {cfg.out}\n"
        f"{cfg.steps} steps of {cfg.prompts_per_step} x {cfg.group_size} responses, lr {cfg.lr:g}, "
        f"gamma {cfg.gamma:g}{falling * (cfg.gamma > 0)}, beta {cfg.beta:g}, eta {cfg.eta1:g} and "
        f"{cfg.eta2:g}; these and all others are in config.json there\n"
        f"sampler {cfg.sampler} ({why['sampler']}), temperature {cfg.temperature}, top_p "
        f"{cfg.top_p}{nucleus if cfg.top_p < 1 else ''}"
    )


def write_config(out, cfg):
    """The configuration that is used, with versions and commit."""
    out.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    describe = ["git", "-C", here, "describe", "--always", "--dirty"]
    git = subprocess.run(describe, capture_output=True, text=True)
    about = {
        "config": dataclasses.asdict(cfg),
        "command": sys.argv,
        "commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "versions": {p: version(p) for p in ("torch", "transformers", "datasets", "pillow")},
    }
    write_atomically(out / "config.json", json.dumps(about, indent=1))


def read_metrics(out):
    """metrics.jsonl as a list of dicts; a line cut short by a crash ends the list."""
    lines, path = [], out / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def cut_metrics(out, step):
    """Drop the lines of steps that will be run again after a resume."""
    kept = [json.dumps(m) + "\n" for m in read_metrics(out) if m["step"] <= step]
    write_atomically(out / "metrics.jsonl", "".join(kept))


def log(out, metrics, other=None):
    """Append one step's line to metrics.jsonl, and send it to what --log opened (plumbing/logs.py),
    if anything."""
    with open(out / "metrics.jsonl", "a") as f:
        f.write(json.dumps(metrics) + "\n")
    if other:
        other.send(numbers(metrics), metrics["step"])


# ------------------------------------------------------------------------ one step's metrics


def of_groups(groups):
    """True means over the responses of a step, of all processes."""
    scores = {k: torch.stack([g.values(k) for g in groups]) for k in groups[0].scores[0]}
    rewards = torch.stack([g.rewards for g in groups])  # (prompts, G), as each of scores
    lengths = [len(t) for g in groups for t in g.rollout.tokens]
    finished = sum(f for g in groups for f in g.rollout.finished)
    names = ("accuracy", "format", "overlong_penalty")
    return {
        "reward": rewards.mean().item(),
        **{k: scores[k].mean().item() for k in names},
        "equal_groups": (rewards == rewards[:, :1]).all(-1).float().mean().item(),
        "response_tokens": sum(lengths) / len(lengths),
        "cut_off": 1 - finished / len(lengths),
    }


def of_totals(totals):
    """{name: (2,) tensor, a sum and the number of tokens it is over} of papo.objective -> means"""
    pairs = {name: pair.tolist() for name, pair in totals.items()}
    return {name: total / max(1, count) for name, (total, count) in pairs.items()}


def of_time(clock, groups):
    """How long a step took, its phases, and the response tokens a second."""
    taken, tokens = seconds(clock), sum(len(t) for g in groups for t in g.rollout.tokens)
    return taken | {"tokens_per_second": tokens / taken["seconds"]}


def seconds(clock):
    """How long a step took, and its phases."""
    phases = {name: round(value, 4) for name, value in clock.seconds.items()}
    return {"seconds": clock.so_far(), "phases": phases}


def memory_gb():
    """This process's memory now and at its peak; with a device, that of the device, whose memory
    now includes the vLLM engine's share. On a platform that keeps no peak, it is the one now."""
    now = psutil.Process().memory_info().rss / 1e9
    if not torch.cuda.is_available():
        return {"host_memory_gb": now, "peak_memory_gb": peak_gb() or now}
    free, total = torch.cuda.mem_get_info()
    return {
        "host_memory_gb": now,
        "device_memory_gb": (total - free) / 1e9,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def peak_gb():
    """The most memory that this process has had; None where the platform does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on a Mac, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ----------------------------------------------------------------------- watching for collapse

# Figure 11 of the paper: how a run looks when the perception loss is being hacked. KL_prcp and the
# clip fraction leave first, both entropies last. (metric, factor over its running median that is
# too much, a value below which it is only noise.) The factors are for warnings: KL_prcp moves most
# in sound runs.
SIGNS_OF_COLLAPSE = [
    ("perception_kl", 5.0, 0.05),
    ("clip_high_fraction", 3.0, 0.002),
    ("masked_entropy", 2.0, 0.1),
    ("entropy", 2.0, 0.1),
]


def away(metrics, sign, recent=3, before=50, least=10):
    """Has a signal left, by the newest of these lines? -> (bool, its mean now, its median before)

    It is compared as the mean of its last `recent` steps with the median of up to `before` steps
    ahead of those, of which there must be `least`.
    """
    name, factor, floor = sign
    values = [m[name] for m in metrics if name in m]
    past, now = values[-before - recent : -recent], sum(values[-recent:]) / recent
    usual = statistics.median(past) if len(past) >= least else math.inf
    return now > max(factor * usual, floor), now, usual


def collapse_warnings(metrics):
    """Lines of metrics so far -> warnings about the newest step, [] while all is well.

    A warning is given when a signal leaves, and not again while it stays away: nothing is
    remembered, so it is the same after a resume.
    """
    lines = []
    for sign in SIGNS_OF_COLLAPSE:
        is_away, now, usual = away(metrics, sign)
        if is_away and not away(metrics[:-1], sign)[0]:
            times = now / usual if usual else math.inf
            lines.append(
                f"warning: {sign[0]} is {now:.4g}, {times:.1f} times its running median "
                f"{usual:.4g}: the perception loss may be collapsing the policy; look at "
                "report.html, then go on from an earlier checkpoint with half the --gamma, or "
                "with --eta1 and --eta2 at 0.03 to 0.05"
            )
    return lines


def left_at(metrics, factor=None):
    """Lines of a whole run -> {signal: the first step at which it had left}; one that stayed is not
    in it. The reward has left when it is below half of its best so far.

    factor: one for all signals, which it takes to say which of them leaves first; default: those of
    the warnings
    """
    signs = [(name, factor or own, floor) for name, own, floor in SIGNS_OF_COLLAPSE]
    left, best = {}, 0.0
    for i, line in enumerate(metrics):
        gone = [sign[0] for sign in signs if away(metrics[: i + 1], sign)[0]]
        best = max(best, line["reward"])
        gone += ["reward"] if line["reward"] < best / 2 else []
        for name in gone:
            left.setdefault(name, line["step"])
    return left


# --------------------------------------------------------------------------- lines and curves


LINE = """KL_prcp is how far the policy on the picture is from the policy on the masked one, KL_ref
how far it is from the policy before training (nats a token); H is its entropy, gamma the weight of
KL_prcp (once it is 0, the masked picture is not scored), val the accuracy on held-out questions,
grad the norm of the gradient, length that of a response in tokens."""


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


def before_after(summaries):
    """The table at the end of a run."""
    n = next(iter(summaries["after"].values()))["n"]
    lines = [f"{'split':<12}{'before':>8}{'after':>8}{'change':>8}    (avg@{n}, %)"]
    for split, s in summaries["after"].items():
        b, a = 100 * summaries["before"][split]["accuracy"], 100 * s["accuracy"]
        lines.append(
            f"{split:<12}{b:>8.1f}{a:>8.1f}{a - b:>+8.1f}    95 % interval after: "
            f"{100 * s['low']:.1f} .. {100 * s['high']:.1f}"
            + followed(summaries["before"][split], s)
        )
    return lines


def followed(before, after):
    """How often a wrong hint was followed, and is now, where a data set has hints."""
    if "followed" not in after or "followed" not in before:
        return ""
    return (
        f"    wrong hint followed {100 * before['followed']:.1f} -> {100 * after['followed']:.1f}"
    )


def curves(out):
    """Draw metrics.jsonl as curves.png."""
    plt = pyplot()
    metrics = read_metrics(out)
    figure, axes = plt.subplots(2, 4, figsize=(18, 7), constrained_layout=True)
    for axis, (title, names) in zip(axes.flat, PANELS):
        for name in names:
            points = [(m["step"], m[name]) for m in metrics if name in m]
            if points:
                marker = "o" if name.startswith("val") else None
                axis.plot(*zip(*points), label=name, marker=marker, markersize=4)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(out / "curves.png", dpi=80)
    plt.close(figure)


# ------------------------------------------------------------------------------------- report.html


def load_run(out):
    """What a run's folder holds for the page. Ends with a sentence if it holds no run."""
    if not (out / "config.json").exists():
        fail(f"{out} holds no run: there is no config.json")
    files = {name: out / f"{name}.json" for name in ("config", "evaluation")}
    said = {name: json.loads(f.read_text()) if f.exists() else {} for name, f in files.items()}
    metrics = read_metrics(out)
    last = metrics[-1]["step"] if metrics else 0
    # A resumed run may find samples of steps that it will run again.
    known = {int(p.stem): p for p in (out / "samples").glob("*.html") if int(p.stem) <= last}
    steps = sorted(known, reverse=True)
    samples = [(step, known[step].read_text()) for step in steps[:SAMPLES] + steps[SAMPLES:][-1:]]
    settings = said["config"].get("config", {})
    meanings = SPLITS if settings.get("val_data") == "toy" and "algo" in settings else {}
    left = left_at(metrics) if settings.get("gamma") else {}
    return Run(out.name, said["config"], metrics, said["evaluation"], samples, meanings, left)


def write_page(out):
    """report.html of a run, as far as it has come."""
    write_atomically(out / "report.html", render([load_run(out)], PANELS + MORE_PANELS))


def main():
    """Put runs side by side, or write one run's page again, and say where it is."""
    p = Parser(__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="output folder of a run")
    p.add_argument("--out", type=Path, help="the page; default: beside the first run")
    args = p.parse_args()
    runs, folders = [load_run(out) for out in args.runs], args.runs
    if len({run.name for run in runs}) < len(runs):
        runs = [dataclasses.replace(r, name=str(f)) for r, f in zip(runs, folders)]
    together = folders[0].parent / f"{'-and-'.join(f.name for f in folders)}.html"
    page = args.out or (together if len(runs) > 1 else folders[0] / "report.html")
    may_write(page.parent)
    write_atomically(page, render(runs, PANELS + MORE_PANELS))
    print(f"written: {page}")


if __name__ == "__main__":
    main()
