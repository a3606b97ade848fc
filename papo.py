"""PAPO: GRPO or DAPO, plus a reason to look at the picture (arXiv 2507.06448).

The objective, maximised over the G responses o_i to one prompt and their tokens:

    J = mean { min(rho A_i, clip(rho, 1 - eps_l, 1 + eps_h) A_i)    Eq. (1), policy
               - beta  KL(pi || pi_ref)                             Eq. (1), GRPO forms
               + gamma KL(pi || pi_mask)                            Eq. (2), perception
               - eta1  H[pi] - eta2 H[pi_mask] }                    Eq. (2), entropies

The mean is over all tokens, 1 / sum_i |o_i|, in Eq. (3) and, in the released code, for every
algorithm. In Eq. (1) and (2) it is 1/G sum_i 1/|o_i|: over each response's tokens, then over
responses.

pi sees the picture, and pi_mask is the same policy on the masked picture (masking.py). The function
`objective` below is this formula with its signs turned, since an optimizer minimises.

The paper prints one objective and its released code optimises another: --objective official (the
default) and --objective paper. docs/details.md lists every difference with its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from loss import PERCEPTION, clipped_surrogate, importance_weight, k3, sampled_entropy, scored_sum

if TYPE_CHECKING:
    from plumbing.run.config import Config
    from policy import Scores
    from rollout import Group

# What the paper prints where the released code does something else (docs/details.md).
PRINTED = dict(perception="printed", kl_clamp=0.0, masked_branch="grad", dual_clip=0.0)
PRINTED |= dict(top_p=1.0, reward="paper")


# The columns of Tables 6 and 8.
TABLE_COLUMNS = "clip_high beta gamma eta1 eta2 dynamic_sampling".split()


def row(*values: float, **more) -> dict:
    """One algorithm, whole: a value for each of TABLE_COLUMNS, and what else it sets, by the names
    of the knobs in plumbing/run/config.py. as_printed: what --objective paper changes in it; by
    default 1/N is Eq. (3)'s with dynamic sampling, and that of Eq. (1) and (2) without."""
    columns = dict(zip(TABLE_COLUMNS, values, strict=True))
    mean = dict(loss_mean="token" if columns["dynamic_sampling"] else "sequence")
    return columns | dict(as_printed=PRINTED | mean | more.pop("as_printed", {})) | more


# A row "algorithm/model" takes the place of the row "algorithm" for that model (MODELS in
# plumbing/run/config.py). Dynamic sampling keeps groups with 0 < #correct < G, Eq. (3). PAPO
# without the reference KL needs double entropy: nothing else holds the policy (Table 8).
# fmt: off
ALGORITHMS = {
    #                             eps_h  beta  gamma  eta1  eta2  dynamic sampling
    "grpo":                   row(0.30,  0.01, 0.00,  0.00, 0.00, False),
    "dapo":                   row(0.28,  0.00, 0.00,  0.00, 0.00, True),
    "papo_g":                 row(0.30,  0.01, 0.02,  0.00, 0.00, False),
    "papo_g/qwen2.5-vl-7b":   row(0.30,  0.01, 0.02,  0.05, 0.05, False),
    "papo_g/qwen3-vl-2b":     row(0.30,  0.01, 0.01,  0.00, 0.00, False),
    "papo_d":                 row(0.28,  0.00, 0.01,  0.03, 0.03, True),
    "grpo_no_ref_kl":         row(0.30,  0.00, 0.00,  0.00, 0.00, False),
    "papo_g_no_ref_kl":       row(0.30,  0.00, 0.01,  0.03, 0.03, False),
    # The toy's gamma, chosen on its split `val`; with both etas it falls to 0.
    "papo_g/toy":             row(0.30,  0.01, 0.30,  0.00, 0.00, False, anneal_steps=20),
    "papo_d/toy":             row(0.28,  0.00, 0.30,  0.03, 0.03, True, anneal_steps=20),
}
# fmt: on


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """A_i = (R_i - mean R) / (std R + eps) within each group (section 2.1). (..., G) -> (..., G)

    The standard deviation is the sample one (G - 1), and eps is as released. Three responses, one
    right and two only well formed, have the rewards 1, 0.1 and 0.1, their mean is 0.4 and their
    standard deviation 0.52, so their advantages are 1.15, -0.58 and -0.58. A group whose rewards
    are all equal gets zeros: it teaches the policy term nothing, and still counts in the other
    terms and in the mean.

    Raises ValueError for a group of one.
    """
    if rewards.shape[-1] < 2:
        raise ValueError("a group of one response has no advantage; use a group size of at least 2")
    # Equal rewards must give exactly 0, and the float32 mean of eight rewards of 0.9 is not 0.9. So
    # the first reward is subtracted from all of them first.
    rewards = rewards - rewards[..., :1]
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + eps)


