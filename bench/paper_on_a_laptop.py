"""The paper's findings, tested on the toy with seeds, intervals, and rules written before the runs.

    python bench/paper_on_a_laptop.py            # everything; 1.5 hours on 2 cores
    python bench/paper_on_a_laptop.py --quick    # the first claim with three seeds; 5 minutes

    python bench/paper_on_a_laptop.py --keep     # train only what the results file lacks
    python bench/paper_on_a_laptop.py --judge    # train nothing; judge and draw what it holds

Every run is the command train.py with one thread, two runs at a time. Call it again after an
interruption: a run that is whole is kept, one that was stopped goes on. A claim says which runs it
needs and holds the rule that decides; the verdict is one of

    confirmed        the rule is met
    contradicted     its opposite is: the 95 % interval lies on the other side
    not confirmed    neither

An interval of a difference is Student's t over seeds, the same seeds on both sides. Writes
results/paper_on_a_laptop.json (every run's command, settings, numbers, commit), a figure a claim,
and the page results/paper_on_a_laptop.md.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plumbing.checkpoint import is_finished  # noqa: E402
from plumbing.common import pyplot, write_atomically  # noqa: E402
from plumbing.config import Config, resolve  # noqa: E402
from plumbing.console import Bar  # noqa: E402
from plumbing.report import left_at, read_metrics  # noqa: E402
from plumbing.setup import model_folder  # noqa: E402

ALWAYS = "--sampler hf --keep 1 --eval_n 4".split()
NAME = "paper_on_a_laptop"
ABOUT = """Written by `python bench/paper_on_a_laptop.py`. Accuracies are per cent, avg@4 on 256
questions a split, means over seeds; differences are points, with their 95 % interval over seeds
where there is more than one."""
SEEDS = [1, 2, 3, 4, 5]
T975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, 97.5 %, by number of seeds
# All found on `val` with seeds above 100: what collapses, what takes 30 steps to do so, and an eta
# and a beta to hold it with. The paper's eta is 1.5 to 3 times its gamma, and so is this.
TOO_LARGE = "--gamma 2 --anneal_steps 0"
WEARS_DOWN = "--gamma 1 --anneal_steps 0"
ETA, BETA = 2, 0.5
# The eighth claim needs a reward that says nothing. It is registered as a fork would do it.
WITHOUT_REWARD = """
from reward import rule
rule("nothing")(lambda graded: 0.0)
import train
train.main()
"""


class Runs:
    """Runs of train.py, by their flags: {(flags, seed): what came out}."""

    def __init__(self, folder):
        self.folder, self.done = Path(folder), {}

    def path(self, flags, seed):
        words = flags.replace("--", "").replace(".", "_").split()
        return self.folder / "-".join([*words, f"seed{seed}"])

    def run(self, job):
        """Train where it is not done yet."""
        flags, seed = job
        out = self.path(flags, seed)
        if not is_finished(out):
            script = ["-c", WITHOUT_REWARD] if "--reward nothing" in flags else ["train.py"]
            resume = ["--resume"] if (out / "config.json").exists() else []
            command = [sys.executable, *script, *flags.split(), "--seed", str(seed), *resume]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            with open(out.with_suffix(".log"), "a") as log:
                done = subprocess.run(
                    [*command, *ALWAYS, "--out", str(out)],
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            if not is_finished(out):
                sys.exit(f"error: {out.name} ended with {done.returncode}; see {log.name}")

    def load(self, file):
        """Take over the runs that a file holds."""
        found = json.loads(file.read_text())["runs"] if file.exists() else []
        self.done |= {(run["flags"], run["seed"]): run for run in found}

    def train(self, wanted, file):
        """What is not done yet of [(flags, seed)], two at a time, into the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # The same flags of two claims are one run.
        jobs = [job for job in dict.fromkeys(wanted) if job not in self.done]
        for trust in {"--no-trust" not in flags for flags, _ in jobs}:
            cfg = resolve({"model": "toy", "trust": trust}, cuda=False)[0]
            model_folder(cfg.model, cfg)  # once, before two runs want it
        print(f"{len(jobs)} runs, in {self.folder}", flush=True)
        with Bar("training", len(jobs), "runs") as bar, ThreadPoolExecutor(2) as two:
            for job, _ in zip(jobs, two.map(self.run, jobs)):
                self.done[job] = self.read(*job)
                self.save(file)
                bar.update()

    def save(self, file, **more):
        """All runs so far, and more, as JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({**more, "runs": list(self.done.values())}))

    def read(self, flags, seed):
        """What a run left, as it goes into the results."""
        out = self.path(flags, seed)
        about = json.loads((out / "config.json").read_text())
        metrics = read_metrics(out)
        evaluation = json.loads((out / "evaluation.json").read_text())
        series = (
            "step reward accuracy perception_kl entropy masked_entropy clip_high_fraction "
            "perception_clamped val_accuracy val_followed response_tokens"
        ).split()
        digits = {k: [round(m[k], 5) if k in m else None for m in metrics] for k in series}
        return {
            "flags": flags,
            "seed": seed,
            "commit": about["commit"],
            "command": f"train.py {flags} --seed {seed} {' '.join(ALWAYS)}",
            "config": {k: v for k, v in about["config"].items() if k != "out"},
            "seconds": round(sum(m["seconds"] + m.get("val_seconds", 0) for m in metrics)),
            **{when: evaluation[when] for when in ("before", "after")},
            "series": {k: v for k, v in digits.items() if any(x is not None for x in v)},
        }

    def after(self, flags, seeds, split="vision", what="accuracy", when="after"):
        """Per cent on a test split after training, or before, one number a seed."""
        return [100 * self.done[flags, seed][when][split][what] for seed in seeds]


def lines_of(run):
    """A run's metrics again, a dict a step."""
    columns = run["series"]
    rows = zip(*columns.values())
    return [{k: v for k, v in zip(columns, row) if v is not None} for row in rows]


