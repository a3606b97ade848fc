"""What a long run says while it works: how far it is, how much time is left, and lines above that.

On a terminal the last line is drawn again twice a second, and tells all that is under way, the
whole first, with the time that has passed or the time that is left:

    papo_g 41/202 steps, 8:13:20 left | update 0:31 | 5/24 passes, 1:58 left

Where standard output is not a terminal, as in the log of a job, the same is a line of its own every
LINE_EVERY seconds. Both go to standard error, so that results can be piped on. Of the processes of
a run only the first one tells.
"""

import os
import shutil
import sys
import threading
import time
from contextlib import contextmanager

DRAW_EVERY = 0.5  # seconds, on a terminal
LINE_EVERY = 30.0  # seconds, elsewhere

_under_way = []  # the Bars that are open, the outermost first
_lock = threading.RLock()  # one writer at a time
_drawn = False  # is there something on the terminal's last line?
_thread = None


class Bar:
    """How far one piece of work is; it is told of while the `with` block lasts.

    total: how many there are, or None where nobody knows; done: how many were done before, such as
    by the run that is resumed; bar.update(n) says that n more are.
    """

    def __init__(self, title, total=None, unit="", done=0):
        self.title, self.total, self.unit = title, total, unit
        self.done, self.before, self.note = done, done, ""
        self.began = time.monotonic()

    def __enter__(self):
        with _lock:
            _under_way.append(self)
            _tell()
        return self

    def __exit__(self, *_):
        with _lock:
            _under_way.remove(self)
            if not _under_way:
                clear()

    def update(self, n=1, note=""):
        self.done, self.note = self.done + n, note

    def __str__(self):
        gone = time.monotonic() - self.began
        if self.total is None:
            return f"{self.title} {clock_time(gone)}"
        said = f"{self.title} {self.done}/{self.total} {self.unit}".strip()
        if new := self.done - self.before:
            said += f", {clock_time(gone / new * (self.total - self.done))} left"
        return f"{said}, {self.note}" if self.note else said


def clock_time(seconds):
    """Seconds -> 0:07, 12:40 or 31:02:09"""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


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
        say(f"{what} ...")
    with Bar(what):
        yield


@contextmanager
def fetching(what):
    """As doing, aloud, for what may have to come from the hub. On a terminal the hub's own bars
    tell how much has come; elsewhere they would fill a log, and are switched off."""
    if on_a_terminal():
        say(f"{what} ...")
        yield
        return
    import datasets
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    datasets.disable_progress_bars()
    with doing(what, aloud=True):
        yield


def say(text, here=False):
    """A line of text, at once, above what is under way. As of `fail`: only the first process
    speaks, or, with `here`, each for itself."""
    if not (here or first()):
        return
    with _lock:
        clear()
        print(text, flush=True)


def first():
    """Is this the process that tells?"""
    return os.environ.get("RANK", "0") == "0"


def on_a_terminal():
    return sys.stdout.isatty() and sys.stderr.isatty()


def clear():
    """Empty the terminal's last line, if something is drawn there."""
    global _drawn
    with _lock:
        if _drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        _drawn = False


def told():
    """All that is under way, as one line; "" if nothing is. A whole of one part is left out."""
    with _lock:
        return " | ".join(str(bar) for bar in _under_way if bar.total != 1)


def _tell():
    """See to it that a thread of this process tells what is under way, however long a piece of it
    takes."""
    global _thread
    if _thread is None and first():
        _thread = threading.Thread(target=_go_on_telling, daemon=True)
        _thread.start()


def _go_on_telling():
    global _drawn
    while True:
        terminal = on_a_terminal()
        time.sleep(DRAW_EVERY if terminal else LINE_EVERY)
        with _lock:
            text = told()
            if text and terminal:
                width = shutil.get_terminal_size().columns
                sys.stderr.write(f"\r{text[: width - 1]}\x1b[K")
            elif text:
                sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
            _drawn = bool(text) and terminal
