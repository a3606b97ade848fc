"""What a thread has read beforehand is what would have been read, and no thread outlives a run."""

import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT

from plumbing.ahead import Ahead
from plumbing.data import Example, Stream
from toy.task import ToyData


def test_one_thread_and_the_caller_share_the_work():
    readers, begun, go = {}, threading.Event(), threading.Event()

    def read(item):
        readers[item] = threading.current_thread()
        if item == 0:
            begun.set()
            go.wait()
        return -item

    ahead, items = Ahead(read), range(12)
    ahead.begin(items)
    begun.wait()
    assert ahead(5) == -5  # the thread has not come so far
    go.set()
    assert [ahead(item) for item in items if item != 5] == [-item for item in items if item != 5]
    assert len(readers) == 12 and not ahead.promised
    assert readers[5] is threading.current_thread() is not readers[0]
    assert len(set(readers.values())) == 2


def test_a_wrong_guess_is_dropped_and_errors_are_said_when_they_are_asked_for():
    go, read_items = threading.Event(), []

    def read(item):
        read_items.append(item)
        go.wait()
        if item == 1:
            raise ValueError("one cannot be read")
        return item

    ahead = Ahead(read)
    ahead.begin([0, 1, 2, 3])
    while not read_items:
        time.sleep(0.01)
    ahead.begin([1])
    go.set()
    assert ahead(7) == 7
    with pytest.raises(ValueError, match="one cannot be read"):
        ahead(1)
    assert sorted(read_items) == [0, 1, 7]


def test_a_stream_read_ahead_is_the_stream(processors, capsys):
    """Over the border of two epochs, with a broken picture, and with guesses that come true, come
    true in part, and do not."""
    data = [*(ToyData("train", 6)[i] for i in range(6))]
    data.append(Example("broken", "<image> ?", "3", [b"no picture"]))
    plain, ahead = (Stream(data, 1, *processors) for _ in range(2))
    now, warnings = range(0, 5), 0

    def said():
        return [line.partition("(")[0] for line in capsys.readouterr().out.splitlines()]

    for later in (range(5, 10), range(10, 12), range(90, 95), range(14, 19), ()):
        wanted, warned = plain.read(now), said()
        found = ahead.read(now, later)
        assert said() == warned
        warnings += warned == ["warning: left out: example broken: a picture cannot be read "]
        assert list(found) == list(wanted)
        for position, prompt in found.items():
            assert prompt.example is wanted[position].example
            assert torch.equal(prompt.ids, wanted[position].ids)
            assert torch.equal(prompt.pixels, wanted[position].pixels)
        now = range(now.stop, now.stop + 5)
    assert warnings >= 2


ENDING = """
import signal, sys, time
from plumbing.ahead import Ahead
# A job in the background may have inherited that it is not to be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)
def read(item):
    print("read", flush=True)
    time.sleep(0.2)
ahead = Ahead(read)
ahead.begin(range(1000))
time.sleep(0.3)
{end}
"""


@pytest.mark.parametrize("end", ["", "sys.exit('error: x')", "1 / 0", "time.sleep(60)"])
def test_however_a_program_ends_the_thread_ends_with_it(end):
    """The last of them is interrupted with ^C."""
    script, pipes = ENDING.format(end=end), dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True, **pipes)
    if "60" in end:
        run.stdout.readline()
        time.sleep(0.5)
        run.send_signal(signal.SIGINT)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == (0 if not end else -signal.SIGINT if "60" in end else 1)
    assert out.count("read") < 20
