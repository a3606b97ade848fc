"""Fine-R1's baselines, stages and ablations on birds that differ in a crest.

    python fine_r1/bench.py --judge     # train nothing: the page of what results/ holds
    python fine_r1/bench.py             # what is missing of it: by estimate three hours on a core
    python fine_r1/bench.py --harder    # the same on the harder birds of fine_r1/kinds.py

Every model answers four test files. Call it again after an interruption: what is whole is kept, and
what was stopped goes on. Writes results/fine_grained.json and .md, or fine_grained_harder.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "bench"))

from paper_on_a_laptop import ROOT, interval, markdown, verdict, with_ends

from plumbing.base.common import Parser, read_json, write_atomically
from plumbing.report.responses import read, summarise

SEEDS = [1, 2, 3]
TESTS = ["test_seen_open", "test_seen_closed", "test_unseen_open", "test_unseen_closed"]


class Arm(NamedTuple):
    """A model, and how it is asked."""

    line: str = ""  # the command that trains it
    rows: str = "train"  # on which file; or, where nothing trains it, the folder that it is
    start: str = "CoT SFT"  # the arm that it goes on from
    steps: int = 30
    asked: str = ""  # flags of eval.py
    files: str = ""  # what the names of its test files begin with


# Of supervised learning, in which each of 15 conversations is seen ten times, batch, rate and steps
# were chosen on `val`. A response of four tokens is an answer, and has no room for a thought.
SFT = "fine_r1/sft.py --prompts_per_update 8 --lr 3e-5 --steps 20"
RL, AT_ONCE = "--reward tagged --sampler hf --keep 1 --steps 30", "--max_response_tokens 4"
TAPO = f"fine_r1/tapo.py {RL}"
ARMS = {
    "base": Arm(rows="base"),
    "answer only": Arm(rows="at_once", asked=AT_ONCE),
    "in context": Arm(rows="base", files="in_context_"),
    "labels": Arm(SFT, "labels", "answer only", 20, AT_ONCE),
    "CoT SFT": Arm(SFT, "sft", "base", 20),
    "2 chains": Arm(SFT, "sft_2", "base", 20),
    "4 chains": Arm(SFT, "sft_4", "base", 20),
    "CLS-RL": Arm(f"train.py --algo grpo {RL}", start="base"),
    "No-Thinking-RL": Arm(f"train.py --algo grpo {RL} {AT_ONCE}", "train", "answer only"),
    "GRPO": Arm(f"train.py --algo grpo {RL}"),
    "DAPO": Arm(f"train.py --algo dapo {RL}"),
    "PAPO_D": Arm(f"train.py --algo papo_d {RL}"),
    "TAPO": Arm(TAPO),
    "intra": Arm(f"{TAPO} --gamma 0 --eta1 0 --eta2 0"),
    "inter": Arm(f"{TAPO} --second_rollouts -1"),
    "6 to 2": Arm(f"{TAPO} --second_rollouts 2"),
    "2 to 6": Arm(f"{TAPO} --second_rollouts 6"),
    "on the anchor": Arm(f"{TAPO} --update_on anchor"),
}
# Who is above whom in the paper: the figure or table, which test files it speaks of, by how their
# names begin, and the pairs. Of the last ones this paper names no winner.
# Written when there were runs of base, CoT SFT, DAPO, PAPO_D and TAPO alone.
RULES = [
    ("Figure 3a", "test_seen", "labels > base, No-Thinking-RL > base, labels > No-Thinking-RL"),
    ("Figure 3a", "test_seen", "TAPO > labels"),
    ("Figure 3a", "test_unseen", "base > labels, TAPO > No-Thinking-RL"),
    ("Figure 3a", "test", "base > CLS-RL"),
    ("Figure 3b", "test", "base > in context"),
    ("Figure 3c", "test", "CoT SFT > base, DAPO > CoT SFT, intra > DAPO, inter > DAPO"),
    ("Figure 3c", "test", "TAPO > DAPO, TAPO > intra, TAPO > inter"),
    ("Table 3a", "test", "TAPO > 6 to 2, TAPO > 2 to 6"),
    ("Table 3b", "test", "2 chains > CoT SFT, 4 chains > 2 chains"),
    ("asked", "test", "base > answer only, DAPO > GRPO, TAPO > PAPO_D, PAPO_D > DAPO"),
    ("asked", "test", "TAPO > on the anchor"),
]
ABOUT = f"""Written by `python fine_r1/bench.py`, which has the commands and the rules. Accuracies
are per cent, avg@4 on 240 questions a file, means over seeds {", ".join(map(str, SEEDS))} with
their 95 % interval (Student's t); differences are points, with the same seeds on both sides. They
are seeds of one base, so a claim is seen by its interval, or not seen, and never confirmed. Among
the arms of supervised learning the number of updates is the same, among those of reinforcement
learning the number of steps, updates and responses. base is asked to think; answer only, labels and
No-Thinking-RL have an empty thought written for them, and four tokens to answer in. GRPO and all
below it go on from the CoT SFT of their seed. intra is TAPO without negatives, inter without
positives; 6 to 2 and 2 to 6 are its n1 and n2, which are four each otherwise."""


def with_interval(values):
    """Mean and 95 % interval of one number a seed, as text."""
    mean, half = interval(values)
    return f"{mean:.1f} ± {half:.1f}" if len(values) > 1 else f"{mean:.1f}"


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
    a, out = ARMS[arm], work / f"{arm}-seed{seed}"
    if not a.line:
        return work / "kinds" / a.rows
    if not (out / f"checkpoint-{a.steps}").exists():
        data = work / "kinds" / f"{a.rows}.parquet"
        call(a.line, out, out=out, seed=seed, model=model_of(work, a.start, seed), data=data)
    return out / f"checkpoint-{a.steps}"


def result_of(work, arm, seed):
    """One model, asked -> its part of the results. One that is not trained has seeds of asking."""
    model, out = model_of(work, arm, seed), work / f"answers-{arm}-seed{seed}.jsonl"
    a = ARMS[arm]
    data = ",".join(f"{work}/kinds/{a.files}{test}.parquet" for test in TESTS)
    asking = f"eval.py --n 4 --reward tagged --sampler hf {a.asked}"
    call(asking, out, out=out, model=model, data=data, seed=1 if a.line else seed)
    found = {k.removeprefix(a.files): summarise(r)["accuracy"] for k, r in read(out).items()}
    commit = read_json(model.parent / "config.json").get("commit")
    return {"arm": arm, "seed": seed, "command": a.line, "commit": commit, "after": found}


def page(results, title="Fine-grained"):
    """The two tables as text. results: what `result_of` says, of each run"""
    heads = ["arm", *(t.removeprefix("test_").replace("_", ", ") for t in TESTS)]
    asked = {(run["arm"], run["seed"]): run["after"] for run in results}
    lines, against = [], []
    for arm in ARMS:
        done = [asked[arm, seed] for seed in SEEDS if (arm, seed) in asked]
        cells = [with_interval([100 * run[t] for run in done]) if done else "" for t in TESTS]
        lines.append([arm, *cells])
    for where, files, pairs in RULES:
        for pair, (test, head) in product(pairs.split(", "), zip(TESTS, heads[1:])):
            both = [[asked.get((arm, s)) for arm in pair.split(" > ")] for s in SEEDS]
            points = [100 * (b[test] - a[test]) for b, a in both if b and a]
            if test.startswith(files) and len(points) > 1:
                said = verdict(points, 1.0), with_ends(points)
                against.append([pair, where, head, *said])
    said = f"{len(asked)} of {len(ARMS) * len(SEEDS)} runs are there."
    compared = markdown(["above > below", "says", "file", "verdict", "points"], against)
    tables = ["\n".join(markdown(heads, lines)), "\n".join(compared)]
    return "\n\n".join([f"# {title}", ABOUT, said, *tables]) + "\n"


def main():
    """Train what is missing, ask every model, and write the page."""
    p = Parser(__doc__)
    p.add_argument("--harder", action="store_true", help="the harder birds")
    p.add_argument("--judge", action="store_true", help="train nothing: write the page again")
    p.add_argument("--work", type=Path, help="where the runs are kept; default: out/NAME")
    args = p.parse_args()
    name = "fine_grained_harder" if args.harder else "fine_grained"
    work, file = args.work or ROOT / "out" / name, ROOT / "results" / f"{name}.json"
    results = json.loads(file.read_text()) if file.exists() else []
    done = [(run["arm"], run["seed"]) for run in results]
    missing = [job for job in product(ARMS, SEEDS) if job not in done]
    print(f"{len(missing)} of {len(ARMS) * len(SEEDS)} runs are missing")
    if missing and not args.judge and not (work / "kinds" / "at_once").exists():
        work.mkdir(parents=True, exist_ok=True)
        call("-m fine_r1.kinds", work / "kinds", work / "kinds", *["--harder"] * args.harder)
    for arm, seed in missing if not args.judge else ():
        results.append(result_of(work, arm, seed))
        write_atomically(file, json.dumps(results))
    file.with_suffix(".md").write_text(page(results, name.replace("_", "-").capitalize()))


if __name__ == "__main__":
    main()
