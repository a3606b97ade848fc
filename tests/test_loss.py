"""The terms of the objective, each against its definition."""
import torch

from loss import clipped_surrogate, k3, masked_sum, sampled_entropy, token_logprobs


def softmax_pair(vocabulary=6, seed=0):
    """Logits of a policy and of its blind twin, small enough that every expectation is a sum."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(2, vocabulary, generator=g, dtype=torch.float64) * 0.7).unbind()          # no clamp of k3 is reached


def test_mean_of_k3_is_the_kl_divergence():
    """Sum_o pi(o) k3(o) = KL(pi || pi_mask): the estimator is unbiased."""
    logits, blind = softmax_pair()
    logp, masked = logits.log_softmax(-1), blind.log_softmax(-1)
    kl = (logp.exp() * (logp - masked)).sum()
    assert torch.allclose((logp.exp() * k3(logp, masked)).sum(), kl, atol=1e-12)


def test_expected_gradient_of_k3_raises_the_forward_kl():
    """With the masked branch detached, E_pi[grad k3] = grad KL(pi_mask || pi): it pushes away from what the blind policy says."""
    logits, blind = softmax_pair()
    masked = blind.log_softmax(-1)
    x = logits.clone().requires_grad_()
    logp = x.log_softmax(-1)
    # A sampled token's gradient, averaged over the policy: the weight pi(o) is how often it is sampled, not part of the loss.
    (sampled,) = torch.autograd.grad((logp.detach().exp() * k3(logp, masked)).sum(), x)
    y = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad((masked.exp() * (masked - y.log_softmax(-1))).sum(), y)
    assert torch.allclose(sampled, exact, atol=1e-12)


def test_k3_clamps_as_released():
    logp = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    value = k3(logp, torch.tensor([5.0, -30.0, 1.0]))
    value.sum().backward()
    assert value[:2].tolist() == [10.0, 10.0]                       # e^5 - 6 and 20 + e^-20 - 1 are both cut to 10
    assert logp.grad[:2].tolist() == [0.0, 0.0] and logp.grad[2] != 0


def test_sampled_entropy_has_no_expected_gradient_on_policy():
    logits, _ = softmax_pair()
    x = logits.clone().requires_grad_()
    logp = x.log_softmax(-1)
    (logp.detach().exp() * sampled_entropy(logp)).sum().backward()
    assert x.grad.abs().max() < 1e-12


def test_surrogate_by_hand():
    """rho = 2, clip 0.2/0.3, dual clip 3: each branch, worked out on paper."""
    logp = torch.log(torch.tensor([2.0, 2.0, 0.5, 0.5, 8.0]))
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])
    loss, high, low = clipped_surrogate(logp, torch.zeros(5), advantage, 0.2, 0.3, 3.0)
    assert torch.allclose(loss, torch.tensor([-1.3, 2.0, -0.5, 0.8, 3.0]))
    assert high.tolist() == [True, False, False, False, False]
    assert low.tolist() == [False, False, False, True, False]


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
    got = token_logprobs(logits, targets, temperature=0.7, banned=banned)
    allowed = [0, 2, 3, 4, 5]
    want = (logits[:, allowed] / 0.7).log_softmax(-1)[range(5), [allowed.index(t) for t in targets]]
    assert torch.allclose(got, want, atol=1e-6)


def test_padding_is_ignored_even_when_it_is_infinite():
    x = torch.tensor([1.0, float("inf"), float("nan"), 2.0], requires_grad=True)
    total = masked_sum(x, torch.tensor([True, False, False, True]))
    total.backward()
    assert total == 3 and x.grad.tolist() == [1, 0, 0, 1]
