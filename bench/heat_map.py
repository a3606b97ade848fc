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

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plumbing.data.prompts import encode  # noqa: E402
from plumbing.report.samples import look, words  # noqa: E402
from plumbing.run.checkpoint import whole  # noqa: E402
from plumbing.run.config import Config  # noqa: E402
from plumbing.run.setup import setup  # noqa: E402
from toy.task import QUESTIONS, ToyData  # noqa: E402


def wrong_hints():
    """Indices of the first questions whose hint is wrong, one of each family."""
    tags = [example.tags for example in map(ToyData("val", 256, 0).__getitem__, range(256))]
    wrong = [(t["family"], i) for i, t in enumerate(tags) if not t["hint_right"]]
    return [next(i for name, i in wrong if name == family) for family in QUESTIONS]


def answers(run, chosen):
    """What a run's last checkpoint answers -> (algorithm, [(Example, words, two pictures)])"""
    config = json.loads((run / "config.json").read_text())["config"]
    parts, found = setup(Config(**config | {"model": str(whole(run)[-1])})), []
    parts.sampler.sync(parts.policy)
    for index in chosen:
        example = parts.validation["val"][index]
        prompt = encode(example, *parts.processors)
        rollout = parts.sampler.generate([prompt], 1, [(parts.cfg.seed, "samples", example.id)])[0]
        kl, pictures = look(parts, prompt, rollout)
        found.append((example, words(rollout.tokens[0], kl[0], parts.processors[0]), pictures))
    parts.close()
    return parts.cfg.algo, found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, help="folders of finished runs of the toy")
    p.add_argument("--out", default=ROOT / "results" / "heat_map.png")
    args = p.parse_args()
    answered = [answers(run, wrong_hints()) for run in args.runs]
    figure = Figure((11, 5.4), layout="constrained")
    for q, axis in enumerate(figure.subplots(len(QUESTIONS), 1)):
        example, _, pictures = answered[0][1][q]
        # One unit is a tenth of an inch. A letter is 0.6 of its size wide, and a point is 1/72 of
        # an inch, so a letter of size 9 takes 0.75 units.
        axis.set(xlim=(0, 110), ylim=(0, 13.5))
        axis.axis("off")
        for k, picture in enumerate(pictures):
            axis.imshow(picture, extent=(12 * k, 12 * k + 11, 1, 12), aspect="auto")
        question = example.problem.removeprefix("<image> ")
        axis.text(26, 10, f"{question}   [{example.answer}]", fontsize=9, weight="bold")
        for a, (algo, found) in enumerate(answered):
            x, y = 35, 6 - 4 * a
            axis.text(26, y, algo, fontsize=9)
            for word, _, shade in found[q][1]:
                box = dict(facecolor=(1, 0.55, 0, shade), edgecolor="none", pad=1.2)
                axis.text(x, y, word.strip(), fontsize=9, family="monospace", bbox=box)
                x += 0.75 * len(word.strip()) + 1
    figure.savefig(args.out, dpi=90)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
