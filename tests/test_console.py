"""What a run says while it works: lines in a log, bars on a terminal."""

import os
import pty
import re
import subprocess
import sys
import termios
import time

import pytest
from conftest import ROOT, SMALL

import train
from plumbing import console
from plumbing.console import Bar, told, track

# Three steps of two passes each, told of at a pace that a test can wait for.
WORK = """
import time
from plumbing import console
console.DRAW_EVERY = console.LINE_EVERY = 0.2
with console.doing("loading a model", aloud=True):
    time.sleep(0.1)
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
    first, *lines = log.splitlines()
    assert first == "loading a model ..."
    assert 5 <= len(lines) <= 16, log
    left = r"(, \d\d:\d\d left)?"
    pattern = rf"algo \d/3 steps{left}( \| update \d\d:\d\d)?( \| \d/2 passes{left})?"
    assert all(re.fullmatch(pattern, line) for line in lines), log
    assert re.search(r"algo 2/3 steps, 00:0\d left \| update 00:00 \| 1/2 passes, 00:0\d left", log)


def test_a_run_tells_of_all_its_work(tmp_path, folder, monkeypatch, capsys):
    """The real loop, told of often enough to see every part: each has a time left, or how long it
    is under way."""
    argv = ["train.py", "--out", str(tmp_path / "run"), *SMALL, "--algo", "papo_g", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(console, "LINE_EVERY", 0.002)
    monkeypatch.setattr(console, "_thread", None)
    train.main()
    log = capsys.readouterr().err
    left = r" \d+/\d+ {}, \d\d:\d\d left"
    assert re.search("papo_g" + left.format("steps"), log)
    assert re.search("sampling" + left.format("responses"), log)
    assert re.search(r"update \d\d:\d\d \|" + left.format("passes"), log)
    assert re.search(r"evaluating vision \d+/\d+ responses \|", log)
    for work in ("masked", "saving a checkpoint"):
        assert re.search(rf"{work} \d\d:\d\d", log), work


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
    termios.tcsetwinsize(theirs, (24, 80))
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


def test_a_terminal_has_bars_one_inside_the_other_and_lines_above_them():
    text = on_terminal()
    assert re.search(r"algo: +33%.*1/3 \[00:0\d<00:0\d", text)
    assert re.search(r"update: .*00:0\d", text) and re.search(r"50%.*1/2 \[", text)
    lines = re.sub(r"\x1b\[[A-K]|\r", "\n", text).split("\n")
    assert [x.strip() for x in lines if re.match("step|done", x.strip())] == [
        *(f"step {i}" for i in range(3)),
        "done",
    ]


def test_only_the_first_process_tells():
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert work(rank="1", **pipes).communicate(timeout=60) == ("", "")


def test_the_time_left_is_that_of_what_this_run_has_done():
    """A run that goes on from step 100 has taken two minutes for ten of its twenty steps."""
    with Bar("algo", 120, "steps", done=100) as bar:
        assert str(bar) == "algo 100/120 steps"
        bar.bar.start_t -= 120.5
        bar.update(10, note="loss 0.5")
        assert re.fullmatch("algo 110/120 steps, 02:0[01] left, loss 0.5", str(bar))


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
