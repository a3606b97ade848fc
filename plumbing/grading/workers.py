"""Answers compared in processes that can be killed, since model output is hostile.

An answer that is not settled as plain text goes to a worker process. One that takes too much time
or memory there is given up: that counts as wrong, is counted, and remembered. Time is the worker's
own, on a processor. A worker that ends otherwise, by a signal or for want of memory elsewhere, has
said nothing of the answer, which is asked again.
"""

import json
import queue
import re
import selectors
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import psutil

LONGEST = 300  # characters; what is longer is not an answer
BARE = re.compile(r"-?\d{1,15}|[A-Za-z]{1,20}")  # compared as text: nothing to parse
PROJECT = Path(__file__).resolve().parents[2]
# The project comes last on the path, so that its names hide no other package's.
WORKER = (
    "import sys; sys.path.append(sys.argv[1]); from plumbing.grading.answers import work; work()"
)


class Grader:
    """Decides whether two answers are equal, in up to `workers` processes of their own.

    seconds: of a processor, for an answer; budget: for all answers of one grade_all, beyond which
    none is parsed. `timeouts` counts the answers that were given up, each once: verdicts are
    remembered.
    """

    def __init__(self, seconds=1.0, workers=2, budget=20.0):
        self.seconds, self.workers, self.budget = seconds, workers, budget
        self.timeouts, self.spent = 0, 0.0
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
        if BARE.fullmatch(given) and BARE.fullmatch(truth) and given.isalpha() == truth.isalpha():
            return given.lower() == truth.lower() if given.isalpha() else int(given) == int(truth)
        try:
            return max(len(given), len(truth)) <= LONGEST and self.ask(given, truth)
        except Unheard:
            return False

    def grade_all(self, pairs):
        """[(given or None, truth), ...] -> [bool, ...], on all workers at once, each pair once."""
        self.spent = 0.0
        different = dict.fromkeys(pair for pair in pairs if pair[0] is not None)
        with ThreadPoolExecutor(self.workers) as threads:
            right = dict(zip(different, threads.map(lambda pair: self.equal(*pair), different)))
        self.spent = 0.0
        return [right.get(pair, False) for pair in pairs]

    def _ask(self, given, truth):
        """The verdict on an answer. Raises Unheard, which is not remembered, where none was heard:
        two workers ended over it, or the budget is spent."""
        heard = None
        for _ in range(2 if self.spent < self.budget else 0):
            worker = self.idle.get()
            try:
                worker = worker if worker and worker.poll() is None else _start()
                before = _seconds_of(worker)
                heard = self._hear(worker, [given, truth], before)
                with self.lock:
                    self.spent += _seconds_of(worker) - before
            finally:
                if heard not in VERDICTS:  # also when Ctrl-C came in between
                    worker = _stop(worker)
                self.idle.put(worker)
            if heard is not None:
                break
        if heard not in VERDICTS:
            with self.lock:
                self.timeouts += 1
        if heard is None:
            raise Unheard
        return heard == "True"

    def _hear(self, worker, question, before):
        """What a worker says -> one of VERDICTS, or another text where it gave the answer up; None
        if it ended, or is asleep for long and may never wake."""
        patience = time.monotonic() + PATIENCE * self.seconds
        try:
            worker.stdin.write(json.dumps(question) + "\n")
            worker.stdin.flush()
        except BrokenPipeError:
            return None
        with selectors.DefaultSelector() as selector:  # select() knows 1,024 files at the most
            selector.register(worker.stdout, selectors.EVENT_READ)
            while not selector.select(min(0.2, self.seconds)):
                if _seconds_of(worker) - before > self.seconds:
                    return "too long"
                if time.monotonic() > patience:
                    return None
        return worker.stdout.readline().strip() or None

    def close(self):
        """End the workers."""
        for worker in [self.idle.get() for _ in range(self.workers)]:
            self.idle.put(_stop(worker))


class Unheard(Exception):
    """No verdict on an answer was heard."""


VERDICTS = ("True", "False")
PATIENCE = 12  # times an answer's seconds on a processor that a worker may be silent


def _seconds_of(worker):
    """How long a worker has been on a processor."""
    try:
        return sum(psutil.Process(worker.pid).cpu_times()[:2])
    except psutil.Error:
        return 0.0


def _start():
    """A worker that has its imports behind it: they are not on the clock."""
    # -P: neither must the folder that the run was started in.
    command = [sys.executable, "-P", "-c", WORKER, str(PROJECT)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    worker = subprocess.Popen(command, text=True, encoding="utf-8", **pipes)
    if worker.stdout.readline() != "ready\n":
        _stop(worker)
        why = f"`python -c 'import plumbing.grading.answers'` in {PROJECT} says why"
        raise RuntimeError(f"the grader does not start; {why}")
    return worker


def _stop(worker):
    if worker is not None:
        worker.kill()
        worker.communicate()
