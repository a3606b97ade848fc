"""Train the toy with your own functions of mine.py, each in the place of the project's:

    python exercises/train_with_mine.py --algo papo_g          # every flag of train.py

Whatever is not green yet is the project's own; the first lines say which is which. entropy_slope
takes part with --entropy exact and an eta above 0, token_weights with --weighted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import plumbing  # noqa: F401  before torch: how its threads wait

import mine
import torch
from test_mine import judge

import loss
import masking
import papo
import policy
import train
from plumbing.run.config import Config


class K3(torch.autograd.Function):
    """k3 whose gradient is the student's."""

    @staticmethod
    def forward(ctx, logp, other):
        with torch.enable_grad():  # for who lets autograd work the derivative out
            value, slope = mine.k3(logp.detach(), other.detach())
        ctx.save_for_backward(slope.detach())
        return value.detach()

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return grad * slope, -grad * slope  # d = other - logp


class Entropy(torch.autograd.Function):
    """The entropy whose gradient is the student's; dist are log-probabilities, which are logits."""

    @staticmethod
    def forward(ctx, dist):
        with torch.enable_grad():
            ctx.save_for_backward(mine.entropy_slope(dist.detach()).detach())
        return loss.exact_entropy(dist)

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return grad[..., None] * slope


def k3(logp, other, clamp=10.0):
    """As loss.k3, with its clamp."""
    value = K3.apply(logp, other)
    capped = value > clamp if clamp else torch.zeros_like(value, dtype=torch.bool)
    return torch.where(capped, clamp, value), capped


def random_patches(prompt, masker, generator):
    """As masking.random_patches."""
    ratio = masker.cfg.mask_ratio
    return mine.masked_picture(prompt.pixels, masker.black, ratio, masker.unit, generator)


def score_only(scorer, rows, pixels, exact=False):
    """As policy.score_only, of the masked picture."""
    if pixels is not rows.masked_pixels or exact or scorer.flat:
        return policy.score_only(scorer, rows, pixels, exact)
    logp = mine.masked_logprobs(lambda x: scorer.logits(scorer.outputs(rows, x)), rows)
    return policy.Scores(policy.in_place(logp, rows.scored), None, None)


class Weighted(Config):
    """The settings of train.py, with the student's token weights."""

    def token_weights(self, kl, counted, gather):
        return [mine.token_weights(*pair) for pair in zip(kl, counted)]


def hang_in():
    """Put what is green into its place -> the names of what is; says what is red."""
    places = {
        "advantages": [(vars(papo), "group_advantages", mine.advantages)],
        "masked_picture": [(masking.MASKS, "random", random_patches)],
        "masked_logprobs": [(vars(train), "score_only", score_only)],
        "k3": [(vars(papo), "k3", k3), (loss.PERCEPTION, "k3", k3)],
        "objective": [(vars(papo), "objective", mine.objective)],
        "entropy_slope": [(vars(policy), "exact_entropy", Entropy.apply)],
        "token_weights": [],
    }
    said = {name: judge(name, getattr(mine, name)) for name in places}
    for name in [name for name in places if said[name]]:
        print(f"{name}: the project's own, since {said[name]}")
    for name in [name for name in places if not said[name]]:
        for place, key, function in places[name]:
            place[key] = function
    return [name for name in places if not said[name]]


def main():
    """Train, as asked."""
    weighted = "--weighted" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--weighted"]
    print(f"yours: {', '.join(hang_in()) or 'nothing yet'}")
    train.main(Weighted if weighted else Config)


if __name__ == "__main__":
    main()
