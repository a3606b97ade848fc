"""--log: the line that a step adds to metrics.jsonl, sent to a program that draws it too. A fork
enters one more under @place("name"), the name of the package that it needs: a class that is made of
the settings before anything is loaded, with send({name: number}, step) and close()."""

from dataclasses import asdict
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from plumbing.base.common import fail, first_line, only_shows, register

LOGS = {}
place = partial(register, LOGS)


class Tracker:
    """A run of the project papo, called as the output folder; a resumed one is a run of its own."""

    def __init__(self, package, cfg, **more):
        init = import_module(package).init
        self.run = init(project="papo", name=Path(cfg.out).name, config=asdict(cfg), **more)
        self.close = self.run.finish

    def send(self, numbers, step):
        self.run.log(numbers, step=step)


place("wandb")(lambda cfg: Tracker("wandb", cfg, dir=cfg.out))
place("trackio")(lambda cfg: Tracker("trackio", cfg, embed=False))  # seen by `trackio show`


def check_log(name):
    """End with a sentence if --log names a package that is not installed."""
    if name and find_spec(name) is None:
        fail(f"--log {name}: {name} is not installed; `pip install {name}` brings it")


def open_log(cfg, first):
    """What --log names, opened in the first process; None elsewhere, and without --log."""
    try:
        log = LOGS[cfg.log](cfg) if cfg.log and first else None
    except Exception as error:  # of many kinds, such as one who is not logged in
        fail(f"--log {cfg.log} does not start ({first_line(error)}); leave it out, or mend that")
    if log:
        guard = only_shows(f"--log {cfg.log} does not do what it should")
        log.send, log.close = guard(log.send), guard(log.close)
    return log
