"""The terms of the objective, as pure functions of tensors.

Notation, per token o_t of a response (every function works on any shape, one number a token):

    logp    l_t = log pi_theta(o_t | q, I, o_<t)        the policy that is being trained, on the picture
    old     log pi_old(o_t | q, I, o_<t)                the policy that sampled the response
    masked  a_t = log pi_theta(o_t | q, I_mask, o_<t)   the same policy, on the masked picture
    ref     log pi_ref(o_t | q, I, o_<t)                the policy before training

Nothing here knows about batches, prompts or padding, and no function changes its inputs.
"""
import torch


def token_logprobs(logits, targets, temperature=1.0, banned=None):
    """Log-probability of each target under softmax(logits / temperature), banned tokens left out of the softmax.

    logits (N, V), targets (N,) int64, banned (V,) bool or None -> (N,) float32. Temperature and ban are the sampler's own:
    a log-probability scored under another distribution than the one sampled from makes the ratio of Eq. (1) wrong.
    """
    logits = logits.float() / temperature                                       # (N, V)
    if banned is not None:
        logits = logits.masked_fill(banned, float("-inf"))
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)   # (N,)


def clipped_surrogate(logp, old, advantage, clip_low, clip_high, dual_clip):
    """The clipped policy term of Eq. (1), as a loss, and where it was clipped.

    rho = pi_theta / pi_old;   loss = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)
    "Clip higher": clip_high > clip_low leaves rare good tokens room to grow; used for GRPO too (section 4.1).
    Dual clip: for A < 0 the loss is at most dual_clip * |A|, so that one token whose ratio exploded cannot rule the step.
    The log-ratio is clamped to +-20, as in the released code, against overflow.

    logp, old, advantage broadcast together -> (loss, high, low): float, bool, bool; high: rho above its bound with A > 0.
    """
    rho = (logp - old).clamp(-20.0, 20.0).exp()
    loss = -torch.minimum(rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage)
    loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)
    return loss, (rho > 1 + clip_high) & (advantage > 0), (rho < 1 - clip_low) & (advantage < 0)


def k3(logp, other):
    """Schulman's k3 estimate of KL(pi || other) from tokens sampled by pi: d = other - logp, k3 = e^d - d - 1 >= 0.

    Its mean over pi's own samples is KL(pi || other). With `other` held fixed, its gradient in logp is 1 - e^d: on the
    perception term it raises tokens that the picture made likelier (d < 0, saturating at 1) and lowers tokens that
    the blind policy likes better (d > 0). The clamps are the released code's; beyond them the gradient is zero.
    """
    d = (other - logp).clamp(-20.0, 20.0)
    return (d.exp() - d - 1).clamp(-10.0, 10.0)


def sampled_entropy(logp):
    """The "entropy" of the released code: the negative log-likelihood of the sampled token, whose mean estimates H."""
    return -logp


def masked_sum(x, mask):
    """Sum of x where mask is true. Padding may hold anything, infinities included."""
    return torch.where(mask, x, 0.0).sum()
