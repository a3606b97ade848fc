"""The objective: signs, denominators, advantages, and what has a gradient."""
from dataclasses import replace

import pytest
import torch

from config import ALGORITHMS, MODELS, resolve
from papo import group_advantages, informative, objective


def example(B=3, G=4, R=6, seed=0):
    """Random log-probs of a small batch, ragged, with garbage in the padding."""
    g = torch.Generator().manual_seed(seed)
    logp, old, masked, ref = (-2 * torch.rand(4, B, G, R, generator=g, dtype=torch.float64)).unbind()
    lengths = torch.randint(1, R + 1, (B, G, 1), generator=g)
    mask = torch.arange(R) < lengths
    return dict(logp=logp, old=logp + 0.3 * (old - logp), masked=masked, ref=ref, mask=mask,
                advantage=torch.randn(B, G, generator=g, dtype=torch.float64), sees=torch.tensor([True] * B))


def gradient(cfg, x, total=None):
    logp = x["logp"].clone().requires_grad_()
    loss, sums = objective(logp, x["old"], x["masked"], x["ref"], x["advantage"], x["mask"], x["sees"],
                           total or int(x["mask"].sum()), cfg)
    loss.backward()
    return loss.detach(), logp.grad, sums


@pytest.fixture
def cfg():
    return replace(resolve({"model": "toy", "algo": "papo_g"}, False)[0], gamma=0.1, beta=0.02, eta1=0.03, eta2=0.05)


def test_advantages_by_hand():
    a = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]]))
    assert torch.allclose(a[0], torch.tensor([1.0, -1.0, -1.0, 1.0]) * 0.5 / (3**-0.5 + 1e-6))     # sample std of 1 0 0 1
    assert not a[1].any()
    with pytest.raises(ValueError, match="group"):
        group_advantages(torch.ones(2, 1))


def test_dynamic_sampling_keeps_groups_that_are_neither_all_right_nor_all_wrong():
    assert informative(torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])).tolist() == [False, False, True]


def test_objective_is_the_sum_of_its_terms_over_the_tokens(cfg):
    """Eq. (1) and (2) written out token by token, in plain Python."""
    from math import exp
    x, total = example(), 0.0
    for b in range(3):
        for g in range(4):
            for t in range(6):
                if not x["mask"][b, g, t]:
                    continue
                logp, old, masked, ref = (x[k][b, g, t].item() for k in ("logp", "old", "masked", "ref"))
                A, rho = x["advantage"][b, g].item(), exp(logp - old)
                policy = min(rho * A, min(max(rho, 1 - cfg.clip_low), 1 + cfg.clip_high) * A)
                if A < 0:
                    policy = max(policy, cfg.dual_clip * A)
                kl = lambda other: min(exp(other - logp) - (other - logp) - 1, 10.0)
                total += policy - cfg.beta * kl(ref) + cfg.gamma * kl(masked) - cfg.eta1 * -logp - cfg.eta2 * -masked
    assert gradient(cfg, x)[0].item() == pytest.approx(-total / int(x["mask"].sum()), abs=1e-12)


def test_micro_batches_add_up_to_the_batch(cfg):
    """One denominator for the whole batch: any split gives the same gradient and the same metrics."""
    x = example(B=6)
    total = int(x["mask"].sum())
    loss, grad, sums = gradient(cfg, x)
    for cuts in ([1] * 6, [2, 4], [5, 1]):
        parts, start = [], 0
        for n in cuts:
            parts.append(gradient(cfg, {k: v[start:start + n] for k, v in x.items()}, total))
            start += n
        assert torch.allclose(sum(p[0] for p in parts), loss) and torch.allclose(torch.cat([p[1] for p in parts]), grad)
        for name, value in sums.items():
            assert torch.allclose(sum(p[2][name] for p in parts).double(), value.double()), name


def test_padding_changes_nothing(cfg):
    x = example()
    loss, grad, _ = gradient(cfg, x)
    filled = {k: torch.where(x["mask"], v, float("nan")) if k in ("logp", "old", "masked", "ref") else v for k, v in x.items()}
    again, grad_again, sums = gradient(cfg, filled)
    assert torch.equal(loss, again) and all(torch.isfinite(v).all() for v in sums.values())
    assert torch.equal(grad[x["mask"]], grad_again[x["mask"]]) and not grad[~x["mask"]].any()


