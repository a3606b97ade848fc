"""PAPO: GRPO or DAPO, plus a reason to look at the picture (arXiv 2507.06448).

The objective, maximised; sums run over the G responses o_i to one prompt and their tokens:

    J = 1/N sum_i sum_t { min(rho A_i, clip(rho, 1 - eps_l, 1 + eps_h) A_i)      Eq. (1), the policy term
                          - beta  KL(pi || pi_ref)                              Eq. (1), GRPO forms only
                          + gamma KL(pi || pi_mask)                             Eq. (2), the implicit perception loss
                          - eta1  H[pi] - eta2 H[pi_mask] }                     Eq. (2), the double entropy loss

What is computed here is what the released code optimises (github.com/MikeWangWZHL/PAPO at fb63bf4), which is not always
what the paper prints. Departures, numbered; "paper" is v5, "code" is the release, "here" is this file:

 1. KL(pi || pi_mask).   paper: r - log r - 1 with r = pi/pi_mask.   code, here: k3 = 1/r + log r - 1, whose mean is the KL.
 2. Masked branch.       paper: differentiable.   code, here: computed once a rollout, without gradient, reused by every
                         update (verl/workers/actor/dp_actor.py, RECOMPUTE_AUG_LOG_PROBS = False). So eta2's term is a
                         constant: it is logged, and moves nothing.
 3. H.                   paper: log pi.   code, here: mean of -log pi over sampled tokens, minimised.
 4. 1/N.                 paper: mean per sequence for GRPO forms.   code: mean over tokens of a micro-batch, then over
                         micro-batches.   here: N = response tokens of the whole optimiser batch, over all processes, so
                         that the gradient does not depend on how the batch was cut.
 5. Clip.                paper: eps.   code, here: 0.2/0.3 (GRPO forms) and 0.2/0.28 (DAPO forms), dual clip 3.
 6. Reward.              paper: 0/1.   code, here: 0.9 accuracy + 0.1 format (--reward paper: 0/1).
 7. Learning rate.       code: 0 during the first rollout step (a warm-up of 0 steps divides into 0).   here: never 0.
 8. Masks.               code: global unseeded numpy state, on the raw picture.   here: one named generator per (seed, step,
                         prompt), on the patches the vision tower sees.
 9. Dynamic sampling.    code: when no group of a round survives, it keeps them all.   here: it draws another round.
"""
import torch

from loss import clipped_surrogate, k3, masked_sum, sampled_entropy

# What an algorithm is. gamma, eta1, eta2 differ by model too: config.py lays the paper's table over these.
ALGORITHMS = {
    "grpo": dict(clip_high=0.30, beta=0.01, gamma=0.0, eta1=0.0, eta2=0.0, dynamic_sampling=False),
    "dapo": dict(clip_high=0.28, beta=0.0, gamma=0.0, eta1=0.0, eta2=0.0, dynamic_sampling=True),
    "papo_g": dict(clip_high=0.30, beta=0.01, gamma=0.02, eta1=0.0, eta2=0.0, dynamic_sampling=False),
    "papo_d": dict(clip_high=0.28, beta=0.0, gamma=0.01, eta1=0.03, eta2=0.03, dynamic_sampling=True),
}


def group_advantages(rewards, eps=1e-6):
    """A_i = (R_i - mean R) / (std R + eps) within each group (section 2.1). rewards (..., G) -> (..., G).

    std is the sample one (G - 1), eps as released. A group whose rewards are all equal gets zero: it teaches the policy
    term nothing, and still counts in the other terms and in N. Raises ValueError for a group of one.
    """
    if rewards.shape[-1] < 2:
        raise ValueError("a group of one response has no advantage; use a group size of at least 2")
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + eps)


def informative(accuracy, low=0.01, high=0.99):
    """DAPO's dynamic sampling, 0 < #correct < G (Eq. 3): may this group stay? accuracy (..., G) -> (...) bool"""
    mean = accuracy.mean(-1)
    return (mean > low) & (mean < high)


def objective(logp, old, masked, ref, advantage, mask, sees, total_tokens, cfg):
    """Minus J, for one micro-batch, and the sums behind its metrics.

    logp, old, masked, ref: (B, G, R) log-probabilities; masked and ref may be None when their term is off.
    advantage (B, G); mask (B, G, R) bool, true on sampled tokens, EOS included; sees (B,) bool, false for a prompt
    without a picture, which has no perception term. total_tokens: N, over the whole optimiser batch and all processes.

    -> (loss, sums): the gradient of J flows from loss into logp only; sums are detached totals over this micro-batch, to
    be added over micro-batches and processes and divided by N (the perception ones by sums["seen"]).
    """
    A = advantage[:, :, None].expand_as(logp)                                   # (B, G, R)
    policy, high, low = clipped_surrogate(logp, old, A, cfg.clip_low, cfg.clip_high, cfg.dual_clip)
    entropy = sampled_entropy(logp)                                             # (B, G, R)
    per_token = policy + cfg.eta1 * entropy                                     # Eq. (1) policy term; Eq. (2), eta1
    parts = {"policy_loss": policy, "entropy": entropy, "clip_high_fraction": high.float(), "clip_low_fraction": low.float()}
    if ref is not None:
        parts["ref_kl"] = k3(logp, ref)
        per_token = per_token + cfg.beta * parts["ref_kl"]                      # Eq. (1), - beta KL_ref
    seen = mask & sees[:, None, None]
    if masked is not None:
        perception = torch.where(seen, k3(logp, masked), 0.0)                   # (B, G, R)
        masked_entropy = torch.where(seen, sampled_entropy(masked), 0.0)
        per_token = per_token - cfg.gamma * perception + cfg.eta2 * masked_entropy      # Eq. (2), gamma and eta2
        parts |= {"perception_kl": perception, "masked_entropy": masked_entropy}
    loss = masked_sum(per_token, mask) / total_tokens
    sums = {name: masked_sum(x.detach(), mask) for name, x in parts.items()}
    sums |= {"seen": seen.sum(), "loss": loss.detach() * total_tokens}
    return loss, sums
