"""report.html: one page on one run, or on several side by side, that needs nothing but a browser.

page.html is its template, in which jinja2 escapes all that comes from data. Its own policy forbids
the browser to run a script or to fetch anything. curves.png is the drawing in it.
"""

import io
import json
import math
from pathlib import Path

import matplotlib
from jinja2 import StrictUndefined, Template
from markupsafe import Markup
from matplotlib.figure import Figure

from plumbing.base.common import only_shows, write_atomically
from plumbing.report.responses import CHANGE_HEADS, changes, filled
from plumbing.report.samples import DARKEST

TEMPLATE = Path(__file__).with_suffix(".html")
POINTS = 300  # a longer curve is drawn as so many means
PANELS_ACROSS = 3  # panels in a row
# Names are no formulas, the same numbers give the same file, and text stays text.
STYLE = {
    "text.parse_math": False,
    "svg.hashsalt": "papo",
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "legend.fontsize": 8,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
PANELS = [
    ("reward and accuracy", ["reward", "accuracy", "val_accuracy", "val_followed"]),
    ("KL to the masked picture (nats a token)", ["perception_kl"]),
    ("entropy (nats a token)", ["entropy", "masked_entropy"]),
    ("KL to the reference", ["ref_kl"]),
    ("clipped tokens", ["clip_high_fraction", "clip_low_fraction", "perception_clamped"]),
    ("gradient norm; token weights", ["grad_norm", "weighted_tokens", "token_weight"]),
    ("response length (tokens)", ["response_tokens"]),
    ("seconds a step", ["seconds"]),
    ("loss: minus J; of sft.py minus log pi", ["loss", "val_loss"]),
]


def write(path, runs, png=None):
    """The page on runs, each as of plumbing.report.record.load_run, and perhaps their curves."""
    curves = ""
    with only_shows("the curves are not drawn"):
        curves = draw(runs, png)
    write_atomically(path, render(runs, curves))


def render(runs, curves):
    """Runs, and their curves as an <svg> -> the page as text."""
    kinds = dict(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    configs = [run["about"]["config"] for run in runs]
    names = dict.fromkeys(name for config in configs for name in config)
    about = dict(runs=runs, curves=Markup(curves), darkest=DARKEST, accuracy=accuracy(runs))
    about["settings"] = [(k, *(json.dumps(config.get(k)) for config in configs)) for k in names]
    return Template(TEMPLATE.read_text("utf-8"), **kinds).render(about)


def accuracy(runs):
    """The tables of before and after of all runs in one, split by split -> rows, the head first."""
    rows = [(r[0], run["name"], *r[1:]) for run in runs for r in changes(run["evaluation"])[1:]]
    splits = list(dict.fromkeys(row[0] for row in rows))
    rows.sort(key=lambda row: splits.index(row[0]))
    return filled([("split", "run", *CHANGE_HEADS[1:]), *rows])


@matplotlib.rc_context(STYLE)
def draw(runs, png=None):
    """Curves, of one run a panel a group of metrics, of several a panel a metric and a line a run,
    in the colour of its place -> an <svg> as text, "" of nothing. png: a file to draw them into too
    """
    if len(runs) == 1:
        panels = [(title, [(n, series(runs[0], n)) for n in names]) for title, names in PANELS]
    else:
        metrics = [name for _, names in PANELS for name in names]
        panels = [(name, [(run["name"], series(run, name)) for run in runs]) for name in metrics]
    panels = [(title, lines) for title, lines in panels if any(points for _, points in lines)]
    if not panels:
        return ""
    rows = math.ceil(len(panels) / PANELS_ACROSS)
    height = 2.6 * rows  # inches
    figure = Figure(figsize=(12, height))
    for place, (title, lines) in enumerate(panels, 1):
        axis = figure.add_subplot(rows, PANELS_ACROSS, place, title=title)
        for i, (name, points) in enumerate(lines):
            if points:
                marker = "." if len(points) <= 40 else None  # so few that each can be seen
                axis.plot(*zip(*points), marker=marker, color=f"C{i}")
                axis.lines[-1].set_label(f"{name} {points[-1][1]:.4g}")
        axis.legend(axis.lines, [line.get_label() for line in axis.lines])  # "_x" is a name too
        axis.locator_params(nbins=5)
    ends = dict(left=0.05, right=0.99, bottom=0.3 / height, top=1 - 0.3 / height)
    figure.subplots_adjust(**ends, wspace=0.2, hspace=0.35)
    text = io.StringIO()
    nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])  # of when and by what
    figure.savefig(text, format="svg", metadata=nothing)
    if png:
        figure.savefig(png, dpi=80)
    return text.getvalue()[text.getvalue().index("<svg") :]


def series(run, name):
    """[(step, value)] of the lines that have a finite one; at most POINTS of them, each a mean."""
    points = [(m["step"], m[name]) for m in run["metrics"] if math.isfinite(m.get(name, math.nan))]
    size = max(1, math.ceil(len(points) / POINTS))
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(sum(x) / len(x) for x in zip(*part)) for part in bins]
