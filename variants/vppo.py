"""VPPO (arXiv 2510.09285): the policy term is left to the tokens that need the picture most.

    torchrun variants/vppo.py        # every flag of train.py, and two more

PAPO uses the masked picture as a loss. VPPO uses it as credit, on DAPO and without a perception
loss: a weight w_it >= 0 on the policy term of token t in response i,

    J = mean { w_it min(rho A_i, clip(rho, 1 - eps_l, 1 + eps_h) A_i) + ... }

    S_it    KL(pi || pi_mask) at a token, as k3 (loss.py), of the policy before the step's updates
    S_i     its mean over the response's tokens
    m_it    = 1 for the k |o_i| tokens with the largest S_it, rounded up, else 0        Eq. (4)
    alpha_i = beta_min + (beta_max - beta_min) (S_i - min S) / (max S - min S)          Eq. (5)
    w_it    = m_it alpha_i                                                              Eq. (6)

min and max are over the responses of the optimizer batch, and beta_max is such that the mean alpha
of the batch is 1. (The paper calls it dynamic and prints no formula; this is the released code's.)
Where all responses look alike, alpha is 1. A weight has no gradient, and since it is not negative,
it may as well be said to weigh the advantage, as the paper does. Beside that: eta1 is 0.06, the
reward 0 or 1, G 8 and the mask ratio 0.5. docs/details.md says what the paper leaves to the
reader, and where its released code differs.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import plumbing  # noqa: F401  before torch: how its threads wait

import torch

import train
from papo import ALGORITHMS, row
from plumbing.run.config import Config, borrow, check_masks_something, knob

SETTINGS = dict(mask_ratio=0.5, group_size=8, reward="paper")
AS_PRINTED = dict(top_p=0.99)
ALGORITHMS["vppo"] = row(0.28, 0.00, 0.00, 0.06, 0.00, True, as_printed=AS_PRINTED, **SETTINGS)
EPS = 1e-6  # a smaller range is rounding, and min-max would blow it up


@dataclass
class Vppo(Config):
    """The settings of train.py, and VPPO's own."""

    algo: str = borrow("algo", default="vppo")
    credit_share: float = knob(
        0.4,
        "k, the share of a response's tokens that keep their policy term",
        part="VPPO",
        low=0,
        high=1,
    )
    credit_floor: float = knob(
        0.9, "beta_min, what the response that looks least counts", low=0, high=1
    )

    def check(self, world_size, cuda):
        super().check(world_size, cuda)
        check_masks_something(self)

    def token_weights(self, kl, counted, gather):
        """kl: [S_it (B, G, R)], counted: [(B, G, R) bool], one a micro-batch -> [w_it], the same.
        gather joins lists of all processes."""
        means = [response_mean(S, c)[c.any(-1)].tolist() for S, c in zip(kl, counted)]
        spread = gather([S for part in means for S in part])  # S_i of every response
        return [self.weights(S, c, spread) for S, c in zip(kl, counted)]

    def weights(self, kl, counted, spread):
        """w_it of one micro-batch, Eq. (4) to (6). spread: S_i of all responses of the batch"""
        order = kl.masked_fill(~counted, -math.inf).argsort(dim=-1, descending=True, stable=True)
        rank = order.argsort(-1)  # 0: the token with the largest S_it
        n = counted.sum(-1, keepdim=True)
        m = (rank < (self.credit_share * n.double() - 1e-9).ceil()).to(kl.dtype)
        low, high = min(spread, default=0.0), max(spread, default=0.0)
        if high - low < EPS:
            return m
        mean = math.fsum(spread) / len(spread)
        beta_min = self.credit_floor
        beta_max = beta_min + (1 - beta_min) * (high - low) / (mean - low)
        S = response_mean(kl, counted)[..., None]  # (B, G, 1)
        return m * (beta_min + (beta_max - beta_min) * (S - low) / (high - low))


def response_mean(kl, counted):
    """S_i: (B, G, R) -> (B, G); 0 for a response without a token that counts"""
    return torch.where(counted, kl, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)


if __name__ == "__main__":
    train.main(Vppo)
