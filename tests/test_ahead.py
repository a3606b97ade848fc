"""What a thread has read beforehand is what would have been read, and no thread outlives a run."""

import signal
import threading

import torch
from conftest import command

from plumbing.data.prompts import Example, Stream
from toy.task import ToyData


def test_a_thread_and_the_caller_share_the_work_and_wrong_guesses_are_dropped(capsys):
    readers, begun, go = {}, threading.Event(), threading.Event()

    class Slow(Stream):
        def __getitem__(self, position):
            readers[position] = threading.current_thread()
            if position == 0:
                begun.set()
                go.wait()
            if position == 3:
                raise ValueError("three cannot be read")
            return -position

    stream = Slow([], 1, None, None)
    assert stream.read([], later=[0, 1, 2]) == {}
    begun.wait()
    assert stream.read([2], later=[3, 4]) == {2: -2}  # the thread is still at 0
    assert readers[2] is threading.current_thread() is not readers[0]
    go.set()
    assert stream.read([4, 5, 3]) == {4: -4, 5: -5} and not stream.promised
    assert "left out: three cannot be read" in capsys.readouterr().out  # by whoever asks for it
    assert sorted(readers) == [0, 2, 3, 4, 5]


def test_a_stream_read_ahead_is_the_stream(processors, capsys):
    """Over the border of two epochs, and with guesses that come true, in part, and not at all."""
    data = [*(ToyData("train", 6)[i] for i in range(6))]
    data.append(Example("broken", "<image> ?", "3", [b"no picture"]))
    plain, ahead = (Stream(data, 1, *processors) for _ in range(2))
    now, warnings = range(0, 5), 0
    for later in (range(5, 10), range(10, 12), range(90, 95), range(14, 19), ()):
        wanted, warned = plain.read(now), capsys.readouterr().out.partition("(")[0]
        found, said = ahead.read(now, later), capsys.readouterr().out.partition("(")[0]
        assert said == warned and list(found) == list(wanted)
        warnings += warned.startswith("warning: left out: example broken")
        for position, prompt in found.items():
            assert torch.equal(prompt.ids, wanted[position].ids)
            assert torch.equal(prompt.pixels, wanted[position].pixels)
        now = range(now.stop, now.stop + 5)
    assert warnings >= 2


INTERRUPTED = """
import signal, time
from plumbing.data.prompts import Stream
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
encode = lambda *_: (print("read", flush=True), time.sleep(0.2))
Stream(range(1000), 1, None, None, encode).read([], later=range(1000))
time.sleep(0.3)
signal.raise_signal(signal.SIGINT)
"""


def test_when_a_program_ends_the_thread_ends_with_it():
    done = command("-c", INTERRUPTED)
    assert done.returncode == -signal.SIGINT and 0 < done.stdout.count("read") < 20
