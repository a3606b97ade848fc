"""The two stages of Fine-R1 on pictures that people drew: the same emoji by two vendors.

    python bench/emoji.py                                       # fetches both packages with npm
    python bench/emoji.py --google DIR --twitter DIR            # folders of unpacked packages
    python bench/emoji.py --algos dapo --steps 10 --seeds 1

An emoji is a class. A subcategory of Unicode's, such as animal-bird, holds those that are taken for
each other. Google's drawing is what is asked about, Twitter's is another picture of the class
(`positive`), and Google's drawing of the most similar emoji of the subcategory is the `negative`.
The tiny policy of toy/ first learns from scratch, with sft.py, to name Google's drawings, moved a
little; then train.py goes on from there with each algorithm, on two thirds of the classes, which
the negatives are of as well. What counts is Twitter's drawings of the other third: neither stage
has seen them. In them a policy is right that looks at what makes the emoji, and not at one vendor's
way to draw it. Each of --seeds goes to both stages; the rows are the same for all of them.

The packages are emoji-datasource-google and emoji-datasource-twitter 16.0.0, of 74 and 62 MB, whose
own files state their licences: the data MIT (Cal Henderson), Google's pictures (Noto) Apache 2.0,
Twitter's (Twemoji) CC BY 4.0. Nothing of them is part of this project.
"""

import argparse
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from paper_on_a_laptop import ROOT
from PIL import Image
from side_by_side import with_interval

from plumbing.common import fail, make_once
from plumbing.config import TINY, algorithms
from plumbing.data import IMAGE
from plumbing.pictures import rgb
from reward import TAGGED
from toy.birds import respond
from toy.kinds import TURNS, png, save
from toy.model import keep, new_policy, processor, tokenizer

VERSION = "16.0.0"
GROUPS = ["animal-bird", "animal-mammal", "food-fruit", "transport-ground", "clothing"]
QUESTION = "which emoji is this ?"
CANDIDATES, COPIES = 4, 8  # named in a chain of thought; of each drawing to learn from, moved


def fetched(vendor, out):
    """The folder of a vendor's package, fetched with npm unless it is there."""
    name, folder = f"emoji-datasource-{vendor}", out / vendor
    archive = out / f"{name}-{VERSION}.tgz"

    def unpack(making):
        print(f"fetching {name} {VERSION}")
        packed = ["npm", "pack", "--silent", f"{name}@{VERSION}"]
        if not archive.exists() and subprocess.run(packed, cwd=out).returncode:
            fail(f"npm cannot fetch {name}@{VERSION}; give its folder with --{vendor}")
        with tarfile.open(archive) as tar:
            wanted = (f"package/img/{vendor}/64/", "package/emoji.json", "package/package.json")
            tar.extractall(making, [m for m in tar if m.name.startswith(wanted)], filter="data")

    return make_once(folder, unpack) / "package"


def package_of(folder):
    """-> (name, version) of an unpacked package"""
    if not (folder / "package.json").is_file():
        fail(f"{folder} is no unpacked package: it holds no package.json")
    about = json.loads((folder / "package.json").read_text())
    return about["name"], about["version"]


def drawings(folders, most):
    """-> {subcategory: {name: {vendor: RGB picture}}}, at most `most` names a subcategory.

    No name is part of another: Fine-R1's reward looks for the truth anywhere in an answer.
    """
    found, names = {}, set()
    for emoji in json.loads((folders["google"] / "emoji.json").read_text()):
        group, name = emoji["subcategory"], emoji["short_name"]
        files = {v: f / "img" / v / "64" / emoji["image"] for v, f in folders.items()}
        clash = any(name in other or other in name for other in names)
        full = len(found.get(group, ())) == most
        if group not in GROUPS or full or clash or not all(f.exists() for f in files.values()):
            continue
        names.add(name)
        pictures = {vendor: rgb(file.read_bytes()) for vendor, file in files.items()}
        found.setdefault(group, {})[name] = pictures
    if min(map(len, found.values()), default=0) < 2:
        groups = " or ".join(found or GROUPS)
        fail(f"not two emoji of {groups} with two drawings in {folders['google']}; see --most")
    return found


def similar(group):
    """{name: the names of its subcategory, the most similar first, itself left out}, by the
    distance between Google's drawings of 16 x 16 pixels."""
    small = {n: np.asarray(p["google"].resize((16, 16)), float) for n, p in group.items()}

    def order(name):
        others = [other for other in group if other != name]
        return sorted(others, key=lambda other: ((small[name] - small[other]) ** 2).sum())

    return {name: order(name) for name in group}


def moved(picture, rng):
    """A drawing at another place, on white."""
    page = Image.new("RGB", picture.size, "white")
    page.paste(picture, (rng.randint(-4, 4), rng.randint(-4, 4)))
    return page


