"""docs/play.html: the loss and two runs of the toy to play with, in one file that needs nothing
but a browser; and docs/collapse.gif.

    python -m toy.play                                         # with the runs that the page holds
    python -m toy.play --runs out/toy-grpo out/toy-papo_g      # with others: it is their only copy

play.html is the template. Its first script has the numbers of the six tokens once more, since a
browser has no autograd; tests/test_play.py compares it with `play` below, which is papo.py's own.
"""

import io
import json
import re
from pathlib import Path

import matplotlib
import torch
from jinja2 import StrictUndefined, Template
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from loss import LOG_RATIO_CLAMP, exact_entropy, exact_kl
from papo import Denominators, LogProbs, Terms, objective, terms_of
from plumbing.base.common import Parser, fail, write_atomically
from plumbing.report.page import STYLE, series
from plumbing.report.record import load_run
from plumbing.report.samples import DARKEST
from plumbing.run.config import Config
from policy import Scores

TEMPLATE = Path(__file__).with_suffix(".html")
DOCS = Path(__file__).parent.parent / "docs"
PAGE, ANIMATION = DOCS / "play.html", DOCS / "collapse.gif"
CURVES = ["val_accuracy", "val_followed"]

# The question is how many red objects there are. With probability pi(3) the policy reads a number
# off the picture, and is right 60 % of the time; with pi(4) it repeats the hint, which is right
# 80 % of the time. The other tokens are no answers.
TOKENS = ["3", "4", "red", "same", "circle", "}"]
RIGHT = [0.6, 0.8, 0.0, 0.0, 0.0, 0.0]
# (pi, pi_mask): blind, the policy repeats the hint; or it makes numbers up as often as it reads
# them, and what the picture changes is junk.
STARTS = {
    "coupled": ([0.40, 0.40, 0.05, 0.05, 0.05, 0.05], [0.10, 0.70, 0.05, 0.05, 0.05, 0.05]),
    "not coupled": ([0.30, 0.35, 0.05, 0.05, 0.20, 0.05], [0.30, 0.45, 0.08, 0.07, 0.02, 0.08]),
}
COLOURS = ["#0072b2", "#e69f00", "#6b6b6b", "#8f8f8f", "#cc79a7", "#b3b3b3"]
UPDATES, LEARNING_RATE = 100, 0.5
CHOICES = "gamma beta eta1 eta2 kl_clamp perception entropy masked_branch".split()
# As released, "kept" is "fresh" where a step has one update.
FIRST = {name: getattr(Config(), name) for name in CHOICES} | {"beta": 0.0}
FIRST |= {"masked_branch": "fresh", "rewarded": True}
LARGE = {"start": "not coupled", "gamma": 2.0}
TRIES = {  # the buttons beside "what to try", by what is written on them
    "gamma 0": {"start": "coupled"},
    "gamma 0.5": {"start": "coupled", "gamma": 0.5},
    "gamma 0.5, not coupled": {"start": "not coupled", "gamma": 0.5},
    "gamma 2, not coupled": LARGE,
    "eta1 0.3, sampled": LARGE | {"eta1": 0.3},
    "eta1 0.3, exact": LARGE | {"eta1": 0.3, "entropy": "exact"},
    "beta 3": LARGE | {"beta": 3.0},
    "masked branch with gradient": LARGE | {"masked_branch": "grad"},
}


# -------------------------------------------------------------------------------- six tokens


def advantages(pi):
    """What papo.group_advantages gives a token on average in a group so large that every token
    comes as often as pi says, and is right as often as RIGHT says. (6,) -> (6,)"""
    right = torch.tensor(RIGHT, dtype=pi.dtype)
    mean = (pi * right).sum()
    return (right - mean) / ((mean * (1 - mean)).sqrt() + 1e-6)


def loss_of(z, m, ref, settings):
    """Minus J by papo.py, its mean over the tokens that pi samples; how often a token is sampled
    has no gradient. z, m, ref: logits of pi, pi_mask and pi_ref, (6,) -> (scalar, Terms)"""
    cfg = Config(**{name: settings[name] for name in CHOICES})
    seen, masked = z.log_softmax(-1), m.log_softmax(-1)
    pi, everywhere = seen.detach().exp(), torch.ones(1, 6, 1, dtype=torch.bool)

    def each(x):
        """Every token is a response of its own: (6,) or () -> (1, 6, 1)"""
        return x.expand(6)[None, :, None]

    kl = None
    if cfg.perception == "exact":
        other = masked if cfg.masked_branch == "grad" else masked.detach()
        kl = tuple(map(each, exact_kl(seen, other, cfg.kl_clamp)))
    both = (Scores(each(x), each(exact_entropy(x))) for x in (seen, masked))
    old = each(seen.detach())
    logprobs = LogProbs(next(both), old, old, next(both), each(ref.log_softmax(-1)), kl)
    A = advantages(pi) * settings["rewarded"]
    terms = Terms(*(x * each(pi) for x in terms_of(logprobs, A[None], everywhere, cfg)))
    return objective(terms, everywhere, Denominators(1, 1), cfg), terms


