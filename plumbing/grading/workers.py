"""Answers compared in processes that can be killed, since model output is hostile.

An answer that is not settled as plain text goes to a worker process, which is killed when it takes
too long, and ends when it takes too much memory; that counts as wrong, and is counted.
"""

import json
import queue
import re
import select
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

LONGEST = 300  # characters; what is longer is not an answer
BARE = re.compile(r"-?\d{1,15}|[A-Za-z]{1,20}")  # compared as text: nothing to parse
PROJECT = Path(__file__).resolve().parents[2]
# The project comes last on the path, so that its names hide no other package's.
WORKER = (
    "import sys; sys.path.append(sys.argv[1]); from plumbing.grading.answers import work; work()"
)


class Grader:
    """Decides whether two answers are equal, in up to `workers` processes of their own. `timeouts`
    counts the answers that were given up, each once: verdicts are remembered."""

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
        if BARE.fullmatch(given) and BARE.fullmatch(truth) and given.isalpha() == truth.isalpha():
            return given.lower() == truth.lower() if given.isalpha() else int(given) == int(truth)
        return max(len(given), len(truth)) <= LONGEST and self.ask(given, truth)

    def grade_all(self, pairs):
        """[(given or None, truth), ...] -> [bool, ...], on all workers at once, each pair once."""
        different = dict.fromkeys(pair for pair in pairs if pair[0] is not None)
        with ThreadPoolExecutor(self.workers) as threads:
            right = dict(zip(different, threads.map(lambda pair: self.equal(*pair), different)))
        return [right.get(pair, False) for pair in pairs]

    def _ask(self, given, truth):
        worker, answer = self.idle.get(), ""
        try:
            worker = worker if worker and worker.poll() is None else _start()
            worker.stdin.write(json.dumps([given, truth]) + "\n")
            worker.stdin.flush()
            if select.select([worker.stdout], [], [], self.seconds)[0]:
                answer = worker.stdout.readline().strip()
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
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    worker = subprocess.Popen(command, text=True, **pipes)
    if worker.stdout.readline() != "ready\n":
        _stop(worker)
        why = f"`python -c 'import plumbing.grading.answers'` in {PROJECT} says why"
        raise RuntimeError(f"the grader does not start; {why}")
    return worker


def _stop(worker):
    if worker is not None:
        worker.kill()
        worker.communicate()
