"""The rule reward and its time limit."""

import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from grading_table import BOXES, TABLE
from mathruler.grader import extract_boxed_content, grade_answer

import reward
from plumbing import answers
from plumbing import grader as grading_workers
from plumbing.grader import Grader
from plumbing.latex import flatten
from reward import boxed, compute_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
from grading import timed  # noqa: E402


@pytest.fixture(scope="module")
def grader():
    g = Grader(seconds=5)
    yield g
    g.close()


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


def test_boxed_takes_the_last_and_balances_braces():
    assert boxed("\\boxed{1} then \\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert boxed("nothing") is None


@pytest.mark.parametrize(
    "given, truth, same",
    [
        ("3", "3", True),
        ("03", "3", True),
        ("3", "4", False),
        ("red", "Red", True),
        ("red", "blue", False),
        ("-2", "2", False),
        ("\\frac{1}{2}", "0.5", True),
        ("1,000", "1000", True),
        ("x+1", "1+x", True),
        ("a3", "blue", False),
    ],
)
def test_equal(given, truth, same, grader):
    assert grader.equal(given, truth) is same


@pytest.mark.parametrize(
    "hostile",
    [
        "9^{9^{9^9}}",
        "9**9**9**9**9",
        "factorial(10**9)",
        "((((" * 60,
        "__import__('os').system('x')",
        "{" * 100_000,
        "\x00\ud7ff",
        "10**10**10",
    ],
)
def test_hostile_answers_are_wrong_soon(hostile):
    grader, start = Grader(seconds=2), time.monotonic()
    assert not grader.equal("1", "2") and not grader.equal(hostile, "\\frac{7}{3}")
    grader.close()
    assert time.monotonic() - start < 60  # generous: the worker's imports on a busy machine


def test_a_timeout_is_counted_and_the_next_answer_is_graded():
    grader = Grader(seconds=2)
    assert not grader.equal("9**9**9**9", "\\frac{1}{2}")
    assert grader.timeouts == 1
    grader.seconds = 20
    assert grader.equal("0.5", "\\frac{1}{2}") and grader.timeouts == 1
    grader.close()


def test_a_grader_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr(grading_workers, "WORKER", "import nowhere")
    with pytest.raises(RuntimeError, match="does not start"):
        Grader().equal("a+b", "b+a+0")


def released(given, truth):
    try:
        return bool(grade_answer(given, truth))
    except Exception:
        return False


def test_the_table_is_large_and_has_both_sides():
    assert len(TABLE) >= 200 and len({case[:2] for case in TABLE}) == len(TABLE)
    assert 0.3 < sum(right for _, _, right, _ in TABLE) / len(TABLE) < 0.7


def test_every_case_of_the_table(grader):
    wrong = [case for case in TABLE if grader.equal(*case[:2]) is not case[2]]
    assert not wrong and grader.timeouts == 0


def test_it_is_right_wherever_the_released_grader_is(grader):
    """And where that one is wrong, too: this is a better grader, not another one."""
    theirs, ours = (
        [f(given, truth) is right for given, truth, right, _ in TABLE]
        for f in (released, grader.equal)
    )
    assert not [case for case, they, we in zip(TABLE, theirs, ours) if they and not we]
    assert sum(ours) > sum(theirs) + 50
    page = " ".join((ROOT / "docs" / "grader.md").read_text().split())
    assert f"holds {len(TABLE)} pairs" in page and f"right on {sum(theirs)} of them" in page


def test_a_batch_is_graded_as_one_by_one(grader):
    pairs = [case[:2] for case in TABLE]
    fresh = Grader(seconds=20)
    assert fresh.grade_all(pairs) == [grader.equal(*pair) for pair in pairs]
    fresh.close()


@pytest.mark.parametrize("response, content, why", BOXES)
def test_boxes(response, content, why):
    assert boxed(response) == content
    assert extract_boxed_content(response) == (
        "None" if content is None else content
    )  # the released code's word for none


def test_the_format_is_the_released_pattern(grader):
    """On random strings of its marks; the pattern itself needs cubic time on a hostile response."""
    pattern, rng = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL), random.Random(0)
    for _ in range(3000):
        marks = rng.choices(
            ["<think>", "</think>", "< think >", "</ think>", "\\boxed{", "}", " ", "\n", "x", "{"],
            k=rng.randrange(9),
        )
        response = "".join(
            [rng.choice(["<think>", " <think>", ""]), *marks, rng.choice(["", "\\boxed{}"])]
        )
        expected = pattern.fullmatch(re.sub(r"\s*(<|>|/)\s*", r"\1", response)) is not None
        assert compute_score(response, "3", grader)["format"] == expected, response


def test_a_grader_is_optional():
    assert compute_score(GOOD, "3") == {"overall": 1.0, "format": 1.0, "accuracy": 1.0}