def markdown(heads, rows):
    """A table as lines of text; heads and rows are lists of cells."""
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def interval(values):
    """Mean and half the width of its 95 % interval over seeds."""
    n = len(values)
    half = T975[n] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return statistics.mean(values), half


def verdict(differences, at_least=0.0):
    """The rule for "b is above a" -> (verdict, sentence). differences: b - a, one a seed"""
    mean, half = interval(differences)
    name = "not confirmed"
    if mean - half > 0 and mean >= at_least:
        name = "confirmed"
    if mean + half < 0:
        name = "contradicted"
    return name, f"{mean:+.1f} points ({mean - half:+.1f} .. {mean + half:+.1f})"


@dataclass
class Claim:
    """One finding: arms are {label: flags}; judge(runs, claim) -> [(what, verdict, numbers)]."""

    title: str
    rule: str
    arms: dict
    seeds: list
    judge: object
    splits: tuple = ("vision", "general")
    watched: tuple = ()  # the signals of which the way is drawn too

    def jobs(self):
        """The runs that it needs."""
        return [(flags, seed) for seed in self.seeds for flags in self.arms.values()]

    def compared(self, runs, a, b, split="vision"):
        """Differences b - a of two arms, one a seed."""
        ours = (runs.after(self.arms[arm], self.seeds, split) for arm in (a, b))
        return [y - x for x, y in zip(*ours)]


# ------------------------------------------------------------------------------------- claims


def better(a, b, at_least):
    """Arm b above arm a by at least so many points on `vision`; on `general` it is told as well."""

    def judge(runs, claim):
        found = [
            ("vision", *verdict(claim.compared(runs, a, b), at_least)),
            ("general", *verdict(claim.compared(runs, a, b, "general"))),
        ]
        for arm in (a, b):
            followed = runs.after(claim.arms[arm], claim.seeds, what="followed")
            found.append((f"wrong hints followed, {arm}", "", f"{interval(followed)[0]:.1f} %"))
        return found

    return judge


def collapses(runs, claim):
    """A gamma that is too large ends below the warm start; and the order in which signals leave,
    each when it is twice what it was."""
    found = []
    for label, flags in claim.arms.items():
        if label != "default":
            before = runs.after(flags, claim.seeds, when="before")
            fall = [a - b for a, b in zip(before, runs.after(flags, claim.seeds))]
            found.append((f"{label} falls below the warm start", *verdict(fall)))
    for seed in claim.seeds:
        left = left_at(lines_of(runs.done[claim.arms["gamma 2"], seed]), factor=2)
        order = sorted((step, name) for name, step in left.items())
        said = ", ".join(f"{name} {step}" for step, name in order) or "none"
        found.append((f"gamma 2: signals leave at step, seed {seed}", "", said))
    return found