# ------------------------------------------------------------------------------ the objective


class LogProbs(NamedTuple):
    """What each policy says of the sampled tokens: (B, G, R) for B groups of G responses."""

    seen: Scores  # pi_theta on the picture; logp, and entropy if it is exact
    old: Tensor  # pi_old
    sampled: Tensor  # pi_old as the sampler computed it; differs from old by rounding only
    masked: Scores | None = None  # pi_mask, where gamma or eta2 needs it
    ref: Tensor | None = None  # pi_ref, where beta needs it
    exact_kl: tuple[Tensor, Tensor] | None = None  # KL(pi || pi_mask) and where it was clamped
    weights: Tensor | None = None  # of each token's policy term, where a variant has some


class Terms(NamedTuple):
    """The terms of J before beta, gamma and eta weigh them, one number a token: (B, G, R) each."""

    policy: Tensor  # the clipped surrogate of Eq. (1), as a loss, with token and sampler weights
    KL_ref: Tensor | float
    KL_prcp: Tensor | float  # 0 where a prompt has no picture, as H_mask
    H: Tensor
    H_mask: Tensor | float
    high: Tensor  # bool: was rho clipped from above?
    low: Tensor  # bool: was rho clipped from below?
    clamped: Tensor | None  # bool: does KL_prcp sit at its clamp?


class Denominators(NamedTuple):
    """What 1/N divides by, in the whole optimizer batch over all processes."""

    tokens: int
    responses: int


def terms_of(logprobs: LogProbs, advantages: Tensor, with_picture: Tensor, cfg: Config) -> Terms:
    """The terms of J. advantages (B, G); with_picture (B, G, R) bool: scored, and the prompt has a
    picture. They carry a gradient into logprobs.seen and, with --masked_branch grad, .masked."""
    logp = logprobs.seen.logp
    A = advantages[:, :, None].expand_as(logp)  # (B, G, R)
    clip = cfg.clip_low, cfg.clip_high, cfg.dual_clip
    policy, high, low = clipped_surrogate(logp, logprobs.old, A, *clip)
    if logprobs.weights is not None:
        policy = policy * logprobs.weights
    if cfg.importance_cap:
        policy = policy * importance_weight(logprobs.old, logprobs.sampled, cfg.importance_cap)
    KL_ref = 0.0 if logprobs.ref is None else k3(logp, logprobs.ref, cfg.kl_clamp)[0]
    H = entropy(logprobs.seen, cfg)
    if (masked := logprobs.masked) is None:
        return Terms(policy, KL_ref, 0.0, H, 0.0, high, low, None)
    if cfg.masked_branch != "grad":  # as released: pi_mask, and with it H_mask, is a constant
        masked = masked.detach()
    if logprobs.exact_kl is not None:
        KL_prcp, clamped = logprobs.exact_kl
    else:  # where only token weights need pi_mask, the whole distribution is not known
        estimate = PERCEPTION.get(cfg.perception, k3)
        KL_prcp, clamped = estimate(logp, masked.logp, cfg.kl_clamp)
    KL_prcp = torch.where(with_picture, KL_prcp, 0.0)
    H_mask = torch.where(with_picture, entropy(masked, cfg), 0.0)
    return Terms(policy, KL_ref, KL_prcp, H, H_mask, high, low, clamped & with_picture)


def objective(terms: Terms, scored: Tensor, N: Denominators, cfg: Config) -> Tensor:
    """Minus J of one micro-batch, a scalar. scored (B, G, R) bool, the tokens that count, EOS
    included; N: of the whole optimizer batch"""
    per_token = (
        terms.policy  # Eq. (1), the clipped surrogate
        + cfg.beta * terms.KL_ref  # Eq. (1)
        - cfg.gamma * terms.KL_prcp  # Eq. (2), the implicit perception loss
        + (cfg.eta1 * terms.H + cfg.eta2 * terms.H_mask)  # Eq. (2), the double entropy loss
    )
    if cfg.loss_mean == "sequence":  # Eq. (1), (2): 1/G sum_i 1/|o_i|, with --objective paper
        lengths = scored.sum(-1, keepdim=True).clamp(min=1)
        return scored_sum(per_token / lengths, scored) / N.responses
    # Eq. (3): 1 / sum_i |o_i|; the released code does so for every algorithm
    return scored_sum(per_token, scored) / N.tokens