INJECTIONS = [
    "__import__('os').system('touch q')",
    "open('q','w')",
    "\\text{open}('q','w')",
    "exec(\"open('q','w')\")",
    "(lambda: open('q','w'))()",
    "$(touch q)",
    "\\_\\_import\\_\\_('os').system('touch q')",
    "().__class__.__base__.__subclasses__() + open('q','w')",
    "x.open('q','w')",
    "[open('q','w') for x in (1,)]",
    "sqrt(open('q','w'))",
    "ｏｐｅｎ('q','w')",
    "\\frac{open('q','w')}{2}",
    "\\text{op}\\text{en}('q','w')",
    "o{}pen('q','w')",
    "\\sqrt{o p e n('q','w')}",
    "`touch q`",
]


@pytest.mark.parametrize("text", INJECTIONS)
def test_an_answer_is_never_executed(text, tmp_path, monkeypatch, grader):
    monkeypatch.chdir(tmp_path)
    fresh = Grader(seconds=20, workers=1)  # its worker lives in the empty folder
    for answer in (text, f"1,{text}", f"x={text}", f"({text}, 2)", f"{text} cm"):
        assert not fresh.equal(answer, "\\frac{7}{3}") and not fresh.equal("x+1", answer)
        assert not answers.verdict(answer, "x=3")
    fresh.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call",
    [
        "test()",
        "exit()",
        "quit()",
        "preview(x)",
        "x=test()",
        "x=exit()",
        "2exit()",
        "\\sin exit()",
        "doctest()",
    ],
)
def test_no_function_of_sympy_or_python_is_called_by_name(call):
    assert not answers.verdict(call, "x=3") and not answers.verdict("2x=6", call)
    with pytest.raises(ValueError):
        answers.formula(answers.cased(flatten(call)))


@pytest.mark.parametrize(
    "response",
    [
        "<think>" + "</think>\\boxed{" * 50_000,
        "<think>" + " " * 1_000_000 + "\\boxed{",
        "{" * 2_000_000,
        "\\boxed{" + "{" * 1_000_000,
        "\\boxed{" + "9" * 290 + "§}",
        "\\boxed{" + "sqrt" * 70 + "§}",
        "\\boxed{" + "5 apples" * 30 + "§}",
        "\\boxed{" + "{" * 500_000 + "}" * 500_001,
        "\\boxed{" + "9" * 1_000_000 + "}",
        "\\boxed{\U0001d7d9\u202e\ud800\x00}",
        "\\boxed{" + "(" * 140 + ")" * 140 + "}",
        "\\boxed{" + "\\frac{1}{" * 25 + "2" + "}" * 25 + "}",
        "\\boxed{" + "-" * 290 + "1}",
        "\\boxed{" + "sqrt" * 70 + "}",
        "\\boxed{" + "a " * 140 + "}",
        "\\boxed{" + "1 cm " * 55 + "}",
        "\\boxed{" + "x," * 140 + "}",
        "\\boxed{" + "±" * 200 + "}",
        "\\boxed{" + "±1," * 90 + "}",
    ],
)
def test_hostile_responses_are_wrong_soon(response):
    grader, start = Grader(seconds=2), time.monotonic()
    assert compute_score(response, "\\frac{7}{3}", grader)["accuracy"] == 0
    grader.close()
    assert time.monotonic() - start < 30 and grader.timeouts == 0


def test_timeouts_of_a_batch_are_counted_and_the_others_graded():
    grader = Grader(seconds=2)
    # Both workers then have their imports behind them.
    grader.grade_all([("1/2", "0.5"), ("2/4", "0.5")])
    pairs = [
        ("9**9**9**9", "\\frac{1}{2}"),
        ("0.5", "\\frac{1}{2}"),
        ("10**10**10", "\\frac{1}{2}"),
        ("1/2", "\\frac{1}{2}"),
    ]
    assert grader.grade_all(pairs) == [False, True, False, True] and grader.timeouts == 2
    grader.close()


def test_a_worker_that_was_killed_is_replaced():
    grader = Grader(seconds=20, workers=1)
    assert grader.equal("a+b", "b+a")
    worker = grader.idle.get()
    worker.kill()
    worker.wait()
    grader.idle.put(worker)
    assert grader.equal("a+c", "c+a") and grader.timeouts == 0
    grader.close()


def test_a_worker_ends_with_its_run():
    code = (
        "from plumbing.grader import Grader; import os; g = Grader(); "
        "assert g.equal('a+b', 'b+a'); print(g.idle.queue[-1].pid, flush=True); os._exit(0)"
    )
    pid = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(reward.__file__).parent,
        text=True,
        capture_output=True,
        timeout=60,
    ).stdout.strip()
    status, deadline = Path(f"/proc/{pid}/stat"), time.monotonic() + 20
    while status.exists() and status.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pid and (not status.exists() or status.read_text().split()[2] == "Z")


def test_two_thousand_responses_are_graded_soon():
    seconds, accuracy, timeouts = timed(2000)  # 1.6 s on 2 cores; the margin is for a busy machine
    assert seconds < 30 and 0.4 < accuracy < 0.6 and timeouts == 0


def test_a_brace_that_is_only_a_sign_does_not_count():
    """As in LaTeX; the released code counts it, and finds no box here."""
    system = "\\left\\{\\begin{array}{l} x=1 \\\\ y=2 \\end{array}\\right."
    assert boxed(f"so \\boxed{{{system}}}") == system
    assert boxed("\\boxed{1\\}") is None
