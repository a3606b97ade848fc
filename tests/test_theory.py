"""Four facts about PAPO's loss, to be read in class.

A policy over six tokens is small enough that an expectation is a sum: E_pi[f] = sum_o pi(o) f(o).
pi is what the policy says after looking at the picture, pi_mask what it says after looking at the
masked one, both free softmax vectors here. Nothing is sampled, so nothing is approximate: the
equalities hold to the last digits of float64.
"""

import pytest
import torch

from loss import exact_kl, k3, printed_kl, sampled_entropy

pytestmark = pytest.mark.lesson


@pytest.fixture(params=[0, 1, 2])
def pair(request):
    """Logits of the policy and of its blind twin."""
    g = torch.Generator().manual_seed(request.param)
    logits, blind = torch.randn(2, 6, generator=g, dtype=torch.float64).unbind()
    return logits.requires_grad_(), blind.requires_grad_()


def gradient(value, logits):
    return torch.autograd.grad(value, logits)[0]


def expectation(pi, f):
    """E_pi[f]. pi is detached: it stands for how often a token is sampled, and sampling has no
    gradient."""
    return (pi.detach() * f).sum()


def test_1_the_mean_of_k3_is_the_kl_the_paper_names(pair):
    """E_pi[1/r + log r - 1] = KL(pi || pi_mask), with r = pi / pi_mask.

    Why: E_pi[pi_mask / pi] = sum_o pi_mask(o) = 1, which cancels the -1, and E_pi[log r] is the KL.
    The first two terms add no bias, but make every single value non-negative, and so the estimate
    quieter than log r alone."""
    log_pi, log_mask = (x.log_softmax(-1) for x in pair)
    kl = (log_pi.exp() * (log_pi - log_mask)).sum()
    value, clamped = k3(log_pi, log_mask, clamp=0)
    assert torch.allclose(expectation(log_pi.exp(), value), kl, atol=1e-14)
    assert torch.allclose(exact_kl(log_pi, log_mask)[0], kl, atol=1e-14)
    assert (value >= 0).all() and not clamped.any()


def test_2_the_released_loss_follows_the_gradient_of_the_other_kl(pair):
    """With the masked branch detached, E_pi[grad k3] = grad KL(pi_mask || pi): the other direction
    of the KL.

    Why: d k3 / d log pi = 1 - 1/r, and E_pi[(1 - pi_mask/pi) grad log pi]
    = 0 - sum_o pi_mask(o) grad log pi(o), which is the gradient of the cross-entropy from pi_mask
    to pi. So maximising it takes probability away from whatever the blind policy would have said.
    This KL has no upper bound, and a token of no meaning gets away from the blind policy as well as
    a true one does. (Neither direction asks for what is true: the exact KL collapses as well.)"""
    logits, blind = pair
    log_mask = blind.log_softmax(-1).detach()
    log_pi = logits.log_softmax(-1)
    released = gradient(expectation(log_pi.exp(), k3(log_pi, log_mask, clamp=0)[0]), logits)
    log_pi = logits.log_softmax(-1)
    other_direction = gradient((log_mask.exp() * (log_mask - log_pi)).sum(), logits)
    log_pi = logits.log_softmax(-1)
    named = gradient((log_pi.exp() * (log_pi - log_mask)).sum(), logits)
    assert torch.allclose(released, other_direction, atol=1e-14)
    assert not torch.allclose(released, named, atol=1e-3)
    # The same, written out: away from pi_mask.
    assert torch.allclose(released, log_pi.exp() - log_mask.exp(), atol=1e-14)


def test_3_the_mean_of_the_printed_form_is_chi_squared_minus_the_kl(pair):
    """E_pi[r - log r - 1] = chi^2(pi || pi_mask) - KL(pi || pi_mask): not the KL that the paper
    names.

    Why: E_pi[r] = sum pi^2 / pi_mask = chi^2 + 1, and E_pi[-log r] = -KL. The same expression is k3
    for KL(pi_mask || pi), but only for tokens sampled from pi_mask; these were sampled from pi."""
    log_pi, log_mask = (x.log_softmax(-1) for x in pair)
    pi, mask = log_pi.exp(), log_mask.exp()
    chi2, kl = ((pi - mask) ** 2 / mask).sum(), (pi * (log_pi - log_mask)).sum()
    printed, _ = printed_kl(log_pi, log_mask, clamp=0)
    r = pi / mask
    assert torch.allclose(printed, r - r.log() - 1, atol=1e-13)
    assert torch.allclose(expectation(pi, printed), chi2 - kl, atol=1e-12)
    assert torch.allclose(
        expectation(mask, printed), (mask * (log_mask - log_pi)).sum(), atol=1e-13
    )
    assert not torch.allclose(chi2 - kl, kl, rtol=0.05)


def test_4_the_sampled_entropy_does_nothing_on_policy(pair):
    """E_pi[grad -log pi] = 0: the released entropy term has no expected gradient while the tokens
    come from the policy itself.

    Why: E_pi[grad log pi] = sum_o grad pi(o) = grad 1 = 0. What it does in a real run comes from
    where the tokens do not come from pi: later updates on the same rollout, and nucleus sampling.
    The second half of the test cuts one token off, as top_p does: then lowering the term raises the
    probability of the tokens that are left."""
    logits, _ = pair
    log_pi = logits.log_softmax(-1)
    assert gradient(expectation(log_pi.exp(), sampled_entropy(log_pi)), logits).abs().max() < 1e-14
    log_pi = logits.log_softmax(-1)
    nucleus = log_pi.exp() * (torch.arange(6) != log_pi.argmin())
    downhill = -gradient(expectation(nucleus / nucleus.sum(), sampled_entropy(log_pi)), logits)
    assert downhill[log_pi.argmin()] < 0 and downhill.abs().max() > 1e-3
