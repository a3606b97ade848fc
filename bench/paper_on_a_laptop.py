"""When does looking pay? PAPO, what it builds on and plain baselines, on the toy: many warm starts,
one budget, rules written before the runs.

    python bench/paper_on_a_laptop.py --judge       # train nothing: judge what results/ holds
    python bench/paper_on_a_laptop.py               # train what is missing; hours on 2 cores

A run is train.py, or another program here, on one thread, two at a time. Call it again after an
interruption: what the results hold is not repeated, a run that was stopped goes on, and the page
says what is missing. All runs come from one commit, so later ones need a checkout of it:

    git worktree add out/fight-tree COMMIT && cd out/fight-tree
    python bench/paper_on_a_laptop.py --out ../../results

The unit is the warm start: seeds of one start are averaged before anything is compared. Settings
are chosen on starts and seeds of their own (`tune` below). Writes paper_on_a_laptop.json, .md and
figures.
"""

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # of a run; two are at work

import plumbing  # noqa: E402, F401  before torch: how its threads wait

import train  # noqa: E402, F401  once for all runs, which are forks of this process
from plumbing.base.common import fail, write_atomically  # noqa: E402
from plumbing.base.console import Bar  # noqa: E402
from plumbing.report.record import read_metrics  # noqa: E402
from plumbing.run.checkpoint import is_finished  # noqa: E402

NAME, ALWAYS = "paper_on_a_laptop", "--sampler hf --keep 1 --eval_n 2"
SPLITS = ("vision", "general", "blind")
SIGNALS = "val_accuracy accuracy perception_kl entropy masked_entropy reward".split()

# ------------------------------------------------------------------------ what is run, and on what

# A recipe of the warm start: how surely a masked picture leads to the hint, and how often a whole
# one does (toy/lessons.py). Each has three starts that are reported; others serve the choosing.
RECIPES = [(coupled, trusts) for coupled in (1.0, 0.5, 0.0) for trusts in (0.12, 0.25, 0.38)]
TUNING = [(1.0, 0.25), (0.0, 0.38)]  # the README's, and the one on which GRPO varied the most


def starts_of(recipes, seeds=(1, 2, 3)):
    """Names of warm starts."""
    return [f"c{coupled}-t{trusts}-s{seed}" for coupled, trusts in recipes for seed in seeds]


def recipe(start):
    """-> (coupled, trusts, seed)"""
    coupled, trusts, seed = re.fullmatch(r"c(.+)-t(.+)-s(\d+)", start).groups()
    return float(coupled), float(trusts), int(seed)


ALL, SIX, THREE = starts_of(RECIPES), starts_of(TUNING), starts_of(RECIPES[1::3], seeds=(1,))
CHOOSING = starts_of(TUNING, seeds=(100,))
CONTROLS = "bench/controls.py"
BATCH_16 = "--group_size 16 --prompts_per_step 16 --prompts_per_update 8"  # as many responses
BONUS = "--entropy exact --eta1 -0.01"
# Every method chooses among four: its first is the default. The score is the mean of `val` at the
# end, whose hints say nothing, and the accuracy on the last five steps' training questions.
METHODS = {
    "grpo": ["train.py --algo grpo", "--lr 4e-4", BATCH_16, f"{CONTROLS} --algo grpo {BONUS}"],
    "papo_g": ["train.py --algo papo_g", "--gamma 0.1", "--gamma 0.6", "--mask_ratio 1.0"],
    "blind_weight": [
        "variants/blind_weight.py",
        "--blind_responses 2",
        "--blind_responses 1",
        "--lr 4e-4",
    ],
    "noisy": [
        "variants/noisy_rollout.py",
        "--noise_steps 300",
        "--noise_steps 800",
        "--second_rollouts 2",
    ],
    "dapo": ["train.py --algo dapo", "--lr 4e-4", BATCH_16, f"{CONTROLS} --algo dapo {BONUS}"],
    "papo_d": ["train.py --algo papo_d", "--gamma 0.1", "--gamma 0.6", "--mask_ratio 1.0"],
    "vppo": ["variants/vppo.py", "--credit_share 0.2", "--credit_share 0.7", "--credit_floor 0.5"],
    "pgpo": [
        "variants/pgpo.py",
        "--credit_threshold 0.4 --credit_boost 2",
        "--credit_threshold 0.2",
        "--credit_boost 2",
    ],
}


