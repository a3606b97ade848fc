"""--log: the line that a step adds to metrics.jsonl, sent to a program that draws it too.

A fork enters one of its own under @place("name"), as the three here, and --log offers it: a class
that is made of the settings before anything is loaded, with send({name: number}, step) and close().
Its name is that of the package which it needs.
"""

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from plumbing.common import fail, first_line, register

LOGS = {}


def place(name):
    """Register a place that lines are sent to."""
    return register(LOGS, name)


@place("tensorboard")
class TensorBoard:
    """Event files in the run's own folder: tensorboard --logdir out"""

    def __init__(self, cfg):
        self.folder, self.writer = Path(cfg.out) / "tensorboard", None

    def send(self, numbers, step):
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None:  # what a resumed run repeats is taken away from this step on
            self.writer = SummaryWriter(self.folder, purge_step=step)
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)
        self.writer.flush()

    def close(self):
        if self.writer:
            self.writer.close()


@place("wandb")
class WeightsAndBiases:
    """A run of the project papo, called as the output folder; a resumed one is a run of its own."""

    def __init__(self, cfg):
        import wandb

        about = dict(name=Path(cfg.out).name, dir=cfg.out, config=asdict(cfg))
        self.run = wandb.init(project="papo", **about)

    def send(self, numbers, step):
        self.run.log(numbers, step=step)

    def close(self):
        self.run.finish()


@place("trackio")
class Trackio(WeightsAndBiases):
    """The same on this machine: `trackio show`"""

    def __init__(self, cfg):
        import trackio

        about = dict(name=Path(cfg.out).name, config=asdict(cfg), embed=False)
        self.run = trackio.init(project="papo", **about)


def check_log(name):
    """End with a sentence if --log names a package that is not installed."""
    if name and find_spec(name) is None:
        fail(f"--log {name}: {name} is not installed; `pip install {name}` brings it")


def open_log(cfg, first):
    """What --log names, opened in the first process; None elsewhere, and without --log."""
    if not (cfg.log and first):
        return None
    try:
        return LOGS[cfg.log](cfg)
    except Exception as error:  # of many kinds, such as one who is not logged in
        fail(f"--log {cfg.log} does not start ({first_line(error)}); leave it out, or mend that")


def numbers(metrics):
    """A line of metrics as {name: number}; the phases' seconds are called phases/<name>."""
    phases = {f"phases/{name}": value for name, value in metrics.get("phases", {}).items()}
    return {k: v for k, v in metrics.items() if k not in ("step", "phases")} | phases
