"""Six facts about PAPO's loss, to be read in class.

A policy over six tokens is small enough that an expectation is a sum: E_pi[f] = sum_o pi(o) f(o).
pi is what the policy says after looking at the picture, pi_mask what it says after looking at the
masked one, both free softmax vectors here. Nothing is sampled, so nothing is approximate: the
equalities hold to the last digits of float64.
"""

import pytest
import torch

from loss import exact_kl, k3, printed_kl, sampled_entropy
from papo import group_advantages

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
    other_kl = (mask * (log_mask - log_pi)).sum()
    assert torch.allclose(expectation(mask, printed), other_kl, atol=1e-13)
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


# A policy of two branches: it looks, with probability a on the picture and b on the masked one, and
# is right with probability r; or it repeats the hint, which is right with probability h.
PLACES = [(0.8, 0.1), (0.6, 0.5), (0.3, 0.3), (0.3, 0.6), (0.1, 0.9), (0.9, 1e-6)]  # (a, b)


def two(a):
    """Logits of (look, hint)."""
    return torch.tensor([a, 1 - a], dtype=torch.float64).log().requires_grad_()


def grpo_pull(a, look, hint, weight=1.0):
    """The mean gradient on the logit of looking, advantages not divided by their deviation. look,
    hint: mean rewards of the branches"""
    logits, rewards = two(a), torch.tensor([look, hint], dtype=torch.float64)
    pi = logits.softmax(-1).detach()
    advantages = weight * (rewards - (pi * rewards).sum())
    return gradient(expectation(pi, advantages * logits.log_softmax(-1)), logits)[0].item()


@pytest.mark.parametrize("a, b", PLACES)
def test_5_perception_follows_a_minus_b_and_reward_follows_r_minus_h(a, b):
    """The mean gradient of k3 on looking is a - b, whatever the reward says; GRPO's is
    a (1 - a) (r - h). So PAPO amplifies what the picture makes likelier: it pays where hints are
    worth more than looking (r < h) and the masked policy looks less (b < a), and it has nothing to
    add where r > h, or where b = a.

    Why: the first is the second fact for two tokens, pi - pi_mask. For the second, A is r - m or
    h - m with m = a r + (1 - a) h, and a (r - m) = a (1 - a) (r - h). Every estimator pushes a
    token that the picture made likelier up, and one that it made less likely down or not at all,
    clamped or not; of two branches one is either. So all have the sign of a - b, and differ in
    size. Through pi_mask the gradient on *its* logit is b - a: where one weight serves both
    pictures, the two cancel.

    It leaves out the tokens inside a branch (facts are likelier on the picture, too, so r rises as
    well), the division by the deviation, later steps (r is none of the policy's constants), and
    collapse (nothing here but two branches can be said)."""
    r, h = 0.5, 0.8
    assert grpo_pull(a, r, h) == pytest.approx(a * (1 - a) * (r - h), abs=1e-14)
    blind = two(b)
    for estimate in (k3, printed_kl, lambda *both, clamp: exact_kl(both[0], both[1], clamp)):
        for clamp in (0, 1.0, 0.1):
            logits = two(a)
            log_pi, log_mask = logits.log_softmax(-1), blind.log_softmax(-1).detach()
            value = estimate(log_pi, log_mask, clamp=clamp)[0]
            # The exact KL is one number for the place; the others are one for each token.
            mean = expectation(log_pi.exp(), value) if value.ndim else value
            push = gradient(mean, logits)[0].item() if mean.requires_grad else 0.0
            assert push * (a - b) > 0 or abs(push) < 1e-12 and (clamp or a == b)
            if estimate is k3 and not clamp:
                assert push == pytest.approx(a - b, abs=1e-12)
    log_pi, log_mask = two(a).log_softmax(-1).detach(), blind.log_softmax(-1)
    through = gradient(expectation(log_pi.exp(), k3(log_pi, log_mask, clamp=0)[0]), blind)[0]
    assert through.item() == pytest.approx(b - a, abs=1e-12)


@pytest.mark.parametrize("a, b", PLACES)
def test_5b_blind_weights_take_the_hint_out_of_the_sum(a, b):
    """A question's advantages times 1 - m, m its accuracy on a black picture: where the hint is
    right, m = b r + 1 - b, where it is wrong, m = b r. The mean gradient over both kinds of
    question is a (1 - a) [(1 - h) (1 - b r) r - h b (1 - r)^2]: with b = 0 it is positive for every
    r and h, whatever the perception loss would say.

    It fails where the masked policy does not repeat hints: at b = 1 its sign is that of r - h, as
    GRPO's. And where a question is answered blindly by another way, all of its weights are small,
    and it teaches nothing. A reward r - lambda m would change nothing at all: m is one number for
    the group, which the group's mean takes out."""
    for r in (0.1, 0.5, 0.9):
        for h in (0.5, 0.8, 0.95):
            right = h * grpo_pull(a, r, 1.0, weight=1 - (b * r + 1 - b))
            wrong = (1 - h) * grpo_pull(a, r, 0.0, weight=1 - b * r)
            bracket = (1 - h) * (1 - b * r) * r - h * b * (1 - r) ** 2
            assert right + wrong == pytest.approx(a * (1 - a) * bracket, abs=1e-14)
            assert ((1 - h) * (1 - r) * r - h * (1 - r) ** 2 > 0) == (r > h)  # b = 1
    rewards = torch.tensor([1.0, 0.1, 0.1, 1.0, 0.0])
    gone = group_advantages(rewards - 0.7 * 0.25)
    assert torch.allclose(gone, group_advantages(rewards), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_6_the_reference_holds_the_perception_loss_where_beta_is_above_gamma(seed):
    """The mean gradient of gamma k3(pi, pi_mask) - beta k3(pi, pi_ref) in the logits is
    (gamma - beta) pi + beta pi_ref - gamma pi_mask. With beta > gamma it leads from everywhere to
    one place, pi_ref + gamma / (beta - gamma) (pi_ref - pi_mask), from where it points nowhere;
    with beta < gamma it leads away from there, into a corner: one token is all that is said.

    Why: the second fact, for both; and pi may be added to its own logits for ever, but not
    subtracted. In the paper's settings gamma is twice beta: what holds the policy there is the
    reward, the small learning rate, and the end of training. It leaves out that pi_mask moves as
    well, since it has the same weights."""
    g = torch.Generator().manual_seed(seed)
    ref = torch.randn(6, generator=g, dtype=torch.float64).softmax(-1)
    mask = ref * (1 + 0.5 * torch.rand(6, generator=g, dtype=torch.float64))
    mask = mask / mask.sum()

    def ascend(gamma, beta, steps):
        logits = ref.log()
        for _ in range(steps):
            logits = logits.detach().requires_grad_()
            log_pi = logits.log_softmax(-1)
            terms = gamma * k3(log_pi, mask.log(), 0)[0] - beta * k3(log_pi, ref.log(), 0)[0]
            push = gradient(expectation(log_pi.exp(), terms), logits)
            pi = log_pi.exp().detach()
            assert torch.allclose(push, (gamma - beta) * pi + beta * ref - gamma * mask, atol=1e-12)
            logits = logits + 0.5 * push
        return logits.softmax(-1).detach()

    held = ascend(0.3, 0.6, 300)
    assert torch.allclose(held, ref + 0.3 / (0.6 - 0.3) * (ref - mask), atol=1e-3)
    assert ascend(0.3, 0.15, 300).max() > 0.99