def rescued(runs, claim):
    """Each stabiliser against none, on `vision`; exact gradients against exact gradients."""
    bases = {label: "exact: none" if "exact: " in label else "none" for label in claim.arms}
    return [
        (label, *verdict(claim.compared(runs, base, label)))
        for label, base in bases.items()
        if label != base
    ]


def optimum_inside(runs, claim):
    """Is the best mask ratio neither the smallest nor the largest?"""
    means = {label: interval(runs.after(f, claim.seeds))[0] for label, f in claim.arms.items()}
    best, labels = max(means, key=means.get), list(means)
    ends = {end: verdict(claim.compared(runs, end, best)) for end in (labels[0], labels[-1])}
    inside = best not in ends and all(name == "confirmed" for name, _ in ends.values())
    name = "confirmed" if inside else "not confirmed"
    ended = "; ".join(f"over {end}: {said}" for end, (_, said) in ends.items() if end != best)
    return [("optimum inside", name, f"best at {best}, {means[best]:.1f} %; {ended}")]


def estimators(runs, claim):
    """The released estimator against the others."""
    others = [label for label in claim.arms if label != "k3 (released)"]
    pairs = [(o, claim.compared(runs, o, "k3 (released)")) for o in others]
    return [(f"k3 above {o}", *verdict(differences)) for o, differences in pairs]


def regimes(runs, claim):
    """PAPO_G against GRPO wherever the toy's shortcut can be."""
    found = []
    for label in [x.removeprefix("papo_g, ") for x in claim.arms if x.startswith("papo_g")]:
        for split in claim.splits:
            pair = claim.compared(runs, f"grpo, {label}", f"papo_g, {label}", split)
            found.append((f"{label}, {split}", *verdict(pair)))
    return found


def rise_and_fall(runs, claim):
    """Without any reward, val accuracy first rises above the warm start's, and then falls below."""
    flags, found = claim.arms["no reward"], []
    for seed in claim.seeds:
        run = runs.done[flags, seed]
        points = [100 * v for v in run["series"]["val_accuracy"] if v is not None]
        start = 100 * run["before"]["vision"]["accuracy"]
        met = max(points) > start + 3 and points[-1] < start - 3
        said = f"vision before {start:.1f} %; val {', '.join(f'{p:.1f}' for p in points)} %"
        found.append((f"seed {seed}", "confirmed" if met else "not confirmed", said))
    return found


