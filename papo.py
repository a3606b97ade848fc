"""PAPO: GRPO or DAPO, plus a reason to look at the picture (arXiv 2507.06448).

The objective, maximised over the G responses o_i to one prompt and their tokens:

    J = mean { w min(rho A_i, clip(rho, 1 - eps_l, 1 + eps_h) A_i)   Eq. (1), policy
               - beta  KL(pi || pi_ref)                             Eq. (1), GRPO forms
               + gamma KL(pi || pi_mask)                            Eq. (2), perception
               - eta1  H[pi] - eta2 H[pi_mask] }                    Eq. (2), entropies

The mean is over all tokens, 1 / sum_i |o_i|, in Eq. (3) and, in the released code, for every
algorithm. In Eq. (1) and (2) it is 1/G sum_i 1/|o_i|: over each response's tokens, then over
responses.

pi sees the picture, pi_mask is the same policy on the masked picture (masking.py), and w is 1, or
what --credit gives to a token (credit.py). The function `objective` below is this formula with its
signs turned, since an optimiser minimises.

The paper prints one objective and its released code optimises another: --objective official (the
default) and --objective paper. docs/differences.md lists every difference with its place.
"""

from typing import NamedTuple

import torch

from loss import PERCEPTION, clipped_surrogate, importance_weight, k3, sampled_entropy, scored_sum

# What each algorithm is, to be held against Tables 6 and 8 of the paper. A row "a/b" is laid over
# row "a" where b applies too: --objective paper, then the model (its row of MODELS in
# plumbing/config.py), then --no_ref_kl; flags win over all rows. "*" is every algorithm. What no
# row says is a default of plumbing/config.py. A new algorithm is a new row.
DAPO = dict(clip_high=0.28, beta=0.00, dynamic_sampling=True)  # Eq. (3): 0 < #correct < G
ALGORITHMS = {
    "grpo": dict(clip_high=0.30, beta=0.01, gamma=0.00, eta1=0.00, eta2=0.00),
    "dapo": DAPO | dict(gamma=0.00, eta1=0.00, eta2=0.00),
    "papo_g": dict(clip_high=0.30, beta=0.01, gamma=0.02, eta1=0.00, eta2=0.00),
    "papo_g/qwen2.5-vl-7b": dict(eta1=0.05, eta2=0.05),
    "papo_g/qwen3-vl-2b": dict(gamma=0.01),
    "papo_d": DAPO | dict(gamma=0.01, eta1=0.03, eta2=0.03),
    # After PAPO: the second picture as credit, on DAPO, and as a source of rollouts, on GRPO.
    "vppo": DAPO | dict(credit="vppo", mask_ratio=0.5, eta1=0.06, group_size=8, reward="paper"),
    "pgpo": DAPO | dict(credit="pgpo", mask="absent"),
    "noisy": dict(clip_high=0.20, beta=0.00, rollout_picture="noisy", top_p=1.0)
    | dict(prompts_per_step=512, group_size=12, dual_clip=0.0),
    # PAPO_D with another class for the masked picture; half of a group is rolled out on a positive.
    "tapo": DAPO
    | dict(gamma=0.01, eta1=0.03, eta2=0.03, mask="contrast", reward="tagged")
    | dict(rollout_picture="positive", update_on="own", group_size=10),
    "tapo/qwen2.5-vl-7b": dict(prompts_per_step=192, prompts_per_update=64),
    **dict.fromkeys(["papo_g/toy", "papo_d/toy"], dict(gamma=0.3, anneal_steps=20)),  # on `val`
    "pgpo/toy": dict(mask="random", credit_threshold=0.1, credit_boost=1.0),  # on `val`
    # Without the reference KL nothing else holds the policy: double entropy is required (Table 8).
    "*/no_ref_kl": dict(beta=0.00),
    "papo_g/no_ref_kl": dict(gamma=0.01, eta1=0.03, eta2=0.03),
    # What the paper prints where the released code does something else (docs/differences.md).
    "*/paper": dict(perception="printed", kl_clamp=0.0, masked_grad=True, dual_clip=0.0, top_p=1.0)
    | dict(reward="paper", loss_mean="sequence"),  # 1/N of Eq. (1) and (2)
    **dict.fromkeys(["dapo/paper", "papo_d/paper", "noisy/paper"], dict(loss_mean="token")),
    "vppo/paper": dict(loss_mean="token", top_p=0.99),
    "tapo/paper": dict(loss_mean="token", update_on="anchor", reward="tagged"),
    "pgpo/paper": dict(loss_mean="token", top_p=0.99, reward="official"),
}


