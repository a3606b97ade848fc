"""The terms of the objective, as pure functions of tensors.

Notation, for one token o_t of a response o to the question q about the picture I:

    logp     log pi_theta(o_t | q, I, o_<t)        the policy that is being trained, on the picture
    old      log pi_old  (o_t | q, I, o_<t)        the policy that sampled the response
    masked   log pi_mask (o_t | q, I_mask, o_<t)   the policy on the masked picture (train.py says
                                                   with which weights)
    ref      log pi_ref  (o_t | q, I, o_<t)        the policy before training

Every function works on any shape, one number a token. The exact terms take whole distributions
instead of sampled tokens: dist = log pi_theta(. | q, I, o_<t), shape (..., V).

Nothing here knows about batches, prompts, padding or settings, and no function changes its inputs.
papo.py adds the terms up.
"""

import torch
from torch import Tensor

LOG_RATIO_CLAMP = 20.0  # as released: keeps exp() from overflowing


def policy_logits(logits: Tensor, temperature: float = 1.0, banned: Tensor | None = None) -> Tensor:
    """The logits of the distribution that is sampled from and scored.

    That distribution is softmax(logits / temperature) without the banned tokens. The samplers and
    the trainer both call this function, since a log-probability scored under another distribution
    than the one sampled from makes the ratio of Eq. (1) wrong.

    logits (..., V); banned (V,) bool or None -> (..., V), at least float32
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return logits if banned is None else logits.masked_fill(banned, float("-inf"))


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target under softmax(logits). logits (N, V), targets (N,) -> (N,)"""
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def clipped_surrogate(
    logp: Tensor,
    old: Tensor,
    advantage: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The policy term of Eq. (1), as a loss, and where it was clipped.

        rho = pi_theta / pi_old
        loss = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)

    "Clip higher", clip_high > clip_low, leaves rare good tokens room to grow; the paper uses it for
    GRPO too (section 4.1). The dual clip of the released code bounds the loss of a token with A < 0
    by dual_clip |A|, so that one token whose ratio exploded cannot rule the step; 0 turns it off.

    logp, old, advantage broadcast together -> (loss, high, low): float, bool, bool
    high: rho is above its upper bound and A > 0; low: rho is below its lower bound and A < 0. Such
    tokens have no gradient. Tokens at the dual clip are not counted.
    """
    rho = (logp - old).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    loss = -torch.minimum(rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage)
    if dual_clip:
        loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)
    return loss, (rho > 1 + clip_high) & (advantage > 0), (rho < 1 - clip_low) & (advantage < 0)


def importance_weight(old: Tensor, sampled: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling: min(pi_old / pi_sampler, cap), without a gradient.

    pi_old is what the trainer says of the sampled token, pi_sampler what the engine says. They are
    the same policy, but not the same kernels or precision (Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training").
    """
    ratio = (old - sampled).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    return ratio.clamp(max=cap).detach()


def k3(logp: Tensor, other: Tensor, clamp: float = 10.0) -> tuple[Tensor, Tensor]:
    """Schulman's k3 estimate of KL(pi || other) from tokens that pi sampled; always >= 0.

        k3 = e^d - d - 1,  d = other - logp

    Its mean over pi's own samples is KL(pi || other). With `other` held fixed its gradient in logp
    is 1 - e^d, and averaged over pi's samples that is the gradient of KL(other || pi), not of
    KL(pi || other) (tests/test_theory.py, the second fact). Maximised as PAPO's perception term,
    with other = masked, it raises the tokens that the picture made likelier (d < 0; the push is at
    most 1) and lowers those that the policy likes better without the picture (d > 0; the push
    grows like e^d). Three sampled tokens, each at a place of its own:

        token                 pi     pi_mask    d         k3      1 - e^d
        read off the picture  .90    .09       -2.303    1.403    +0.9     raised
        the same either way   .50    .50        0        0         0       left alone
        a habit of language   .20    .40       +0.693    0.307    -1       lowered

    -> (value, clamped): clamped is true where a clamp has cut the gradient to zero: the value at
    `clamp` (released: 10; 0 turns it off), or the log-ratio at +-20.
    """
    d = other - logp
    inside = d.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    value, at_top = _clamp(inside.exp() - inside - 1, clamp)
    return value, at_top | (d.abs() > LOG_RATIO_CLAMP)


def printed_kl(logp: Tensor, masked: Tensor, clamp: float = 0.0) -> tuple[Tensor, Tensor]:
    """KL_prcp as the paper prints it in section 3.2: r - log r - 1, with r = pi / pi_mask.

    The released code computes k3(logp, masked) = 1/r + log r - 1 instead. The printed form is k3
    with the roles of the two policies exchanged, an estimate of KL(pi_mask || pi) if the tokens
    came from pi_mask. They come from pi, so its mean is chi^2(pi || pi_mask) - KL(pi || pi_mask)
    (tests/test_theory.py). -> (value, clamped), as k3
    """
    return k3(masked, logp, clamp)


# What --perception can estimate from sampled tokens: f(logp, masked, clamp) -> (value, clamped).
# The other choice, exact_kl below, needs whole distributions, so policy.py calls it.
PERCEPTION = {"k3": k3, "printed": printed_kl}


def exact_kl(dist: Tensor, other: Tensor, clamp: float = 0.0) -> tuple[Tensor, Tensor]:
    """KL(pi || other) = sum_v pi(v) (log pi(v) - log other(v)) over the whole vocabulary.

    No sampling noise, and its gradient is that of the KL itself; k3 only has the right mean.

    dist, other (..., V) log-probabilities, -inf for banned tokens, which are the same in both
    -> (value, clamped), (...) each
    """
    outside = dist == float("-inf")  # pi(v) = 0 contributes 0, not 0 times infinity
    ratio = (dist - other).masked_fill(outside, 0.0)
    return _clamp((dist.exp() * ratio).sum(-1), clamp)


def _clamp(value: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
    """Cap a KL at `clamp` nats (0: no cap), beyond which it has no gradient -> (value, capped)"""
    if not clamp:
        return value, torch.zeros_like(value, dtype=torch.bool)
    return value.clamp(max=clamp), value > clamp


def sampled_entropy(logp: Tensor) -> Tensor:
    """The "entropy" of the released code: -log pi of the sampled token, whose mean estimates H.

    Its expected gradient is zero while the tokens come from pi itself. exact_entropy has the
    gradient of H.
    """
    return -logp


def exact_entropy(dist: Tensor) -> Tensor:
    """H[pi] = -sum_v pi(v) log pi(v). dist (..., V) log-probs, -inf for banned tokens -> (...)"""
    return -(dist.exp() * dist.masked_fill(dist == float("-inf"), 0.0)).sum(-1)


def scored_sum(x: Tensor, scored: Tensor) -> Tensor:
    """The sum of x over the tokens that count. Padding may hold anything, infinities included."""
    return torch.where(scored, x, 0.0).sum()
