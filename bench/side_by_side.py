"""What the second picture can be used for, side by side on the toy: the same budget, five seeds.

    python bench/side_by_side.py --judge    # train nothing; write the table of what there is
    python bench/side_by_side.py --pace     # time the methods in turn, on a quiet machine; minutes
    python bench/side_by_side.py            # train what is missing; a run is 3 to 5 minutes

Runs are those of paper_on_a_laptop.py, which are taken over. Every method is compared with the
algorithm that its paper builds on, by the rule there. Writes results/side_by_side.json and .md.
"""

import argparse
import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from paper_on_a_laptop import NAME as LAPTOP
from paper_on_a_laptop import RENAMED, ROOT, SEEDS, Runs, command, interval, markdown, verdict

from plumbing.report.record import read_metrics

NAME = "side_by_side"
# (label, algorithm, what it builds on, what it uses the second picture as)
METHODS = [
    ("GRPO", "grpo", None, "nothing"),
    ("PAPO_G", "papo_g", "grpo", "a loss"),
    ("NoisyRollout", "noisy", "grpo", "a source of rollouts"),
    ("DAPO", "dapo", None, "nothing"),
    ("PAPO_D", "papo_d", "dapo", "a loss"),
    ("VPPO", "vppo", "dapo", "credit"),
    ("PGPO", "pgpo", "dapo", "credit"),
]
ABOUT = """Written by `python bench/side_by_side.py`. Accuracies are per cent, avg@4 on 256
questions a split, means over seeds with their 95 % interval (Student's t). A difference is in
points, with the same seeds on both sides. The time of a step is a multiple of GRPO's, from short
runs of all methods in turn (`--pace`)."""
HEADS = (
    "method, algorithm, second picture, vision, general, wrong hints followed, vision against its "
    "base, is it above, time a step, seeds"
).split(", ")


def flags_of(algo):
    """What its runs are known by: some algorithms of the results are programs today."""
    return RENAMED.get(f"--algo {algo}", f"--algo {algo}")


def with_interval(values):
    """Mean and 95 % interval of one number a seed, as text."""
    mean, half = interval(values)
    return f"{mean:.1f} ± {half:.1f}" if len(values) > 1 else f"{mean:.1f}"


def row(label, algo, base, use, runs, pace):
    """One method's line of the table, over the seeds that there are -> cells, [] without any"""
    flags, base = flags_of(algo), flags_of(base)
    seeds = [seed for seed in SEEDS if (flags, seed) in runs.done]
    if not seeds:
        return []
    columns = [("vision", "accuracy"), ("general", "accuracy"), ("vision", "followed")]
    cells = [with_interval(runs.after(flags, seeds, *column)) for column in columns]
    both = [seed for seed in seeds if (base, seed) in runs.done]
    pair = (runs.after(f, both) for f in (base, flags))
    against = verdict([y - x for x, y in zip(*pair)]) if both else ("", "")
    time = f"{pace[algo] / pace['grpo']:.1f}" if pace else ""
    return [label, f"`{command(flags)}`", use, *cells, *against[::-1], time, str(len(seeds))]


def paces(folder):
    """{algorithm: seconds a step}, the median of short runs in turn; the first step warms up."""
    runs, seconds = Runs(folder), {algo: [] for _, algo, _, _ in METHODS}
    for r in range(2):
        for algo, times in seconds.items():
            job = f"{flags_of(algo)} --steps 3 --eval_every 0 --eval_questions 2", r
            runs.run(job)
            times += [m["seconds"] for m in read_metrics(runs.path(*job))[1:]]
    return {algo: round(statistics.median(times), 3) for algo, times in seconds.items()}


def page(runs, pace=None):
    """The table as text."""
    rows = [cells for method in METHODS if (cells := row(*method, runs, pace))]
    return "\n".join(["# Side by side", "", ABOUT, "", *markdown(HEADS, rows), ""])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--judge", action="store_true", help="train nothing: write the table again")
    p.add_argument("--out", default=ROOT / "results", type=Path, help="where results are written")
    p.add_argument("--pace", action="store_true", help="train nothing: time the methods again")
    args = p.parse_args()
    runs, file = Runs(ROOT / "out" / "laptop"), args.out / f"{NAME}.json"
    pace = json.loads(file.read_text()).get("pace") if file.exists() else None
    wanted = [(flags_of(algo), seed) for seed in SEEDS for _, algo, _, _ in METHODS]
    runs.load(ROOT / "results" / f"{LAPTOP}.json")
    runs.load(file)
    runs.done = {job: runs.done[job] for job in wanted if job in runs.done}
    if args.pace:
        with TemporaryDirectory() as folder:
            pace = paces(folder)
    elif not args.judge:
        runs.train(wanted, file)
    text = page(runs, pace)
    print(text)
    runs.save(file, pace=pace)
    (args.out / f"{NAME}.md").write_text(text)


if __name__ == "__main__":
    main()
