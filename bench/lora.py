"""LoRA beside full training on the toy: the same budget, the same seeds.

    python bench/lora.py              # train what is missing; a run is 2 to 5 minutes
    python bench/lora.py --judge      # train nothing; write the table of what there is
    python bench/lora.py --seeds 1 --steps 2 --work /tmp/a --out /tmp/b      # does it run?

Runs are those of paper_on_a_laptop.py: the command train.py with one thread, two runs at a time,
kept in the same folder and gone on with after an interruption. The runs of full training are taken
over from its results file: the same flags are the same run. Two things are judged by the rule
there: does a method learn (after against before), and is LoRA below full training. Writes
results/lora.json and results/lora.md.
"""

import argparse
from pathlib import Path

from paper_on_a_laptop import NAME as LAPTOP
from paper_on_a_laptop import ROOT, SEEDS, Runs, markdown, verdict
from side_by_side import with_interval

from plumbing.config import parser, resolve
from plumbing.lora import add_adapters, count
from toy.model import new_policy, tokenizer

NAME = "lora"
# (label, algorithm, rank of the adapters; 0: all weights are trained)
METHODS = [
    ("PAPO_G", "papo_g", 0),
    ("PAPO_G, LoRA", "papo_g", 16),
    ("PAPO_G, LoRA of rank 1", "papo_g", 1),
]
ABOUT = """Written by `python bench/lora.py`. Accuracies are per cent, avg@4 on 256 questions a
split, means over seeds with their 95 % interval (Student's t). Differences are in points, on
`vision`, with the same seeds on both sides."""
HEADS = (
    "method, command, trained parameters, vision, general, wrong hints followed, learned, does it "
    "learn, against full training, is it above, seeds"
).split(", ")


def flags_of(algo, rank, steps):
    """A run's flags, as paper_on_a_laptop.py names it."""
    rank = f" --lora_rank {rank}" if rank else ""
    return f"--algo {algo}{rank}" + (f" --steps {steps}" if steps else "")


def trained(flags):
    """How many parameters of the toy these flags train."""
    cfg, _ = resolve({"model": "toy", **vars(parser().parse_args(flags.split()))}, cuda=False)
    return count(add_adapters(new_policy(tokenizer()), cfg))[0]


def row(method, runs, seeds, steps):
    """One method's line of the table, over the seeds that there are -> cells, [] without any"""
    label, algo, rank = method
    flags, full = (flags_of(algo, r, steps) for r in (rank, 0))
    seeds = [seed for seed in seeds if (flags, seed) in runs.done]
    if not seeds:
        return []
    columns = [("vision", "accuracy"), ("general", "accuracy"), ("vision", "followed")]
    cells = [with_interval(runs.after(flags, seeds, *column)) for column in columns]
    before, after = (runs.after(flags, seeds, when=when) for when in ("before", "after"))
    learned = verdict([y - x for x, y in zip(before, after)])
    both = [seed for seed in seeds if (full, seed) in runs.done]
    against = ("", "")
    if rank and both:
        pair = (runs.after(f, both) for f in (full, flags))
        against = verdict([y - x for x, y in zip(*pair)])
    cells += [learned[1], learned[0], against[1], against[0], str(len(seeds))]
    return [label, f"`train.py {flags}`", f"{trained(flags):,}", *cells]


def page(runs, seeds, steps):
    """The table as text."""
    rows = [cells for method in METHODS if (cells := row(method, runs, seeds, steps))]
    return "\n".join(["# LoRA beside full training", "", ABOUT, "", *markdown(HEADS, rows), ""])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--judge", action="store_true", help="train nothing: write the table again")
    p.add_argument("--seeds", type=int, default=len(SEEDS), help="how many, from 1 on")
    p.add_argument("--steps", type=int, help="of a run; default: the toy's own")
    p.add_argument("--work", default=ROOT / "out" / "laptop", help="where the runs are kept")
    p.add_argument("--out", default=ROOT / "results", type=Path, help="where results are written")
    args = p.parse_args()
    runs, file = Runs(args.work), args.out / f"{NAME}.json"
    seeds = SEEDS[: args.seeds]
    wanted = [(flags_of(algo, r, args.steps), seed) for seed in seeds for _, algo, r in METHODS]
    for known in (ROOT / "results" / f"{LAPTOP}.json", file):
        runs.load(known)
    runs.done = {job: runs.done[job] for job in wanted if job in runs.done}
    if not args.judge:
        runs.train(wanted, file)
    text = page(runs, seeds, args.steps)
    print(text)
    runs.save(file)
    (args.out / f"{NAME}.md").write_text(text)


if __name__ == "__main__":
    main()
