"""What a run says while it works: lines in a log, bars on a terminal."""

import os
import pty
import re
import sys
import termios
import time

import pytest

from plumbing.base import console
from plumbing.base.common import fail


def work():
    """Three steps of two passes each, at a pace that tqdm tells of: it looks ten times a second."""
    for step in console.track(range(3), "algo", "steps"):
        with console.doing("update", aloud=step == 0):
            for _ in console.track(range(2), "", "passes"):
                time.sleep(0.11)
        console.say(f"step {step}")


def test_a_log_gets_a_line_now_and_then_and_results_are_kept_apart(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    work()
    out, log = capsys.readouterr()
    assert out == "step 0\nstep 1\nstep 2\n" and "\r" not in log
    line = r"\nalgo 1/3 steps, 0\d:\d\d left \| update 00:\d\d \|  1/2 passes, 00:\d\d left\n"
    assert "\nupdate ...\n" in log and re.search(line, log)
    monkeypatch.setattr(console, "LINE_EVERY", 1000.0)
    work()
    assert capsys.readouterr().err == "update ...\n"
    monkeypatch.setattr(console, "FIRST", False)  # another process of the same run
    work(), console.say("mine", every_rank=True)
    assert capsys.readouterr() == ("mine\n", "")


def test_a_terminal_has_bars_one_inside_the_other_and_lines_above_them(monkeypatch):
    (ours, theirs), text = pty.openpty(), b""
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as m:
        m.setattr(sys, "stdout", terminal), m.setattr(sys, "stderr", terminal)
        work()
        while b"step 2\r\n" not in text:  # it comes in one piece or two
            text += os.read(ours, 4096)
    assert b"algo 1/3 steps" in text and b"update 00:00" in text and b"1/2 passes" in text
    assert re.findall(rb"[\r\n](step \d)\r\n", text) == [b"step 0", b"step 1", b"step 2"]


def test_the_time_left_is_that_of_what_this_run_has_done(monkeypatch, capsys):
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    with pytest.raises(ZeroDivisionError), console.Bar("a", 120, "steps", done=100) as bar:
        bar.start_t, bar.last_print_t = bar.start_t - 120.5, bar.last_print_t - 1
        bar.update(10, note="loss 0.5")
        raise ZeroDivisionError  # after it nothing is told of this bar
    console.Bar("update").close()
    log = capsys.readouterr().err
    assert re.search("a 110/120 steps, 02:0[0-3] left, loss 0.5\nupdate 00:00\n$", log)


def test_data_do_not_act_on_the_terminal(capsys):
    """An escape sequence, a change of direction and a line of a megabyte, in a line or an error."""
    hostile = "\x1b]0;owned\x07 \u202edrawer\tred\n" + "A" * 1_000_000
    console.say(hostile)
    with pytest.raises(SystemExit) as raised:
        fail(hostile)
    for text in (capsys.readouterr().out, str(raised.value)):
        assert "\\x1b]0;owned\\x07 \\u202edrawer\tred\nAAA" in text and len(text) < 2200
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert console.shown("größer ≥ 3, 图片 😀") == "größer ≥ 3, 图片 😀"