def rows_of(found):
    """{name of a file: its rows}, in the columns of toy/kinds.py

    Every third class of a subcategory is unseen: no row of `train` has a picture of it.
    """
    files = {"sft": [], "train": [], "test_unseen": [], "test_seen": []}
    rng = random.Random(0)
    for group, emoji in found.items():
        near, known = similar(emoji), {name for k, name in enumerate(emoji) if k % 3 != 2}
        for name, drawn in emoji.items():
            candidates = sorted([name, *near[name][: CANDIDATES - 1]])
            thought = f"group {group} ; candidates {' '.join(candidates)} ; it is {name}"
            asked = f"{IMAGE} {QUESTION}"
            said = asked + TAGGED.instruction, respond(thought, name)
            messages = [{"role": r, "content": t} for r, t in zip(TURNS, said)]
            for _ in range(COPIES):
                images = [png(moved(drawn["google"], rng))]
                files["sft"].append({"messages": messages, "images": images})
            row = {"problem": asked, "answer": name}
            twitter, seen = png(drawn["twitter"]), name in known
            files["test_seen" if seen else "test_unseen"].append(row | {"images": [twitter]})
            if seen:
                other = next(other for other in near[name] if other in known)
                companions = {"positive": twitter, "negative": png(emoji[other]["google"])}
                files["train"].append(row | {"images": [png(drawn["google"])]} | companions)
    return files


def words(files):
    """Every word of the rows."""
    texts = [turn["content"] for row in files["sft"] for turn in row["messages"]]
    return sorted({word for text in texts for word in text.replace(IMAGE, "").split()})


def run(script, flags):
    """A script of the project with {flag: value}. Ends where it fails."""
    command = [sys.executable, ROOT / script, *(x for k, v in flags.items() for x in (f"--{k}", v))]
    if subprocess.run(list(map(str, command))).returncode:
        fail(f"{script} failed; what it said stands above")


def trained(args, base, seed):
    """Both stages with one seed -> [the settings, versions and accuracies of each algorithm]"""
    start, found = args.out / f"sft-seed{seed}", []
    small = {k: TINY[k] for k in ("min_pixels", "max_pixels", "dtype", "tokens_per_forward")}
    learn = {"recipe": "toy", "steps": args.updates, "save_every": args.updates} | small
    places = {"model": base, "data": args.out / "sft.parquet", "out": start}
    run("sft.py", learn | places | {"seed": seed})
    # All other settings are those that train.py gives to a tiny model.
    go_on = {"lr": TINY["lr"], "reward": "tagged", "sampler": "hf"}
    go_on |= {"steps": args.steps, "eval_every": 0}
    for algo in args.algos:
        out = args.out / f"{algo}-seed{seed}"
        places = {"model": start / f"checkpoint-{args.updates}", "out": out}
        places |= {"data": args.out / "train.parquet", "val_data": args.out / "test_unseen.parquet"}
        run("train.py", go_on | places | {"algo": algo, "seed": seed})
        about = json.loads((out / "config.json").read_text())
        kept = {"algo": algo, "seed": seed, "sft.py": learn, "train.py": go_on}
        kept |= {k: about[k] for k in ("commit", "versions")}
        found.append(kept | json.loads((out / "evaluation.json").read_text()))
    return found


def main():
    """Fetch, write the files, train, report."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--google", type=Path, help="folder of emoji-datasource-google")
    p.add_argument("--twitter", type=Path, help="folder of emoji-datasource-twitter")
    p.add_argument("--out", type=Path, default=ROOT / "out" / "emoji")
    p.add_argument("--most", type=int, default=12, help="emoji of a subcategory")
    p.add_argument("--updates", type=int, default=150, help="of supervised learning")
    p.add_argument("--steps", type=int, default=30, help="of reinforcement learning")
    p.add_argument("--algos", nargs="+", choices=algorithms(), default=["dapo", "tapo"])
    p.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="at most 5")
    args = p.parse_args()
    if len(args.seeds) > 5:
        fail("--seeds: give at most 5")
    args.out.mkdir(parents=True, exist_ok=True)
    folders = {v: getattr(args, v) or fetched(v, args.out) for v in ("google", "twitter")}
    told = {"packages": dict(map(package_of, folders.values()))}
    files = rows_of(drawings(folders, args.most))
    for name, rows in files.items():
        save(args.out / f"{name}.parquet", rows)

    tok = tokenizer([*TURNS, "system", *words(files)])
    base = keep((new_policy(tok), tok, processor()), args.out / f"untrained-{len(tok)}")
    runs = [one for seed in args.seeds for one in trained(args, base, seed)]
    told["classes"] = {"seen": len(files["test_seen"]), "unseen": len(files["test_unseen"])}
    told["rows"] = {name: len(rows) for name, rows in files.items()}
    (args.out / "emoji.json").write_text(json.dumps(told | {"runs": runs}, indent=1))
    print("Twitter's drawings of the classes that reinforcement learning has not seen, avg@8:")
    for algo in args.algos:
        own = [one for one in runs if one["algo"] == algo]
        shown = (
            f"{when} {with_interval([100 * one[when]['test']['accuracy'] for one in own])} %"
            for when in ("before", "after")
        )
        print(f"    {algo}: {', '.join(shown)}")


if __name__ == "__main__":
    main()
