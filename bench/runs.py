"""The runs of the fair fight (fight.py): programs of this project with flags and seeds, two at a
time, kept in a JSON file; and the warm starts that they begin with."""

import json
import os
import re
import runpy
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if "torch" not in sys.modules:
    os.environ["OMP_NUM_THREADS"] = "1"  # of a run; two are at work

import plumbing  # noqa: E402, F401  before torch: how its threads wait

from fight import ALL, CHOOSING, parts, recipe  # noqa: E402

import train  # noqa: E402, F401  once for all runs, which are forks of this process
from plumbing.base.common import fail, write_atomically  # noqa: E402
from plumbing.base.console import Bar  # noqa: E402
from plumbing.report.record import read_metrics  # noqa: E402
from plumbing.run.checkpoint import is_finished  # noqa: E402

ALWAYS = "--sampler hf --keep 1 --eval_n 2"
SPLITS = ("vision", "general", "blind")
SIGNALS = "val_accuracy accuracy perception_kl entropy masked_entropy reward".split()


class Runs:
    """What was run, {(start, command, seed): what came out}, and what is known of each start."""

    def __init__(self, folder):
        self.folder, self.done, self.starts, self.commit = Path(folder), {}, {}, None
        self.claims = []  # the page's first table, for who reads the file

    def load(self, file):
        """Take over what a results file holds."""
        if file.exists():
            kept = json.loads(file.read_text())
            self.starts, self.commit = kept["starts"], kept["commit"]
            self.done = {(r["start"], r["command"], r["seed"]): r for r in kept["runs"]}

    def save(self, file):
        """All of it as JSON, a line a run."""
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(run) for run in self.done.values())
        known = {"commit": self.commit, "starts": self.starts, "claims": self.claims}
        about = json.dumps(known)
        write_atomically(file, f'{about[:-1]},\n"runs": [\n{lines}\n]}}\n')

    def path(self, start, command, seed):
        words = re.sub("[./]", "_", command.replace("--", "")).split()
        return self.folder / start / "-".join([*words, f"seed{seed}"])

    def flags(self, job):
        """The command line of a run: [program, flag, value, ...]"""
        start, command, seed = job
        model = f"--model {self.folder / 'warm' / start} --data toy --seed {seed}"
        return f"{command} {model} {ALWAYS} --out {self.path(*job)}".split()

    def train(self, file):
        """What is missing of the parts, two runs at a time, into the file."""
        asked = ["git", "-C", ROOT, "describe", "--always", "--dirty"]
        here = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        self.commit = self.commit or here
        if here.endswith("-dirty"):
            fail(f"this tree is {here}, and a run names the commit that it is of: commit first")
        self.make_starts()
        own = lambda: [p for p in parts(self) if p.later == (here != self.commit)]
        while missing := [j for p in own() for j in p.jobs() if j not in self.done]:
            missing, children = list(dict.fromkeys(missing)), {}
            with Bar("training", len(missing), "runs") as bar:
                while missing or children:
                    while missing and len(children) < 2:
                        job = missing.pop(0)
                        children[start_child(self.flags(job), self.path(*job))] = job
                    child, status = os.wait()
                    job = children.pop(child)
                    if not is_finished(self.path(*job)):
                        fail(f"{self.path(*job)} ended with {status}; see its .log")
                    self.done[job] = self.read(*job, here)
                    self.save(file)
                    bar.update()

    def make_starts(self):
        """The warm starts, those of a seed at once, and what the theorem wants to know of each."""
        from toy.lessons import TRUSTING, build_all

        for start in (*ALL, *CHOOSING):
            same = {s: recipe(s) for s in (*ALL, *CHOOSING) if recipe(s)[2] == recipe(start)[2]}
            teachers = {
                self.folder / "warm" / s: TRUSTING._replace(coupled=coupled, trusts=trusts)
                for s, (coupled, trusts, _) in same.items()
            }
            if not all(folder.exists() for folder in teachers):
                in_child(build_all, teachers, seed=recipe(start)[2])
            if start not in self.starts:
                out = self.folder / "warm" / f"{start}.json"
                if not out.exists():
                    in_child(measure, self.folder / "warm" / start, out)
                self.starts[start] = json.loads(out.read_text())

    def read(self, start, command, seed, commit):
        """What a run of this commit left, as it goes into the results."""
        out = self.path(start, command, seed)
        about = json.loads((out / "config.json").read_text())
        if about["commit"] != commit:
            fail(f"{out} is a run of commit {about['commit']}, not {commit}")
        evaluation, metrics = json.loads((out / "evaluation.json").read_text()), read_metrics(out)
        run = {"start": start, "command": command, "seed": seed}
        run |= {"commit": commit} if commit != self.commit else {}
        run["seconds"] = round(sum(m["seconds"] for m in metrics))
        for when in ("before", "after"):
            kept = {s: evaluation[when][s] for s in SPLITS}
            run[when] = {s: [round(100 * v[k], 2) for k in NUMBERS] for s, v in kept.items()}
        # In tenths, one digit a question: of n responses so many are right, repeat a wrong hint.
        each = evaluation["after"]["vision"]["each"]
        run["right"], run["followed"] = ("".join(f"{9 * x:.0f}" for x in each[k]) for k in NUMBERS)
        columns = {k: [round(m[k], 4) if k in m else None for m in metrics] for k in SIGNALS}
        run["series"] = {k: v for k, v in columns.items() if any(x is not None for x in v)}
        return run

    def scores(self, command):
        """By what a setting is chosen: one number a start, of those that are done."""
        found = [self.done[s, command, 101] for s in CHOOSING if (s, command, 101) in self.done]
        last = [r["series"] for r in found]
        return [50 * (x["val_accuracy"][-1] + sum(x["accuracy"][-5:]) / 5) for x in last]

    def worst(self, commands, starts, base):
        """How far the worst of them ends above `base` on vision; None while one is missing."""
        jobs = [(s, c, 1) for c in commands for s in starts]
        if any(j not in self.done for j in [*jobs, *((s, base, 1) for s in starts)]):
            return None
        return min(self.value(*j) - self.value(j[0], base, 1) for j in jobs)

    def value(self, start, command, seed, split="vision", what=0, when="after"):
        """Per cent of one run. what: an index of NUMBERS"""
        return self.done[start, command, seed][when][split][what]


