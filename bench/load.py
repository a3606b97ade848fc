"""Much of everything: how long it takes, and what it leaves in memory.

    python bench/load.py                         # all of PARTS, about half an hour on two cores
    python bench/load.py --only answers,text

Each part is a fork of this process: seconds, and bytes of its own memory after it beside those
before it (not of files, which the system shares). Into results/load.json.
"""

import io
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

import psutil
from runs import ROOT, in_child  # puts the project on the path

from plumbing.base.common import Parser, write_atomically
from plumbing.base.console import say
from plumbing.data.sources import Rows
from plumbing.grading.workers import Grader
from plumbing.models.weights import load_processors
from plumbing.report.record import read_metrics
from plumbing.run.config import resolve
from plumbing.run.setup import model_folder

SMALL = "--sampler hf --prompts_per_step 4 --prompts_per_update 4 --group_size 4 --val_data="
SMALL += " --max_response_tokens 16 --save_every 100 --keep 1 --lr 1e-5"
ASKED = "how many red objects are there ? " * 4
# What a policy may write when it learns that a grader computes.
HOSTILE = ["(" * 50, "9^" * 60, "x^{" * 24, "1+" * 140, r"\frac{1}{" * 30, r"\sqrt{" * 40]
HOSTILE += [r"\sin(" * 50, "10^{99999}", "2000!", "{1,2,3}," * 30, r"\overline{9}" * 20]


def checked(rows):
    """Are the rows of a data set usable? -> how many are not"""
    cfg = resolve({"model": "toy", "sampler": "hf"}, cuda=False)[0]
    return len(rows.faults(*load_processors(model_folder("toy"), cfg), 256))


def pictures(folder):
    """39,000 rows, as many as ViRL39K, each with a JPEG of 640 x 480: 1.3 GB"""
    import pyarrow
    from PIL import Image
    from pyarrow import parquet

    buffer = io.BytesIO()
    Image.effect_noise((640, 480), 60).save(buffer, "JPEG", quality=20)
    row = {"problem": f"<image> {ASKED}", "answer": "3", "images": [{"bytes": buffer.getvalue()}]}
    table = pyarrow.Table.from_pylist([row] * 39_000)
    parquet.write_table(table, folder / "rows.parquet", row_group_size=1000)
    return lambda: checked(Rows(folder / "rows.parquet", "train"))


def text(folder):
    """200,000 rows without a picture, as JSON lines"""
    rows = ({"problem": f"{i} {ASKED}", "answer": "3", "images": []} for i in range(200_000))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return lambda: checked(Rows(folder / "rows.jsonl", "train"))


def program(words):
    """Run a program of this project here."""
    import runpy

    sys.argv = [str(word) for word in words]
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def steps(folder):
    """300 steps of four small groups; memory: the last step's beside that of step 50"""

    def work():
        program([*f"train.py --algo papo_g {SMALL} --steps 300 --out".split(), folder / "run"])
        memory = {m["step"]: m["host_memory_gb"] for m in read_metrics(folder / "run")}
        return {"grown": 1e9 * (memory[300] - memory[50])}

    return work


def questions(folder):
    """5,000 questions answered once, in at most 8 tokens"""
    flags = "--model toy --n 1 --max_response_tokens 8 --questions 1667 --out".split()
    return lambda: program(["eval.py", *flags, folder / "answers.jsonl"])


def answers(_):
    """10,000 hostile answers, no two alike, in batches of 500, as a step grades them"""
    rng = random.Random(1)
    parts = [f"{rng.choice(HOSTILE)}{i}{rng.choice(HOSTILE)}" for i in range(10_000)]
    pairs = [(said[:300], "0.5") for said in parts]

    def work():
        grader = Grader()
        right = sum(sum(grader.grade_all(pairs[i : i + 500])) for i in range(0, len(pairs), 500))
        grader.close()
        return {"right": right, "given up": grader.timeouts}

    return work


PARTS = {f.__name__: f for f in (pictures, text, steps, questions, answers)}


def measure(part, folder, out):
    """One part, made ready and then timed, into a JSON file."""

    def memory():
        about = psutil.Process().memory_info()
        return about.rss - about.shared

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    work = part(folder)
    before, began = memory(), time.perf_counter()
    found = work()
    took = {"seconds": round(time.perf_counter() - began, 1), "grown": memory() - before}
    took |= found if isinstance(found, dict) else {"result": found}
    took["grown"] = f"{took['grown'] / 1e6:.0f} MB"
    write_atomically(out, json.dumps({"what": part.__doc__, **took}))
    shutil.rmtree(folder)


def main():
    """Measure what is asked for, and add it to the results."""
    p = Parser(__doc__)
    p.add_argument("--only", default=",".join(PARTS), help="some of the parts")
    p.add_argument("--work", type=Path, default=ROOT / "out/load", help="for files")
    p.add_argument("--out", type=Path, default=ROOT / "results/load.json")
    args = p.parse_args()
    results = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    for name in args.only.split(","):
        one = args.work.with_name(f"{args.work.name}-{name}.json")
        in_child(measure, PARTS[name], args.work / name, one)
        results[name] = json.loads(one.read_text("utf-8"))
        say(f"{name}: {results[name]}")
        write_atomically(args.out, json.dumps(results, indent=1))
        os.unlink(one)


if __name__ == "__main__":
    main()
