"""When does looking pay? PAPO, what it builds on and plain baselines, on the toy: many warm starts,
one budget, rules written before the runs.

    python bench/paper_on_a_laptop.py --judge       # train nothing: judge what results/ holds
    python bench/paper_on_a_laptop.py               # train what is missing; hours on 2 cores

A run is train.py, or another program here, on one thread, two at a time. Call it again after an
interruption: what the results hold is not repeated, a run that was stopped goes on, and the page
says what is missing. All runs come from one commit, so the missing ones need a checkout of it; only
what was thought of later comes from another, which those runs name:

    git worktree add out/fight-tree COMMIT && cd out/fight-tree
    python bench/paper_on_a_laptop.py --out ../../results

The unit is the warm start: seeds of one start are averaged before anything is compared. Settings
are chosen on starts and seeds of their own (`tune` below). Writes paper_on_a_laptop.json, .md and
figures.
"""

import argparse
import math
import statistics
from itertools import product
from pathlib import Path

import numpy as np
from fight import METHODS, RECIPES, Pair, candidates, chosen, parts, pulls, starts_of
from matplotlib.figure import Figure
from runs import ROOT, SIGNALS, SPLITS, Runs

from toy.task import QUESTIONS, make  # found by runs.py

NAME = "paper_on_a_laptop"
ENOUGH = 9  # warm starts that a pair needs to be in the family that is corrected, and confirmed
# Student's t at 97.5 %, from 1 degree of freedom on; {number of warm starts: t}
T975 = """12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131
2.120 2.110 2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056"""
T975 = dict(enumerate(map(float, T975.split()), 2))


def interval(values):
    """Mean and half the width of its 95 % interval, one value a warm start."""
    n = len(values)
    half = T975[n] * statistics.stdev(values) / n**0.5 if n in T975 else math.inf
    return statistics.mean(values), half


def with_ends(values):
    """The mean and both ends of that interval, as text."""
    mean, half = interval(values)
    return f"{mean:+.1f} ({mean - half:+.1f} .. {mean + half:+.1f})"


def sign_flip(values):
    """Two-sided p of the mean under random signs: exact up to 16 values, else from 100,000 draws.
    It needs no bell curve, where runs end in two camps."""
    n, x = len(values), np.array(values)
    if n <= 16:
        signs = 1 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        return float((abs(signs @ x) >= abs(x.sum()) - 1e-9).mean())
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (100_000, n))
    return float(((abs(signs @ x) >= abs(x.sum()) - 1e-9).sum() + 1) / 100_001)


