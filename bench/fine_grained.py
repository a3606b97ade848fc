"""Fine-R1's two stages on birds that differ in a crest: CoT SFT, then TAPO beside DAPO and PAPO_D.

    python bench/fine_grained.py            # train what is missing; half an hour on 2 cores
    python bench/fine_grained.py --judge    # train nothing; write the page of what there is

A seed is one CoT SFT (sft.py) of the base model, and from there each algorithm (train.py). Every
model answers the four test files of toy/kinds.py (eval.py): kinds that were trained on and kinds
that were not, by name (open) and with four shuffled options (closed). Call it again after an
interruption: what is whole is kept, and a run that was stopped goes on. Writes
results/fine_grained.json, .md and .png.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from paper_on_a_laptop import ROOT, interval, markdown, verdict
from side_by_side import with_interval

from plumbing.checkpoint import is_finished
from plumbing.common import pyplot, write_atomically
from plumbing.console import Bar
from plumbing.report import read_metrics
from plumbing.responses import read
from plumbing.summary import summarise

NAME, SEEDS = "fine_grained", [1, 2, 3]
TESTS = ["test_seen_open", "test_seen_closed", "test_unseen_open", "test_unseen_closed"]
STEPS = 20  # of supervised learning, in which every conversation is seen ten times
SFT = f"--prompts_per_update 8 --lr 3e-5 --steps {STEPS}"  # chosen on `val`
ALGORITHMS = {
    "DAPO": "--algo dapo --reward tagged",
    "PAPO_D": "--algo papo_d --reward tagged",
    "TAPO": "--algo tapo",
}
ALWAYS = "--sampler hf --keep 1 --eval_every 5 --eval_n 4"
ARMS = ["base", "CoT SFT", *ALGORITHMS]
ABOUT = f"""Written by `python bench/fine_grained.py`. Accuracies are per cent, avg@4 on 240
questions a file, means over seeds {", ".join(map(str, SEEDS))} with their 95 % interval (Student's
t); differences are points, with the same seeds on both sides. The three algorithms go on from the
same CoT SFT of a seed, with the same number of steps, updates and responses."""


def command(script, made, **flags):
    """A script of the project on one thread; it goes on where it was stopped. Ends where it fails.

    script: with flags without spaces; made: what it writes, with a log beside it
    """
    words = [str(word) for k, v in flags.items() for word in (f"--{k}", v)]
    resume = ["--resume"] if (made / "config.json").exists() else []
    line = [sys.executable, *script.split(), *words, *resume]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = made.with_suffix(".log")
    with open(log, "a") as file:
        said = dict(cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        if subprocess.run(line, **said).returncode:
            sys.exit(f"error: {script.split()[0]} failed; see {log}")


def answers(model, work, name):
    """{test file: accuracy} of a model, from responses that it has given or gives now."""
    out, data = work / f"{name}.jsonl", ",".join(f"{work / 'kinds' / t}.parquet" for t in TESTS)
    command("eval.py --n 4 --reward tagged --sampler hf", out, out=out, model=model, data=data)
    return {test: summarise(records)["accuracy"] for test, records in read(out).items()}


def fine_tuned(work, seed):
    """The folder of a seed's CoT SFT."""
    out = work / f"kinds-sft-seed{seed}"
    model = out / f"checkpoint-{STEPS}"
    if not model.exists():
        start = {"model": work / "kinds/base", "data": work / "kinds/sft.parquet"}
        command(f"sft.py {SFT}", out, out=out, seed=seed, **start)
    return model


def trained(work, arm, seed):
    """-> (folder of the model that an algorithm arrives at, what its run says of itself)"""
    out, summary = work / f"{arm}-seed{seed}", {}
    file = out / "evaluation.json"
    if not is_finished(out):
        start = {"model": fine_tuned(work, seed), "data": work / "kinds/train.parquet"}
        start |= {"val_data": work / "kinds/val.parquet"}
        command(f"train.py {ALGORITHMS[arm]} {ALWAYS}", out, out=out, seed=seed, **start)
    metrics, about = read_metrics(out), json.loads((out / "config.json").read_text())
    start = json.loads(file.read_text())["before"]["test"]["accuracy"]
    val = [(0, start), *((m["step"], m["val_accuracy"]) for m in metrics if "val_accuracy" in m)]
    summary |= {"flags": ALGORITHMS[arm], "commit": about["commit"], "val": val}
    summary["prompts"] = sum(m["generated_prompts"] for m in metrics)
    return out / f"checkpoint-{metrics[-1]['step']}", summary