def play(settings):
    """Plain gradient ascent from a start, the gradient cut to a norm as in training -> pi and
    pi_mask before each update and after the last, (UPDATES + 1, 2, 6)"""
    settings = FIRST | settings
    z, m = (torch.tensor(p, dtype=torch.float64).log() for p in STARTS[settings["start"]])
    ref, weights, states = z.clone(), [z.requires_grad_(), m.requires_grad_()], []
    climb = torch.optim.SGD(weights, lr=LEARNING_RATE)
    for _ in range(UPDATES + 1):
        states.append(torch.stack(weights).softmax(-1).detach())
        climb.zero_grad()
        loss_of(z, m, ref, settings)[0].backward()
        torch.nn.utils.clip_grad_norm_(weights, Config().max_grad_norm)
        climb.step()
    return torch.stack(states)


# -------------------------------------------------------------------------------------- runs


def replay(folders):
    """What the page shows of runs: their questions, and of each its curves and, by step, the
    responses, as of `briefly`. Ends with a sentence if a folder holds no run, or one of other
    questions or steps."""
    questions, runs = None, []
    for out in folders:
        try:
            run, samples = load_run(out), []
        except ValueError as error:
            fail(error)
        for file in sorted((out / "samples").glob("*.json")):
            asked = json.loads(file.read_text("utf-8"))
            found = [{k: q[k] for k in ("problem", "answer", "pictures")} for q in asked]
            questions = questions or found
            if found != questions:
                fail(f"{file} has other questions than {folders[0]}; give both runs one --seed")
            samples.append([int(file.stem), [[briefly(r) for r in q["responses"]] for q in asked]])
        curves = {name: [(s, round(y, 4)) for s, y in series(run, name)] for name in CURVES}
        config = run["about"]["config"]
        kept = {name: config[name] for name in ("algo", "gamma", "seed", "steps")}
        runs.append(kept | {"curves": curves, "samples": samples})
    if len({str([step for step, _ in run["samples"]]) for run in runs}) > 1:
        fail(f"{folders[0]} and {folders[1]} have samples of other steps; train both to the end")
    return {"questions": questions, "runs": runs}


def briefly(response):
    """-> [reward, [(word, nats), ...]]"""
    words = [(word, round(nats, 2)) for word, nats, _ in response["words"]]
    return [round(response["reward"], 2), words]


def held(page):
    """The runs that a page holds."""
    return json.loads(re.search(r'id="runs">(.*?)</script>', page)[1])


# -------------------------------------------------------------------------------------- page


def embedded(value):
    """JSON that ends no script."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c"))


def render(runs):
    """The page as text."""
    given = dict(tokens=TOKENS, right=RIGHT, starts=STARTS, colours=COLOURS)
    given |= dict(updates=UPDATES, lr=LEARNING_RATE, max_grad_norm=Config().max_grad_norm)
    given |= dict(first=FIRST, tries=TRIES, log_ratio_clamp=LOG_RATIO_CLAMP, darkest=DARKEST)
    kinds = dict(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    ends = {name: dict(zip(TOKENS, play(tried)[-1, 0].tolist())) for name, tried in TRIES.items()}
    template = Template(TEMPLATE.read_text("utf-8"), **kinds)
    about = dict(given=embedded(given), runs=embedded(runs), ends=ends, darkest=DARKEST)
    return template.render(about, updates=UPDATES, right=RIGHT) + "\n"


@matplotlib.rc_context(STYLE)
def animate(path, every=4):
    """pi over the updates at a gamma that helps, one that is too large, and what holds the latter,
    as a GIF"""
    shown = ["gamma 0.5", "gamma 2, not coupled", "eta1 0.3, exact", "beta 3"]
    titles = ["coupled, gamma 0.5", "not coupled, gamma 2", "and eta1 0.3, exact", "or beta 3"]
    paths, frames = [play(TRIES[name])[:, 0].tolist() for name in shown], []
    for step in range(0, UPDATES + 1, every):
        figure = Figure(figsize=(9, 2.2), layout="constrained")
        for axis, title, states in zip(figure.subplots(1, 4, sharey=True), titles, paths):
            axis.bar(TOKENS, states[step], color=COLOURS)
            axis.set(title=title, ylim=(0, 1))
            axis.tick_params(labelsize=7)
        figure.supxlabel(f"update {step}")
        file = io.BytesIO()
        figure.savefig(file, dpi=80)
        frames.append(Image.open(file).quantize(32))
    waits = [600, *[160] * (len(frames) - 2), 2000]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=waits, loop=0)


def main():
    """Make the page and the animation."""
    p = Parser(__doc__)
    p.add_argument("--runs", nargs=2, metavar="RUN", type=Path, help="folders of two runs")
    p.add_argument("--out", type=Path, default=PAGE, help="the page")
    args = p.parse_args()
    runs = replay(args.runs) if args.runs else held(PAGE.read_text("utf-8"))
    write_atomically(args.out, render(runs))
    animate(args.out.parent / ANIMATION.name)
    print(f"written: {args.out}, {args.out.parent / ANIMATION.name}")


if __name__ == "__main__":
    main()