def group_advantages(rewards, eps=1e-6):
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

    seen: object  # policy.Scores: pi_theta on the picture; logp, and entropy if it is exact
    old: torch.Tensor  # pi_old
    sampled: torch.Tensor  # pi_old as the sampler computed it; differs from old by rounding only
    masked: object = None  # policy.Scores: pi_mask, where gamma, eta2 or credit needs it
    ref: torch.Tensor | None = None  # pi_ref, where beta needs it
    exact_kl: tuple | None = None  # for --perception exact: KL(pi || pi_mask), where it was clamped
    credit: torch.Tensor | None = None  # w of credit.py, on the policy term; None: 1


class Denominators(NamedTuple):
    """What 1/N divides by, in the whole optimiser batch over all processes."""

    tokens: int
    responses: int


def objective(said, advantages, scored, pictured, N, cfg):
    """Minus J for one micro-batch, and its metrics.

    said: LogProbs; advantages (B, G); scored (B, G, R) bool, the tokens that count, EOS included;
    pictured (B,) bool, whether the prompt has a picture: without one there is no perception term;
    N: Denominators of the whole batch; cfg: plumbing.config.Config

    -> (loss, sums). loss carries the gradient of J into said.seen and, with cfg.masked_grad, into
    said.masked. sums: {metric: (2,) tensor, its sum over some tokens and the number of those
    tokens}, to be added up over micro-batches and processes before one is divided by the other.
    """
    logp = said.seen.logp
    A = advantages[:, :, None].expand_as(logp)  # (B, G, R)
    policy, high, low = clipped_surrogate(
        logp, said.old, A, cfg.clip_low, cfg.clip_high, cfg.dual_clip
    )
    w = 1.0 if said.credit is None else said.credit
    if cfg.importance_cap:
        w = w * importance_weight(said.old, said.sampled, cfg.importance_cap)
    H = entropy(said.seen, cfg)
    KL_ref = 0.0 if said.ref is None else k3(logp, said.ref, cfg.kl_clamp)[0]
    with_picture = scored & pictured[:, None, None]
    KL_prcp, H_mask, clamped = perception(said, with_picture, cfg)

    per_token = (
        policy * w  # Eq. (1), the clipped surrogate; w: --credit and --importance_cap
        + cfg.beta * KL_ref  # Eq. (1)
        - cfg.gamma * KL_prcp  # Eq. (2), the implicit perception loss
        + (cfg.eta1 * H + cfg.eta2 * H_mask)  # Eq. (2), the double entropy loss
    )
    if cfg.loss_mean == "sequence":  # Eq. (1), (2): 1/G sum_i 1/|o_i|, with --objective paper
        lengths = scored.sum(-1, keepdim=True).clamp(min=1)
        loss = scored_sum(per_token / lengths, scored) / N.responses
    else:  # Eq. (3): 1 / sum_i |o_i|; the released code does so for every algorithm
        loss = scored_sum(per_token, scored) / N.tokens

    def total(x, over=scored):
        return torch.stack([scored_sum(x.detach(), over).double(), over.sum().double()])

    sums = {"policy_loss": total(policy * w), "entropy": total(H)}
    sums |= {"clip_high_fraction": total(high.float()), "clip_low_fraction": total(low.float())}
    sums |= {"sampler_gap": total((said.old - said.sampled).abs())}
    sums |= {"sampler_kl": total(k3(said.sampled, said.old, 0)[0])}
    if said.ref is not None:
        sums |= {"ref_kl": total(KL_ref)}
    if said.credit is not None:
        sums |= {"credited_tokens": total(said.credit.sign()), "credit_weight": total(said.credit)}
    if said.masked is not None:
        sums |= {"perception_kl": total(KL_prcp, with_picture)}
        sums |= {"masked_entropy": total(H_mask, with_picture)}
        sums |= {"perception_clamped": total(clamped.float(), with_picture)}
    # The loss is a sum over tokens divided by N. Times N.tokens, it can be averaged as the others.
    sums |= {"loss": torch.stack([(loss.detach() * N.tokens).double(), scored.sum().double()])}
    return loss, sums


