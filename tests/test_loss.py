"""The terms, one by one: by hand, by gradcheck, and at their clamps."""

import pytest
import torch

from loss import (
    clipped_surrogate,
    exact_entropy,
    exact_kl,
    k3,
    policy_logits,
    printed_kl,
    sampled_entropy,
    scored_sum,
    token_logprobs,
)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(f, *inputs):
    """Analytic against numeric gradients, for every input at once."""
    assert torch.autograd.gradcheck(f, [x.clone().requires_grad_() for x in inputs])


BANNED = torch.tensor([False, True, False, False, False, True])
TARGETS, ADVANTAGES = torch.tensor([0, 2, 3, 4]), numbers(4, 6, seed=2)


def distribution(x):
    return policy_logits(x, 0.7, BANNED).log_softmax(-1)


TERMS = {
    "token log-probs": lambda x, y: token_logprobs(policy_logits(x, 0.7, BANNED), TARGETS),
    "clipped surrogate": lambda x, y: clipped_surrogate(x, y, ADVANTAGES, 0.2, 0.3, 3.0)[0],
    "k3": lambda x, y: k3(x, y, 10.0)[0],
    "k3 without clamp": lambda x, y: k3(x, y, 0)[0],
    "printed": lambda x, y: printed_kl(x, y, 10.0)[0],
    "sampled entropy": lambda x, y: sampled_entropy(x),
    "exact entropy": lambda x, y: exact_entropy(distribution(x)),
    "exact KL": lambda x, y: exact_kl(distribution(x), distribution(y))[0],
}


@pytest.mark.parametrize("term", TERMS)
def test_gradcheck(term):
    check(TERMS[term], numbers(4, 6), numbers(4, 6, seed=1))


@pytest.mark.lesson
def test_k3_by_hand_and_at_its_clamps():
    """d = 1: e - 2. e^5 - 6 is cut to 10; 20 + e^-20 - 1 = 19 too, and without a clamp stays.
    Beyond a clamp there is no gradient."""
    logp = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    other = torch.tensor([1.0, 5.0, -20.0, -30.0], dtype=torch.float64)
    value, clamped = k3(logp, other, 10.0)
    value.sum().backward()
    assert value.tolist() == pytest.approx([torch.e - 2, 10, 10, 10])
    assert clamped.tolist() == [False, True, True, True]
    assert logp.grad.tolist() == pytest.approx([1 - torch.e, 0, 0, 0])
    logp.grad = None
    value, clamped = k3(logp, other, 0)
    value.sum().backward()
    assert value[2:].tolist() == pytest.approx([19, 19])
    assert clamped.tolist() == [False, False, False, True]
    assert logp.grad[1] == pytest.approx(1 - torch.e**5) and logp.grad[3] == 0


@pytest.mark.lesson
def test_exact_kl_and_entropy_by_hand():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    kl, clamped = exact_kl(p.log(), q.log())
    assert kl.item() == pytest.approx(0.25 * torch.log(torch.tensor(2.0)).item()) and not clamped
    assert exact_entropy(p.log()).item() == pytest.approx(1.5 * torch.log(torch.tensor(2.0)).item())
    value, clamped = exact_kl(p.log(), q.log(), clamp=0.1)
    assert value.item() == pytest.approx(0.1) and clamped


def test_banned_tokens_add_nothing_and_no_nan():
    x, y = numbers(4, 6).requires_grad_(), numbers(4, 6, seed=1).requires_grad_()
    dist, blind = (policy_logits(z, 1.0, BANNED).log_softmax(-1) for z in (x, y))
    few, few_blind = (z[:, ~BANNED].log_softmax(-1) for z in (x, y))
    kl, entropy = exact_kl(dist, blind)[0], exact_entropy(dist)
    assert torch.allclose(kl, exact_kl(few, few_blind)[0])
    assert torch.allclose(entropy, exact_entropy(few))
    (kl + entropy).sum().backward()
    for grad in (x.grad, y.grad):
        assert torch.isfinite(grad).all() and not grad[:, BANNED].any() and grad[:, ~BANNED].any()


@pytest.mark.lesson
def test_surrogate_by_hand():
    """rho = 2, clip 0.2/0.3, dual clip 3: each branch, worked out on paper."""
    logp = torch.log(torch.tensor([2.0, 2.0, 0.5, 0.5, 8.0]))
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    loss, high, low = clipped_surrogate(logp, torch.zeros(5), advantage, 0.2, 0.3, 3.0)
    assert torch.allclose(loss, torch.tensor([-1.3, 2.0, -0.5, 0.8, 3.0]))
    assert high.tolist() == [True, False, False, False, False]
    assert low.tolist() == [False, False, False, True, False]
    without = clipped_surrogate(logp, torch.zeros(5), advantage, 0.2, 0.3, 0)[0]  # no dual clip
    assert without[-1] == pytest.approx(8.0)


@pytest.mark.lesson
def test_surrogate_on_policy_is_the_policy_gradient():
    """At rho = 1 the gradient is -A grad log pi: nothing is clipped, whatever the sign."""
    logp = torch.tensor([-0.3, -2.0, -1.0], requires_grad=True)
    advantage = torch.tensor([1.5, -0.7, 0.0])
    loss, high, low = clipped_surrogate(logp, logp.detach(), advantage, 0.2, 0.3, 3.0)
    loss.sum().backward()
    assert torch.equal(logp.grad, -advantage) and not high.any() and not low.any()


def test_logprobs_follow_temperature_and_ban():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    banned = torch.tensor([0, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
    targets = torch.tensor([0, 2, 3, 4, 5])
    got = token_logprobs(policy_logits(logits, 0.7, banned), targets)
    allowed = [0, 2, 3, 4, 5]
    want = (logits[:, allowed] / 0.7).log_softmax(-1)[range(5), [allowed.index(t) for t in targets]]
    assert torch.allclose(got, want, atol=1e-6)


def test_half_precision_logits_are_scored_in_float32():
    assert policy_logits(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert policy_logits(torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float64


def test_padding_is_ignored_even_when_it_is_infinite():
    x = torch.tensor([1.0, float("inf"), float("nan"), 2.0], requires_grad=True)
    total = scored_sum(x, torch.tensor([True, False, False, True]))
    total.backward()
    assert total == 3 and x.grad.tolist() == [1, 0, 0, 1]
