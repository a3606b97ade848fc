"""Which tokens deserve the advantage: what the picture adds to a token says how much of it to give.

PAPO uses the masked picture as a loss. Methods that came after it use it as credit, a weight
w_it >= 0 on the policy term of token t in response i (the first line of J in papo.py):

    J = mean { w_it min(rho A_i, clip(rho, 1 - eps_l, 1 + eps_h) A_i) + ... }

A weight has no gradient. Since it is not negative, w min(rho A, clip(rho) A) is the same as
min(rho w A, clip(rho) w A), so it may as well be said to weigh the advantage, as the papers do.

    S_it    KL(pi || pi_mask) at a token, as k3 (loss.py), of the policy before the step's updates
    S_i     its mean over the response's tokens
    |o_i|   how many tokens that are

A rule is one function below under @rule("name"), and --credit offers every name:

    f(kl, advantages, scored, spread, cfg) -> weights

    kl           (B, G, R) S_it
    advantages   (B, G) A_i; VPPO and PGPO do not look at them
    scored       (B, G, R) bool, the tokens that count, of prompts with a picture
    spread       Spread of S_i over the whole optimiser batch
    weights      (B, G, R), read where scored is true; elsewhere they may be anything

What each of them leaves to the reader, and where released code differs, is in docs/differences.md.
"""

import math
from typing import NamedTuple

import torch

from loss import k3
from plumbing.common import register

CREDIT = {}  # what --credit can be, beside none
EPS = 1e-6  # a smaller range is rounding, and min-max would blow it up


class Spread(NamedTuple):
    """Of S_i, over the responses of one optimiser update on all processes."""

    low: float
    mean: float
    high: float


def rule(name):
    """Register a rule: f(kl, advantages, scored, spread, cfg) -> weights"""
    return register(CREDIT, name)


# VPPO (arXiv 2510.09285): the policy term is left to the tokens that need the picture most, and a
# response that looks more than the others of its batch counts for more.
#
#     m_it    = 1 for the k |o_i| tokens with the largest S_it, rounded up, else 0        Eq. (4)
#     alpha_i = beta_min + (beta_max - beta_min) (S_i - min S) / (max S - min S)          Eq. (5)
#     w_it    = m_it alpha_i                                                              Eq. (6)
#
# beta_max is such that the mean alpha of the batch is 1. (The paper calls it dynamic and prints no
# formula; this is the released code's.) Where all responses look alike, alpha is 1.
@rule("vppo")
def vppo(kl, advantages, scored, spread, cfg):
    """Filters tokens and shapes trajectories. cfg: credit_share (k), credit_floor (beta_min)"""
    order = kl.masked_fill(~scored, -math.inf).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)  # 0: the token with the largest S_it
    n = scored.sum(-1, keepdim=True)
    m = (rank < (cfg.credit_share * n.double() - 1e-9).ceil()).to(kl.dtype)
    width = spread.high - spread.low
    if width < EPS:
        return m
    beta_min = cfg.credit_floor
    beta_max = beta_min + (1 - beta_min) * width / (spread.mean - spread.low)
    S = response_mean(kl, scored)[..., None]  # (B, G, 1)
    return m * (beta_min + (beta_max - beta_min) * (S - spread.low) / width)


# PGPO (arXiv 2604.01840): each response keeps its advantage in sum, and moves it to the tokens that
# need the picture.
#
#     L_it = log(1 + S_it)                                                                Eq. (4)
#     I_it = (L_it - min_t L_it) / (max_t L_it - min_t L_it + eps), within the response   Eq. (5)
#     u_it = I_it / (tau + eps)  below tau,                                               Eq. (6)
#            1 + beta (I_it - tau) / (1 - tau + eps)  from tau on
#     w_it = u_it |o_i| / sum_t u_it                                                      Eq. (7)
#
# Eq. (8) is A_i w_it. Where all tokens of a response look alike, every I is 0 and Eq. (7) is 0 / 0:
# here w is 1.
@rule("pgpo")
def pgpo(kl, advantages, scored, spread, cfg):
    """Gates and boosts tokens. cfg: credit_threshold (tau), credit_boost (beta)"""
    L, tau = kl.log1p(), cfg.credit_threshold
    low = L.masked_fill(~scored, math.inf).amin(-1, keepdim=True)
    high = L.masked_fill(~scored, -math.inf).amax(-1, keepdim=True)
    need = (L - low) / (high - low + EPS)  # I_it
    boosted = 1 + cfg.credit_boost * (need - tau) / (1 - tau + EPS)
    u = torch.where(scored, torch.where(need < tau, need / (tau + EPS), boosted), 0.0)
    w = u * scored.sum(-1, keepdim=True) / u.sum(-1, keepdim=True)
    return torch.where(high - low < EPS, 1.0, w)


# ------------------------------------------------------------------ over the whole optimiser batch


def weigh(batches, parts):
    """Set the weights of one optimiser update's micro-batches (train.MicroBatch), whose old and
    masked log-probs are known. Collective: every process of the run calls it.

    A prompt without a picture keeps the plain algorithm, w = 1, and is not in the spread.
    """
    cfg, known = parts.cfg, []
    for batch in batches:
        kl, _ = k3(batch.old, batch.masked.logp, cfg.kl_clamp)
        known.append((batch, kl, batch.rows.scored.to(kl.device) & batch.pictured[:, None, None]))
    means = [response_mean(kl, scored)[scored.any(-1)].tolist() for _, kl, scored in known]
    spread = spread_of(parts.processes.gather([S for part in means for S in part]))
    for batch, kl, scored in known:
        weights = CREDIT[cfg.credit](kl, batch.advantages, scored, spread, cfg)
        batch.credit = torch.where(scored, weights, 1.0)


def response_mean(kl, scored):
    """S_i: (B, G, R) -> (B, G); 0 for a response without a token that counts"""
    return torch.where(scored, kl, 0.0).sum(-1) / scored.sum(-1).clamp(min=1)


def spread_of(means):
    """A list of S_i -> Spread; the same in any order."""
    if not means:
        return Spread(0.0, 0.0, 0.0)
    return Spread(min(means), math.fsum(means) / len(means), max(means))
