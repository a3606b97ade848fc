"""report.html: one page on one run, or on several side by side, that needs nothing but a browser.

A page is a table of accuracy before and after, curves, samples and settings, in one file without a
script. Its own policy forbids the browser to fetch anything. It follows the reader's choice of
light or dark. All that comes from data passes through html.escape.
"""

import json
import math
from dataclasses import dataclass, field
from html import escape

DARKEST = 3  # nats from which a word is drawn in full colour
POINTS = 400  # a longer curve is drawn as so many means
HUES = 8  # colours of curves, --c0 to --c7 in STYLE

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1f2328; --faint: #59636e; --line: #d1d9e0;
 --card: #f6f8fa; --heat: 255 140 0; --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df;
 --c4: #cf222e; --c5: #0a7a83; --c6: #9a6700; --c7: #bf3989 }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --text: #e6edf3; --faint: #9198a1;
 --line: #3d444d; --card: #151b23; --heat: 160 74 0; --c0: #58a6ff; --c1: #f0883e; --c2: #3fb950;
 --c3: #bc8cff; --c4: #ff7b72; --c5: #39c5cf; --c6: #d29922; --c7: #f778ba } }
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif;
 margin: 2em auto; max-width: 1200px; padding: 0 1.2em }
h1 { font-size: 1.6em; margin-bottom: 0 } h2 { margin-top: 1.8em } h3 { font-size: 1em }
table { border-collapse: collapse } .wide { overflow-x: auto }
th, td { border-bottom: 1px solid var(--line); padding: 3px 12px 3px 0; text-align: left;
 vertical-align: top } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.curves { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)) }
figure { background: var(--card); border-radius: 8px; margin: 0; padding: 10px 12px }
figcaption { font-size: 13px } svg { display: block; width: 100% } svg text { fill: var(--faint);
 font: 10px system-ui, sans-serif } .rule { stroke: var(--line) }
.curve { fill: none; stroke-linejoin: round; stroke-width: 1.6 }
.key { white-space: nowrap } .key::before { background: var(--k); border-radius: 2px; content: "";
 display: inline-block; height: 3px; margin: 0 5px 3px 0; width: 16px }
.p { border-top: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: 8px 20px;
 padding: 12px 0 } .p > div:last-child { flex: 1 1 340px; min-width: 0 }
.p img { height: 140px; image-rendering: pixelated; margin-right: 8px; max-width: 100% }
.r { color: var(--faint); font-size: 13px } code { font-size: 14px; overflow-wrap: anywhere;
 white-space: pre-wrap } code span { background: rgb(var(--heat) / var(--s)); border-radius: 3px;
 padding: 1px 2px } .runs { display: grid; gap: 0 28px; grid-auto-columns: minmax(340px, 1fr);
 grid-auto-flow: column; overflow-x: auto } summary { cursor: pointer }
