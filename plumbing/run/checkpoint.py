"""A run that can be stopped at any moment and goes on as if it had not been.

    checkpoint-N/            a Hugging Face folder: safetensors, config, tokenizer, processor files;
                             with LoRA the adapter in peft's format instead of the model
    checkpoint-N/trainer/    torch.distributed.checkpoint: master weights and optimizer state of
                             what is trained; its state.json: counters

    checkpoint-N/manifest.json   the size and checksum of every file, written last

A checkpoint is written under a hidden name and renamed when it is whole and on the disk; what is
resumed is compared with its manifest first. No state of a random generator is saved, since every
draw of a run is made by one with a name: (seed, purpose, step, prompt).
"""

import errno
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from plumbing.base.common import (
    MANIFEST,
    checksum,
    damaged,
    fail,
    hold,
    may_write,
    read_json,
    seal,
    sync_folder,
    takes_no_more,
)
from plumbing.base.console import doing
from plumbing.models.lora import count
from plumbing.models.weights import save_model
from plumbing.run.config import same_run

# Frozen weights are those of the model that the run starts from, when it is resumed as well.
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
# That one process saves alone is meant.
warnings.filterwarnings("ignore", message="torch.distributed is")


@dataclass
class Progress:
    """How far a run has come: what a checkpoint holds beside weights and optimizer state."""

    step: int = 0
    cursor: int = 0  # prompts consumed of the stream


