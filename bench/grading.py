"""How often each grader is right on the hand-written table.

    pip install mathruler==0.1.0 pylatexenc==2.11 math-verify==0.9.0
    python bench/grading.py [results/grading.md]

Grades every case of tests/grading_table.py with reward.py's grader, and with mathruler (the
released one) and math-verify where installed; writes counts and the cases where they differ.
"""

import argparse
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from grading_table import TABLE  # noqa: E402

from plumbing.grading.workers import Grader  # noqa: E402


def installed_graders():
    """{name: f(given, truth)} of the other graders, as far as they are installed."""
    graders = {}
    with suppress(ImportError):
        from mathruler.grader import grade_answer

        graders["mathruler"] = grade_answer
    with suppress(ImportError):
        from math_verify import parse, verify

        def math_verify(given, truth):
            gold = parse(f"${truth}$" if "$" not in truth else truth)
            return gold and verify(gold, parse(f"\\boxed{{{given}}}"))

        graders["math-verify"] = math_verify
    return graders


def verdict_of(grade, given, truth):
    """-> bool; a grader that fails has said no."""
    try:
        return bool(grade(given, truth))
    except Exception:
        return False


def main(path):
    grader, others = Grader(), installed_graders()
    graders = others | {"reward.py": grader.equal}
    said = {name: [verdict_of(f, *case[:2]) for case in TABLE] for name, f in graders.items()}
    grader.close()
    right = [case[2] for case in TABLE]
    lines = [
        "# Graders on the hand-written table",
        "",
        f"`python bench/grading.py` on the {len(TABLE)} cases of `tests/grading_table.jsonl`.",
        "",
        "| grader | right | takes wrong for right | takes right for wrong |",
        "|---|---|---|---|",
    ]
    for name, verdicts in said.items():
        too_kind = sum(yes and not r for yes, r in zip(verdicts, right))
        too_strict = sum(r and not yes for yes, r in zip(verdicts, right))
        which = f"{name} {version(name)}" if name in others else name
        good = f"{len(TABLE) - too_kind - too_strict} of {len(TABLE)}"
        lines.append(f"| {which} | {good} | {too_kind} | {too_strict} |")
    rows = [row for row in zip(TABLE, *said.values()) if len(set(row[1:])) > 1]
    lines += ["", f"They differ on the {len(rows)} cases below, and agree on the others.", ""]
    lines += [f"| answer | truth | is it right | {' | '.join(said)} | why |"]
    lines += [f"{'|---' * (4 + len(said))}|"]
    for (given, truth, wanted, why), *verdicts in rows:
        a, b = (f"`{x}`".replace("|", "\\|") for x in (given, truth))
        answers = " | ".join("yes" if yes else "no" for yes in (wanted, *verdicts))
        lines.append(f"| {a} | {b} | {answers} | {why} |")
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(*lines[4 : 6 + len(said)], sep="\n")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    page = ROOT / "results" / "grading.md"
    p.add_argument("page", nargs="?", type=Path, default=page, help="what is written")
    main(p.parse_args().page)