def holm(ps):
    """Holm's adjusted p of a family, in the same order."""
    order, adjusted, highest = np.argsort(ps), [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


def verdict(points, p, at_least=0.0):
    """Pair's rule. points: b - a, one a warm start; p: corrected"""
    mean, half = interval(points)
    above, below = mean - half > 0 and mean >= at_least, mean + half < 0
    if len(points) < ENOUGH:
        return "seen" if above else "seen reversed" if below else "not seen"
    sure = p <= 0.05
    return "confirmed" if sure and above else "contradicted" if sure and below else "not confirmed"


def by_seed(runs, part, pair):
    """b - a of each seed, of the starts that are done: {start: [points]}"""
    found = {}
    for start in filter(lambda s: s.startswith(pair.only), part.starts):
        jobs = [[(start, part.arms[x], n) for x in (pair.b, pair.a)] for n in part.seeds]
        if all(j in runs.done for js in jobs for j in js):
            ends = [[runs.value(*j, pair.split) for j in js] for js in jobs]
            found[start] = [b - a for b, a in ends]
    return found


def differences(runs, part, pair):
    """b - a of the starts that are done, one a warm start, its seeds averaged; {start: points}"""
    return {s: statistics.mean(points) for s, points in by_seed(runs, part, pair).items()}


def judged(runs):
    """All pairs of all parts that have two starts at least -> [cells of the table]"""
    rows = []
    for part in parts(runs):
        for pair in part.pairs:
            points = list(differences(runs, part, pair).values())
            if len(points) > 1:
                rows.append((part, pair, points, sign_flip(points)))
    family = [row[-1] if len(row[2]) >= ENOUGH else None for row in rows]
    adjusted, cells = iter(holm([p for p in family if p is not None])), []
    for part, pair, points, p in rows:
        corrected = next(adjusted) if len(points) >= ENOUGH else 1.0
        # With 80 % power at 5 %, uncorrected: (t + 0.84) standard errors.
        visible = interval(points)[1] * (1 + 0.84 / T975[len(points)])
        where = f"{pair.split}, {pair.only} starts" if pair.only else pair.split
        said = verdict(points, corrected, pair.at_least)
        holms = f"{corrected:.2g}" if len(points) >= ENOUGH else ""
        known = [with_ends(points), f"{p:.2g}", holms, str(len(points)), f"{visible:.0f}"]
        cells.append([part.title, f"{pair.b} above {pair.a}", where, said, *known])
    return cells


def components(found):
    """{start: points of each seed} -> standard deviations between warm starts, between seeds, and
    of what neither explains. A seed asks every start the same questions in the same order, so the
    two are crossed: expected mean squares of a two-way layout with one run a cell."""
    x = np.array(list(found.values()))
    starts, seeds = x.shape
    left = x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()
    rest = (left**2).sum() / ((starts - 1) * (seeds - 1))
    both = x.mean(1).var(ddof=1) - rest / seeds, x.mean(0).var(ddof=1) - rest / starts
    return [max(0.0, v) ** 0.5 for v in (*both, rest)]


def phases(runs):
    """The phase picture: {(coupled, trusts, h): (predicted to pay, a - b, r, GRPO, PAPO_G, blind
    weights)}, all but the first means of three starts, of the cells that are done."""
    best, found = chosen(runs), {}
    for h in (0.5, 0.65, 0.8, 0.95):
        more = "" if h == 0.8 else f" --hint_right {h}"
        for coupled, trusts in RECIPES:
            starts = starts_of([(coupled, trusts)])
            jobs = [[(s, best[m] + more, 1) for s in starts] for m in list(METHODS)[:3]]
            if all(j in runs.done for js in jobs for j in js):
                pull = [pulls(runs.starts[s], h) for s in starts]
                grpo, papo = (sum(p[m] for p in pull) for m in ("grpo", "papo_g"))
                ends = [statistics.mean(runs.value(*j) for j in js) for js in jobs]
                seen = [looking(runs.starts[s], h) for s in starts]
                found[coupled, trusts, h] = (grpo < 0 < papo, *np.mean(seen, axis=0), *ends)
    return found


def looking(start, h):
    """-> (a - b, r) of a warm start whose hints are right with probability h"""
    a, b, r = (
        h * start[f"{picture}, hint right"][what] + (1 - h) * start[f"{picture}, hint wrong"][what]
        for picture, what in (("picture", "looks"), ("masked", "looks"), ("picture", "right"))
    )
    return a - b, r


def by_family(runs, command, starts):
    """{family: (accuracy on vision, wrong hints followed)} in per cent, means over runs."""
    wrong = [i for i in range(256) if not make(0, "vision", i)[0].tags["hint_right"]]
    found = {}
    for f, family in enumerate(QUESTIONS):
        done = [runs.done[s, command, 1] for s in starts]
        right = [int(x) for r in done for x in r["right"][f :: len(QUESTIONS)]]
        followed = [int(x) for r in done for i, x in zip(wrong, r["followed"]) if i % 4 == f]
        found[family] = tuple(100 / 9 * statistics.mean(x) for x in (right, followed))
    return found


def turned(runs, a, b, starts):
    """Per cent of vision's questions that b has mostly right and a has not, and the reverse."""
    new = lost = n = 0
    for start in starts:
        x, y = (runs.done[start, c, 1]["right"] for c in (a, b))
        new += sum(p < "5" <= q for p, q in zip(x, y))
        lost += sum(q < "5" <= p for p, q in zip(x, y))
        n += len(x)
    return 100 * new / n, 100 * lost / n


# ------------------------------------------------------------------------------------ the page

ABOUT = """Written by `python bench/paper_on_a_laptop.py`. Accuracies are per cent, avg@2 on 256
questions a split; differences are points. The unit is the warm start. c1.0-t0.25-s1 is the start of
seed 1 whose last teacher repeats 25 % of the hints, and 100 % where the picture is masked (c).
What was chosen, on what, and after seeing what: docs/findings.md."""
HEADS = "part, claim, where, verdict, mean and 95 % interval, p, p (Holm), warm starts, visible"


def markdown(heads, rows):
    """A table as lines of text; heads and rows are lists of cells."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def mean(values, form=".1f"):
    """The mean as text."""
    return f"{statistics.mean(values):{form}}"


def done_of(part, command, runs):
    """The runs of an arm that are there."""
    return [j for j in part.jobs() if j[1] == command and j in runs.done]


def arms_table(part, runs):
    """What each arm of a part arrived at, over the runs that are done."""
    rows = []
    for label, command in part.arms.items():
        if done := done_of(part, command, runs):
            columns = [[runs.value(*j, s) for j in done] for s in SPLITS]
            columns += [[runs.value(*j, what=1) for j in done]]
            columns += [[runs.done[j]["seconds"] for j in done]]
            each = " ".join(f"{x:.0f}" for x in columns[0])
            rows.append([label, f"`{command}`", *map(mean, columns), each, str(len(done))])
    heads = ["arm", "command", *SPLITS, "wrong hints followed", "seconds", "vision of each run"]
    return markdown([*heads, "runs"], rows)


def recipe_table(part, runs):
    """The headline by recipe: means of its starts, vision / general, and the pulls."""
    rows = []
    for coupled, trusts in RECIPES:
        starts, cells = starts_of([(coupled, trusts)]), []
        pull = [pulls(runs.starts[s], 0.8) for s in starts]
        for method, command in part.arms.items():
            jobs = [(s, command, 1) for s in starts]
            if not all(j in runs.done for j in jobs):
                break
            both = " / ".join(mean([runs.value(*j, s) for j in jobs]) for s in SPLITS[:2])
            each = " ".join(f"{runs.value(*j):.0f}" for j in jobs)
            cells += [f"{both} ({each})", mean([p[method] for p in pull], "+.3f")]
        else:
            rows.append([f"{100 * coupled:.0f} %", f"{100 * trusts:.0f} %", *cells])
    heads = [f"{m}{x}" for m in part.arms for x in (": vision / general (each vision)", ": pull")]
    return markdown(["coupled", "trusts", *heads], rows)


def family_table(part, runs):
    """The headline by family of questions, and what PAPO_G turns."""
    starts = [s for s in part.starts if all((s, c, 1) in runs.done for c in part.arms.values())]
    rows = []
    for group in ("c1.0", "c0.5", "c0.0"):
        own = [s for s in starts if s.startswith(group)]
        for arm, command in part.arms.items() if own else ():
            found = by_family(runs, command, own).values()
            new, lost = turned(runs, part.arms["grpo"], command, own)
            shares = [f"{right:.0f} / {followed:.0f}" for right, followed in found]
            rows.append([group, arm, *shares, f"{new:.1f} / {lost:.1f}"])
    heads = [f"{family}: right / repeats" for family in QUESTIONS]
    return markdown(["starts", "arm", *heads, "newly right / newly wrong, against grpo"], rows)


def phase_table(found):
    """The phase picture as a table, and how often the prediction is right."""
    rows, right = [], []
    for (coupled, trusts, h), (predicted, apart, r, grpo, papo, weighted) in found.items():
        pays = papo - grpo > 10
        right.append((predicted == pays, pays))
        place = [f"{100 * x:.0f} %" for x in (h, coupled, trusts)]
        cells = [f"{x:.1f}" for x in (grpo, papo, weighted, papo - grpo)]
        answers = ["yes" if x else "no" for x in (predicted, pays)]
        rows.append([*place, f"{apart:.2f}", f"{r:.2f}", *cells, *answers])
    hits, pays = (sum(x[i] for x in right) for i in (0, 1))
    said = f"Of {len(right)} cells the theorem has {hits} right, "
    said += f'"it always pays" {pays}, "it never does" {len(right) - pays}.'
    heads = "hints right, coupled, trusts, a - b, r, grpo, papo_g, blind_weight, papo_g - grpo"
    return [*markdown([*heads.split(", "), "predicted to pay", "pays"], rows), "", said]


def phase_figure(found):
    """PAPO_G's and the blind weights' gain over GRPO on vision, a panel for each h."""
    hs = sorted({h for *_, h in found})
    picture = Figure((2.6 * len(hs) + 1.2, 5), layout="constrained")
    axes = picture.subplots(2, len(hs), squeeze=False)
    coupled, trusts = (sorted({r[i] for r in RECIPES}) for i in (0, 1))
    for (row, name), (column, h) in product(enumerate(("PAPO_G", "blind weights")), enumerate(hs)):
        axis, gains = axes[row, column], np.full((3, 3), np.nan)
        for (i, c), (j, t) in product(enumerate(coupled), enumerate(trusts)):
            if (c, t, h) in found:
                predicted, _, _, grpo, papo, weighted = found[c, t, h]
                gains[i, j] = (papo, weighted)[row] - grpo
                bold = "bold" if predicted and not row else "normal"
                axis.text(j, i, f"{gains[i, j]:+.0f}", ha="center", va="center", weight=bold)
        image = axis.imshow(gains, "PiYG", vmin=-40, vmax=40, origin="lower")
        axis.set_xticks(range(3), [f"{100 * t:.0f} %" for t in trusts])
        axis.set_yticks(range(3), [f"{100 * c:.0f} %" for c in coupled])
        axis.set_title(f"{name}, hints right {100 * h:.0f} %", fontsize=9)
        axis.set(xlabel="trusts hints", ylabel="coupled" * (not column))
    picture.colorbar(image, ax=axes, label="points of vision above GRPO")
    return picture


def curves(part, runs, labels, signals):
    """What happens on the way, step by step: a line a run, the runs of an arm in one colour."""
    picture = Figure((2.7 * len(signals), 2.8), layout="constrained")
    for axis, name in zip(picture.subplots(1, len(signals)), signals):
        for c, label in enumerate(labels):
            for job in done_of(part, part.arms[label], runs):
                line = runs.done[job]["series"].get(name, [])
                points = [(i + 1, x) for i, x in enumerate(line) if x is not None]
                axis.plot(*zip(*points or [(1, math.nan)]), f"C{c}", alpha=0.6, label=label)
        axis.set(title=name, xlabel="step")
        axis.set_yscale("log" if name.endswith(("kl", "entropy")) else "linear")
        axis.grid(alpha=0.3)
    handles = {line.get_label(): line for line in picture.axes[0].lines}
    picture.axes[0].legend(handles.values(), handles, fontsize=7)
    return picture


def headline_tables(part, runs):
    """The headline by recipe and by family."""
    return ["", *recipe_table(part, runs), "", *family_table(part, runs)]


def seed_lines(part, runs):
    """How much of the difference is the start's, and how much the seed's, with seeds as units."""
    if len(found := by_seed(runs, part, Pair("papo_g", "grpo"))) < 2:
        return []
    said = "Standard deviation of papo_g - grpo on vision: between warm starts {:.1f}, between "
    said += "seeds {:.1f}, of what neither explains {:.1f} points. Below, seeds are the units."
    rows = [*found.items(), ("mean", list(map(statistics.mean, zip(*found.values()))))]
    lines = ["", said.format(*components(found)), ""]
    cells = []
    for name, points in rows if len(found) < ENOUGH else rows[-1:]:
        each = " ".join(f"{x:+.0f}" for x in points)
        cells.append([name, with_ends(points), f"{sign_flip(points):.2g}", each])
    return [*lines, *markdown(["start", "mean and 95 % interval", "p", "each seed"], cells)]


def blind_lines(part, runs):
    """Whether PAPO's gain is gone, by that part's rule."""
    said = []
    for pair in part.pairs:
        points = list(differences(runs, part, pair).values())
        if len(points) > 1:
            mean, half = interval(points)
            gone = "gone" if mean + half < 5 else "not shown to be gone"
            said.append(f"{pair.b} above {pair.a} by at most {mean + half:.1f}: {gone}.")
    return ["", *said]


def worst_lines(part, runs):
    """Of each arm, the run that ends furthest below PAPO_G's own on its start."""
    rows, base = [], "train.py --algo papo_g"
    for label, command in part.arms.items():
        done = [j for j in done_of(part, command, runs) if (j[0], base, 1) in runs.done]
        falls = {j: runs.value(*j) - runs.value(j[0], base, 1) for j in done}
        if falls:
            rows.append([label, f"{min(falls.values()):+.1f}", f"{max(falls.values()):+.1f}"])
    heads = ["arm", "worst run against PAPO_G's own", "best run"]
    return ["", *markdown(heads, rows)] if rows else []


ADDED = {
    "The headline": headline_tables,
    "The headline, three seeds": seed_lines,
    "The headline, ten seeds": seed_lines,
    "Trained blind": blind_lines,
    "Collapse": worst_lines,
    "Is it held at any gamma?": worst_lines,
}


def page(runs, folder, draw=True):
    """Judge, print, draw, and write the results, of what there is."""
    all_parts, sections, pictures = parts(runs), [], {}
    wanted = {j for part in all_parts for j in part.jobs()}
    for part in all_parts:
        table = arms_table(part, runs)
        if len(table) > 2:
            says = " ".join(part.says.split()).rstrip(".")
            sections += ["", f"## {part.title}", "", f"{says}.", "", *table]
            sections += ADDED.get(part.title, lambda *_: [])(part, runs)
        if part.title == "Collapse" and len(table) > 2:
            shown = ["gamma 2", "gamma 2, beta 0.5", "gamma 2, beta 2 gamma"]
            pictures["collapse"] = curves, (part, runs, shown, SIGNALS[2:] + SIGNALS[:1])
    if found := phases(runs):
        sections += ["", "## The phase picture", "", *phase_table(found)]
        pictures["phases"] = phase_figure, (found,)
    for name, (figure, about) in pictures.items():
        sections += ["", f"![{name}]({NAME}-{name}.png)"]
        if draw:
            figure(*about).savefig(folder / f"{NAME}-{name}.png", dpi=80)
    scores = lambda m: (mean(runs.scores(x) or [math.nan]) for x in candidates(m))
    choice = [[m, f"`{c}`", *scores(m)] for m, c in chosen(runs).items()]
    heads = ["method", "chosen", *(f"candidate {i}" for i in range(1, 5))]
    done = len(wanted & set(runs.done))
    said = f"{done} of {len(wanted)} runs of the parts below are there, of commit {runs.commit}; "
    said += "what was thought of later is of others, which those runs name."
    runs.claims = judged(runs)
    claims = markdown(HEADS.split(", "), runs.claims)
    print(*claims, said, sep="\n")
    text = ["# The paper on a laptop", "", ABOUT, said, "", *claims, "", *markdown(heads, choice)]
    (folder / f"{NAME}.md").write_text("\n".join([*text, *sections, ""]))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--judge", action="store_true", help="train nothing: judge and draw again")
    p.add_argument("--work", default=ROOT / "out" / "fight", help="where the runs are kept")
    p.add_argument("--out", default=ROOT / "results", type=Path, help="where results are written")
    args = p.parse_args()
    runs, file = Runs(args.work), args.out / f"{NAME}.json"
    runs.load(file)
    if not args.judge:
        runs.train(file)
    page(runs, args.out)
    runs.save(file)


if __name__ == "__main__":
    main()
