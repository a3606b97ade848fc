"""What a run leaves to look at: config.json, metrics.jsonl, curves.png, samples.html, and the lines on the console."""
import base64
import collections
import dataclasses
import html
import io
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from config import fail
from data import encode_all, generator
from loss import k3
from masking import picture
from model import score_only
from papo import PERCEPTION

PANELS = [("reward and accuracy", ["reward", "accuracy", "val_accuracy"]), ("KL to the masked picture (nats a token)", ["perception_kl"]),
          ("entropy (nats a token)", ["entropy", "masked_entropy"]), ("KL to the reference", ["ref_kl"]),
          ("clipped tokens", ["clip_high_fraction", "clip_low_fraction", "perception_clamped"]), ("gradient norm", ["grad_norm"]),
          ("response length (tokens)", ["response_tokens"]), ("seconds a step", ["seconds"])]


def write_atomically(path, text):
    """Write beside, then rename: a reader sees the old file or the new one."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(text)
    beside.rename(path)


def write_config(out, cfg):
    """The configuration that is used, with versions and commit."""
    out.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    about = {"config": dataclasses.asdict(cfg), "command": sys.argv, "commit": git.stdout.strip() or None,
             "python": platform.python_version(), "world_size": int(os.environ.get("WORLD_SIZE", 1)),
             "versions": {p: version(p) for p in ("torch", "transformers", "datasets", "pillow")}}
    write_atomically(out / "config.json", json.dumps(about, indent=1))


def left_out(out, data, faults, strict):
    """Name the rows that cannot be used in a file, and say how many there are of which kind. faults: {index: why}

    Ends with a sentence if that is all rows, or, with strict, if it is any."""
    if not faults:
        return
    if strict:
        fail(f"row {min(faults)} of {data.name}: {faults[min(faults)]}")
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"left_out-{data.name}.jsonl"
    write_atomically(file, "".join(json.dumps({"row": i, "why": faults[i]}) + "\n" for i in sorted(faults)))
    if len(faults) == len(data):
        fail(f"none of the {len(data)} rows of {data.name} can be used; {file} says why")
    kinds = collections.Counter(re.sub(r"[\d.]+|\(.*\)", "N", why) for why in faults.values())
    tqdm.write(f"{len(faults)} of {len(data)} rows of {data.name} are left out ({file} names them): "
               + "; ".join(f"{n} x {kind}" for kind, n in kinds.most_common()))


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
    write_atomically(out / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in read_metrics(out) if m["step"] <= step))


def log(out, metrics):
    with open(out / "metrics.jsonl", "a") as f:
        f.write(json.dumps(metrics) + "\n")


def memory_gb():
    """This process's memory, and the device's if there is one, the vLLM engine's share included: now, and the trainer's peak."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    now = {"host_memory_gb": pages * resource.getpagesize() / 1e9}
    if not torch.cuda.is_available():
        return now | {"peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    free, total = torch.cuda.mem_get_info()
    return now | {"device_memory_gb": (total - free) / 1e9, "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9}


def step_line(run, step, groups, fate, totals, optimiser, seconds):
    """One step's line of metrics: true means over the whole batch, all updates and all processes.

    totals: sums over tokens by name, of papo.objective; fate: what became of the prompts that were rolled out."""
    tokens, seen = sum(n for g in groups for n in g.lengths), totals.pop("seen")
    means = {k: v / max(1, seen if k in PERCEPTION else tokens) for k, v in totals.items()}
    scores = {k: torch.stack([g.values(k) for g in groups]) for k in groups[0].scores[0]}                       # (prompts, G) each
    rewards = torch.stack([g.rewards for g in groups])
    lengths = [len(t) for g in groups for t in g.rollout.tokens]
    return {"step": step, "reward": rewards.mean().item(), **{k: scores[k].mean().item() for k in ("accuracy", "format", "overlong_penalty")},
            **means, "equal_groups": (rewards == rewards[:, :1]).all(-1).float().mean().item(), "response_tokens": sum(lengths) / len(lengths),
            "cut_off": 1 - sum(f for g in groups for f in g.rollout.finished) / len(lengths), **optimiser,
            "skipped_updates": run.skipped, **{f"{k}_prompts": n for k, n in fate.items()},
            "grading_timeouts": sum(run.gather([run.grader.timeouts])), "seconds": seconds,
            "phases": {k: round(v, 4) for k, v in run.seconds.items()}, "tokens_per_second": sum(lengths) / seconds,
            **memory_gb()}


# Figure 11 of the paper: how a run looks when the perception loss is being hacked. KL_prcp and the clip fraction leave first, both
# entropies last. (metric, factor over its running median that is too much, a value below which it is only noise)
SIGNS_OF_COLLAPSE = [("perception_kl", 5.0, 0.05), ("clip_high_fraction", 3.0, 0.002), ("masked_entropy", 2.0, 0.1), ("entropy", 2.0, 0.1)]


def collapse_warnings(metrics, recent=3, before=50, least=10):
    """Lines of metrics so far -> warnings about the newest step, [] while all is well.

    A signal is compared as the mean of its last `recent` steps with the median of up to `before` steps ahead of those. A warning
    is given when it leaves, and not again while it stays away: nothing is remembered, so it is the same after a resume.
    """
    def away(name, factor, floor, end):
        values = [m[name] for m in metrics[:end] if name in m]
        past, now = values[-before - recent:-recent], sum(values[-recent:]) / recent
        usual = statistics.median(past) if len(past) >= least else math.inf
        return now > max(factor * usual, floor), now, usual

    lines = []
    for name, factor, floor in SIGNS_OF_COLLAPSE:
        (is_away, now, usual), (was_away, _, _) = (away(name, factor, floor, end) for end in (len(metrics), len(metrics) - 1))
        if is_away and not was_away:
            lines.append(f"warning: {name} is {now:.4g}, {now / usual if usual else math.inf:.1f} times its running median {usual:.4g}: the perception "
                         f"loss may be collapsing the policy; look at samples.html, then go on from an earlier checkpoint with half the "
                         f"--gamma, or with --eta1 and --eta2 at 0.03 to 0.05")
    return lines


def console_line(m, steps):
    """One step on one line."""
    parts = [f"step {m['step']:>{len(str(steps))}}/{steps}", f"reward {m['reward']:.3f}", f"accuracy {m['accuracy']:.3f}"]
    parts += [f"{label} {m[key]:.4f}" for label, key in [("KL_prcp", "perception_kl"), ("KL_ref", "ref_kl"), ("H", "entropy")] if key in m]
    parts += [f"val {m['val_accuracy']:.3f}"] if "val_accuracy" in m else []
    return "  ".join(parts + [f"grad {m['grad_norm']:.2f}", f"length {m['response_tokens']:.1f}", f"{m['seconds']:.1f} s"])


def before_after(summaries):
    """The table at the end of a run."""
    lines = [f"{'split':<12}{'before':>8}{'after':>8}{'change':>8}    (avg@{next(iter(summaries['after'].values()))['n']}, %)"]
    for split, s in summaries["after"].items():
        b, a = 100 * summaries["before"][split]["accuracy"], 100 * s["accuracy"]
        lines.append(f"{split:<12}{b:>8.1f}{a:>8.1f}{a - b:>+8.1f}    95 % interval after: {100 * s['low']:.1f} .. {100 * s['high']:.1f}")
    return lines


def curves(out):
    """Draw metrics.jsonl as curves.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    metrics = read_metrics(out)
    figure, axes = plt.subplots(2, 4, figsize=(18, 7), constrained_layout=True)
    for axis, (title, names) in zip(axes.flat, PANELS):
        for name in names:
            points = [(m["step"], m[name]) for m in metrics if name in m]
            if points:
                axis.plot(*zip(*points), label=name, marker="o" if name == "val_accuracy" else None, markersize=4)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(out / "curves.png", dpi=80)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------- samples.html

STYLE = """<!doctype html><meta charset="utf-8"><title>PAPO samples</title><style>
body { font: 15px/1.5 sans-serif; margin: 2em; max-width: 1200px }
img { image-rendering: pixelated; height: 140px; max-width: 400px; margin-right: 8px }
.p { display: flex; gap: 20px; border-top: 1px solid #ccc; padding: 12px 0 } .p > div:first-child { flex: none }
code { font-size: 14px; white-space: pre-wrap } .r { color: #555; font-size: 13px } span { border-radius: 3px; padding: 1px 2px }
</style>
<h1>Which words depend on the picture?</h1>
<p>Left: the picture, and the masked picture of the perception loss. Each token is shaded by its KL_prcp, the k3 estimate of how far the
policy on the picture is from the policy on the masked picture (white: 0 nats, full orange: 3 nats or more). Hover to read it.</p>
"""


def _png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def samples(run, out, step, questions=4, n=4):
    """Roll out a few validation questions and add them to samples.html, newest first. Collective: every process calls it."""
    val = run.validation(run.val_split)
    prompts = encode_all([val[i] for i in range(min(questions, len(val)))], run.tok, run.image_processor)
    rollouts = run.sampler.generate(prompts, n, [(run.cfg.seed, "samples", p.example.id) for p in prompts])
    blocks = [f"<h2>after step {step}</h2>"]
    for prompt, rollout in ((p, r) for p, r in zip(prompts, rollouts) if r):
        packed, pictures, kl = run.policy.pack([prompt], [rollout.tokens]), "", None
        try:
            masked = run.masker(prompt, generator(run.cfg.seed, "samples mask", prompt.example.id))
        except ValueError:                                     # validation data need not have what training needs, such as contrasts
            masked = None
        if masked is not None:
            scores = score_only(run.policy, packed.to(run.device), dataclasses.replace(packed, pixel_values=masked).to(run.device))
            kl = k3(scores.logp, scores.masked)[0][0].cpu()                                                     # (G, R)
            first = int(prompt.grid[0].prod())
            pictures = "".join(_png(picture(x[:first], prompt.grid[0], run.image_processor)) for x in (prompt.pixel_values, masked))
        lines = []
        for g, tokens in enumerate(rollout.tokens):
            score = run.score(rollout.texts[g], prompt.example.answer)
            words, so_far = [], ""
            for t in range(len(tokens)):
                nats = kl[g, t].item() if kl is not None else 0.0
                text = run.tok.decode(tokens[:t + 1])          # whole prefixes: a token's own text depends on what precedes it
                word, so_far = html.escape(text[len(so_far):]), text
                words.append(f'<span style="background:rgba(255,140,0,{min(1.0, nats / 3):.2f})" title="{nats:.3f} nats">{word}</span>')
            lines.append(f"<div><code>{''.join(words)}</code> <span class=r>reward {score['overall']:.1f}</span></div>")
        blocks.append(f"<div class=p><div>{pictures}</div><div><b>{html.escape(prompt.example.problem)}</b> "
                      f"<span class=r>answer: {html.escape(prompt.example.answer)}</span>{''.join(lines)}</div></div>")
    if run.rank == 0:
        (out / "samples").mkdir(exist_ok=True)
        write_atomically(out / "samples" / f"{step:06d}.html", "\n".join(blocks))
        parts = sorted((out / "samples").glob("*.html"), reverse=True)
        write_atomically(out / "samples.html", STYLE + "\n".join(p.read_text() for p in parts))
