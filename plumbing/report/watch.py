"""What is measured and shown while a run trains: validation, samples, and the before/after table.

evaluate_splits is eval.py's, which stands above this room.
"""

import json
from pathlib import Path

from plumbing.base.common import Clock, read_json, write_atomically
from plumbing.base.console import say
from plumbing.data.sources import splits_of, validation_split
from plumbing.report import record
from plumbing.report.responses import accuracy_table, aligned, changes


def measure(parts, metrics, evaluate_splits):
    """Validate where it is time to, and keep the step's line of metrics, before its checkpoint is
    saved: a run that is stopped in between goes on from an older one, and makes the line again."""
    cfg, step = parts.cfg, metrics["step"]
    if cfg.val_data and cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.steps):
        clock, split = Clock(), validation_split(cfg.val_data)
        summary = evaluate_splits(parts, [split], 2, "val")[split]
        metrics |= {f"val_{k}": summary[k] for k in ("accuracy", "followed") if k in summary}
        metrics["val_seconds"] = clock.so_far()
    if parts.processes.first:
        record.log(Path(cfg.out), metrics, parts.log)


def show_step(parts, metrics):
    """Say what a step's metrics are, and bring the page up to date where there is more to see."""
    cfg, out, step = parts.cfg, Path(parts.cfg.out), metrics["step"]
    say(record.console_line(metrics, cfg.steps))
    if validated := "val_accuracy" in metrics:
        from plumbing.report.samples import write_samples  # when the first ones are written

        write_samples(parts, step)
    if parts.processes.first:
        if validated or step % cfg.save_every == 0:
            record.write_page(out)
        for line in record.collapse_warnings(record.read_metrics(out)) if cfg.gamma else []:
            say(line)


def measure_all(parts, when, evaluate_splits):
    """avg@n on every test split, before or after training, into evaluation.json -> {when: ...}"""
    cfg, out = parts.cfg, Path(parts.cfg.out)
    file = out / "evaluation.json"
    summaries = read_json(file)
    # What was measured before training stays; after it, a longer run is measured again.
    if cfg.val_data and (when == "after" or when not in summaries):
        summaries[when] = evaluate_splits(parts, splits_of(cfg.val_data), cfg.eval_n, "test")
        say("\n".join([f"accuracy {when} training:", *accuracy_table(summaries[when])]))
        if parts.processes.first:
            write_atomically(file, json.dumps(summaries, indent=1))
        if when == "before":
            from plumbing.report.samples import write_samples

            write_samples(parts, step=0)
        if parts.processes.first:
            record.write_page(out)
    return summaries


def show_run(out, summaries):
    """What a finished run leaves: the table of before and after, and the files in its folder."""
    record.write_page(out)
    if summaries:
        say("\n".join(aligned(changes(summaries))))
    written = [str(p) for p in sorted(out.iterdir()) if not p.name.startswith(".")]
    say("; look at ".join([f"written: {', '.join(written)}", *(p for p in written if "html" in p)]))