def candidates(method):
    """The four commands that it chooses among."""
    first, *rest = METHODS[method]
    return [first, *(x if ".py" in x else f"{first} {x}" for x in rest)]


@dataclass
class Pair:
    """ "b is above a": confirmed where the mean difference over warm starts is at least so many
    points, its 95 % interval (Student's t) lies above 0, and its sign-flip test holds at 5 % after
    Holm's correction over all pairs of the page."""

    b: str
    a: str
    split: str = "vision"
    at_least: float = 0.0
    only: str = ""  # starts whose names begin so


@dataclass
class Part:
    """Arms {label: command} on warm starts, each with these seeds, and what is compared."""

    title: str
    says: str  # the rule, or what is looked for
    arms: dict
    starts: list
    seeds: tuple = (1,)
    pairs: list = field(default_factory=list)

    def jobs(self):
        """The runs that it needs: (start, command, seed)."""
        return [(s, c, n) for n in self.seeds for s in self.starts for c in self.arms.values()]


def both(b, a, **more):
    """A pair on vision and on general."""
    return [Pair(b, a, split, **more) for split in ("vision", "general")]


def tuning(names):
    """What is chosen, and by what."""
    arms = {f"{m} {i}": c for m in names for i, c in enumerate(candidates(m))}
    says = "the best score decides (the mean of `val` and of training accuracy); a tie leaves the"
    return Part(f"Tuning: {', '.join(names)}", f"{says} earlier one", arms, CHOOSING, (101,))


def held_at(gamma):
    """{a way to keep a policy from collapsing: the command}, at a gamma that is never lowered."""
    ways = {"": "", "eta1 2 gamma": f"--eta1 {2 * gamma}", "beta 0.5": "--beta 0.5"}
    ways |= {"beta 2 gamma": f"--beta {2 * gamma}", "1 nat": "--kl_clamp 1"}
    ways |= {"beta 2 gamma, signs": f"--beta {2 * gamma} --reference signed"}
    ways |= {name: f"--perception {name}" for name in ("jensen_shannon", "held")}
    worn = f"{CONTROLS} --algo papo_g --gamma {gamma} --anneal_steps 0"
    return {way: f"{worn} {flags}".strip() for way, flags in ways.items()}


def chosen(runs):
    """{method: the command that its tuning chose}, of the methods that are tuned."""
    found = {}
    for method in METHODS:
        scores = {c: runs.scores(c) for c in candidates(method)}
        if all(len(s) == len(CHOOSING) for s in scores.values()):
            found[method] = max(scores, key=lambda c: sum(scores[c]))
    return found


