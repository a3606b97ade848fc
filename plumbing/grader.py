"""Answers compared in processes that can be killed, since model output is hostile.

A tower of powers keeps sympy busy for ever, or fills the memory. So an answer that is not settled
as plain text goes to a worker process, which is killed when it takes too long or too much; that
counts as wrong, and is counted.
"""

import json
import queue
import re
import select
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import psutil

LONGEST = 300  # characters; what is longer is not an answer
MEMORY = 4 << 30  # bytes that a worker may take
WATCH = 0.05  # seconds between two looks at a worker's memory
PLAIN = re.compile(r"-?\d{1,15}|[A-Za-z]{1,20}")  # compared as text: nothing to parse
PROJECT = Path(__file__).resolve().parent.parent
# The project comes last on the path, so that its names hide no other package's.
WORKER = "import sys; sys.path.append(sys.argv[1]); from plumbing.answers import work; work()"


class Grader:
    """Decides whether two answers are equal, in up to `workers` processes of their own.

    `timeouts` counts the answers that were given up, each once: verdicts are remembered.
    """

    def __init__(self, seconds=5.0, workers=2):
        self.seconds, self.workers, self.timeouts = seconds, workers, 0
        self.idle = queue.LifoQueue()
        for _ in range(workers):
            self.idle.put(None)  # a worker starts when it is needed
        self.ask = lru_cache(1 << 14)(self._ask)  # a batch holds the same answer many times
        self.lock = threading.Lock()

    def equal(self, given, truth):
        """-> bool"""
        given, truth = given.strip(), truth.strip()
        if given == truth:
            return True
        both = PLAIN.fullmatch(given) and PLAIN.fullmatch(truth)
        if both and given.isalpha() == truth.isalpha():
            if given.isalpha():
                return given.lower() == truth.lower()
            return int(given) == int(truth)
        return max(len(given), len(truth)) <= LONGEST and self.ask(given, truth)

    def grade_all(self, pairs):
        """[(given or None, truth), ...] -> [bool, ...], on all workers at once, each pair once."""
        different = list(dict.fromkeys(pair for pair in pairs if pair[0] is not None))
        with ThreadPoolExecutor(self.workers) as threads:
            verdicts = threads.map(lambda pair: self.equal(*pair), different)
            known = dict(zip(different, verdicts))
        return [known.get(pair, False) for pair in pairs]

    def _ask(self, given, truth):
        worker, answer = self.idle.get(), ""
        try:
            worker = worker if worker and worker.poll() is None else _start()
            worker.stdin.write(json.dumps([given, truth]) + "\n")
            worker.stdin.flush()
            answer = _listen(worker, self.seconds)
        except BrokenPipeError:  # the worker died: as good as a time-out
            pass
        finally:
            if not answer:  # also when Ctrl-C came in between: its answer is still to come
                worker = _stop(worker)
            self.idle.put(worker)
        with self.lock:
            self.timeouts += not answer
        return answer == "True"

    def close(self):
        """End the workers."""
        for _ in range(self.workers):
            _stop(self.idle.get())
            self.idle.put(None)


def _start():
    """A worker that has its imports behind it: they are not on the clock."""
    # -P: neither must the folder that the run was started in.
    command = [sys.executable, "-P", "-c", WORKER, str(PROJECT)]
    pipe = subprocess.PIPE
    worker = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    )
    if worker.stdout.readline() != "ready\n":
        _stop(worker)
        raise RuntimeError(
            f"the grader does not start; `python -c 'import plumbing.answers, sympy'` in {PROJECT} "
            "says why"
        )
    return worker


def _listen(worker, seconds):
    """The worker's answer, or "" if it takes longer or more memory than it may."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([worker.stdout], [], [], min(WATCH, left))[0]:
            return worker.stdout.readline().strip()
        try:
            if psutil.Process(worker.pid).memory_info().rss > MEMORY:
                return ""
        except psutil.Error:  # it is gone
            return ""
    return ""


def _stop(worker):
    if worker is not None:
        worker.kill()
        worker.communicate()
