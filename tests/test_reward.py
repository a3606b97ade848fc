"""The rule reward, and the worker processes that grade answers."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from grading_table import BOXES, TABLE

from plumbing.grading import workers as grading_workers
from plumbing.grading.workers import Grader
from reward import boxed, compute_score

GOOD = "<think> red : 1 + 0 = 1 </think> \\boxed{ 3 }"


@pytest.mark.parametrize(
    "response, truth, overall, paper",
    [
        (GOOD, "3", 1.0, 1.0),
        (GOOD, "4", 0.1, 0.0),
        ("\\boxed{3}", "3", 0.9, 1.0),  # right, but never thought
        ("<think> hm </think> 3", "3", 0.0, 0.0),  # never boxed
        ("<think> hm </think> \\boxed{3", "3", 0.0, 0.0),  # never closed
        ("hello <think> hm </think> \\boxed{3}", "3", 0.9, 1.0),
        ("", "3", 0.0, 0.0),
    ],
)
def test_score(response, truth, overall, paper, grader):
    assert compute_score(response, truth, grader)["overall"] == pytest.approx(overall)
    assert compute_score(response, truth, grader, "paper")["overall"] == paper


def test_a_grader_is_optional():
    assert compute_score(GOOD, "3") == {"overall": 1.0, "format": 1.0, "accuracy": 1.0}


@pytest.mark.parametrize("response, content, why", BOXES)
def test_boxes(response, content, why):
    assert boxed(response) == content


def test_boxes_are_the_released_ones():
    released = pytest.importorskip("mathruler.grader").extract_boxed_content
    assert [released(response) for response, _, _ in BOXES] == [
        "None" if content is None else content for _, content, _ in BOXES
    ]  # the released code's word for none


def test_a_brace_that_is_only_a_sign_does_not_count():
    """As in LaTeX; the released code counts it, and finds no box here."""
    system = "\\left\\{\\begin{array}{l} x=1 \\\\ y=2 \\end{array}\\right."
    assert boxed(f"so \\boxed{{{system}}}") == system
    assert boxed("\\boxed{1\\}") is None


def test_the_format_is_the_released_pattern(grader):
    """On random strings of its marks; the pattern itself needs cubic time on a hostile response."""
    pattern, rng = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL), random.Random(0)
    for _ in range(3000):
        marks = rng.choices(
            ["<think>", "</think>", "< think >", "</ think>", "\\boxed{", "}", " ", "\n", "x", "{"],
            k=rng.randrange(9),
        )
        begin, end = rng.choice(["<think>", " <think>", ""]), rng.choice(["", "\\boxed{}"])
        response = "".join([begin, *marks, end])
        expected = pattern.fullmatch(re.sub(r"\s*(<|>|/)\s*", r"\1", response)) is not None
        assert compute_score(response, "3", grader)["format"] == expected, response


def test_numbers_and_words_need_no_worker():
    grader = Grader()
    assert grader.equal("03", "3") and grader.equal(" red", "Red") and grader.equal("x+1", "x+1")
    assert not grader.equal("-2", "2") and not grader.equal("red", "blue")
    assert not grader.equal("9" * 301, "9" * 302)  # longer than an answer
    assert list(grader.idle.queue) == [None, None] and grader.timeouts == 0


def test_a_batch_is_graded_as_one_by_one(grader):
    """Every case of the table, one of them twice, and a response without an answer."""
    pairs, right = [case[:2] for case in TABLE], [case[2] for case in TABLE]
    assert grader.grade_all([*pairs, pairs[0], (None, "3")]) == [*right, right[0], False]
    assert [grader.equal(*pair) for pair in pairs] == right and grader.timeouts == 0


def test_it_is_right_wherever_the_released_grader_is():
    """And where that one is wrong, too: this is a better grader, not another one."""
    released = pytest.importorskip("mathruler.grader").grade_answer
    theirs = 0
    for given, truth, right, _ in TABLE:
        try:
            theirs += bool(released(given, truth)) is right
        except Exception:
            theirs += not right
    page = " ".join((ROOT / "docs" / "grader.md").read_text().split())
    assert f"holds {len(TABLE)} pairs" in page and f"right on {theirs} of them" in page


def test_a_grader_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr(grading_workers, "WORKER", "import nowhere")
    with pytest.raises(RuntimeError, match="does not start"):
        Grader().equal("a+b", "b+a+0")


AS_IT_IS = grading_workers.WORKER


def worker_that(monkeypatch, answer, does):
    """Let a worker do this when it reads that answer."""
    odd = (
        "from plumbing.grading import answers; read = answers.formula; import os, signal, time; "
        f"answers.formula = lambda x: ({does}) if x == {answer!r} else read(x); "
    )
    code = AS_IT_IS.replace("from plumbing", f"{odd}from plumbing", 1)
    monkeypatch.setattr(grading_workers, "WORKER", code)


def test_an_answer_that_takes_too_long_is_given_up_once_and_remembered(monkeypatch):
    """And the others are graded, by a new worker."""
    worker_that(monkeypatch, "7/9", "[None for _ in iter(int, 1)]")
    grader = Grader(seconds=0.5)
    pairs = [("3/6", "0.5"), ("7/9", "14/18"), ("4/8", "0.5"), ("7/9", "14/18")]
    assert grader.grade_all(pairs) == [True, False, True, False] and grader.timeouts == 1
    assert not grader.equal("7/9", "14/18") and grader.timeouts == 1
    grader.close()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_an_answer_is_not_wrong_because_its_judge_was_ended_or_sleeps(sent, monkeypatch):
    """Of the out-of-memory killer, a scheduler, and a machine that is suspended: twelve times half
    a second later it is asked again."""
    worker_that(monkeypatch, "7/9", "(time.sleep(1), read(x))[1]")
    grader = Grader(seconds=0.5, workers=1)
    assert grader.equal("1/2", "0.5")
    (worker,) = grader.idle.queue
    worker_that(monkeypatch, "nothing", "0")  # what comes after it is as usual
    threading.Timer(0.3, os.kill, (worker.pid, sent)).start()
    assert grader.equal("7/9", "14/18") and grader.timeouts == 0
    grader.close()


def test_no_verdict_that_was_not_heard_is_remembered(monkeypatch):
    worker_that(monkeypatch, "7/9", "os.kill(os.getpid(), signal.SIGKILL)")
    grader = Grader(workers=1)
    assert not grader.equal("7/9", "14/18") and grader.timeouts == 1
    worker_that(monkeypatch, "nothing", "0")
    assert grader.equal("7/9", "14/18") and grader.timeouts == 1
    grader.close()


def test_a_batch_has_a_budget(monkeypatch):
    """What is asked for beyond it is given up, and the next batch has it whole."""
    worker_that(monkeypatch, "7/9", "[None for _ in iter(int, 1)]")
    grader = Grader(seconds=0.5, workers=1, budget=0.4)
    assert grader.grade_all([("7/9", "14/18"), ("1/4", "0.25"), ("5", "5")]) == [False, False, True]
    assert grader.timeouts == 2
    assert grader.grade_all([("7/9", "14/18"), ("1/4", "0.25")]) == [False, True]
    assert grader.timeouts == 2
    grader.close()


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_a_process_with_many_files_open_grades_and_leaves_no_worker_behind():
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    kept = [open(os.devnull) for _ in range(1100)]
    try:
        grader = Grader()
        assert grader.grade_all([("1/2", "0.5"), ("2/4", "0.5"), ("1/3", "0.5")])[:2] == [True] * 2
        workers = [worker for worker in grader.idle.queue if worker]
        grader.close()
        assert workers and all(worker.poll() is not None for worker in workers)
    finally:
        for file in kept:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such limit")
def test_a_worker_that_takes_too_much_memory_ends(monkeypatch):
    worker_that(monkeypatch, "7/9", "bytearray(5 << 30)")
    grader = Grader(seconds=20, workers=1)
    assert not grader.equal("7/9", "14/18") and grader.timeouts == 1
    assert grader.equal("1/2", "0.5") and grader.timeouts == 1
    grader.close()


def test_a_worker_ends_with_its_run():
    code = (
        "from plumbing.grading.workers import Grader; import os; g = Grader(); "
        "assert g.equal('a+b', 'b+a'); print(g.idle.queue[-1].pid, flush=True); os._exit(0)"
    )
    pid = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip()
    status, deadline = Path(f"/proc/{pid}/stat"), time.monotonic() + 20
    while status.exists() and status.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pid and (not status.exists() or status.read_text().split()[2] == "Z")


HOSTILE = [
    *(
        "9^{9^{9^9}}",
        "10**10**10",
        "(((n!)!)!)!",
        "e^{e^{e^{e^x}}}",
        "(2^{2^{2x}})!",
        "x" + "^x" * 9,
    ),
    *("((((" * 60, "(" * 140 + ")" * 140, "\\frac{1}{" * 25 + "2" + "}" * 25, "-" * 290 + "1"),
    *("{" * 100_000, "{" * 290, "\x00\ud7ff", "\U0001d7d9\u202e\ud800\x00", "ﷺ" * 290, "½" * 290),
    *("9" * 290 + "§", "9" * 1_000_000, "sqrt" * 70 + "§", "5 apples" * 30 + "§", "a " * 140),
    *("1 cm " * 55 + "§", "5 m" + " m" * 140 + "§", "x," * 140, "±" * 200, "±1," * 90, "= " * 140),
    *("the answer is " * 20, "\\text{" * 45 + "}" * 45, "\\begin{pmatrix}" * 15, "[0,1" * 70),
]


def test_hostile_answers_are_wrong_soon():
    """So soon that none of them counts as a time-out."""
    grader, start = Grader(seconds=10), time.monotonic()
    assert not any(grader.grade_all([(x, "\\frac{7}{3}") for x in HOSTILE]))
    grader.close()
    assert grader.timeouts == 0
    assert time.monotonic() - start < 30  # 3 s on 2 busy cores


@pytest.mark.parametrize(
    "response",
    [
        "<think>" + "</think>\\boxed{" * 50_000,
        "<think>" + " " * 1_000_000 + "\\boxed{",
        "{" * 2_000_000,
        "\\boxed{" + "{" * 1_000_000,
        "\\boxed{" + "{" * 500_000 + "}" * 500_001,
    ],
)
def test_hostile_responses_are_wrong_soon(response, grader):
    start = time.monotonic()
    assert compute_score(response, "\\frac{7}{3}", grader)["accuracy"] == 0
    assert time.monotonic() - start < 30