def perception(said, with_picture, cfg):
    """KL(pi || pi_mask) and H[pi_mask] of Eq. (2), and where the KL was clamped.

    (B, G, R) each, 0 where with_picture is false; three zeros in an algorithm without them.
    """
    if (masked := said.masked) is None:
        return 0.0, 0.0, None
    if not cfg.masked_grad:  # as released: pi_mask is a constant, and eta2 weighs a constant
        masked = type(masked)(*(None if x is None else x.detach() for x in masked))
    if said.exact_kl is not None:
        kl, clamped = said.exact_kl
    else:  # where only --credit has scored pi_mask, the whole distribution is not known
        estimate = PERCEPTION.get(cfg.perception, k3)
        kl, clamped = estimate(said.seen.logp, masked.logp, cfg.kl_clamp)
    kl = torch.where(with_picture, kl, 0.0)
    return kl, torch.where(with_picture, entropy(masked, cfg), 0.0), clamped & with_picture


def entropy(scores, cfg):
    """H of Eq. (2), sampled or over the whole vocabulary: (B, G, R)"""
    return scores.entropy if cfg.entropy == "exact" else sampled_entropy(scores.logp)


# --------------------------------------------------------------------------- dynamic sampling


def difficulty(accuracy, low, high):
    """Which side of DAPO's bounds a group is on. accuracy (G,), 0 or 1 each

    With the bounds 0.01 and 0.99, the defaults, "informative" is 0 < #correct < G of Eq. (3).

    -> "informative" strictly between the bounds, else "too_hard" or "too_easy"
    """
    mean = accuracy.mean().item()
    return "too_hard" if mean <= low else "too_easy" if mean >= high else "informative"


def fill_batch(draw, cfg):
    """The groups of one step; with dynamic sampling only informative ones (Eq. 3), drawn in rounds
    until the batch is full -> (groups, {what became of the prompts rolled out: how many})

    draw(n) rolls out and scores the next n prompts -> [Group], fewer where a prompt could not be
    used; those are replaced. Raises ValueError, which says what the data lacks, when max_rounds
    rounds do not fill the batch.
    """
    wanted, kept = cfg.prompts_per_step, []
    fate = {"generated": 0, "refused": 0, "too_easy": 0, "too_hard": 0}
    for _ in range(cfg.max_rounds):
        n = cfg.prompts_per_round if cfg.dynamic_sampling else wanted - len(kept)
        groups = draw(n)
        fate["generated"] += len(groups)
        fate["refused"] += n - len(groups)
        for group in groups:
            verdict = "informative"
            if cfg.dynamic_sampling:
                verdict = difficulty(group.values("accuracy"), cfg.filter_low, cfg.filter_high)
            if verdict == "informative":
                kept.append(group)
            else:
                fate[verdict] += 1
        if len(kept) >= wanted:
            return kept[:wanted], {**fate, "surplus": len(kept) - wanted}
    raise ValueError(why_not_full(len(kept), fate, cfg))


def why_not_full(kept, fate, cfg):
    """What the data lacks, as a sentence."""
    if not cfg.dynamic_sampling or fate["refused"] > fate["generated"]:
        prompts = fate["generated"] + fate["refused"]
        refused = f"of {prompts} prompts {fate['refused']} could not be used"
        return f"{refused}; the warnings above say why"
    side = "easy" if fate["too_easy"] > fate["too_hard"] else "hard"
    return (
        f"after {cfg.max_rounds} rounds of {cfg.prompts_per_round} prompts only {kept} of "
        f"{cfg.prompts_per_step} groups had an accuracy between {cfg.filter_low} and "
        f"{cfg.filter_high}; {fate['too_easy']} were above and {fate['too_hard']} below, so the "
        f"data is too {side} for this model: change it, widen the bounds or raise --max_rounds"
    )
