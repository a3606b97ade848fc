"""What a run says while it works: lines in a log, one line that is drawn again on a terminal."""

import os
import pty
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from plumbing.console import Bar, clock_time, told, track

# Three steps of two passes each, told of at a pace that a test can wait for.
WORK = """
import time
from plumbing import console
console.DRAW_EVERY = console.LINE_EVERY = 0.2
for step in console.track(range(3), "algo", "steps"):
    with console.doing("update"):
        for _ in console.track(range(2), "", "passes"):
            time.sleep(0.5)
    console.say(f"step {step}")
console.say("done")
"""


def work(rank="0", **streams):
    """The program above, as a process of its own."""
    command = [sys.executable, "-c", WORK]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"RANK": rank}, **streams)


def test_a_log_gets_a_line_now_and_then_and_results_are_kept_apart():
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, log = work(**pipes).communicate(timeout=60)
    assert out.splitlines() == ["step 0", "step 1", "step 2", "done"]
    assert "\r" not in log and "\x1b" not in log
    lines = log.splitlines()
    assert 5 <= len(lines) <= 16, log
    left = r"(, \d:\d\d left)?"
    pattern = rf"algo \d/3 steps{left}( \| update \d:\d\d)?( \| \d/2 passes{left})?"
    assert all(re.fullmatch(pattern, line) for line in lines), log
    assert re.search(r"algo 2/3 steps, 0:0\d left \| update 0:00 \| 1/2 passes, 0:0\d left", log)


def test_lines_come_at_once_when_piped():
    """Whoever watches a log sees a line when it is said, not when a buffer is full."""
    process = work(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "step 0\n"
    seen = time.monotonic()
    process.wait(timeout=60)
    assert time.monotonic() - seen > 1.5  # two more steps were still to come


def on_terminal():
    """What the program writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    process = work(stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    try:
        while chunk := os.read(ours, 4096):
            text += chunk
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    process.wait(timeout=60)
    return text.decode()


def screen(text):
    """The lines that are left of what was written to a terminal."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown, at = "", 0
        for piece in re.split("(\r|\x1b\\[K)", line):
            if piece == "\r":
                at = 0
            elif piece == "\x1b[K":
                shown = shown[:at]
            else:
                shown, at = shown[:at] + piece + shown[at + len(piece) :], at + len(piece)
        lines.append(shown)
    return lines


def test_a_terminal_has_one_line_that_is_drawn_again_and_nothing_is_left_of_it():
    text = on_terminal()
    assert text.count("\r\x1b[K") >= 3 and re.search(r"\ralgo 1/3 steps, 0:0\d left \| ", text)
    assert re.search(r"\d/2 passes", text)
    assert screen(text) == ["step 0", "step 1", "step 2", "done", ""]


def test_only_the_first_process_tells():
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert work(rank="1", **pipes).communicate(timeout=60) == ("", "")


def test_the_time_left_is_that_of_what_this_run_has_done():
    """A run that goes on from step 100 has taken two minutes for ten of its twenty steps."""
    bar = Bar("algo", 120, "steps", done=100)
    assert str(bar) == "algo 100/120 steps"
    bar.began, bar.done = time.monotonic() - 120.5, 110
    assert str(bar) == "algo 110/120 steps, 2:00 left"
    assert [clock_time(s) for s in (7, 760, 111729)] == ["0:07", "12:40", "31:02:09"]


def test_work_that_stops_is_told_of_no_longer():
    def steps():
        for i in track(range(5), "algo", "steps"):
            assert told().startswith(f"algo {i}/5 steps")
            if i == 2:
                return

    steps()
    assert told() == ""
    with pytest.raises(ZeroDivisionError), Bar("algo", 3, "steps"):
        raise ZeroDivisionError
    assert told() == ""


def test_one_file_writes_to_the_console_while_others_work():
    """A bar of another kind would be drawn into the line that console.py draws."""
    for folder in ("", "plumbing", "toy", "bench", "tests"):
        for path in (ROOT / folder).glob("*.py"):
            assert not re.search(r"^\s*(from|import) tqdm", path.read_text(), re.M), path
