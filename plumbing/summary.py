"""What the responses to sets of questions come to: avg@n, averages over sets, a table."""

import math
import random

from plumbing.responses import by_question
from plumbing.sources import BENCHMARKS


def summarise(records, resamples=1000):
    """Records of one set -> avg@n accuracy with a 95 % bootstrap interval over questions, pass@n,
    and other means."""
    questions = by_question(records)
    means = [sum(v) / len(v) for v in questions.values()]
    draw = random.Random(0)
    boots = [sum(draw.choices(means, k=len(means))) / len(means) for _ in range(resamples)]
    boots.sort()
    followed = [r["followed"] for r in records if "followed" in r]  # of the toy's wrong hints
    # Of what every record has: other programs' files do not say all of it.
    known = [k for k in ("format", "finished", "tokens") if all(k in r for r in records)]
    mean = {k: sum(r[k] for r in records) / len(records) for k in known}
    return {
        "accuracy": sum(means) / len(means),
        "low": boots[int(0.025 * resamples)],
        "high": boots[int(0.975 * resamples)],
        "pass": sum(max(v) == 1 for v in questions.values()) / len(questions),
        "format": mean.get("format", math.nan),
        "cut_off": 1 - mean.get("finished", math.nan),
        "tokens": mean.get("tokens", math.nan),
        "questions": len(means),
        "n": len(records) // len(means),
        **({"followed": sum(followed) / len(followed)} if followed else {}),
    }


def macro(values):
    """{set: value} -> {General, Vision, Overall: the paper's mean over sets}, of those columns of
    which all sets are there."""
    columns = {"General": [], "Vision": [], "Overall": list(BENCHMARKS)}
    for name, (_, _, column) in BENCHMARKS.items():
        columns[column.capitalize()].append(name)
    whole = {name: sets for name, sets in columns.items() if all(s in values for s in sets)}
    return {name: sum(values[s] for s in sets) / len(sets) for name, sets in whole.items()}


def table(summaries):
    """{set: summary} -> lines of a table, with the paper's averages where all sets are there."""
    head = f"{'set':<12}{'avg@n':>8}{'95 % interval':>18}{'pass@n':>9}{'format':>9}{'cut off':>9}"
    hints = any("followed" in s for s in summaries.values())
    lines = [head + f"{'tokens':>8}{'questions':>11}" + f"{'wrong hint followed':>22}" * hints]
    for name, s in summaries.items():
        p = {k: 100 * v for k, v in s.items()}
        interval = f"{p['low']:.1f} .. {p['high']:.1f}"
        lines.append(
            f"{name:<12}{p['accuracy']:>8.1f}{interval:>18}{p['pass']:>9.1f}{p['format']:>8.1f}%"
            f"{p['cut_off']:>8.1f}%{s['tokens']:>8.1f}{s['questions']:>11}"
            + (f"{p['followed']:>21.1f}%" if "followed" in p else "")
        )
    means = macro({k: s["accuracy"] for k, s in summaries.items()})
    return lines + [f"{name:<12}{100 * value:>8.2f}" for name, value in means.items()]
