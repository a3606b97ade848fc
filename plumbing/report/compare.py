"""Two files of responses to the same questions compared, and one graded again, without a model."""

from pathlib import Path

import numpy as np

from plumbing.base.common import fail, may_write, write_atomically
from plumbing.base.console import track
from plumbing.grading.workers import Grader
from plumbing.report import responses
from plumbing.report.responses import by_question, macro, percent, read
from reward import compute_score


def relative_gain(before, after):
    """{set: accuracy} twice -> {set: gain in per cent of `before`}; the paper's Delta_rel is the
    mean of these over sets."""
    shared = [s for s in before if s in after and before[s] > 0]
    return {s: 100 * (after[s] - before[s]) / before[s] for s in shared}


def paired_test(a, b, resamples=10_000):
    """The same questions answered by two models. a, b: {question: mean accuracy}

    -> (mean difference b - a, low, high, p). The interval is a bootstrap over questions; p is the
    share of random sign flips of the differences with a mean at least as far from 0 (two-sided).
    """
    d = np.array([b[q] - a[q] for q in a if q in b])
    draw, far = np.random.default_rng(0), abs(d.mean()) - 1e-12
    signs = (draw.choice([-1, 1], (100, len(d))) for _ in range(resamples // 100))
    as_far = sum((abs((d * sign).mean(1)) >= far).sum() for sign in signs)
    return d.mean(), *responses.interval(d, resamples), (as_far + 1) / (resamples + 1)


def means_of(path):
    """A file of responses -> {set: {question: mean accuracy}}"""
    sets = read(path)
    if not all("accuracy" in r for records in sets.values() for r in records):
        fail(f"{path} holds responses that are not graded; eval.py --rescore grades them")
    questions = {s: by_question(records) for s, records in sets.items()}
    return {s: {q: sum(v) / len(v) for q, v in qs.items()} for s, qs in questions.items()}


def compare(first, second):
    """Two files of responses to the same questions -> lines of a table."""
    a, b = means_of(first), means_of(second)
    before, after, tests = {}, {}, {}
    for s in filter(b.get, a):
        both = [q for q in a[s] if q in b[s]]
        if not both:
            fail(f"{first} and {second} share no question of {s}")
        before[s], after[s] = (sum(x[s][q] for q in both) / len(both) for x in (a, b))
        _, low, high, p = paired_test(a[s], b[s])
        tests[s] = [percent(low, high, form="+.2f"), f"{p:.4f}"]
    if not tests:
        empty = [path for path, found in ((first, a), (second, b)) if not found]
        fail(f"{empty[0]} holds no responses" if empty else f"{first} and {second} share no set")
    gains = relative_gain(before, after)
    # The paper's averages come behind the sets, those of the gains too.
    before, after, gains = (values | macro(values) for values in (before, after, gains))
    rows = [["set", "first", "second", "gain", "95 % interval", "p", "relative"]]
    for s in before:
        accuracies = [percent(x[s], form=".2f") for x in (before, after)]
        gain = percent(after[s] - before[s], form="+.2f")
        relative = f"{gains[s]:+.2f} %" if s in gains else ""
        rows.append([s, *accuracies, gain, *tests.get(s, ["", ""]), relative])
    return [f"first: {first}, second: {second}", *responses.aligned(rows)]


def rescore(path, out, kind="official"):
    """Grade the responses of a file again, by the rule `kind` -> lines of a table; writes them to
    out."""
    may_write(Path(out).parent)  # before the work, not after it
    sets, grader = read(path), Grader()
    for name, records in sets.items():
        for r in track(records, f"grading {name}", "responses"):
            r |= {"split": name} | compute_score(r["predict"], r["label"], grader, kind)
    grader.close()
    graded = [r for records in sets.values() for r in records]
    write_atomically(Path(out), responses.as_lines(graded))
    summaries = {name: responses.summarise(records) for name, records in sets.items()}
    return [*responses.accuracy_table(summaries), f"responses: {out}"]