def parts(runs):
    """All parts in the order in which they are run; those that wait for a choice are left out."""
    first, last = tuning(list(METHODS)[:4]), tuning(list(METHODS)[4:])
    best = chosen(runs)
    if not {"grpo", "papo_g", "blind_weight", "noisy"} <= set(best):
        return [first]
    grpo, papo, weight = (best[m] for m in ("grpo", "papo_g", "blind_weight"))
    three = {"grpo": grpo, "papo_g": papo, "blind_weight": weight}
    coupled = [x for c in ("c1.0", "c0.5", "c0.0") for x in both("papo_g", "grpo", only=c)]
    head = [*both("papo_g", "grpo"), *coupled, *both("blind_weight", "grpo")]
    head += both("papo_g", "blind_weight")

    def fork(method):  # the same settings, with the controls' flags
        return best[method].replace("train.py", CONTROLS)

    slow = {f"{m}, {n} steps": f"{three[m]} --steps {n}" for m in three for n in (60, 120)}
    data = {
        "hints dropped in 30 %": "--hints dropped",
        "hints shuffled in 30 %": "--hints shuffled",
    }
    data |= {"black in 30 %": "--pictures part"}
    changed = {f"grpo, {k}": f"{fork('grpo')} {f}" for k, f in data.items()}
    kinds = {k: f"{fork('papo_g')} --perception {k}" for k in ("signed", "branch", "inside")}
    number = {
        f"blind_weight, n {n}": f"variants/blind_weight.py --blind_responses {n}" for n in (1, 2)
    }
    mixed = {"blind_weight with PAPO": f"{weight} --gamma 0.3 --anneal_steps 20"}
    controls = {**three, **changed, **kinds, **number, **mixed}
    unseen = [(m, k) for k in ("black", "exchanged") for m in ("grpo", "papo_g")]
    untrained = {f"{m}, {k}": f"{fork(m)} --pictures {k}" for m, k in unseen}
    plain = "train.py --algo papo_g"
    doses = {f"gamma {g}": f"{plain} --gamma {g}" for g in (0.02, 0.05, 0.1, 0.6, 1.0)}
    doses = {"gamma 0": "train.py --algo grpo", **doses, "gamma 0.3": plain}
    held = {f"gamma {g}, held": f"{plain} --gamma {g} --anneal_steps 0" for g in (0.02, 0.1, 0.3)}
    late = {f"from step {n}": f"{CONTROLS} --algo papo_g --gamma_from {n}" for n in (10, 20)}
    hold = {}
    for g in (1, 2):
        hold |= {f"gamma {g}, {way}".strip(", "): c for way, c in held_at(g).items()}
    rescued = [Pair(k, f"gamma {g}") for g in (1, 2) for k in hold if k.startswith(f"gamma {g},")]
    places = []
    for h in (0.95, 0.5, 0.65):
        arms = {f"{m}, h {h}": f"{c} --hint_right {h}" for m, c in three.items()}
        title = f"The phase picture: hints right {100 * h:.0f} % of the time"
        places.append(
            Part(title, "scored together, below", arms, ALL, pairs=both(*list(arms)[1::-1]))
        )
    found = [
        first,
        Part("The headline", Pair.__doc__.strip(), three, ALL, pairs=head),
        Part("The headline, more seeds", "variance inside a warm start", three, SIX, (2, 3)),
        Part(
            "Trained blind",
            "PAPO's gain is gone when trained blind: above GRPO by less than 5 points",
            untrained,
            SIX,
            pairs=[Pair(f"papo_g, {k}", f"grpo, {k}") for k in ("black", "exchanged")],
        ),
        Part(
            "Baselines that a reviewer asks for",
            "each against the method that it varies",
            controls,
            SIX,
            pairs=[Pair(k, "grpo") for k in changed]
            + [Pair("papo_g", k) for k in kinds]
            + [Pair("blind_weight", k) for k in number]
            + both("blind_weight with PAPO", "blind_weight"),
        ),
        Part("Longer", "each against its 30 steps", {**three, **slow}, THREE),
        Part("How much gamma, and when", "a dose curve", {**doses, **held, **late}, THREE),
        Part("Collapse", "what is above the same gamma, held, alone", hold, THREE, pairs=rescued),
        *places,
        last,
    ]
    pairs = {way: [held_at(g)[way] for g in (1, 2)] for way in held_at(1) if way}
    fates = {way: runs.worst(pair, THREE, plain) for way, pair in pairs.items()}
    if None not in fates.values():
        way = max(fates, key=fates.get)
        again = {f"gamma {g}": held_at(g)[way] for g in (0.3, 1, 2)}
        says = f"the best way of those above, {way}: at every gamma each of five seeds on each of "
        says += "three starts must end at most 5 points below PAPO_G's own run there"
        found.append(Part("Is it held at any gamma?", says, again, THREE, (1, 2, 3, 4, 5)))
    if set(best) == set(METHODS):
        others = {m: best[m] for m in ("noisy", "dapo", "papo_d", "vppo", "pgpo")} | three
        others["dapo with the entropy of PAPO_D"] = f"{CONTROLS} --algo papo_d --gamma 0"
        others["blind_weight on DAPO"] = "variants/blind_weight.py --algo blind_weight_d"
        others["vppo, credit at random"] = f"{CONTROLS} --by_chance --algo vppo"
        above = [("papo_d", "dapo"), ("vppo", "dapo"), ("pgpo", "dapo"), ("noisy", "grpo")]
        above += [("vppo", "vppo, credit at random"), ("blind_weight on DAPO", "dapo")]
        above += [("dapo with the entropy of PAPO_D", "dapo")]
        pairs = [Pair(b, a) for b, a in above]
        found.append(Part("All methods, one budget", "each on its base", others, SIX, pairs=pairs))
    return found


# ---------------------------------------------------------------------------------- running it


