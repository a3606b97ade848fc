"""Rule reward: is the response well formed, and is the boxed answer right?

    overall = 0.9 * accuracy + 0.1 * format          the released code (examples/reward_function/math.py)
    overall = accuracy                               the paper (section 2.1: R in {0, 1})

Symbolic comparison is the released grader's, mathruler, which parses model output with sympy. Model output is hostile: a
tower of powers keeps sympy busy for ever. So answers that are not settled by plain text go to a separate process,
which is killed when it takes too long; that counts as wrong, and is counted.
"""
import json
import re
import select
import signal
import subprocess
import sys

FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)
PLAIN = re.compile(r"-?\d{1,15}|[A-Za-z]{1,20}")            # compared as text: nothing to parse
CODE = re.compile(r"__|[A-Za-z_]\w*\s*\.\s*[A-Za-z_]|lambda|import|eval|exec|open|[\"'`;]")  # what sympy's parser might run


def boxed(text):
    """The content of the last \\boxed{...} with balanced braces, stripped; None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len("\\boxed{"):i].strip()
    return None


class Grader:
    """Decides whether two answers are equal, with a time limit for what has to be parsed."""

    def __init__(self, seconds=5.0):
        self.seconds, self.timeouts, self.worker = seconds, 0, None

    def equal(self, given, truth):
        """-> bool. `timeouts` counts the answers that were given up."""
        given, truth = given.strip(), truth.strip()
        if given == truth:
            return True
        if PLAIN.fullmatch(given) and PLAIN.fullmatch(truth):
            return given.lower() == truth.lower() or (given.lstrip("-").isdigit() and truth.lstrip("-").isdigit()
                                                      and int(given) == int(truth))
        if len(given) > 300 or CODE.search(given):
            return False
        if self.worker is None or self.worker.poll() is not None:
            self.worker = subprocess.Popen([sys.executable, __file__, "--worker"], stdin=subprocess.PIPE,
                                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            if self.worker.stdout.readline() != "ready\n":                       # its imports are not on the clock
                raise RuntimeError("the grader does not start; `python reward.py --worker` says why (is mathruler installed?)")
        try:
            self.worker.stdin.write(json.dumps([given, truth]) + "\n")
            self.worker.stdin.flush()
            if select.select([self.worker.stdout], [], [], self.seconds)[0]:
                return self.worker.stdout.readline().strip() == "True"
        except BrokenPipeError:                                                  # the worker died: as good as a time-out
            pass
        self.timeouts += 1
        self.close()
        return False

    def close(self):
        if self.worker is not None:
            self.worker.kill()
            self.worker.communicate()
            self.worker = None


def compute_score(response, truth, grader, kind="official"):
    """-> {"overall", "format", "accuracy"}, each between 0 and 1. kind: "official" or "paper"."""
    answer = boxed(response)
    accuracy = float(answer is not None and grader.equal(answer, truth))
    well_formed = float(FORMAT.fullmatch(re.sub(r"\s*(<|>|/)\s*", r"\1", response)) is not None)
    overall = accuracy if kind == "paper" else 0.9 * accuracy + 0.1 * well_formed
    return {"overall": overall, "format": well_formed, "accuracy": accuracy}


def _work():
    """The worker: one JSON pair a line in, one verdict a line out."""
    from mathruler.grader import grade_answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)              # Ctrl-C is for the run, which ends its worker itself
    grade_answer("a + \\frac{1}{2}", "b")                                         # sympy imports half of itself on first use
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(60)                                       # ends a worker whose run was killed while it was busy
        try:
            verdict = bool(grade_answer(*json.loads(line)))
        except Exception:                                                        # what cannot be parsed is not equal
            verdict = False
        signal.alarm(0)                                        # waiting for the next answer is not on this clock
        print(verdict, flush=True)


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    _work()
