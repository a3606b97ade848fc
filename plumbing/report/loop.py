"""The loop around every program's own step: a folder to begin or go on with, steps that are watched
and saved, and a stop at any moment."""

import sys
from dataclasses import asdict
from pathlib import Path

from plumbing.base.common import stop_requests
from plumbing.base.console import say, track
from plumbing.data.sources import fingerprint
from plumbing.report import record
from plumbing.run import checkpoint
from plumbing.run.checkpoint import Progress


def begin(cfg, build):
    """Open a run's folder, build what the run holds, and go on from the newest checkpoint if it is
    resumed -> (build(cfg), Progress). Collective. Ends with a sentence if the folder is in use."""
    out = Path(cfg.out)
    checkpoint.open_folder(out, cfg, say)
    parts = build(cfg)  # every process has looked at the folder when this returns
    newest = checkpoint.newest_sound(out, parts.processes, say) if cfg.resume else None
    progress = Progress(**checkpoint.restore(newest, parts)) if newest else Progress()
    if parts.processes.first:
        record.write_config(out, cfg, fingerprint(parts.stream.examples), parts.folder)
        record.cut_metrics(out, progress.step)
    return parts, progress


def take_steps(parts, progress, step, measure, show):
    """Steps until the last one; ends the program where it is asked to stop before that.

    step(parts, progress) -> a line of metrics; measure(parts, metrics) adds to the line and keeps
    it, before a checkpoint is saved: a run that dies in between makes it again; show(parts,
    metrics) tells of it
    """
    cfg, processes = parts.cfg, parts.processes
    with stop_requests() as asked:
        for _ in track(range(progress.step, cfg.steps), cfg.algo, "steps", done=progress.step):
            metrics = step(parts, progress)
            stop, last = any(processes.gather([bool(asked)])), progress.step == cfg.steps
            measure(parts, metrics)
            if last or stop or progress.step % cfg.save_every == 0:
                checkpoint.save(Path(cfg.out), asdict(progress), parts)
            show(parts, metrics)
            if stop and not last:
                parts.close()
                say(f"stopped after step {progress.step}; go on with the same flags and --resume")
                sys.exit(130)
