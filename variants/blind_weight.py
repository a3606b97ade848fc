"""A plain baseline without any KL: an advantage counts as much as its question needs the picture.

    torchrun variants/blind_weight.py        # every flag of train.py, and one more

On GRPO, or with --algo blind_weight_d on DAPO. Of each question n more responses are sampled on a
black picture; they are graded, and trained on by nobody:

    A'_i = (1 - m) A_i,   m = the mean accuracy of the n blind responses

So a question that is answered without looking teaches little. Filters that drop such questions from
the data are its published kin (docs/after-papo.md); here it is done at every step, as the policy
is now. Where a hint is right, what repeats it is right blindly, and those questions leave the sum;
where it is wrong they stay, so looking is what is left to be rewarded (tests/test_theory.py, the
fifth fact). It is no reward r - lambda m: m is one number for the group, whose mean takes it out
again.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import plumbing  # noqa: F401  before torch: how its threads wait

import torch

import train
from masking import black_row
from papo import ALGORITHMS, row
from plumbing.run.config import Config, borrow, knob
from reward import score

ALGORITHMS["blind_weight"] = row(0.30, 0.01, 0.00, 0.00, 0.00, False)
ALGORITHMS["blind_weight_d"] = row(0.28, 0.00, 0.00, 0.00, 0.00, True)


@dataclass
class BlindWeight(Config):
    """The settings of train.py, and one of its own."""

    algo: str = borrow("algo", default="blind_weight")
    blind_responses: int = knob(
        4, "n, responses a question on a black picture", part="Blind weights", above=0
    )

    def weigh(self, groups, prompts, parts, step):
        """The groups, with A'_i; a question without a picture keeps A_i."""
        black, n = black_row(parts.processors[1]), self.blind_responses
        seen = [g for g in groups if prompts[g.position].pixels is not None]
        blind = [prompts[g.position] for g in seen]
        blind = [replace(p, pixels=black.expand_as(p.pixels)) for p in blind]
        seeds = [(self.seed, "blind", step, g.position) for g in seen]
        rollouts = parts.sampler.generate(blind, n, seeds)
        texts = [text for r in rollouts for text in r.texts]
        truths = [p.example.answer for p in blind for _ in range(n)]
        graded = score(texts, truths, parts.grader, self.reward)
        right = torch.tensor([s["accuracy"] for s in graded]).view(-1, n)  # (groups, n)
        for group, m in zip(seen, right.mean(-1)):
            group.advantages = (1 - m) * group.advantages
        return groups


if __name__ == "__main__":
    train.main(BlindWeight)