NUMBERS = ("accuracy", "followed")


def start_child(words, out, first=lambda: None):
    """Run a program of this project in a fork of this process, which calls first() -> its process
    id. Output goes beside `out`, and what stands in `out` is gone on with."""
    out.parent.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if (out / "config.json").exists() else []
    sys.stdout.flush()
    if child := os.fork():
        return child
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.argv, status = [*words, *resume], 1
    try:
        first()
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        status = 0
    except SystemExit as ended:
        print(ended, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def in_child(work, *args, **more):
    """Call work(...) in a fork of this process, which so never uses its threads."""
    if child := os.fork():
        if os.waitpid(child, 0)[1]:
            fail(f"{work.__name__} did not end well; the reason is above")
        return
    status = 1
    try:
        work(*args, **more)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def measure(folder, out):
    """What the theorem wants to know of a warm start, as JSON in `out`: from 8 responses to each of
    256 training questions, those whose hint is right apart from the others, how often it looks and
    how often each way to an answer is right, on the picture, masked as in PAPO, and black."""
    import hashlib
    from dataclasses import replace

    from masking import mask_patches
    from plumbing.run.config import resolve
    from plumbing.run.setup import setup
    from reward import boxed

    flags = dict(model=str(folder), data="toy", algo="papo_g", sampler="hf", val_data="", seed=7)
    parts = setup(resolve(flags | {"out": str(out)}, False)[0])
    prompts, black = list(parts.stream.read(range(256), range(0)).values()), parts.masker.black
    masked = parts.masker.of_all(prompts, [(7, i) for i in range(256)])
    pieces = masked.split([len(p.pixels) for p in prompts])
    whole = [mask_patches(p.pixels, (p.pixels == p.pixels).all(-1), black) for p in prompts]
    pictures = {"picture": [p.pixels for p in prompts], "masked": pieces, "black": whole}
    weights = (folder / "model.safetensors").read_bytes()
    found = {"sha256": hashlib.sha256(weights).hexdigest()}
    parts.sampler.sync(parts.policy)
    for name, pixels in pictures.items():
        asked = [replace(p, pixels=x) for p, x in zip(prompts, pixels)]
        rollouts = parts.sampler.generate(asked, 8, [(7, name, i) for i in range(256)])
        for hint_right in (True, False):
            looked, right, right_hint = [], [], []
            for prompt, rollout in zip(prompts, rollouts):
                example = prompt.example
                if example.tags["hint_right"] != hint_right:
                    continue
                for text in rollout.texts:
                    looks = "a friend says" not in text
                    looked.append(looks)
                    (right if looks else right_hint).append(boxed(text) == example.answer)
            found[f"{name}, hint {'right' if hint_right else 'wrong'}"] = {
                "looks": sum(looked) / len(looked),
                "right": sum(right) / max(1, len(right)),
                "right by hint": sum(right_hint) / max(1, len(right_hint)),
            }
    parts.close()
    write_atomically(out, json.dumps(found))
