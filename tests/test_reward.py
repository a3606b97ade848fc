"""The rule reward and its time limit."""
import time

import pytest

import reward
from reward import Grader, boxed, compute_score


@pytest.fixture(scope="module")
def grader():
    g = Grader(seconds=5)
    yield g
    g.close()


GOOD = "<think> red : 1 + 0 = 1 </think> \\boxed{ 3 }"


@pytest.mark.parametrize("response, truth, overall, paper", [
    (GOOD, "3", 1.0, 1.0),
    (GOOD, "4", 0.1, 0.0),
    ("\\boxed{3}", "3", 0.9, 1.0),                        # right, but never thought
    ("<think> hm </think> 3", "3", 0.0, 0.0),             # never boxed
    ("<think> hm </think> \\boxed{3", "3", 0.0, 0.0),     # never closed
    ("hello <think> hm </think> \\boxed{3}", "3", 0.9, 1.0),
    ("", "3", 0.0, 0.0),
])
def test_score(response, truth, overall, paper, grader):
    assert compute_score(response, truth, grader)["overall"] == pytest.approx(overall)
    assert compute_score(response, truth, grader, "paper")["overall"] == paper


def test_boxed_takes_the_last_and_balances_braces():
    assert boxed("\\boxed{1} then \\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert boxed("nothing") is None


@pytest.mark.parametrize("given, truth, same", [
    ("3", "3", True), ("03", "3", True), ("3", "4", False), ("red", "Red", True), ("red", "blue", False), ("-2", "2", False),
    ("\\frac{1}{2}", "0.5", True), ("1,000", "1000", True), ("x+1", "1+x", True), ("a3", "blue", False),
])
def test_equal(given, truth, same, grader):
    assert grader.equal(given, truth) is same


@pytest.mark.parametrize("hostile", ["9^{9^{9^9}}", "9**9**9**9**9", "factorial(10**9)", "((((" * 60, "__import__('os').system('x')",
                                     "{" * 100_000, "\x00\ud7ff", "10**10**10"])
def test_hostile_answers_are_wrong_soon(hostile):
    grader, start = Grader(seconds=2), time.monotonic()
    assert not grader.equal("1", "2") and not grader.equal(hostile, "\\frac{7}{3}")
    grader.close()
    assert time.monotonic() - start < 60                  # generous: the worker's imports on a busy machine


def test_a_timeout_is_counted_and_the_next_answer_is_graded():
    grader = Grader(seconds=2)
    assert not grader.equal("9**9**9**9", "\\frac{1}{2}")
    assert grader.timeouts == 1
    grader.seconds = 20
    assert grader.equal("0.5", "\\frac{1}{2}") and grader.timeouts == 1
    grader.close()


def test_a_grader_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr(reward, "__file__", "/nowhere/reward.py")
    with pytest.raises(RuntimeError, match="does not start"):
        Grader().equal("a+b", "b+a+0")
