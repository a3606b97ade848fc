"""The terms of the objective, as pure functions of tensors.

Notation, per token o_t of a response (every function works on any shape, one number a token):

    logp    l_t = log pi_theta(o_t | q, I, o_<t)        the policy that is being trained, on the picture
    old     log pi_old(o_t | q, I, o_<t)                the policy that sampled the response
    masked  a_t = log pi_theta(o_t | q, I_mask, o_<t)   the same policy, on the masked picture
    ref     log pi_ref(o_t | q, I, o_<t)                the policy before training

The exact terms take whole distributions instead of sampled tokens: dist = log pi_theta(. | q, I, o_<t), (..., V).
Nothing here knows about batches, prompts or padding, and no function changes its inputs.
"""
import torch

LOG_RATIO_CLAMP = 20.0        # as released: e^20 is still a float, and no useful ratio is that large


def policy_logits(logits, temperature=1.0, banned=None):
    """Logits of the distribution that is sampled from and scored: softmax(logits / temperature) without the banned tokens.

    logits (..., V), banned (V,) bool or None -> (..., V), at least float32. One home for both uses: a log-probability scored
    under another distribution than the one sampled from makes the ratio of Eq. (1) wrong.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return logits if banned is None else logits.masked_fill(banned, float("-inf"))


def token_logprobs(logits, targets):
    """Log-probability of each target under softmax(logits). logits (N, V), targets (N,) int64 -> (N,)"""
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def clipped_surrogate(logp, old, advantage, clip_low, clip_high, dual_clip):
    """The clipped policy term of Eq. (1), as a loss, and where it was clipped.

    rho = pi_theta / pi_old;   loss = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)
    "Clip higher": clip_high > clip_low leaves rare good tokens room to grow; used for GRPO too (section 4.1).
    Dual clip (released code): for A < 0 the loss is at most dual_clip * |A|, so that one token whose ratio exploded cannot rule
    the step; 0 turns it off.

    logp, old, advantage broadcast together -> (loss, high, low): float, bool, bool; high: rho above its bound with A > 0.
    """
    rho = (logp - old).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    loss = -torch.minimum(rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage)
    if dual_clip:
        loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)
    return loss, (rho > 1 + clip_high) & (advantage > 0), (rho < 1 - clip_low) & (advantage < 0)


def importance_weight(old, sampled, cap):
    """Truncated importance sampling: min(pi_old / pi_sampler, cap), a weight on the policy term without a gradient.

    pi_old is the trainer's word on the sampled token, pi_sampler the engine's; the same policy, but not the same kernels or
    precision (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
    """
    return (old - sampled).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp().clamp(max=cap).detach()


def k3(logp, other, clamp=10.0):
    """Schulman's k3 estimate of KL(pi || other) from tokens sampled by pi: d = other - logp, k3 = e^d - d - 1 >= 0.

    Its mean over pi's own samples is KL(pi || other). With `other` held fixed, its gradient in logp is 1 - e^d: on the
    perception term it raises tokens that the picture made likelier (d < 0, saturating at 1) and lowers tokens that
    the blind policy likes better (d > 0). What the paper prints for KL_prcp, r - log r - 1 with r = pi / pi_mask, is this function
    with its arguments exchanged, k3(masked, logp): an estimate of KL(pi_mask || pi), had the tokens come from pi_mask.

    -> (value, clamped): clamped is true where a clamp has cut the gradient to zero: the value at `clamp` (released: 10;
    0 turns it off), or the log-ratio at +-20.
    """
    d = other - logp
    inside = d.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    value, at_top = _clamp(inside.exp() - inside - 1, clamp)
    return value, at_top | (d.abs() > LOG_RATIO_CLAMP)


def exact_kl(dist, other, clamp=0.0):
    """KL(pi || other) = sum_v pi(v) (log pi(v) - log other(v)) over the whole vocabulary, at each position.

    dist, other (..., V) log-probabilities, -inf for banned tokens (the same ones in both) -> (value, clamped), (...) each.
    No sampling noise, and its gradient is that of the KL itself; k3 only has the right mean.
    """
    outside = dist == float("-inf")                                             # pi(v) = 0: contributes 0, not 0 * inf
    ratio = (dist - other).masked_fill(outside, 0.0)
    return _clamp((dist.exp() * ratio).sum(-1), clamp)


def _clamp(value, clamp):
    """Cap a KL at `clamp` nats (0: no cap); beyond it the gradient is zero. -> (value, where it was capped)"""
    return (value.clamp(max=clamp), value > clamp) if clamp else (value, torch.zeros_like(value, dtype=torch.bool))


def sampled_entropy(logp):
    """The "entropy" of the released code: the negative log-likelihood of the sampled token, whose mean estimates H.

    Its expected gradient is zero while the tokens come from pi itself; exact_entropy is the regulariser that the name promises.
    """
    return -logp


def exact_entropy(dist):
    """H[pi] = -sum_v pi(v) log pi(v) at each position. dist (..., V) log-probabilities, -inf for banned tokens -> (...)"""
    return -(dist.exp() * dist.masked_fill(dist == float("-inf"), 0.0)).sum(-1)


def masked_sum(x, mask):
    """Sum of x where mask is true. Padding may hold anything, infinities included."""
    return torch.where(mask, x, 0.0).sum()
