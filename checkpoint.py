"""A run that can be stopped at any moment and goes on as if it had not been.

    checkpoint-N/            a Hugging Face folder: safetensors, config, tokenizer and processor files
    checkpoint-N/trainer/    torch.distributed.checkpoint: master weights and optimiser state; its state.json: counters

A checkpoint is written under a hidden name and renamed when it is whole, so one with its final name is always whole. No state of a
random generator is saved, since every draw of a run is made by a generator named after (seed, purpose, step, prompt).
"""
import errno
import json
import shutil
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from config import fail, same_run
from model import save_hf


def whole(out):
    """Checkpoints in an output folder, oldest first."""
    found = [p for p in out.glob("checkpoint-*") if p.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def open_folder(out, cfg):
    """Check that a run may write here -> the checkpoint to continue from, or None. Ends with a sentence if it may not."""
    used = (out / "config.json").exists() or (out / "metrics.jsonl").exists()
    if not cfg.resume:
        if used:
            fail(f"{out} holds another run; continue it with --resume, or give another --out")
        if out.exists() and not out.is_dir():
            fail(f"{out} is a file; give another --out")
        return None
    if not used:
        fail(f"--resume: there is no run in {out}")
    same_run(cfg, out / "config.json")
    return whole(out)[-1] if whole(out) else None


def _state(run):
    model, optimiser = get_state_dict(run.policy, run.optimiser)
    return {"model": model, "optimiser": optimiser}


def save(run, step):
    """Write checkpoint-<step> and remove the oldest beyond cfg.keep. Ends with a sentence on a full disk; what was whole stays."""
    out = Path(run.cfg.out)
    final, making = out / f"checkpoint-{step}", out / f".making-checkpoint-{step}"
    if final.exists():
        return
    try:
        if run.rank == 0:
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            size = sum(p.numel() * p.element_size() for p in run.policy.parameters())
            if shutil.disk_usage(out).free < 5 * size:         # weights twice, two moments, and some room
                raise OSError(errno.ENOSPC, "no space left")
        run.barrier()
        save_hf(run.policy, making, run.folder, run.rank)
        with warnings.catch_warnings():                        # one process saving alone is meant
            warnings.filterwarnings("ignore", message="torch.distributed is")
            dcp.save(_state(run), checkpoint_id=making / "trainer", no_dist=run.world == 1)
        if run.rank == 0:
            counters = {"step": step, "cursor": run.cursor, "updates": run.updates, "skipped": run.skipped}
            (making / "trainer" / "state.json").write_text(json.dumps(counters))
            making.rename(final)
            for old in whole(out)[:-run.cfg.keep] if run.cfg.keep else []:
                old.rename(out / f".removing-{old.name}")      # a kill in the middle leaves nothing that looks whole
            for old in out.glob(".removing-*"):
                shutil.rmtree(old)
    except (OSError, dcp.api.CheckpointException) as error:
        if getattr(error, "errno", errno.ENOSPC if "No space left" in str(error) else 0) != errno.ENOSPC:
            raise
        shutil.rmtree(making, ignore_errors=True)
        fail(f"no disk space left for {final}; free some and continue with --resume (older checkpoints are untouched)")
    run.barrier()


def restore(run, folder):
    """Load weights, optimiser state and counters of a checkpoint -> the step to go on with."""
    state = _state(run)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        dcp.load(state, checkpoint_id=folder / "trainer", no_dist=run.world == 1)
    set_state_dict(run.policy, run.optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"])
    counters = json.loads((folder / "trainer" / "state.json").read_text())
    run.cursor, run.updates, run.skipped = counters["cursor"], counters["updates"], counters["skipped"]
    return counters["step"]
