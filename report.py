"""What a run leaves to look at: config.json, metrics.jsonl, curves.png, samples.html, and the lines on the console."""
import base64
import dataclasses
import html
import io
import json
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image

from data import encode, generator, load
from loss import k3
from masking import choose_patches, mask_patches, picture
from model import pack

PANELS = [("reward and accuracy", ["reward", "accuracy", "val_accuracy"]), ("KL to the masked picture (nats a token)", ["perception_kl"]),
          ("entropy (nats a token)", ["entropy", "masked_entropy"]), ("KL to the reference", ["ref_kl"]),
          ("clipped tokens", ["clip_high_fraction", "clip_low_fraction"]), ("gradient norm", ["grad_norm"]),
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


def peak_memory_gb():
    """Peak of the device if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


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
    val = load(run.cfg.data, "val", questions, 0)
    examples = [val[i] for i in range(min(questions, len(val)))]
    prompts = [encode(e, run.tok, run.image_processor) for e in examples]
    rollouts = run.sampler.generate(prompts, n, [(run.cfg.seed, "samples", e.id) for e in examples])
    blocks = [f"<h2>after step {step}</h2>"]
    for prompt, rollout in zip(prompts, rollouts):
        unit = run.image_processor.merge_size**2 if run.cfg.mask_unit == "token" else 1
        packed, pictures, kl = pack(run.policy.vlm, [prompt], [rollout.tokens]), "", None
        if prompt.grid is not None:
            hidden = choose_patches(len(prompt.pixel_values), run.cfg.mask_ratio,
                                    generator(run.cfg.seed, "samples mask", prompt.example.id), unit)
            masked = mask_patches(prompt.pixel_values, hidden, run.black)
            with torch.no_grad():
                kl = k3(run.policy(packed.to(run.device)),
                        run.policy(dataclasses.replace(packed, pixel_values=masked).to(run.device)))[0].cpu()    # (G, R)
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
