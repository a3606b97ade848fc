"""The same questions answered by two policies. Each word is shaded by how far the policy on the
picture is from the policy on the masked picture there, as in report.html.

    python bench/heat_map.py out/laptop/algo-grpo-seed1 out/laptop/algo-papo_g-seed1

The arguments are folders of finished runs with the same seed. Questions of `val` whose hint is
wrong are drawn, one of each family.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plumbing.checkpoint import whole  # noqa: E402
from plumbing.common import pyplot  # noqa: E402
from plumbing.config import Config  # noqa: E402
from plumbing.data import encode  # noqa: E402
from plumbing.drawing import write_words  # noqa: E402
from plumbing.samples import look, words  # noqa: E402
from plumbing.setup import setup  # noqa: E402
from toy.task import FAMILIES  # noqa: E402


def answers(run, chosen):
    """What a run's last checkpoint answers -> (algorithm, [(Example, words, two pictures)])"""
    config = json.loads((run / "config.json").read_text())["config"]
    parts, found = setup(Config(**config | {"model": str(whole(run)[-1])})), []
    parts.sampler.sync(parts.policy)
    for index in chosen:
        example = parts.validation["val"][index]
        prompt = encode(example, *parts.processors)
        names = [(parts.cfg.seed, "samples", example.id)]
        rollout = parts.sampler.generate([prompt], 1, names)[0]
        kl, pictures = look(parts, prompt, rollout)
        found.append((example, words(rollout.tokens[0], kl[0], parts.processors[0]), pictures))
    parts.close()
    return parts.cfg.algo, found


def wrong_hints(count):
    """Indices of the first questions whose hint is wrong, one of each family in turn."""
    from toy.task import ToyData

    data, found = ToyData("val", 256, 0), []
    for index in range(len(data)):
        tags = data[index].tags
        if not tags["hint_right"] and tags["family"] == FAMILIES[len(found) % len(FAMILIES)]:
            found.append(index)
        if len(found) == count:
            return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, help="folders of finished runs of the toy")
    p.add_argument("--questions", type=int, default=4)
    p.add_argument("--out", default=ROOT / "results" / "heat_map.png")
    args = p.parse_args()
    answered = [answers(run, wrong_hints(args.questions)) for run in args.runs]

    plt = pyplot()
    size = (11, 1.35 * args.questions)
    figure, axes = plt.subplots(args.questions, 1, figsize=size, constrained_layout=True)
    for q, axis in enumerate(axes):
        example, _, pictures = answered[0][1][q]
        axis.set(xlim=(0, 110), ylim=(0, 13.5))
        axis.axis("off")
        for k, picture in enumerate(pictures):
            axis.imshow(picture, extent=(12 * k, 12 * k + 11, 1, 12), aspect="auto")
        question = example.problem.removeprefix("<image> ")
        axis.text(26, 10, f"{question}   [{example.answer}]", fontsize=9, weight="bold")
        for a, (algo, found) in enumerate(answered):
            axis.text(26, 6 - 4 * a, algo, fontsize=9)
            write_words(axis, 35, 6 - 4 * a, found[q][1])
    figure.savefig(args.out, dpi=90)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
