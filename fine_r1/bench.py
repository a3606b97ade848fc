"""Fine-R1's two stages on birds that differ in a crest: CoT SFT, then TAPO beside DAPO and PAPO_D.

    python fine_r1/bench.py            # an hour on one core, for what results/ lacks

Every model answers the four test files of fine_r1/kinds.py. Call it again after an interruption:
what is whole is kept, and what was stopped goes on. Writes results/fine_grained.json and .md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "bench"))

from paper_on_a_laptop import ROOT, interval, markdown

from plumbing.base.common import Parser, write_atomically
from plumbing.report.responses import read, summarise

SEEDS = [1, 2, 3]
TESTS = ["test_seen_open", "test_seen_closed", "test_unseen_open", "test_unseen_closed"]
RL = "--reward tagged --sampler hf --keep 1 --steps 30"
# {model: (what makes it, of which file, its last step)}. Of supervised learning, in which every
# conversation is seen ten times, batch, rate and steps were chosen on `val`.
ARMS = {
    "CoT SFT": ("fine_r1/sft.py --prompts_per_update 8 --lr 3e-5 --steps 20", "sft", 20),
    "DAPO": (f"train.py --algo dapo {RL}", "train", 30),
    "PAPO_D": (f"train.py --algo papo_d {RL}", "train", 30),
    "TAPO": (f"fine_r1/tapo.py {RL}", "train", 30),
}
ABOUT = f"""Written by `python fine_r1/bench.py`. Accuracies are per cent, avg@4 on 240
questions a file, means over seeds {", ".join(map(str, SEEDS))} with their 95 % interval (Student's
t); differences are points, with the same seeds on both sides. The three algorithms go on from the
same CoT SFT of a seed, with the same number of steps, updates and responses."""


def with_interval(values):
    """Mean and 95 % interval of one number a seed, as text."""
    mean, half = interval(values)
    return f"{mean:.1f} ± {half:.1f}" if len(values) > 1 else f"{mean:.1f}"


def verdict(differences):
    """Whether b is above a by its interval alone -> (verdict, numbers). differences: one a seed"""
    mean, half = interval(differences)
    name = "confirmed" if mean > half else "contradicted" if mean < -half else "not confirmed"
    return name, f"{mean:+.1f} points ({mean - half:+.1f} .. {mean + half:+.1f})"


def call(line, made, *words, **flags):
    """A command of the project, on one thread; it goes on where it was stopped. Ends where it
    fails. made: what it writes, with a log beside it"""
    words += tuple(word for name, value in flags.items() for word in (f"--{name}", value))
    words += ("--resume",) if (made / "config.json").exists() else ()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(made.with_suffix(".log"), "a", encoding="utf-8") as log:
        told = dict(cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        if subprocess.run([sys.executable, *line.split(), *map(str, words)], **told).returncode:
            sys.exit(f"error: {line.split()[0]} failed; see {log.name}")


def model_of(work, arm, seed):
    """The folder of a model, made where it is missing."""
    kinds = work / "kinds"
    if arm == "base":
        if not (kinds / "base").exists():
            call("-m fine_r1.kinds", kinds, kinds)
        return kinds / "base"
    (line, rows, steps), out = ARMS[arm], work / f"{arm}-seed{seed}"
    if not (out / f"checkpoint-{steps}").exists():
        start = model_of(work, "base" if arm == "CoT SFT" else "CoT SFT", seed)
        call(line, out, out=out, seed=seed, model=start, data=kinds / f"{rows}.parquet")
    return out / f"checkpoint-{steps}"


def result_of(work, arm, seed):
    """One model, asked -> its part of the results."""
    model, out = model_of(work, arm, seed), work / f"answers-{arm}-seed{seed}.jsonl"
    data = ",".join(f"{work / 'kinds' / test}.parquet" for test in TESTS)
    call("eval.py --n 4 --reward tagged --sampler hf", out, out=out, model=model, data=data)
    after = {test: summarise(records)["accuracy"] for test, records in read(out).items()}
    return {"arm": arm, "seed": seed, "after": after}


def page(results):
    """The two tables as text. results: what `result_of` says, of each run"""
    heads = ["model", *(t.removeprefix("test_").replace("_", ", ") for t in TESTS)]
    asked = {(run["arm"], run["seed"]): run["after"] for run in results}
    lines, against = [], []

    def values(arm, test):
        return [100 * asked[arm, seed][test] for seed in SEEDS if (arm, seed) in asked]

    for arm in (arm for arm in ["base", *ARMS] if values(arm, TESTS[0])):
        lines.append([arm, *(with_interval(values(arm, test)) for test in TESTS)])
    for a, b in [("CoT SFT", "DAPO"), ("DAPO", "TAPO"), ("PAPO_D", "TAPO"), ("DAPO", "PAPO_D")]:
        for test, head in zip(TESTS, heads[1:]):
            differences = [y - x for x, y in zip(values(a, test), values(b, test))]
            if len(differences) > 1:
                against.append([f"{b} above {a}", head, *verdict(differences)])
    tables = markdown(heads, lines), markdown(["compared", "file", "verdict", "points"], against)
    return "\n\n".join(["# Fine-grained", ABOUT, *map("\n".join, tables)]) + "\n"


def main():
    """Train what is missing, ask every model, and write the page."""
    p = Parser(__doc__)
    p.add_argument("--work", default=ROOT / "out" / "fine_grained", type=Path, help="of the runs")
    args, file = p.parse_args(), ROOT / "results" / "fine_grained.json"
    results = json.loads(file.read_text()) if file.exists() else []
    jobs = [("base", SEEDS[0]), *((arm, seed) for arm in ARMS for seed in SEEDS)]
    done = [(run["arm"], run["seed"]) for run in results]
    args.work.mkdir(parents=True, exist_ok=True)
    for arm, seed in [job for job in jobs if job not in done]:
        results.append(result_of(args.work, arm, seed))
        write_atomically(file, json.dumps(results))
    file.with_suffix(".md").write_text(page(results))


if __name__ == "__main__":
    main()
