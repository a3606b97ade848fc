"""The terms, one by one: by hand, and at their clamps."""

import pytest
import torch

from loss import clipped_surrogate, exact_entropy, exact_kl, policy_logits


@pytest.mark.lesson
def test_exact_kl_and_entropy_by_hand():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    kl, clamped = exact_kl(p.log(), q.log())
    assert kl.item() == pytest.approx(0.25 * torch.log(torch.tensor(2.0)).item()) and not clamped
    assert exact_entropy(p.log()).item() == pytest.approx(1.5 * torch.log(torch.tensor(2.0)).item())
    value, clamped = exact_kl(p.log(), q.log(), clamp=0.1)
    assert value.item() == pytest.approx(0.1) and clamped


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


def test_half_precision_logits_are_scored_in_float32():
    assert policy_logits(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert policy_logits(torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float64
