"""Rule reward: is the response well formed, and is the boxed answer right?

    overall = 0.9 * accuracy + 0.1 * format          the released code (examples/reward_function/math.py)
    overall = accuracy                               the paper (section 2.1: R in {0, 1})

When two answers are the same is answers.py's concern. Model output is hostile: a tower of powers keeps sympy busy for ever. So answers that
are not settled by plain text go to worker processes, which are killed when they take too long; that counts as wrong, and is counted.
"""
import json
import queue
import re
import resource
import select
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

LONGEST = 300                                                # characters; what is longer is not an answer
MEMORY = 4 << 30                                             # bytes that a worker may take: 10**10**10 must not fill the machine
PLAIN = re.compile(r"-?\d{1,15}|[A-Za-z]{1,20}")             # compared as text: nothing to parse


def boxed(text):
    """The content of the last \\boxed{...} with balanced braces, stripped; None without one."""
    start, depth = text.rfind("\\boxed{"), 0
    for brace in re.finditer(r"[{}]", text[start:]) if start >= 0 else ():
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + len("\\boxed{"):start + brace.start()].strip()
    return None


class Grader:
    """Decides whether two answers are equal, with a time limit for what has to be parsed, in up to `workers` processes."""

    def __init__(self, seconds=5.0, workers=2):
        self.seconds, self.workers, self.timeouts, self.idle = seconds, workers, 0, queue.LifoQueue()
        for _ in range(workers):
            self.idle.put(None)                              # a worker starts when it is needed
        self.ask, self.lock = lru_cache(1 << 14)(self._ask), threading.Lock()    # a batch holds the same answer many times

    def equal(self, given, truth):
        """-> bool. `timeouts` counts the answers that were given up, each once: verdicts are remembered."""
        given, truth = given.strip(), truth.strip()
        if given == truth:
            return True
        if PLAIN.fullmatch(given) and PLAIN.fullmatch(truth) and given.isalpha() == truth.isalpha():
            return given.lower() == truth.lower() if given.isalpha() else int(given) == int(truth)
        return max(len(given), len(truth)) <= LONGEST and self.ask(given, truth)

    def grade_all(self, pairs):
        """[(given or None, truth), ...] -> [bool, ...], on all workers at once; the verdicts are remembered."""
        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(lambda pair: pair[0] is not None and self.equal(*pair), pairs))

    def _ask(self, given, truth):
        worker, answer = self.idle.get(), ""
        try:
            worker = worker if worker and worker.poll() is None else _start()
            worker.stdin.write(json.dumps([given, truth]) + "\n")
            worker.stdin.flush()
            if select.select([worker.stdout], [], [], self.seconds)[0]:
                answer = worker.stdout.readline().strip()
        except BrokenPipeError:                                                  # the worker died: as good as a time-out
            pass
        finally:
            if not answer:                                                       # also when Ctrl-C came in between: its answer is still to come
                worker = _stop(worker)
            self.idle.put(worker)
        with self.lock:
            self.timeouts += not answer
        return answer == "True"

    def close(self):
        for _ in range(self.workers):
            _stop(self.idle.get())
            self.idle.put(None)


def _start():
    """A worker that has its imports behind it: they are not on the clock."""
    worker = subprocess.Popen([sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True)
    if worker.stdout.readline() != "ready\n":
        _stop(worker)
        raise RuntimeError("the grader does not start; `python reward.py --worker` says why (is mathruler installed?)")
    return worker


def _stop(worker):
    if worker is not None:
        worker.kill()
        worker.communicate()


def compute_score(response, truth, grader=None, kind="official"):
    """-> {"overall", "format", "accuracy"}, each between 0 and 1. kind: "official" or "paper". Without a grader, one of its own for this call."""
    if grader is None:
        grader = Grader(workers=1)
        try:
            return compute_score(response, truth, grader, kind)
        finally:
            grader.close()
    answer = boxed(response)
    accuracy = float(answer is not None and grader.equal(answer, truth))
    # As the released pattern, <think>.*</think>.*\boxed{.*}.* without spaces around < > /, but in linear time.
    text, at = "".join(part.strip() for part in re.split("([<>/])", response)), 0
    well_formed = text.startswith("<think>")
    for mark in ("<think>", "</think>", "\\boxed{", "}"):
        found = text.find(mark, at)
        well_formed, at = well_formed and found >= 0, found + len(mark)
    overall = accuracy if kind == "paper" else 0.9 * accuracy + 0.1 * well_formed
    return {"overall": overall, "format": float(well_formed), "accuracy": accuracy}


def _work():
    """The worker: one JSON pair a line in, one verdict a line out."""
    from answers import verdict
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or hard > MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    signal.signal(signal.SIGINT, signal.SIG_IGN)              # Ctrl-C is for the run, which ends its workers itself
    verdict("a + \\frac{1}{2}", "b")                          # sympy imports half of itself on first use
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(60)                                       # ends a worker whose run was killed while it was busy
        answer = verdict(*json.loads(line))
        signal.alarm(0)                                        # waiting for the next answer is not on this clock
        print(answer, flush=True)


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    _work()