def claims(quick):
    """All claims, each with the rule that decides it."""
    grpo, dapo, papo_g, papo_d = (f"--algo {a}" for a in ("grpo", "dapo", "papo_g", "papo_d"))
    collapse = f"{papo_g} {TOO_LARGE}"
    three, two = SEEDS[:3], SEEDS[:2]
    worn = f"{papo_g} {WEARS_DOWN}"
    exact = f"{worn} --masked_grad --entropy exact"
    above = "the mean difference on vision is at least {} points and its interval is above 0"
    first = Claim(
        "PAPO-G is above GRPO",
        above.format(15),
        {"grpo": grpo, "papo_g": papo_g},
        three if quick else SEEDS,
        better("grpo", "papo_g", 15),
        watched=tuple(SIGNALS)[:3],
    )
    if quick:
        return [first]
    ratios = {
        f"{r}": papo_g + (f" --mask_ratio {r}" if r != Config.mask_ratio else "") for r in RATIOS
    }
    places = {f"h {h}": f"--hint_right {h}" for h in STRENGTHS}
    weakest, strongest = (list(places.items())[i] for i in (0, -1))
    places |= {f"{k}, no trust": f"--no-trust {flags}" for k, flags in (weakest, strongest)}
    arms = {f"{a}, {k}": f"--algo {a} {f}".strip() for k, f in places.items() for a in first.arms}
    return [
        first,
        Claim(
            "PAPO-D is above DAPO",
            above.format(0),
            {"dapo": dapo, "papo_d": papo_d},
            SEEDS,
            better("dapo", "papo_d", 0),
        ),
        Claim(
            "Too large a gamma collapses",
            "vision ends below the warm start, with its interval",
            {
                "default": papo_g,
                "gamma 2": collapse,
                "gamma 1": worn,
                "gamma 1, exact KL": f"{worn} --perception exact --masked_grad",
            },
            three,
            collapses,
            watched=tuple(SIGNALS),
        ),
        Claim(
            "Double entropy rescues a gamma that collapses",
            "vision is above the run without a stabiliser, with its interval",
            {
                "none": worn,
                "single, pi": f"{worn} --eta1 {ETA}",
                "double, as released (the same run)": f"{worn} --eta1 {ETA} --eta2 {ETA}",
                "a higher beta": f"{worn} --beta {BETA}",
                "exact: none": exact,
                "exact: single, pi": f"{exact} --eta1 {ETA}",
                "exact: single, pi_mask": f"{exact} --eta2 {ETA}",
                "exact: double": f"{exact} --eta1 {ETA} --eta2 {ETA}",
            },
            three,
            rescued,
        ),
        Claim(
            "There is a best mask ratio inside",
            "the best mean lies inside, above both ends with their intervals",
            ratios,
            two,
            optimum_inside,
        ),
        Claim(
            "The released estimator is the better one",
            "vision with k3 is above vision with the other, with its interval",
            {
                "k3 (released)": papo_g,
                "printed": f"{papo_g} --perception printed --masked_grad --kl_clamp 0",
                "exact, both branches": f"{papo_g} --perception exact --masked_grad",
            },
            three,
            estimators,
        ),
        Claim(
            "Where it helps, and where it costs",
            "PAPO-G above GRPO, with the interval",
            arms,
            two,
            regimes,
        ),
        Claim(
            "The perception loss alone first helps, then destroys",
            "val rises 3 points above the warm start's vision, and ends 3 points below it",
            {"no reward": f"{collapse} --reward nothing --eval_every 5"},
            three,
            rise_and_fall,
            watched=tuple(SIGNALS),
        ),
    ]


# What is drawn of the way, and what stands above it.
SIGNALS = {
    "val_accuracy": "accuracy on val",
    "val_followed": "wrong hints followed, on val",
    "perception_kl": "KL_prcp, nats a token",
    "entropy": "entropy, nats a token",
    "masked_entropy": "masked entropy, nats a token",
    "reward": "reward",
}
STRENGTHS = [0.5, 0.65, 0.95]  # the toy's own, 0.8, is the first claim
RATIOS = [0.2, 0.4, 0.6, 0.8, 1.0]


# ------------------------------------------------------------------------------ figures, pages