def numbered(out):
    """All that is called checkpoint-N in an output folder, oldest first; not checkpoint-1-best."""
    found = [p for p in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def is_whole(checkpoint):
    """Was it written by a run, to the end? The manifest is the last file that is."""
    return (checkpoint / MANIFEST).is_file()


def whole(out):
    """Checkpoints in an output folder, oldest first."""
    return list(filter(is_whole, numbered(out)))


def open_folder(out, cfg, say):
    """Check that a run may write here, and hold the folder. Ends with a sentence if it may not.
    say: a function that prints a line"""
    if os.environ.get("RANK", "0") == "0" and (not cfg.resume or out.is_dir()):
        may_write(out)
        hold(out)
    about = read_json(out / "config.json")
    used = "config" in about or (out / "metrics.jsonl").exists()
    if about and not used:
        fail(f"{out} holds a model, or something else that is no run; give another --out")
    if not cfg.resume:
        if used and is_finished(out):
            onwards = "give another --out, or go on with --resume and more --steps"
            fail(f"{out} holds a run that has ended; look at its report.html, {onwards}")
        if used:
            fail(f"{out} holds another run; continue it with --resume, or give another --out")
        return
    if not used:
        fail(f"--resume: there is no run in {out}")
    same_run(cfg, out / "config.json")
    for other in numbered(out):
        if not is_whole(other):
            say(f"note: {other} is no whole checkpoint of a run, and is left alone")


def newest_sound(out, processes, say):
    """The newest checkpoint whose files are what its manifest says, or None where there is none at
    all. A damaged one is set aside, with a line. Ends with a sentence if all are. Collective."""
    there = whole(out)
    for checkpoint in reversed(there):
        with doing(f"checking {checkpoint}"):
            share = slice(processes.rank, None, processes.world)
            wrong = processes.gather(damaged(checkpoint, share))
        if not wrong:
            return checkpoint
        aside = checkpoint.with_name(f"{checkpoint.name}-damaged")
        say(
            f"warning: {checkpoint / wrong[0]} is damaged: it is not what {MANIFEST} says; the "
            f"checkpoint is called {aside.name} from now on"
        )
        if processes.first:
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
        processes.barrier()
    if there:
        fail(f"no checkpoint in {out} is sound; begin again in another --out")
    return None


def is_finished(out):
    """Has the run in a folder come to its end? What it measured then is there; without validation
    data the checkpoint of its last step is."""
    if measured := read_json(out / "evaluation.json"):
        return "after" in measured
    cfg = read_json(out / "config.json").get("config", {})
    ended = cfg.get("steps") and not cfg.get("val_data")
    return bool(ended) and is_whole(out / f"checkpoint-{cfg['steps']}")


def bytes_of(trained, frozen, cfg):
    """Of one checkpoint of so many parameters, in float32: the weights for other programs, with
    LoRA the adapter's; and of what is trained the weights for this one and two moments."""
    return 16 * trained + 4 * (0 if cfg.lora_rank else frozen)


def check_space(model, steps, cfg, say):
    """Say what a run's checkpoints will take; end with a sentence if the disk cannot hold that.
    While one is saved, the oldest of those that --keep counts is still there. Without a folder
    nothing is saved. model: may be on the device "meta"; steps: the run's last one"""
    out, one = Path(cfg.out), bytes_of(*count(model), cfg)
    if not out.is_dir():
        return
    there = [int(p.name.split("-")[1]) for p in whole(out)]
    todo = range(max(there, default=0) + 1, steps + 1)
    saves = sum(step % cfg.save_every == 0 or step == steps for step in todo)
    new = min(saves, max(1, cfg.keep + 1 - len(there))) if cfg.keep else saves
    free, at_once = shutil.disk_usage(out).free, len(there) + new
    size = f"{one / 1e9:.3g} GB each, at most {at_once} at a time"
    if new * one > free:
        room = f"{size}, {len(there)} are there, and {free / 1e9:.3g} GB are free"
        advice = "make room, or give another --out, or --keep 1, which needs room for 2"
        fail(f"{out} cannot hold this run's checkpoints: {room}; {advice}")
    say(f"checkpoints: {size} (--keep, --save_every)")


def _state(policy, optimizer):
    model, moments = get_state_dict(policy, optimizer.adamw, options=TRAINED)
    return {"model": model, "optimizer": moments}


@doing("saving a checkpoint")
def save(out, counters, parts):
    """Write checkpoint-<step> and remove the oldest beyond cfg.keep. counters: {"step", "cursor"}
    of the run. Ends with a sentence on a full disk; what was whole stays. Collective."""
    processes, optimizer = parts.processes, parts.optimizer
    final = out / f"checkpoint-{counters['step']}"
    making = out / f".making-{final.name}"
    if is_whole(final):
        return
    counters = {**counters, "updates": optimizer.updates, "skipped": optimizer.skipped}
    try:
        if processes.first:
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            if shutil.disk_usage(out).free < bytes_of(*count(parts.policy), parts.cfg):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        processes.barrier()
        save_model(parts.policy, making, parts.folder, parts.cfg, processes.first)
        state, alone = _state(parts.policy, optimizer), processes.world == 1
        dcp.save(state, checkpoint_id=making / "trainer", no_dist=alone)
        if processes.first:
            (making / "trainer" / "state.json").write_text(json.dumps(counters), "utf-8")
        processes.barrier()
        names = sorted(str(p.relative_to(making)) for p in making.rglob("*") if p.is_file())
        mine = names[processes.rank :: processes.world]
        sums = processes.gather([(name, checksum(making / name)) for name in mine])
        if processes.first:
            seal(making, dict(sums))
            if final.exists():  # somebody else's, and not ours to delete
                final.rename(final.with_name(f"{final.name}-set-aside"))
            making.rename(final)
            sync_folder(out)
            remove_oldest(out, parts.cfg.keep)
    except (Exception, dcp.api.CheckpointException) as error:  # a BaseException
        shutil.rmtree(making, ignore_errors=True)
        if not (why := takes_no_more(error)):
            raise
        rest = "make room and continue with --resume (older checkpoints are untouched)"
        fail(f"{final} cannot be written ({why}); {rest}")
    processes.barrier()


def remove_oldest(out, keep):
    """Keep the newest ones; 0 keeps all. A kill in the middle leaves nothing that looks whole."""
    for old in whole(out)[:-keep] if keep else []:
        old.rename(out / f".removing-{old.name}")
    for old in out.glob(".removing-*"):
        shutil.rmtree(old)


def restore(folder, parts):
    """Load a checkpoint's weights and optimizer state -> {"step", "cursor"}. Collective."""
    state, alone = _state(parts.policy, parts.optimizer), parts.processes.world == 1
    with doing(f"loading {folder}", aloud=True):
        dcp.load(state, checkpoint_id=folder / "trainer", no_dist=alone)
    # How Adam is computed follows the device of this run, not that of the one that saved.
    for saved, own in zip(state["optimizer"]["param_groups"], parts.optimizer.adamw.param_groups):
        saved["fused"] = own["fused"]
    loaded = dict(model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    set_state_dict(parts.policy, parts.optimizer.adamw, **loaded, options=TRAINED)
    counters = read_json(folder / "trainer" / "state.json")
    parts.optimizer.updates = counters.pop("updates")
    parts.optimizer.skipped = counters.pop("skipped")
    return counters
