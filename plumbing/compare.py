"""Two files of responses to the same questions compared, and one graded again, without a model."""

from pathlib import Path

import torch

from plumbing.common import fail, pyplot, write_atomically
from plumbing.console import track
from plumbing.grader import Grader
from plumbing.responses import as_lines, by_question, read
from plumbing.summary import macro, summarise, table
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
    Raises ValueError if they share no question.
    """
    shared = [q for q in a if q in b]
    if not shared:
        raise ValueError("the two files share no question")
    d = torch.tensor([b[q] - a[q] for q in shared], dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    boots, flips, step = [], [], max(1, 2_000_000 // len(d))
    # A slice at a time: (resamples, questions) may be large.
    for start in range(0, resamples, step):
        k = min(step, resamples - start)
        boots.append(d[torch.randint(len(d), (k, len(d)), generator=g)].mean(1))
        flips.append((d * (2.0 * torch.randint(2, (k, len(d)), generator=g) - 1)).mean(1))
    boots, flips = torch.cat(boots).sort().values, torch.cat(flips)
    as_far = (flips.abs() >= d.mean().abs() - 1e-12).sum().item()
    low, high = boots[int(0.025 * resamples)].item(), boots[int(0.975 * resamples)].item()
    return d.mean().item(), low, high, (as_far + 1) / (resamples + 1)


def means_of(path):
    """A file of responses -> {set: {question: mean accuracy}}"""
    sets = read(path)
    if not all("accuracy" in r for records in sets.values() for r in records):
        fail(f"{path} holds responses that are not graded; eval.py --rescore grades them")
    questions = {s: by_question(records) for s, records in sets.items()}
    return {s: {q: sum(v) / len(v) for q, v in qs.items()} for s, qs in questions.items()}


def compare(first, second, chart):
    """Two files of responses to the same questions -> lines of a table; draws the bars."""
    a, b = means_of(first), means_of(second)
    shared, means = [s for s in a if s in b], []
    if not shared:
        fail(f"{first} and {second} share no set")
    heads = ["first", "second", "gain"]
    lines = [f"{'set':<12}" + "".join(f"{h:>8}" for h in heads)]
    lines[0] += f"{'95 % interval':>18}{'p':>8}{'relative':>10}"
    for s in shared:
        if not set(a[s]) & set(b[s]):
            fail(f"{first} and {second} share no question of {s}")
        difference, low, high, p = paired_test(a[s], b[s])
        both = [q for q in a[s] if q in b[s]]
        means.append([sum(x[s][q] for q in both) / len(both) for x in (a, b)])
        before, after = means[-1]
        relative = f"{100 * difference / before:+.2f} %" if before else "-"
        interval = f"{100 * low:+.2f} .. {100 * high:+.2f}"
        lines.append(
            f"{s:<12}{100 * before:>8.2f}{100 * after:>8.2f}{100 * difference:>+8.2f}"
            f"{interval:>18}{p:>8.4f}{relative:>10}"
        )
    lines += averages(*({s: m[k] for s, m in zip(shared, means)} for k in (0, 1)))
    bars(shared, means, [Path(first).stem, Path(second).stem], chart)
    return [*lines, f"chart: {chart}"]


def averages(before, after):
    """The paper's averages of two {set: accuracy} as lines of the table."""
    gains, lines = macro(relative_gain(before, after)), []
    for name, value in macro(before).items():
        other = macro(after)[name]
        relative = f"{gains[name]:+.2f} %".rjust(10) if name in gains else ""
        lines.append(
            f"{name:<12}{100 * value:>8.2f}{100 * other:>8.2f}{100 * (other - value):>+8.2f}"
            f"{'':>26}{relative}"
        )
    return lines


def bars(sets, means, names, chart):
    """Two bars a set, into the file `chart`."""
    plt = pyplot()
    size = (max(4, 1.2 * len(sets)), 3.5)
    figure, axis = plt.subplots(figsize=size, constrained_layout=True)
    for k, name in enumerate(names):
        places = [i + 0.4 * k for i in range(len(sets))]
        axis.bar(places, [100 * m[k] for m in means], 0.4, label=name)
    axis.set(xticks=[i + 0.2 for i in range(len(sets))], xticklabels=sets, ylabel="avg@n (%)")
    axis.legend()
    figure.savefig(chart, dpi=100)


def rescore(path, out, kind="official"):
    """Grade the responses of a file again, by the rule `kind` -> lines of a table; writes them to
    out."""
    sets, grader = read(path), Grader()
    for name, records in sets.items():
        for r in track(records, f"grading {name}", "responses"):
            r |= {"split": name} | compute_score(r["predict"], r["label"], grader, kind)
    grader.close()
    write_atomically(Path(out), as_lines(r for records in sets.values() for r in records))
    return [*table({s: summarise(r) for s, r in sets.items()}), f"responses: {out}"]
