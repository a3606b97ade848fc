"""The paper's findings, tested on the toy with seeds, intervals, and rules written before the runs.

    python bench/paper_on_a_laptop.py --judge             # train nothing: judge what results/ holds
    python bench/paper_on_a_laptop.py --out out/again     # everything anew; 1.5 hours on 2 cores

Every run is the command train.py with one thread, two runs at a time. Call it again after an
interruption: a run that is whole is kept, one that was stopped goes on, and what the results file
in --out holds is not repeated. A claim says which runs it needs, and its judge holds the rule that
decides. The verdict is `confirmed` where the rule is met, `contradicted` where its opposite is (the
95 % interval lies on the other side), and `not confirmed` elsewhere.

An interval of a difference is Student's t over seeds, the same seeds on both sides. Writes
results/paper_on_a_laptop.json (every run's command, settings, numbers, commit), a figure a claim,
and the page results/paper_on_a_laptop.md.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plumbing.base.common import write_atomically  # noqa: E402
from plumbing.base.console import Bar  # noqa: E402
from plumbing.report.record import first_anomaly, read_metrics  # noqa: E402
from plumbing.run.checkpoint import is_finished  # noqa: E402

ALWAYS = "--sampler hf --keep 1 --eval_n 4"
NAME = "paper_on_a_laptop"
ABOUT = """Written by `python bench/paper_on_a_laptop.py`. Accuracies are per cent, avg@4 on 256
questions a split, means over seeds; differences are points, with their 95 % interval over seeds
where there is more than one. Commands are spelled as today. `out/careless` is another warm start
(`python -m toy.lessons out/careless --last careless`), whose teachers never trust a hint."""
SEEDS = [1, 2, 3, 4, 5]
T975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, 97.5 %, by number of seeds
SPLITS = ("vision", "general")
CARELESS = "--model out/careless --data toy"
# A run is known by its flags, and a results file keeps those that it was called with. These are
# spelled differently today; out/careless is made as the warm start of --no-trust was, then for each
# run anew.
RENAMED = {
    "--masked_grad": "--masked_branch grad",
    "--no-trust": CARELESS,
    "--algo noisy": "variants/noisy_rollout.py",
    "--algo vppo": "variants/vppo.py",
    "--algo pgpo": "variants/pgpo.py",
}
# The eighth claim needs a reward that says nothing. It is registered as a fork would do it.
WITHOUT_REWARD = "import reward, train; reward.rule('nothing')(lambda _: 0.0); train.main()"
# What is drawn of the way; docs/metrics.md says what they are.
SIGNALS = "val_accuracy val_followed perception_kl entropy masked_entropy reward".split()


def command(flags):
    """How a run is called: train.py with its flags, or the program that they begin with."""
    return flags if flags.split()[0].endswith(".py") else f"train.py {flags}"


class Runs:
    """Runs of train.py, by their flags: {(flags, seed): what came out}."""

    def __init__(self, folder):
        self.folder, self.done = Path(folder), {}

    def path(self, flags, seed):
        words = re.sub("[./]", "_", flags.replace("--", "")).split()
        return self.folder / "-".join([*words, f"seed{seed}"])

    def run(self, job):
        """Train where it is not done yet."""
        flags, seed = job
        out = self.path(flags, seed)
        if is_finished(out):
            return
        program, *words = f"{command(flags)} --seed {seed} {ALWAYS} --out {out}".split()
        script = ["-c", WITHOUT_REWARD] if "--reward nothing" in flags else [program]
        resume = ["--resume"] if (out / "config.json").exists() else []
        about = dict(env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, cwd=ROOT)
        with open(out.with_suffix(".log"), "a") as log:
            about |= dict(stdout=log, stderr=subprocess.STDOUT)
            done = subprocess.run([sys.executable, *script, *words, *resume], **about)
        if not is_finished(out):
            sys.exit(f"error: {out.name} ended with {done.returncode}; see {log.name}")

    def load(self, file):
        """Take over the runs that a file holds."""
        for run in json.loads(file.read_text())["runs"] if file.exists() else []:
            flags = run["flags"]
            for then, now in RENAMED.items():
                flags = flags.replace(then, now)
            self.done[flags, run["seed"]] = run

    def train(self, wanted, file):
        """What is not done yet of [(flags, seed)], two at a time, into the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # The same flags of two claims are one run.
        jobs = [job for job in dict.fromkeys(wanted) if job not in self.done]
        if any(CARELESS in flags for flags, _ in jobs) and not (ROOT / "out/careless").exists():
            lessons = "-m toy.lessons out/careless --last careless".split()
            subprocess.run([sys.executable, *lessons], cwd=ROOT, check=True)
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
        evaluation = json.loads((out / "evaluation.json").read_text())
        metrics, series = read_metrics(out), ["step", *SIGNALS, "clip_high_fraction"]
        digits = {k: [round(m[k], 5) if k in m else None for m in metrics] for k in series}
        return {
            "flags": flags,
            "seed": seed,
            "commit": about["commit"],
            "command": f"{command(flags)} --seed {seed} {ALWAYS}",
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
    name = "contradicted" if mean + half < 0 else "not confirmed"
    if mean - half > 0 and mean >= at_least:
        name = "confirmed"
    return name, f"{mean:+.1f} points ({mean - half:+.1f} .. {mean + half:+.1f})"


@dataclass
class Claim:
    """One finding: arms are {label: flags}; judge(runs, claim) -> [(what, verdict, numbers)], and
    its docstring begins with the rule."""

    title: str
    arms: dict
    seeds: list
    judge: object
    watched: int = 0  # so many signals of SIGNALS are drawn on the way, too

    def jobs(self):
        """The runs that it needs."""
        return [(flags, seed) for seed in self.seeds for flags in self.arms.values()]

    def compared(self, runs, a, b, split="vision"):
        """Differences b - a of two arms, one a seed."""
        ours = (runs.after(self.arms[arm], self.seeds, split) for arm in (a, b))
        return [y - x for x, y in zip(*ours)]


def better(at_least):
    """The second arm above the first by so many points on `vision`; `general` is told as well."""

    def judge(runs, claim):
        a, b = claim.arms
        found = [
            ("vision", *verdict(claim.compared(runs, a, b), at_least)),
            ("general", *verdict(claim.compared(runs, a, b, "general"))),
        ]
        for arm in (a, b):
            followed = runs.after(claim.arms[arm], claim.seeds, what="followed")
            found.append((f"wrong hints followed, {arm}", "", f"{interval(followed)[0]:.1f} %"))
        return found

    above = "the mean difference on vision is at least {} points and its interval is above 0"
    judge.__doc__ = above.format(at_least)
    return judge


def collapses(runs, claim):
    """vision ends below the warm start, with its interval

    And the order in which signals leave, each when it is twice what it was.
    """
    found = []
    for label, flags in claim.arms.items():
        if label != "default":
            before = runs.after(flags, claim.seeds, when="before")
            fall = [a - b for a, b in zip(before, runs.after(flags, claim.seeds))]
            found.append((f"{label} falls below the warm start", *verdict(fall)))
    for seed in claim.seeds:
        left = first_anomaly(lines_of(runs.done[claim.arms["gamma 2"], seed]), factor=2)
        order = sorted((step, name) for name, step in left.items())
        said = ", ".join(f"{name} {step}" for step, name in order) or "none"
        found.append((f"gamma 2: signals leave at step, seed {seed}", "", said))
    return found


def rescued(runs, claim):
    """vision is above the run without a stabiliser, with its interval

    Exact gradients are held against exact gradients.
    """
    bases = {label: "exact: none" if "exact: " in label else "none" for label in claim.arms}
    return [
        (label, *verdict(claim.compared(runs, base, label)))
        for label, base in bases.items()
        if label != base
    ]


def optimum_inside(runs, claim):
    """the best mean lies inside, above both ends with their intervals"""
    means = {label: interval(runs.after(f, claim.seeds))[0] for label, f in claim.arms.items()}
    best, labels = max(means, key=means.get), list(means)
    ends = {end: verdict(claim.compared(runs, end, best)) for end in (labels[0], labels[-1])}
    inside = best not in ends and all(name == "confirmed" for name, _ in ends.values())
    name = "confirmed" if inside else "not confirmed"
    ended = "; ".join(f"over {end}: {said}" for end, (_, said) in ends.items() if end != best)
    return [("optimum inside", name, f"best at {best}, {means[best]:.1f} %; {ended}")]


def estimators(runs, claim):
    """vision with k3 is above vision with the other, with its interval"""
    others = [label for label in claim.arms if label != "k3 (released)"]
    pairs = [(o, claim.compared(runs, o, "k3 (released)")) for o in others]
    return [(f"k3 above {o}", *verdict(differences)) for o, differences in pairs]


def regimes(runs, claim):
    """PAPO-G above GRPO, with the interval"""
    found = []
    for label in [x.removeprefix("papo_g, ") for x in claim.arms if x.startswith("papo_g")]:
        for split in SPLITS:
            pair = claim.compared(runs, f"grpo, {label}", f"papo_g, {label}", split)
            found.append((f"{label}, {split}", *verdict(pair)))
    return found


def rise_and_fall(runs, claim):
    """val rises 3 points above the warm start's vision, and ends 3 points below it"""
    flags, found = claim.arms["no reward"], []
    for seed in claim.seeds:
        run = runs.done[flags, seed]
        points = [100 * v for v in run["series"]["val_accuracy"] if v is not None]
        start = 100 * run["before"]["vision"]["accuracy"]
        met = max(points) > start + 3 and points[-1] < start - 3
        said = f"vision before {start:.1f} %; val {', '.join(f'{p:.1f}' for p in points)} %"
        found.append((f"seed {seed}", "confirmed" if met else "not confirmed", said))
    return found


def claims():
    """All claims, in the order of the page."""
    grpo, dapo, papo_g, papo_d = (f"--algo {a}" for a in ("grpo", "dapo", "papo_g", "papo_d"))
    # All found on `val` with seeds above 100: what collapses, what takes 30 steps to do so, and an
    # eta and a beta to hold it with. The paper's eta is 1.5 to 3 times its gamma, and so is this.
    collapse, worn = (f"{papo_g} --gamma {gamma} --anneal_steps 0" for gamma in (2, 1))
    eta1, eta2, beta, grad = "--eta1 2", "--eta2 2", "--beta 0.5", "--masked_branch grad"
    exact = f"{worn} {grad} --entropy exact"
    collapsing = {
        "default": papo_g,
        "gamma 2": collapse,
        "gamma 1": worn,
        "gamma 1, exact KL": f"{worn} --perception exact {grad}",
    }
    stabilised = {
        "none": worn,
        "single, pi": f"{worn} {eta1}",
        "double, as released (the same run)": f"{worn} {eta1} {eta2}",
        "a higher beta": f"{worn} {beta}",
        "exact: none": exact,
        "exact: single, pi": f"{exact} {eta1}",
        "exact: single, pi_mask": f"{exact} {eta2}",
        "exact: double": f"{exact} {eta1} {eta2}",
    }
    ratios = {str(r): f"{papo_g} --mask_ratio {r}" for r in (0.2, 0.4, 0.6, 0.8, 1.0)}
    ratios["0.6"] = papo_g  # the default
    measured = {
        "k3 (released)": papo_g,
        "printed": f"{papo_g} --perception printed {grad} --kl_clamp 0",
        "exact, both branches": f"{papo_g} --perception exact {grad}",
    }
    # The toy's own h, 0.8, is the first claim.
    places = {f"h {h}": f"--hint_right {h}" for h in (0.5, 0.65, 0.95)}
    places |= {f"{h}, no trust": f"{CARELESS} {places[h]}" for h in ("h 0.5", "h 0.95")}
    arms = {f"{a}, {k}": f"--algo {a} {f}" for k, f in places.items() for a in ("grpo", "papo_g")}
    bare = {"no reward": f"{collapse} --reward nothing --eval_every 5"}
    five, three, two = (SEEDS[:n] for n in (5, 3, 2))
    return [
        Claim("PAPO-G is above GRPO", {"grpo": grpo, "papo_g": papo_g}, five, better(15), 3),
        Claim("PAPO-D is above DAPO", {"dapo": dapo, "papo_d": papo_d}, five, better(0)),
        Claim("Too large a gamma collapses", collapsing, three, collapses, 6),
        Claim("Double entropy rescues a gamma that collapses", stabilised, three, rescued),
        Claim("There is a best mask ratio inside", ratios, two, optimum_inside),
        Claim("The released estimator is the better one", measured, three, estimators),
        Claim("Where it helps, and where it costs", arms, two, regimes),
        Claim(
            "The perception loss alone first helps, then destroys", bare, three, rise_and_fall, 6
        ),
    ]


def figure(claim, runs):
    """Accuracy after training by arm, a dot a seed with mean and interval."""
    axis = Figure((max(5, 1.5 * len(claim.arms)), 3.6), layout="constrained").subplots()
    for s, split in enumerate(SPLITS):
        values = [runs.after(flags, claim.seeds, split) for flags in claim.arms.values()]
        means, halves = zip(*map(interval, values))
        places = [k + 0.22 * s for k in range(len(values))]
        halves = halves if len(claim.seeds) > 2 else None
        axis.errorbar(places, means, halves, fmt=f"sC{s}", capsize=4, label=split)
        axis.plot(places, values, f".C{s}", alpha=0.5)
    axis.set_xticks(range(len(claim.arms)), claim.arms, rotation=20, ha="right", fontsize=8)
    axis.set(ylabel="accuracy after training, %", title=claim.title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return axis.figure


def curves(claim, runs):
    """What happens on the way, step by step: a line a run, the seeds of an arm in one colour."""
    picture = Figure((2.7 * claim.watched, 2.8), layout="constrained")
    axes = picture.subplots(1, claim.watched)
    for axis, name in zip(axes, SIGNALS):
        for c, flags in enumerate(claim.arms.values()):
            for seed in claim.seeds:
                lines = [x for x in lines_of(runs.done[flags, seed]) if name in x]
                axis.plot([x["step"] for x in lines], [x[name] for x in lines], f"C{c}", alpha=0.6)
        axis.set(title=name, xlabel="step")
        axis.set_yscale("log" if name.endswith(("kl", "entropy")) else "linear")
        axis.grid(alpha=0.3)
    axes[0].legend(axes[0].lines[:: len(claim.seeds)], claim.arms, fontsize=8)
    return picture


def page(runs, folder, draw=True):
    """Judge, print, draw, and write the results."""
    summary, sections, judged = [], [], []
    for number, claim in enumerate(claims(), 1):
        if missing := [job for job in claim.jobs() if job not in runs.done]:
            print(f"{number}. {claim.title}: {len(missing)} runs are missing")
            continue
        rule, found = claim.judge.__doc__.partition("\n")[0], claim.judge(runs, claim)
        pictures = {f"{NAME}-{number}.png": figure(claim, runs)}
        if claim.watched:
            pictures[f"{NAME}-{number}-curves.png"] = curves(claim, runs)
        for name, picture in pictures.items() if draw else ():
            picture.savefig(folder / name, dpi=80)
        rows = [[f"{number}. {claim.title}", *row] for row in found]
        print(*map(" | ".join, rows), sep="\n")
        summary += rows
        sections += ["", f"## {number}. {claim.title}", "", f"Rule: {rule}.", ""]
        sections += [*arms_table(claim, runs), ""]
        sections += [f"![{claim.title}]({name})" for name in pictures]
        judged.append({"title": claim.title, "rule": rule, "found": found})
    table = markdown(["claim", "what", "verdict", "numbers"], summary)
    text = "\n".join(["# The paper on a laptop", "", ABOUT, "", *table, *sections, ""])
    (folder / f"{NAME}.md").write_text(text)
    runs.save(folder / f"{NAME}.json", claims=judged)


def arms_table(claim, runs):
    """Where the arms of a claim began, if in one place, and what each arrived at, as a table."""
    columns = [*((split, "accuracy") for split in SPLITS), ("vision", "followed")]

    def cells(flags, when):
        """The mean of each column, and the first column's numbers, one a seed."""
        values = [runs.after(flags, claim.seeds, *column, when) for column in columns]
        each = " ".join(f"{x:.1f}" for x in values[0])
        return [*(f"{statistics.mean(x):.1f}" for x in values), each]

    rows = [[k, f"`{command(f)}`", *cells(f, "after")] for k, f in claim.arms.items()]
    starts = [cells(flags, "before") for flags in claim.arms.values()]
    if all(start == starts[0] for start in starts):
        rows.insert(0, ["before training", "", *starts[0]])
    last = ["wrong hints followed", f"{SPLITS[0]}, seed by seed"]
    return markdown(["arm", "command", *SPLITS, *last], rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--judge", action="store_true", help="train nothing: judge and draw again")
    p.add_argument("--work", default=ROOT / "out" / "laptop", help="where the runs are kept")
    p.add_argument("--out", default=ROOT / "results", type=Path, help="where results are written")
    args = p.parse_args()
    runs, file = Runs(args.work), args.out / f"{NAME}.json"
    runs.load(file)
    if not args.judge:
        runs.train([job for claim in claims() for job in claim.jobs()], file)
    page(runs, args.out)


if __name__ == "__main__":
    main()