class Runs:
    """What was run, {(start, command, seed): what came out}, and what is known of each start."""

    def __init__(self, folder):
        self.folder, self.done, self.starts, self.commit = Path(folder), {}, {}, None

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
        about = json.dumps({"commit": self.commit, "starts": self.starts})
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
        here = subprocess.run(
            ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip()
        self.commit = self.commit or here
        if here.endswith("-dirty") or here != self.commit:
            fail(f"the runs are those of commit {self.commit}, and this tree is {here}; see --help")
        self.make_starts()
        while missing := [j for p in parts(self) for j in p.jobs() if j not in self.done]:
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
                    self.done[job] = self.read(*job)
                    self.save(file)
                    bar.update()

    def make_starts(self):
        """The warm starts, those of a seed at once, and what the theorem wants to know of each."""
        from toy.lessons import TRUSTING, build_all

        for start in (*ALL, *CHOOSING):
            coupled, trusts, seed = recipe(start)
            same = [s for s in (*ALL, *CHOOSING) if recipe(s)[2] == seed]
            teachers = {
                self.folder / "warm" / s: TRUSTING._replace(
                    coupled=recipe(s)[0], trusts=recipe(s)[1]
                )
                for s in same
            }
            if not all(folder.exists() for folder in teachers):
                in_child(build_all, teachers, seed=seed)
            if start not in self.starts:
                out = self.folder / "warm" / f"{start}.json"
                in_child(measure, self.folder / "warm" / start, out)
                self.starts[start] = json.loads(out.read_text())

    def read(self, start, command, seed):
        """What a run left, as it goes into the results."""
        out = self.path(start, command, seed)
        about = json.loads((out / "config.json").read_text())
        if about["commit"] != self.commit:
            fail(f"{out} is a run of commit {about['commit']}, not {self.commit}")
        evaluation, metrics = json.loads((out / "evaluation.json").read_text()), read_metrics(out)
        run = {"start": start, "command": command, "seed": seed}
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


def start_child(words, out):
    """Run a program of this project in a fork of this process -> its process id. Output goes beside
    `out`, and what stands in `out` is gone on with."""
    out.parent.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if (out / "config.json").exists() else []
    sys.stdout.flush()
    if child := os.fork():
        return child
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.argv, status = [*words, *resume], 1
    try:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def in_child(work, *args, **more):
    """Call work(...) in a fork of this process, which so never uses its threads."""
    if child := os.fork():
        if os.waitpid(child, 0)[1]:
            fail("a warm start could not be made; the reason is above")
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


# ---------------------------------------------------------------------------- what is predicted


def pulls(start, h, gamma=0.3):
    """The mean gradient of each method on the branch "look" of a warm start whose hints are right
    with probability h, from what `measure` found of it (docs/findings.md, the fifth fact).

    GRPO's is a (1 - a) (r - q) / s, with q the hint's accuracy and s the reward's deviation, a mean
    over questions whose hint is right and those whose hint is wrong; PAPO adds gamma (a - b); a
    blind weight multiplies a question's part by 1 - m. -> {method: pull}; it is predicted to look
    where its pull is above 0.

    The rule of the phase picture: PAPO is predicted to pay where GRPO's pull is below 0 and its own
    above. It does pay where it ends more than 10 points above GRPO on vision. Cells are means of
    three starts; what is right of 36 is set against "it always pays" and "it never does".
    """
    grpo = weighted = papo = 0.0
    for share, hint in ((h, "right"), (1 - h, "wrong")):
        seen, masked, black = (start[f"{p}, hint {hint}"] for p in ("picture", "masked", "black"))
        a, b, r, q = seen["looks"], masked["looks"], seen["right"], seen["right by hint"]
        right = a * r + (1 - a) * q
        pull = a * (1 - a) * (r - q) / max(1e-6, right * (1 - right)) ** 0.5
        blindly = black["looks"] * black["right"] + (1 - black["looks"]) * black["right by hint"]
        grpo += share * pull
        weighted += share * (1 - blindly) * pull
        papo += share * gamma * (a - b)
    return {"grpo": grpo, "papo_g": grpo + papo, "blind_weight": weighted}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--judge", action="store_true", help="train nothing: judge and draw again")
    p.add_argument("--work", default=ROOT / "out" / "fight", help="where the runs are kept")
    p.add_argument("--out", default=ROOT / "results", type=Path, help="where results are written")
    args = p.parse_args()
    runs, file = Runs(args.work), args.out / f"{NAME}.json"
    runs.load(file)
    if not args.judge:
        runs.train(file)


if __name__ == "__main__":
    main()