def result(work, arm, seed):
    """One model, made where it is missing, and asked -> its part of the results."""
    model, about = work / "kinds/base", {}
    if arm == "CoT SFT":
        model = fine_tuned(work, seed)
    elif arm in ALGORITHMS:
        model, about = trained(work, arm, seed)
    after = answers(model, work, f"answers-{arm.replace(' ', '-')}-seed{seed}")
    return {"arm": arm, "seed": seed, **about, "after": after}


def page(results):
    """The two tables as text. results: {(arm, seed): what `result` says}"""
    heads = ["model", *(t.removeprefix("test_").replace("_", ", ") for t in TESTS), "val by step"]
    lines, against = [], []

    def values(arm, test):
        return [100 * results[arm, seed]["after"][test] for seed in SEEDS if (arm, seed) in results]

    for arm in ARMS:
        runs = [results[arm, seed] for seed in SEEDS if (arm, seed) in results]
        if runs:
            cells = [with_interval(values(arm, test)) for test in TESTS]
            steps = zip(*(run.get("val", []) for run in runs))
            means = (interval([100 * accuracy for _, accuracy in at])[0] for at in steps)
            lines.append([arm, *cells, " ".join(f"{x:.0f}" for x in means)])
    for a, b in [("CoT SFT", "DAPO"), ("DAPO", "TAPO"), ("PAPO_D", "TAPO"), ("DAPO", "PAPO_D")]:
        for test in TESTS:
            differences = [y - x for x, y in zip(values(a, test), values(b, test))]
            if len(differences) > 1:
                against.append([f"{b} above {a}", heads[1 + TESTS.index(test)]])
                against[-1] += verdict(differences)
    tables = markdown(heads, lines), markdown(["compared", "file", "verdict", "points"], against)
    first, second = map("\n".join, tables)
    return "\n\n".join(["# Fine-grained", ABOUT, first, second, f"![val]({NAME}.png)"]) + "\n"


def figure(results, file):
    """Accuracy on `val` as training goes on, a line a seed."""
    plt = pyplot()
    picture, axis = plt.subplots(figsize=(6, 3.2), constrained_layout=True)
    for c, arm in enumerate(ALGORITHMS):
        runs = [results[arm, seed] for seed in SEEDS if (arm, seed) in results]
        for i, run in enumerate(runs):
            steps, accuracy = zip(*run["val"])
            axis.plot(steps, accuracy, color=f"C{c}", alpha=0.7, label=None if i else arm)
    axis.set(xlabel="step", ylabel="accuracy on val")
    axis.legend()
    axis.grid(alpha=0.3)
    picture.savefig(file, dpi=80)
    plt.close(picture)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--judge", action="store_true", help="train nothing: write the page again")
    p.add_argument("--work", default=ROOT / "out" / NAME, type=Path, help="where the runs are kept")
    p.add_argument("--out", default=ROOT / "results", type=Path, help="where results are written")
    args = p.parse_args()
    file, results = args.out / f"{NAME}.json", {}
    if file.exists():
        results = {(run["arm"], run["seed"]): run for run in json.loads(file.read_text())}
    if not args.judge:
        args.work.mkdir(parents=True, exist_ok=True)
        if not (args.work / "kinds").exists():
            command(f"-m toy.kinds {args.work / 'kinds'}", args.work / "kinds")
        jobs = [("base", SEEDS[0]), *((arm, seed) for arm in ARMS[1:] for seed in SEEDS)]
        jobs = [job for job in jobs if job not in results]
        for seed in SEEDS:  # first, since several runs begin with it
            fine_tuned(args.work, seed)
        with Bar(NAME, len(jobs), "runs") as bar, ThreadPoolExecutor(2) as two:
            for job, run in zip(jobs, two.map(lambda job: result(args.work, *job), jobs)):
                results[job] = run
                write_atomically(file, json.dumps(list(results.values())))
                bar.update()
    text = page(results)
    print(text)
    (args.out / f"{NAME}.md").write_text(text)
    figure(results, args.out / f"{NAME}.png")


if __name__ == "__main__":
    main()