"""
LEGEND = f"""<h2>Which words depend on the picture?</h2>
<p>Left: the picture, and the masked picture of the perception loss. Each token is shaded by its
KL_prcp, the k3 estimate of how far the policy on the picture is from the policy on the masked
picture: none at 0 nats, <code><span style="--s:1">full colour</span></code> at {DARKEST} nats or
more. Rest on a token to read its number.</p>"""


WITHOUT = "No accuracy was measured, since there were no validation data (--val_data)."
CURVES = """<p class="r">In a healthy run the reward rises, while perception_kl (KL_prcp, how far
the policy on the picture is from the policy on the masked one) and the entropies fall or stay.
Where perception_kl, the clipped tokens and the entropies shoot up and the reward falls, the policy
writes senseless text: the perception loss rewards being different, and that is different too.</p>
"""


@dataclass
class Run:
    """What is told of one run."""

    name: str
    about: dict  # config.json
    metrics: list  # a dict a step
    evaluation: dict  # {"before", "after": {split: summary}}, or a loss each of sft.py's
    samples: list  # [(step, HTML of plumbing/samples.py)], the newest first
    meanings: dict = field(default_factory=dict)  # {split: what is asked there}
    left: dict = field(default_factory=dict)  # {signal of a collapse: when it left}


def render(runs, panels):
    """Runs -> the page as text. panels: [(title, metrics drawn together)] for a run by itself"""
    title = " and ".join(run.name for run in runs)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="r">{escape(subtitle(run))}</p>' for run in runs),
        *(f"<p>{escape(outcome(run))}</p>" for run in runs),
        "<h2>Before and after</h2>",
        before_after(runs),
        f'<p class="r">{escape(what_was_measured(runs))}</p>',
        "<h2>Curves</h2>",
        CURVES,
        curves(runs, panels),
        samples(runs),
        "<h2>Settings</h2>",
        settings(runs),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def subtitle(run):
    """One line on what a run is, and how far it has come."""
    cfg = run.about.get("config", {})
    wanted = [f"{k} {cfg[k]}" for k in ("algo", "model", "data", "seed") if cfg.get(k)]
    step = run.metrics[-1]["step"] if run.metrics else 0
    of = f" of {cfg['steps']}" if cfg.get("steps") else ""
    commit = [f"commit {run.about['commit']}"] if run.about.get("commit") else []
    return ", ".join([f"{run.name}: step {step}{of}", *wanted, *commit])


def outcome(run):
    """What came of a run, in sentences."""
    parts = []
    if has_losses(run):
        before, *after = losses(run)
        now = f", and is {after[0]}" if after else " before training"
        parts.append(f"The validation loss was {before}{now}.")
    elif run.evaluation.get("after"):
        moves = {"rose": [], "fell": [], "did not clearly change": []}
        for split in splits_of(run):
            before, after, *_ = accuracy(run, split)
            moves[direction(run, split)].append(f"{split} (from {before} to {after} %)")
        said = [f"{move} on {', '.join(found)}" for move, found in moves.items() if found]
        parts.append(f"Accuracy {'; it '.join(said)}.")
    else:
        measured = run.about.get("config", {}).get("val_data")
        why = "There is no accuracy after training yet." if measured else WITHOUT
        parts.append(why)
    if run.left:
        when = ", ".join(f"{name} at step {step}" for name, step in run.left.items())
        parts.append(f"Signs of a collapse: {when} left where it used to be.")
    return " ".join([f"{run.name}:", *parts])


def direction(run, split):
    """How accuracy moved: clearly where what it was before lies outside of the interval after."""
    before, after = (run.evaluation[when][split] for when in ("before", "after"))
    if after["low"] <= before["accuracy"] <= after["high"]:
        return "did not clearly change"
    return "rose" if after["accuracy"] > before["accuracy"] else "fell"


def what_was_measured(runs):
    """What the numbers of the table are, and what is asked in each split."""
    counts = {(s.get("n"), s.get("questions")) for r in runs for s in splits_of(r).values()}
    parts = [
        f"Accuracy in per cent, the mean over {n} responses to each of {questions} questions; "
        "pass@n: the share of questions with at least one right response."
        for n, questions in sorted(c for c in counts if all(c))
    ]
    meanings = {k: v for run in runs for k, v in run.meanings.items()}
    return " ".join(parts + [f"{split}: {meaning}." for split, meaning in meanings.items()])


# ------------------------------------------------------------------------------------------- tables


def table(heads, rows):
    """Cells -> an HTML table; those after the first column that hold a number stand right."""

    def line(cells, tag):
        kinds = [' class="n"' if i and is_number(c) else "" for i, c in enumerate(cells)]
        texts = (f"<{tag}{kind}>{escape(str(c))}</{tag}>" for c, kind in zip(cells, kinds))
        return f"<tr>{''.join(texts)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(heads, "th")}{body}</table></div>'


def is_number(cell):
    return str(cell).lstrip("+-")[:1].isdigit()


def before_after(runs):
    """The tables of all runs in one, split by split."""
    heads, rows = ["split", "run", "before", "after", "change", "95 % interval after", "pass@n"], []
    for split in dict.fromkeys(split for run in runs for split in splits_of(run)):
        rows += [
            (split, run.name, *accuracy(run, split)) for run in runs if split in splits_of(run)
        ]
    rows += [("validation loss", run.name, *losses(run)) for run in runs if has_losses(run)]
    if not rows:
        return "<p>Nothing was measured: there are no validation data.</p>"
    hints = any(len(row) > len(heads) for row in rows)
    return table(heads + ["wrong hint followed"] * hints, rows)


def has_losses(run):
    return isinstance(run.evaluation.get("before"), float)


def splits_of(run):
    """The splits that were measured, before training at least."""
    return {} if has_losses(run) else run.evaluation.get("before", {})


def accuracy(run, split):
    """Per cent -> (before, after, change, interval after, pass@n, and perhaps of wrong hints)"""
    before = run.evaluation["before"][split]
    after = run.evaluation.get("after", {}).get(split)
    b = 100 * before["accuracy"]
    cells = [f"{b:.1f}", "", "", ""]
    if after:
        a, low, high = (100 * after[k] for k in ("accuracy", "low", "high"))
        cells[1:] = [f"{a:.1f}", f"{a - b:+.1f}", f"{low:.1f} .. {high:.1f}"]
    for name in ("pass", "followed"):
        if name in before:
            then = f" → {100 * after[name]:.1f}" if after else ""
            cells.append(f"{100 * before[name]:.1f}{then}")
    return cells


def losses(run):
    """Of a run of sft.py -> (before, after, change)"""
    before, after = run.evaluation["before"], run.evaluation.get("after")
    return [f"{before:.4f}", *([f"{after:.4f}", f"{after - before:+.4f}"] if after else [])]


def settings(runs):
    """All settings of one run; of several what differs, and the rest folded away."""
    configs = [run.about.get("config", {}) for run in runs]
    names, heads = list(dict.fromkeys(k for c in configs for k in c)), ["", *(r.name for r in runs)]
    rows = {k: (k, *(json.dumps(c.get(k)) for c in configs)) for k in names}
    parts, same = [], names
    if len(runs) > 1:
        differs = [k for k in names if len(set(rows[k][1:])) > 1]
        same = [k for k in names if k not in differs]
        parts.append(table(heads, [rows[k] for k in differs]))
    commands = [(r.name, " ".join(map(str, r.about.get("command", [])))) for r in runs]
    versions = [(r.name, json.dumps(r.about.get("versions", {}))) for r in runs]
    whole = table(heads, [rows[k] for k in same])
    summary = "all settings" if len(runs) == 1 else "what is the same"
    parts += [table(["run", "command"], commands), table(["run", "versions"], versions)]
    return "\n".join([*parts, f"<details><summary>{summary}</summary>{whole}</details>"])


# ------------------------------------------------------------------------------------------- curves


def curves(runs, panels):
    """A panel a group of metrics for one run; for several a panel a metric, a colour a run."""
    if len(runs) == 1:
        drawn = [(title, [(n, series(runs[0], n)) for n in names]) for title, names in panels]
    else:
        metrics = [name for _, names in panels for name in names]
        drawn = [(name, [(run.name, series(run, name)) for run in runs]) for name in metrics]
    figures = [panel(title, lines) for title, lines in drawn]
    return f'<div class="curves">{"".join(figures)}</div>' if any(figures) else "<p>None yet.</p>"


def series(run, name):
    """[(step, value)] of the lines that have one; at most POINTS of them, each a mean."""
    points = [(m["step"], m[name]) for m in run.metrics if math.isfinite(m.get(name, math.nan))]
    size = math.ceil(len(points) / POINTS)
    bins = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else []
    return [tuple(sum(x) / len(x) for x in zip(*part)) for part in bins] or points


def panel(title, lines):
    """[(name, [(x, y)])] -> a figure with an SVG in it; "" if there is nothing to draw.

    A line's colour is that of its place, so that a run has one colour in all panels, those in which
    another one has no points included.
    """
    if not any(points for _, points in lines):
        return ""
    x, y = (scale([p[k] for _, points in lines for p in points]) for k in (0, 1))
    width, height, left, top = 300, 170, 46, 8  # of the plot: from (46, 8) to (292, 150)

    def place(point):
        across = left + (point[0] - x[0]) / (x[1] - x[0]) * (width - left - 8)
        return across, height - 20 - (point[1] - y[0]) / (y[1] - y[0]) * (height - 20 - top)

    marks = []
    for value in ticks(*y):
        at = place((x[0], value))[1]
        marks.append(f'<path class="rule" d="M{left} {at:.1f}H{width - 8}"/>')
        marks.append(f'<text x="{left - 5}" y="{at + 3:.1f}" text-anchor="end">{value:.3g}</text>')
    for value in ticks(*x, most=5):
        at = place((value, y[0]))[0]
        marks.append(f'<text x="{at:.1f}" y="{height - 6}" text-anchor="middle">{value:g}</text>')
    keys = []
    for i, (name, points) in enumerate(lines):
        if not points:
            continue
        colour, placed = f"var(--c{i % HUES})", [place(p) for p in points]
        text = " ".join(f"{a:.1f},{b:.1f}" for a, b in placed)
        marks.append(f'<polyline class="curve" style="stroke:{colour}" points="{text}"/>')
        if len(placed) <= 40:  # so few that each can be seen, and one alone is no line
            dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2"/>' for a, b in placed)
            marks.append(f'<g style="fill:{colour}">{dots}</g>')
        last = f"{points[-1][1]:.4g}"
        keys.append(f'<span class="key" style="--k:{colour}">{escape(name)} {last}</span>')
    return (
        f"<figure><figcaption><b>{escape(title)}</b><br>{' '.join(keys)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(marks)}</svg></figure>"
    )


def scale(values):
    """The ends of an axis, never the same."""
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) / 10 or 1.0
        return low - margin, high + margin
    return low, high


def ticks(low, high, most=4):
    """Round numbers from low to high, at most so many: 1, 2 or 5 times a power of ten apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    steps = [k * power for k in (1, 2, 5, 10, 20)]
    step = next(s for s in steps if math.floor(high / s) - math.ceil(low / s) < most)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


# ------------------------------------------------------------------------------------------ samples


def samples(runs):
    """The newest samples of each run; of one run also older ones, folded away. "" without any, as
    of a run of sft.py."""
    if not any(run.samples for run in runs):
        return ""
    if len(runs) > 1:
        columns = [
            f"<div><h3>{escape(r.name)}</h3>{''.join(block(r.samples[:1]))}</div>" for r in runs
        ]
        return f'{LEGEND}<div class="runs">{"".join(columns)}</div>'
    newest, *older = block(runs[0].samples)
    return "\n".join([LEGEND, newest, *older])


def block(found):
    """[(step, HTML)] -> a piece of HTML each, the first one open."""
    return [
        f"<details{'' if i else ' open'}><summary>{stage(step)}</summary>{text}</details>"
        for i, (step, text) in enumerate(found)
    ]


def stage(step):
    return f"after step {step}" if step else "before training"
