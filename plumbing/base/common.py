"""What every file may import: stopping with one sentence, random draws that have a name, and files
that are whole or not there."""

import argparse
import contextlib
import difflib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
import uuid
import zlib
from functools import partial
from importlib.util import find_spec
from typing import NoReturn

import torch

from plumbing.base import console


def fail(message, every_rank=False) -> NoReturn:
    """End the program with one clear sentence and a non-zero exit status. The processes of a run
    fail together, and only the first one speaks; every_rank: this one fails alone, and says so."""
    rank, message = os.environ.get("RANK", "0"), console.shown(str(message))
    if rank == "0":
        sys.exit(f"error: {message}")
    sys.exit(f"error in process {rank}: {message}" if every_rank else 1)


FULL = [getattr(errno, name, 0) for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EIO".split()]


def takes_no_more(error):
    """The line of an exception that says that a disk, or a file, takes no more; "" if none does.
    Libraries hide the error's number in their own words."""
    said = ["unexpected pos"]  # torch.save's word for it, sometimes
    said += [os.strerror(number) for number in filter(None, FULL)]
    lines = map(str.strip, str(error).splitlines())
    return next((line for line in lines if any(s in line for s in said)), "")


def in_a_sentence(kind, error, trace):
    """What ends a program that nothing else caught: of a full disk, a quota, a file that may not be
    written, one sentence; of all else the traceback."""
    if not (why := takes_no_more(error)):
        return sys.__excepthook__(kind, error, trace)
    then = "make room or give another place, and ask again (a run goes on with --resume)"
    print(f"error: {console.shown(why)}; {then}", file=sys.stderr)


sys.excepthook = in_a_sentence


class Parser(argparse.ArgumentParser):
    """A command line that is wrong gets one sentence, and a misspelt flag the nearest one."""

    def __init__(self, description, **more):
        # A description keeps its lines.
        style = partial(argparse.RawDescriptionHelpFormatter, width=100, max_help_position=32)
        super().__init__(description=description, formatter_class=style, allow_abbrev=False, **more)

    def error(self, message):
        """What argparse calls instead of returning arguments; ends the program."""
        known = [flag for action in self._actions for flag in action.option_strings]
        for word in dict.fromkeys(re.findall(r"--[\w-]+", message)):
            for nearest in () if word in known else difflib.get_close_matches(word, known, 1):
                message += f"; {word} may be meant to be {nearest}"
        fail(f"{message}; see --help")


def generator(*name):
    """A random generator with a name, such as (seed, "mask", step, prompt): every draw of a run has
    one. So it repeats, also after a resume, and does not depend on the number of processes."""
    digest = hashlib.sha256(repr(name).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def register(registry, name):
    """A decorator that enters a function in a registry. Raises ValueError for a name in use."""
    if name in registry:
        raise ValueError(f"{name} is registered already; choose another name")
    return lambda function: registry.setdefault(name, function)


def write_atomically(path, text):
    """Write beside the file, then rename: a reader sees the old file or the new one, never half."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")  # two programs may write it at once
    try:
        beside.write_text(text, "utf-8", "surrogateescape")  # of a path in another locale
        beside.replace(path)
    except OSError as error:  # a write that fails does not say where
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def read_json(path, otherwise=fail):
    """What a JSON file says, a dict; {} where there is no such file. otherwise(sentence): what is
    done about one that cannot be read, before {} is returned"""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if isinstance(found, dict):
            return found
        raise ValueError("it is no dict")
    except (OSError, ValueError) as error:
        otherwise(f"{path} cannot be read ({first_line(error)})")
    return {}


def may_write(folder):
    """Make a folder, or end with a sentence if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        fail(f"{folder} cannot be written ({error.strerror or error}); give another --out")


HELD = {}  # {folder or file: the open file whose lock says that this process is at work there}


def hold(path):
    """Take a folder, or a file, for the life of this process, or end with a sentence that names who
    has it.

    The lock goes when the process does, however it ends, so none is ever stale. Where the system
    or the file system has no locks, nothing is held.
    """
    path = path.resolve()
    if path in HELD or not find_spec("fcntl"):
        return
    import fcntl

    lock = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    file = open(lock, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        fail(f"{path} is being written by {holder}; wait for it, end it, or give another --out")
    except OSError as error:
        console.say(f"note: {path} cannot be locked ({error.strerror}); let no other run use it")
    HELD[path] = file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()


MANIFEST = "manifest.json"


def checksum(path):
    """[size, CRC-32] of a file, which is on the disk itself when this returns."""
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            size, crc = size + len(block), zlib.crc32(block, crc)
        os.fsync(file.fileno())
    return [size, crc]


def seal(folder, sums):
    """Write a folder's manifest, {file: checksum}, last of all and onto the disk."""
    (folder / MANIFEST).write_text(json.dumps(sums, indent=1), encoding="utf-8")
    checksum(folder / MANIFEST)
    sync_folder(folder)


def sync_folder(folder):
    """Have the names in a folder on the disk itself."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damaged(folder, share=slice(None), among=lambda name: True):
    """Which files of a folder with a manifest are not what it says -> names; share, among: of which
    of them this is asked"""
    if not (sums := read_json(folder / MANIFEST, otherwise=lambda _: None)):
        return [MANIFEST]
    wanted = sorted(filter(among, sums))[share]

    def wrong(name):
        path = folder / name
        there = path.is_file() and path.stat().st_size == sums[name][0]  # or it need not be read
        return not there or checksum(path) != sums[name]

    return [name for name in wanted if wrong(name)]


def make_once(folder, fill):
    """Make a folder that others find whole or not at all: fill(a path beside it), then rename. ->
    folder. Several processes, of several machines even, may do so at once: the first's stays."""
    if folder.is_dir():
        return folder
    making = folder.with_name(f".making-{folder.name}-{uuid.uuid4().hex}")
    try:
        fill(making)
        making.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)  # there is none once it has its name
    return folder


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


@contextlib.contextmanager
def only_shows(what):
    """What only shows a run never ends it: an error in the block is a warning. what: fails then"""
    try:
        yield
    except Exception as error:  # of many kinds, from matplotlib's to those of a full disk
        console.say(f"warning: {what} ({first_line(error)})")


def first_line(error):
    """The first line of an exception's message, or its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
