"""How often each grader is right on the hand-written table.

    python bench/grading.py [results/grading.md]

Prints every case of tests/grading_table.py with the verdict of mathruler (the released grader), of
reward.py, and of math-verify where it is installed; writes the counts and the cases where they
differ as markdown. Last, the time that 2,000 responses take.
"""

import random
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from grading_table import TABLE  # noqa: E402
from mathruler.grader import grade_answer  # noqa: E402

from plumbing.grader import Grader  # noqa: E402
from reward import compute_score  # noqa: E402


def mathruler(given, truth):
    try:
        return bool(grade_answer(given, truth))
    except Exception:
        return False


def math_verify():
    """math-verify as a function like the others; None where it is not installed."""
    try:
        from math_verify import parse, verify
    except ImportError:
        return None

    def grade(given, truth):
        gold = parse(f"${truth}$" if "$" not in truth else truth)
        return bool(gold) and bool(verify(gold, parse(f"\\boxed{{{given}}}")))

    return grade


def responses(n, seed=0):
    """n responses like a batch's: eight to a question, half of them right, numbers, formulas,
    choices and words mixed."""
    rng, out = random.Random(seed), []
    for q in range(n // 8):
        k = rng.randrange(2, 99)
        truth, forms = rng.choice(
            [
                (str(k), [str(k), f"{k}.0", f"x={k}", f"{k} \\text{{ cm}}"]),
                (f"\\frac{{{k}}}{{7}}", [f"{k}/7", f"\\dfrac{{{k}}}{{7}}"]),
                (f"{k}\\sqrt{{3}}", [f"{k}\\sqrt3", f"\\frac{{{3 * k}}}{{\\sqrt{{3}}}}"]),
                ("B", ["B", "(B)", f"B. {k} cm"]),
                ("red", ["red", "Red"]),
                (f"x^2+{k}x", [f"x(x+{k})", f"{k}x+x^{{2}}"]),
                (f"({k},1)", [f"({k}, 1)"]),
            ]
        )
        others = [str(k + 1), "A", "blue", f"\\frac{{{k}}}{{{rng.randrange(8, 99)}}}", f"{k}x"]
        for _ in range(8):
            answer = rng.choice(forms if rng.random() < 0.5 else others)
            thought = f"<think> {'so we add and look again ' * 40} {q} </think>"
            out.append((f"{thought} \\boxed{{{answer}}}", truth))
    return out


def timed(n=2000):
    """Seconds for n ordinary responses, one after another, the workers' start included."""
    batch, grader, start = responses(n), Grader(), time.monotonic()
    scores = [compute_score(response, truth, grader) for response, truth in batch]
    seconds = time.monotonic() - start
    grader.close()
    return seconds, sum(s["accuracy"] for s in scores) / n, grader.timeouts


def main(path):
    grader, verify = Grader(), math_verify()
    graders = {"mathruler": mathruler, "reward.py": grader.equal}
    graders |= {"math-verify": verify} if verify else {}
    rows = [
        (given, truth, right, why, {name: grade(given, truth) for name, grade in graders.items()})
        for given, truth, right, why in TABLE
    ]
    grader.close()
    for given, truth, right, why, said in rows:
        marks = "  ".join(
            f"{name} {'yes' if yes else 'no':3}{' ' if yes == right else '!'}"
            for name, yes in said.items()
        )
        print(f"{given:45} {truth:40} {'yes' if right else 'no':4} {marks}  {why}")
    lines = [
        "# Graders on the hand-written table",
        "",
        f"`python bench/grading.py` on the {len(rows)} cases of `tests/grading_table.py`.",
        "",
        "| grader | right | takes wrong for right | takes right for wrong |",
        "|---|---|---|---|",
    ]
    for name in graders:
        too_kind, too_strict = (
            sum(said[name] is not right and right is r for _, _, right, _, said in rows)
            for r in (False, True)
        )
        which = name if name == "reward.py" else f"{name} {version(name)}"
        good = f"{len(rows) - too_kind - too_strict} of {len(rows)}"
        lines.append(f"| {which} | {good} | {too_kind} | {too_strict} |")
    worse = sum(said["mathruler"] == right != said["reward.py"] for _, _, right, _, said in rows)
    differ = [row for row in rows if len(set(row[4].values())) > 1]
    lines += [
        "",
        f"Cases where mathruler is right and reward.py is not: {worse}. The graders differ on the "
        f"{len(differ)} cases below, and agree on the other {len(rows) - len(differ)}.",
        "",
        f"| answer | truth | is it right | {' | '.join(graders)} | why |",
        "|---|---|---|" + "---|" * len(graders) + "---|",
    ]
    for given, truth, right, why, said in differ:
        a, b = (f"`{x}`".replace("|", "\\|") for x in (given, truth))
        verdicts = " | ".join("yes" if yes else "no" for yes in (right, *said.values()))
        lines.append(f"| {a} | {b} | {verdicts} | {why} |")
    Path(path).write_text("\n".join(lines) + "\n")
    print(*lines[4 : 7 + len(graders)], f"mathruler right, reward.py wrong: {worse}", sep="\n")
    seconds, accuracy, timeouts = timed()
    print(f"2,000 responses: {seconds:.1f} s, accuracy {accuracy:.3f}, {timeouts} time-outs")


if __name__ == "__main__":
    main(*(sys.argv[1:] or [ROOT / "results" / "grading.md"]))