def test_inputs_are_left_as_they_were(cfg):
    x = example()
    before = {k: v.clone() for k, v in x.items()}
    gradient(cfg, x)
    assert all(torch.equal(before[k], x[k]) for k in x)


def one_term(cfg, **on):
    off = dict(gamma=0.0, beta=0.0, eta1=0.0, eta2=0.0)
    return replace(cfg, **{**off, **on})


def test_each_coefficient_moves_the_gradient_the_way_it_says(cfg):
    x = example()
    x["advantage"] = torch.zeros_like(x["advantage"])                 # the policy term is silent
    m = x["mask"]
    d = (x["masked"] - x["logp"])[m]
    # gamma raises tokens that the picture made likelier and lowers those that the blind policy likes better
    assert (gradient(one_term(cfg, gamma=1.0), x)[1][m].sign() == -(1 - d.exp()).sign()).all()
    # beta pulls towards the reference
    assert (gradient(one_term(cfg, beta=1.0), x)[1][m].sign() == (1 - (x["ref"] - x["logp"])[m].exp()).sign()).all()
    # eta1 lowers the sampled negative log-likelihood: every sampled token is raised
    assert (gradient(one_term(cfg, eta1=1.0), x)[1][m] < 0).all()
    # eta2's branch has no gradient: a constant, as in the released default
    loss, grad, _ = gradient(one_term(cfg, eta2=1.0), x)
    assert loss > 0 and not grad.any()


def test_the_perception_term_is_in_what_is_differentiated(cfg):
    """The released Qwen3 branch adds its terms to a variable that backward() never sees."""
    x = example()
    assert not torch.allclose(gradient(cfg, x)[1], gradient(replace(cfg, gamma=0.0), x)[1])


def test_a_prompt_without_a_picture_has_no_perception_term(cfg):
    x = example()
    x["sees"] = torch.tensor([True, False, True])
    only = one_term(cfg, gamma=1.0, eta2=1.0)
    x["advantage"] = torch.zeros_like(x["advantage"])
    loss, grad, sums = gradient(only, x)
    assert not grad[1].any() and grad[0].any()
    assert sums["seen"] == x["mask"][[0, 2]].sum()


def test_equal_rewards_still_train_the_other_terms(cfg):
    x = example()
    x["advantage"] = group_advantages(torch.ones(3, 4, dtype=torch.float64))
    assert gradient(cfg, x)[1][x["mask"]].all() and not gradient(one_term(cfg), x)[1].any()


def test_presets_are_the_papers():
    """A few rows of the paper's Table 6 and the released scripts."""
    def get(model, algo):
        c = resolve({"model": model, "algo": algo}, True)[0]
        return c.gamma, c.eta1, c.eta2, c.beta, c.clip_high, c.dynamic_sampling
    for size in ("3B", "7B"):
        model = f"Qwen/Qwen2.5-VL-{size}-Instruct"
        assert get(model, "grpo") == (0, 0, 0, 0.01, 0.3, False) and get(model, "dapo") == (0, 0, 0, 0, 0.28, True)
        assert get(model, "papo_d") == (0.01, 0.03, 0.03, 0, 0.28, True)
    assert get("Qwen/Qwen2.5-VL-3B-Instruct", "papo_g") == (0.02, 0, 0, 0.01, 0.3, False)
    assert get("Qwen/Qwen2.5-VL-7B-Instruct", "papo_g") == (0.02, 0.05, 0.05, 0.01, 0.3, False)
    assert get("Qwen/Qwen3-VL-2B-Thinking", "papo_g") == (0.01, 0, 0, 0.01, 0.3, False)
    c = resolve({"model": "Qwen/Qwen2.5-VL-3B-Instruct"}, True)[0]
    assert (c.prompts_per_step, c.group_size, c.prompts_per_update, c.lr, c.top_p, c.min_pixels, c.max_pixels) == (
        384, 5, 128, 1e-6, 0.99, 200_704, 1_003_520)
    assert set(ALGORITHMS) == {"grpo", "dapo", "papo_g", "papo_d"} and "toy" in MODELS
