"""What is watched while a run trains: validation, samples, curves, and the before/after table."""

import json
from pathlib import Path

from eval import evaluate_splits
from plumbing import report
from plumbing.common import Clock, write_atomically
from plumbing.samples import write_samples
from plumbing.setup import splits_of
from plumbing.sources import validation_split
from plumbing.summary import table


def watch(parts, metrics, say):
    """Validate where it is time to, and show what a step's metrics are."""
    cfg, out, step = parts.cfg, Path(parts.cfg.out), metrics["step"]
    if cfg.val_data and cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.steps):
        clock, split = Clock(), validation_split(cfg.val_data)
        summary = evaluate_splits(parts, [split], 2, "val")[split]
        metrics["val_accuracy"] = summary["accuracy"]
        if "followed" in summary:
            metrics["val_followed"] = summary["followed"]
        write_samples(parts, parts.validation[split], out, step)
        metrics["val_seconds"] = clock.so_far()
    say(report.console_line(metrics, cfg.steps))
    if parts.processes.first:
        report.log(out, metrics, parts.log)
        if "val_accuracy" in metrics:
            report.curves(out)
        if "val_accuracy" in metrics or step % cfg.save_every == 0:
            report.write_page(out)
        for line in report.collapse_warnings(report.read_metrics(out)) if cfg.gamma else []:
            say(line)


def evaluate(parts, when, say):
    """avg@n on every test split, before or after training, into evaluation.json -> {when: ...}"""
    cfg, out = parts.cfg, Path(parts.cfg.out)
    file = out / "evaluation.json"
    summaries = json.loads(file.read_text()) if file.exists() else {}
    # What was measured before training stays; after it, a longer run is measured again.
    if cfg.val_data and (when == "after" or when not in summaries):
        summaries[when] = evaluate_splits(parts, splits_of(cfg.val_data), cfg.eval_n, "test")
        say("\n".join([f"accuracy {when} training:", *table(summaries[when])]))
        if when == "before":
            write_samples(parts, parts.validation[validation_split(cfg.val_data)], out, step=0)
        if parts.processes.first:
            write_atomically(file, json.dumps(summaries, indent=1))
            report.write_page(out)
    return summaries


def show(out, summaries, say):
    """What a finished run leaves: the table of before and after, and the files in its folder."""
    report.curves(out)
    report.write_page(out)
    if summaries:
        say("\n".join(report.before_after(summaries)))
    written = sorted(p for p in out.iterdir() if not p.name.startswith("."))
    say(f"written: {', '.join(map(str, written))}; look at {out / 'report.html'}")
