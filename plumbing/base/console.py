"""What a long run says while it works: lines, and tqdm's bars on standard error. Where that is no
terminal, all of them are a line, at most every LINE_EVERY seconds:
papo_g 41/202 steps, 8:13:20 left | update 00:31 | 5/24 passes, 01:58 left"""

import os
import sys
import time
from contextlib import contextmanager, nullcontext
from importlib import import_module

from tqdm import tqdm

for stream in (sys.stdout, sys.stderr):  # a locale that lacks a sign has it written out
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
FIRST = os.environ.get("RANK", "0") == "0"  # of the processes of a run only the first one speaks
LINE_EVERY = 10.0


class Bar(tqdm):
    """How far one piece of work is; `done` parts of it were done before the run was resumed."""

    told = time.monotonic()  # when the last line was printed

    def __init__(self, title, total=None, unit="", done=0):
        form = "{desc} {n_fmt}/{total_fmt} {unit}, {remaining} left{postfix}"
        more = {"bar_format": form if total else "{desc} {elapsed}", "leave": False, "unit": unit}
        more |= {"initial": done, "smoothing": 0, "disable": total == 1 or not FIRST}
        super().__init__(desc=title, total=total, **more)

    def update(self, n=1, note=""):
        self.set_postfix_str(note, refresh=False)
        super().update(n)

    def display(self, msg=None, pos=None):
        """Called by tqdm to draw the bar, or to wipe it with the message ""."""
        if sys.stderr.isatty():
            return super().display(msg, pos)
        if msg is None and time.monotonic() - Bar.told >= LINE_EVERY:
            Bar.told = time.monotonic()
            bars = sorted(tqdm._instances, key=lambda bar: abs(bar.pos))  # the outermost first
            print(*bars, sep=" | ", file=sys.stderr, flush=True)


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


def fetching(what):
    """As doing, aloud, for what may come from the hub, whose own bars would fill a log."""
    for library in [] if sys.stderr.isatty() else ["datasets", "huggingface_hub.utils"]:
        import_module(library).disable_progress_bars()
    return doing(what, aloud=True)


def say(text, every_rank=False, file=None):
    """Print a line at once, above the bars. every_rank: as of `fail`, each process for itself"""
    if every_rank or FIRST:
        with tqdm.external_write_mode(file or sys.stdout) if sys.stderr.isatty() else nullcontext():
            print(shown(text), file=file, flush=True)


LONGEST = 2000  # characters of a line


def shown(text):
    """A text that may quote data, for a terminal: what would act on it there, an escape sequence or
    a change of direction, is written out, and lines of any length are cut."""
    lines = (line if len(line) <= LONGEST else f"{line[:LONGEST]} ..." for line in text.split("\n"))
    safe = (c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in "\n".join(lines))
    return "".join(safe)