def entropy(scores: Scores, cfg: Config) -> Tensor:
    """H of Eq. (2), sampled or over the whole vocabulary: (B, G, R)"""
    return scores.entropy if cfg.entropy == "exact" else sampled_entropy(scores.logp)


def metrics_of(terms: Terms, logprobs: LogProbs, scored: Tensor, with_picture: Tensor) -> dict:
    """{metric: (2,) tensor, its sum over some tokens and the number of those tokens}, to be added
    up over micro-batches and processes before one is divided by the other."""

    def total(x, over=scored):
        return torch.stack([scored_sum(x.detach(), over).double(), over.sum().double()])

    sums = {"policy_loss": total(terms.policy), "entropy": total(terms.H)}
    sums |= {"clip_high_fraction": total(terms.high.float())}
    sums |= {"clip_low_fraction": total(terms.low.float())}
    sums |= {"sampler_gap": total((logprobs.old - logprobs.sampled).abs())}
    sums |= {"sampler_kl": total(k3(logprobs.sampled, logprobs.old, 0)[0])}
    if logprobs.ref is not None:
        sums |= {"ref_kl": total(terms.KL_ref)}
    if (w := logprobs.weights) is not None:
        sums |= {"weighted_tokens": total(w.sign()), "token_weight": total(w)}
    if logprobs.masked is not None:
        sums |= {"perception_kl": total(terms.KL_prcp, with_picture)}
        sums |= {"masked_entropy": total(terms.H_mask, with_picture)}
        sums |= {"perception_clamped": total(terms.clamped.float(), with_picture)}
    return sums


# --------------------------------------------------------------------------- dynamic sampling


def difficulty(accuracy: Tensor) -> str:
    """Whether a group has something to compare, Eq. (3). accuracy (G,), 0 or 1 each

    -> "informative" where 0 < #correct < G, else "too_hard" or "too_easy"
    """
    correct = int(accuracy.sum())
    return "too_hard" if correct == 0 else "too_easy" if correct == len(accuracy) else "informative"


def fill_batch(draw: Callable, cfg: Config) -> tuple[list[Group], dict[str, int]]:
    """The groups of one step; with dynamic sampling only informative ones (Eq. 3), drawn in rounds
    until the batch is full -> (groups, {what became of the prompts rolled out: how many})

    draw(n) rolls out and scores the next n prompts -> [Group], fewer where a prompt could not be
    used; those are replaced. Raises ValueError, which says what the data lacks, when cfg.max_rounds
    rounds do not fill the batch.
    """
    wanted = cfg.prompts_per_step
    kept: list[Group] = []
    counts = {"generated": 0, "refused": 0, "too_easy": 0, "too_hard": 0}
    for _ in range(cfg.max_rounds):
        n = cfg.prompts_per_update if cfg.dynamic_sampling else wanted - len(kept)
        groups = draw(n)
        counts["generated"] += len(groups)
        counts["refused"] += n - len(groups)
        for group in groups:
            verdict = difficulty(group.values("accuracy")) if cfg.dynamic_sampling else ""
            if verdict in counts:
                counts[verdict] += 1
            else:
                kept.append(group)
        if len(kept) >= wanted:
            return kept[:wanted], {**counts, "surplus": len(kept) - wanted}
    raise ValueError(why_not_full(len(kept), counts, cfg))


def why_not_full(kept: int, counts: dict[str, int], cfg: Config) -> str:
    """What the data lacks, as a sentence."""
    if not cfg.dynamic_sampling or counts["refused"] > counts["generated"]:
        prompts = counts["generated"] + counts["refused"]
        refused = f"of {prompts} prompts {counts['refused']} could not be used"
        return f"{refused}; the warnings above say why"
    side = "easy" if counts["too_easy"] > counts["too_hard"] else "hard"
    return (
        f"after {cfg.max_rounds} rounds of {cfg.prompts_per_update} prompts only {kept} of "
        f"{cfg.prompts_per_step} groups had right and wrong answers; in {counts['too_easy']} all "
        f"were right and in {counts['too_hard']} none, so the data is too {side} for this model: "
        "change it"
    )
