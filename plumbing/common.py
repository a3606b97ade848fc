"""What every file may import: stopping with one sentence, random draws that have a name, and files
that are whole or not there."""

import argparse
import contextlib
import difflib
import hashlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import uuid

import torch

from plumbing import console


def fail(message, here=False):
    """End the program with one clear sentence and a non-zero exit status.

    Every process of a run is expected to fail together, so only the first one speaks; with `here`,
    the error belongs to this process alone and is said by it.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        sys.exit(f"error: {message}")
    sys.exit(f"error in process {rank}: {message}" if here else 1)


class Parser(argparse.ArgumentParser):
    """A command line that is wrong gets one sentence, and a flag that is misspelt the nearest one.
    A description keeps its lines."""

    def __init__(self, description, **more):
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=style, allow_abbrev=False, **more)

    def error(self, message):
        """What argparse calls instead of returning arguments; ends the program."""
        known = [flag for action in self._actions for flag in action.option_strings]
        meant = {}
        for word in re.findall(r"--[\w-]+", message):
            nearest = difflib.get_close_matches(word, known, 1)
            if nearest and word not in known:
                meant[word] = nearest[0]
        hints = [f"{word} may be meant to be {flag}" for word, flag in meant.items()]
        fail("; ".join([message, *hints, "see --help"]))


def generator(*name):
    """A random generator with a name, such as (seed, "mask", step, prompt).

    Every draw of a run is made from a name like this one. So it repeats, it survives a resume
    without any saved state, and it does not depend on the number of processes.
    """
    digest = hashlib.sha256(repr(name).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def register(registry, name):
    """A decorator that enters a function in a registry. Raises ValueError for a name in use."""
    if name in registry:
        raise ValueError(f"{name} is registered already; choose another name")

    def enter(function):
        registry[name] = function
        return function

    return enter


def write_atomically(path, text):
    """Write beside the file, then rename: a reader sees the old file or the new one, never half."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(text)
    beside.rename(path)


def may_write(folder):
    """Make a folder, or end with a sentence if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        fail(f"{folder} cannot be written ({error.strerror or error}); give another --out")


def make_once(folder, fill):
    """Make a folder that others find whole or not at all: fill(a path beside it), then rename.
    -> folder

    Several processes, also of several machines that share a disk, may do so at the same time: the
    first one's folder stays, and the others' hold the same.
    """
    making = folder.with_name(f".making-{folder.name}-{uuid.uuid4().hex}")
    if folder.is_dir():
        return folder
    try:
        fill(making)
        making.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)  # there is none once it has its name
    return folder


def pyplot():
    """matplotlib's pyplot, for pictures that go into files; imported when one is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


class Clock:
    """Seconds by phase: `with clock("update"): ...` adds to clock.seconds["update"], and the
    console tells that it is under way."""

    def __init__(self):
        self.began, self.seconds = time.perf_counter(), {}

    @contextlib.contextmanager
    def __call__(self, phase):
        start = time.perf_counter()
        with console.doing(phase):
            yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def so_far(self):
        """Seconds since the clock was made."""
        return time.perf_counter() - self.began


@contextlib.contextmanager
def stop_requests():
    """While this lasts, SIGINT and SIGTERM (torchrun sends both) only lengthen the list yielded."""
    asked = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(s, lambda *_: asked.append(True)) for s in signals]
    try:
        yield asked
    finally:
        for s, handler in zip(signals, before):
            signal.signal(s, handler)


def first_line(error):
    """The first line of an exception's message, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
