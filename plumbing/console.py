"""What a long run says while it works: how far it is, how much time is left, and lines above that.

On a terminal these are tqdm's bars, one inside the other, drawn again twice a second even where a
piece of the work takes long. Where standard output is not a terminal, as in the log of a job, the
same is one line every LINE_EVERY seconds:

    papo_g 41/202 steps, 8:13:20 left | update 00:31 | 5/24 passes, 01:58 left

Both go to standard error, so that results can be piped on. Of the processes of a run only the first
one tells.
"""

import os
import sys
import threading
import time
from contextlib import contextmanager

from tqdm import tqdm

DRAW_EVERY = 0.5  # seconds, on a terminal
LINE_EVERY = 10.0  # seconds, elsewhere

_under_way = []  # the Bars that are open, the outermost first
_lock = threading.RLock()
_thread = None


class Bar:
    """How far one piece of work is; it is told of while the `with` block lasts.

    total: how many there are, or None where nobody knows; done: how many were done before, such as
    by the run that is resumed; bar.update(n) says that n more are.
    """

    def __init__(self, title, total=None, unit="", done=0):
        self.terminal = on_a_terminal()
        form = "{desc} {elapsed}"
        if total is not None:
            form = "{desc} {n_fmt}/{total_fmt} " + unit + ", {remaining} left{postfix}"
        self.about = dict(desc=title, total=total, initial=done, unit=f" {unit}", leave=False)
        self.about["smoothing"] = 0  # the time left is told by the whole pace so far
        self.about |= {"mininterval": DRAW_EVERY} if self.terminal else {"bar_format": form}
        # A whole of one part says nothing, and neither do other processes.
        self.about["disable"] = total == 1 or not first()

    def __enter__(self):
        # In a log, tqdm only keeps the time, and draws to nowhere.
        self.nowhere = None if self.terminal else open(os.devnull, "w")
        self.bar = tqdm(**self.about, file=self.nowhere)
        with _lock:
            _under_way.append(self)
        _tell()
        return self

    def __exit__(self, *_):
        with _lock:
            _under_way.remove(self)
            self.bar.close()
            if self.nowhere:
                self.nowhere.close()

    def update(self, n=1, note=""):
        self.bar.update(n)
        if note:
            self.bar.set_postfix_str(note, refresh=False)

    def __str__(self):
        return "" if self.bar.disable else str(self.bar).strip().replace(", ? left", "")


def track(items, title, unit, done=0):
    """Yield the items, and tell how many of them are done, those done before included."""
    with Bar(title, done + len(items), unit, done) as bar:
        for item in items:
            yield item
            bar.update()


@contextmanager
def doing(what, aloud=False):
    """While the block lasts, `what` is under way; aloud: a line says so first."""
    if aloud:
        say(f"{what} ...", file=sys.stderr)
    with Bar(what):
        yield


@contextmanager
def fetching(what):
    """As doing, aloud, for what may have to come from the hub. On a terminal the hub's own bars
    tell how much has come; elsewhere they would fill a log, and are switched off."""
    if on_a_terminal():
        say(f"{what} ...", file=sys.stderr)
        yield
        return
    import datasets
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    datasets.disable_progress_bars()
    with doing(what, aloud=True):
        yield


def say(text, here=False, file=None):
    """A line of text, at once, above what is under way. As of `fail`: only the first process
    speaks, or, with `here`, each for itself. file: default: standard output"""
    if here or first():
        with tqdm.external_write_mode(file or sys.stdout):
            print(text, file=file, flush=True)


def first():
    """Is this the process that tells?"""
    return os.environ.get("RANK", "0") == "0"


def on_a_terminal():
    return sys.stdout.isatty() and sys.stderr.isatty()


def told():
    """All that is under way, as one line; "" if nothing is."""
    with _lock:
        return " | ".join(filter(None, map(str, _under_way)))


def draw():
    """Tell what is under way, if anything is."""
    with _lock:
        if on_a_terminal():
            for bar in _under_way:
                bar.bar.refresh()
        elif text := told():
            print(text, file=sys.stderr, flush=True)


def _tell():
    """See to it that a thread of this process tells what is under way, however long a piece of it
    takes."""
    global _thread
    if _thread is None and first():
        _thread = threading.Thread(target=_go_on_telling, daemon=True)
        _thread.start()


def _go_on_telling():
    while True:
        time.sleep(DRAW_EVERY if on_a_terminal() else LINE_EVERY)
        try:
            draw()
        except (OSError, ValueError):  # nobody reads any longer, or it is closed
            return