def figure(number, claim, runs, folder):
    """Accuracy after training by arm, a dot a seed with mean and interval -> file name"""
    plt = pyplot()
    width = max(5, 1.2 + 0.75 * len(claim.arms) * len(claim.splits))
    picture, axis = plt.subplots(figsize=(width, 3.6), constrained_layout=True)
    for s, split in enumerate(claim.splits):
        for k, flags in enumerate(claim.arms.values()):
            values = runs.after(flags, claim.seeds, split)
            mean, half = interval(values)
            x, colour = k + 0.22 * s, f"C{s}"
            axis.errorbar(x, mean, half if len(values) > 2 else 0, fmt="s", color=colour, capsize=4)
            axis.plot([x] * len(values), values, ".", color=colour, alpha=0.5)
        axis.plot([], [], "s", color=f"C{s}", label=split)
    axis.set_xticks(range(len(claim.arms)), claim.arms, rotation=20, ha="right", fontsize=8)
    axis.set_ylabel("accuracy after training, %")
    axis.set_title(f"{number}. {claim.title}", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    name = f"{NAME}-{number}.png"
    picture.savefig(folder / name, dpi=80)
    plt.close(picture)
    return name


def curves(number, claim, runs, folder):
    """What happens on the way, step by step: of each arm the mean over seeds, and shaded from the
    lowest seed to the highest -> file name"""
    plt, n = pyplot(), len(claim.watched)
    size = (16, 2.6) if n > 3 else (11, 3.2)
    picture, axes = plt.subplots(1, n, figsize=size, constrained_layout=True)
    for axis, name in zip(axes, claim.watched):
        for c, (label, flags) in enumerate(claim.arms.items()):
            points = {}  # {step: a value a seed}
            for seed in claim.seeds:
                series = runs.done[flags, seed]["series"]
                for step, value in zip(series["step"], series.get(name, [])):
                    if value is not None:
                        points.setdefault(step, []).append(value)
            if points:
                values = points.values()
                axis.plot(list(points), list(map(statistics.mean, values)), f"C{c}", label=label)
                edges = list(map(min, values)), list(map(max, values))
                axis.fill_between(list(points), *edges, color=f"C{c}", alpha=0.2, linewidth=0)
        axis.set_title(SIGNALS[name], fontsize=10)
        axis.set_xlabel("step")
        if SIGNALS[name].endswith("nats a token"):
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    file = f"{NAME}-{number}-curves.png"
    picture.savefig(folder / file, dpi=80)
    plt.close(picture)
    return file


def page(all_claims, runs, folder):
    """Judge, print, draw, and write the results."""
    summary, sections, judged = [], [], []
    for number, claim in enumerate(all_claims, 1):
        if missing := [job for job in claim.jobs() if job not in runs.done]:
            print(f"{number}. {claim.title}: {len(missing)} runs are missing")
            continue
        found = claim.judge(runs, claim)
        pictures = [figure(number, claim, runs, folder)]
        if claim.watched:
            pictures.append(curves(number, claim, runs, folder))
        rows = [f"| {number}. {claim.title} | {' | '.join(row)} |" for row in found]
        print("\n".join(rows))
        summary += rows
        sections += ["", f"## {number}. {claim.title}", "", f"Rule: {claim.rule}.", ""]
        sections += arms_table(claim, runs)
        sections += ["", *(f"![{claim.title}]({name})" for name in pictures)]
        judged.append({"title": claim.title, "rule": claim.rule, "found": found})
    head = ["# The paper on a laptop", "", ABOUT, "", "| claim | what | verdict | numbers |"]
    text = "\n".join([*head, "|---|---|---|---|", *summary, *sections, ""])
    (folder / f"{NAME}.md").write_text(text)
    runs.save(folder / f"{NAME}.json", claims=judged)


def arms_table(claim, runs):
    """Where the arms of a claim began, if in one place, and what each arrived at, as a table."""

    def numbers(flags, when):
        """One list a column, one number a seed."""
        splits = [(split, "accuracy") for split in claim.splits] + [("vision", "followed")]
        return [runs.after(flags, claim.seeds, *column, when) for column in splits]

    heads = [*claim.splits, "wrong hints followed", f"{claim.splits[0]}, seed by seed"]
    lines = [f"| arm | command | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    rows = [(label, f"`train.py {flags}`", flags, "after") for label, flags in claim.arms.items()]
    starts = [numbers(flags, "before") for flags in claim.arms.values()]
    if all(start == starts[0] for start in starts):
        rows.insert(0, ("before training", "", rows[0][2], "before"))
    for label, command, flags, when in rows:
        values = numbers(flags, when)
        cells = [f"{statistics.mean(x):.1f}" for x in values]
        cells.append(" ".join(f"{x:.1f}" for x in values[0]))
        lines.append(f"| {label} | {command} | {' | '.join(cells)} |")
    return lines


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--quick", action="store_true", help="the first claim, with three seeds")
    p.add_argument("--keep", action="store_true", help="runs in the results file are not repeated")
    p.add_argument("--judge", action="store_true", help="train nothing: judge and draw again")
    p.add_argument("--work", default=ROOT / "out" / "laptop", help="where the runs are kept")
    p.add_argument("--out", default=ROOT / "results", type=Path, help="where results are written")
    args = p.parse_args()
    all_claims, runs, file = claims(args.quick), Runs(args.work), args.out / f"{NAME}.json"
    if args.keep or args.judge:
        runs.load(file)
    if not args.judge:
        runs.train([job for claim in all_claims for job in claim.jobs()], file)
    page(all_claims, runs, args.out)


if __name__ == "__main__":
    main()
