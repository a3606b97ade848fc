"""PGPO (arXiv 2604.01840): each response keeps its advantage in sum, and moves it to the tokens
that need the picture.

    torchrun variants/pgpo.py        # every flag of train.py, two more, and --mask absent

On DAPO, without a perception loss. The other picture is none at all (on the toy: random tokens,
black, which was chosen on `val`), and a weight w_it >= 0 on the
policy term of token t in response i says what the picture adds to the token:

    S_it = KL(pi || pi_mask) at a token, as k3 (loss.py), of the policy before the step's updates
    L_it = log(1 + S_it)                                                                Eq. (4)
    I_it = (L_it - min_t L_it) / (max_t L_it - min_t L_it + eps), within the response   Eq. (5)
    u_it = I_it / (tau + eps)  below tau,                                               Eq. (6)
           1 + beta (I_it - tau) / (1 - tau + eps)  from tau on
    w_it = u_it |o_i| / sum_t u_it                                                      Eq. (7)

Eq. (8) is A_i w_it. Where all tokens of a response look alike, every I is 0 and Eq. (7) is 0 / 0:
here w is 1.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import plumbing  # noqa: F401  before torch: how its threads wait

import torch

import train
from masking import kind
from papo import ALGORITHMS, row
from plumbing.run.config import Config, borrow, check_masks_something, knob

AS_PRINTED = dict(top_p=0.99, reward="official")
PGPO = (0.28, 0.00, 0.00, 0.00, 0.00, True)
ALGORITHMS["pgpo"] = row(*PGPO, as_printed=AS_PRINTED, mask="absent")
# Chosen on the toy's split `val`.
TOY = dict(mask="random", credit_threshold=0.1, credit_boost=1.0)
ALGORITHMS["pgpo/toy"] = row(*PGPO, as_printed=AS_PRINTED, **TOY)
EPS = 1e-6


@kind("absent")
def absent(prompt, masker, generator):
    """No picture: nothing attends to its tokens, which keep their places (appendix A.1)."""
    return None


@dataclass
class Pgpo(Config):
    """The settings of train.py, and PGPO's own."""

    algo: str = borrow("algo", default="pgpo")
    credit_threshold: float = knob(
        0.4, "tau: tokens below it are weakened, others boosted", part="PGPO", low=0, high=1
    )
    credit_boost: float = knob(2.0, "beta: how strongly", low=0)

    def check(self, world_size, cuda):
        super().check(world_size, cuda)
        check_masks_something(self)

    def token_weights(self, kl, counted, gather):
        """kl: [S_it (B, G, R)], counted: [(B, G, R) bool], one a micro-batch -> [w_it], the same"""
        return [self.weights(S, c) for S, c in zip(kl, counted)]

    def weights(self, kl, counted):
        """w_it of one micro-batch, Eq. (4) to (7)"""
        L, tau = kl.log1p(), self.credit_threshold
        low = L.masked_fill(~counted, math.inf).amin(-1, keepdim=True)
        high = L.masked_fill(~counted, -math.inf).amax(-1, keepdim=True)
        need = (L - low) / (high - low + EPS)  # I_it
        boosted = 1 + self.credit_boost * (need - tau) / (1 - tau + EPS)
        u = torch.where(counted, torch.where(need < tau, need / (tau + EPS), boosted), 0.0)
        w = u * counted.sum(-1, keepdim=True) / u.sum(-1, keepdim=True)
        return torch.where(high - low < EPS, 1.0, w)


if __name__ == "__main__":
    train.main(Pgpo)
