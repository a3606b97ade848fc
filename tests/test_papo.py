"""The algorithm: the objective against the slow reference, signs, denominators, advantages, groups,
and what has a gradient."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from reference import J

from groups import Group
from loss import exact_entropy, exact_kl, importance_weight, policy_logits, token_logprobs
from papo import (
    Denominators,
    LogProbs,
    fill_batch,
    group_advantages,
    objective,
)
from plumbing.config import resolve
from plumbing.policy import Scores
from reward import overlong_penalty

ALGOS = ["grpo", "dapo", "papo_g", "papo_d"]
VOCABULARY = 7


def example(B=3, G=4, R=5, seed=0, extreme=True):
    """Logits of a small ragged batch on both pictures, one prompt without a picture; extreme: with
    a token at every clamp."""
    g = torch.Generator().manual_seed(seed)
    logits, masked = torch.randn(2, B, G, R, VOCABULARY, generator=g, dtype=torch.float64).unbind()
    if extreme:  # r = e^26 and 1/r = e^6 or so
        logits[0, 0, 0, 0], masked[0, 0, 0, 0] = 14.0, -14.0
        masked[0, 1, 0, 0] += 8.0
    tokens = torch.randint(2, VOCABULARY, (B, G, R), generator=g)
    tokens[0, :2, 0] = 0
    logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    old, ref, sampled = logp + 0.4 * torch.randn(3, B, G, R, generator=g, dtype=torch.float64)
    mask = torch.arange(R) < torch.randint(1, R + 1, (B, G, 1), generator=g)
    return {
        "logits": logits,
        "masked_logits": masked,
        "tokens": tokens,
        "old": old,
        "ref": ref,
        "sampled": sampled,
        "mask": mask,
        "rewards": torch.rand(B, G, generator=g, dtype=torch.float64).round(decimals=1),
        "sees": torch.arange(B) != 1,
        "banned": torch.arange(VOCABULARY) == 1,
    }


def scores(x, cfg):
    """What plumbing.policy.Policy makes of the two pictures' logits -> Scores of each, and (the
    exact KL, where it was clamped)."""

    def one(logits):
        logits = policy_logits(logits, cfg.temperature, x["banned"])
        logp = token_logprobs(logits.flatten(0, 2), x["tokens"].flatten()).view(x["tokens"].shape)
        dist = logits.log_softmax(-1)
        return Scores(logp, exact_entropy(dist)), dist

    hidden = x["masked_logits"] if cfg.masked_grad else x["masked_logits"].detach()
    (seen, dist), (masked, blind) = one(x["logits"]), one(hidden)
    return seen, masked, exact_kl(dist, blind, cfg.kl_clamp)


def said(x, cfg):
    """Everything that is said of the tokens -> LogProbs"""
    seen, masked, kl = scores(x, cfg)
    kl = kl if cfg.perception == "exact" else None
    return LogProbs(seen, x["old"], x["sampled"], masked, x["ref"], kl, x.get("credit"))


def leaves(x):
    """The same example with logits of its own that take a gradient."""
    return {k: v.clone().requires_grad_() if "logits" in k else v for k, v in x.items()}


def fast(x, cfg, tokens=None, responses=None):
    """papo.objective -> (loss, {input: gradient}, sums)"""
    x = leaves(x)
    tokens, responses = tokens or int(x["mask"].sum()), responses or int(x["mask"].any(-1).sum())
    N, advantages = Denominators(tokens, responses), group_advantages(x["rewards"])
    loss, sums = objective(said(x, cfg), advantages, x["mask"], x["sees"], N, cfg)
    loss.backward()
    inputs = {k: x[k] for k in ("logits", "masked_logits")}
    return (
        loss.detach(),
        {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in inputs.items()},
        sums,
    )


def settings(algo="papo_g", **flags):
    return resolve({"model": "toy", "algo": algo, "temperature": 0.8, **flags}, False)[0]


ALL_ON = dict(gamma=0.1, beta=0.02, eta1=0.03, eta2=0.05)


@pytest.fixture
def cfg():
    return settings(**ALL_ON)


def agrees(x, cfg):
    slow = leaves(x)
    wanted = -J(slow, cfg)
    wanted.backward()
    loss, gradients, _ = fast(x, cfg)
    assert abs(loss.item() - wanted.item()) < 1e-10
    for name, grad in gradients.items():
        other = torch.zeros_like(grad) if slow[name].grad is None else slow[name].grad
        assert (grad - other).abs().max() < 1e-10, name


@pytest.mark.parametrize(
    "perception,masked_grad,entropy,loss_mean,kl_clamp",
    product(
        ["k3", "printed", "exact"],
        [False, True],
        ["sampled", "exact"],
        ["token", "sequence"],
        [10.0, 0.0],
    ),
)
def test_every_variant_is_the_slow_reference(perception, masked_grad, entropy, loss_mean, kl_clamp):
    variant = dict(perception=perception, masked_grad=masked_grad, entropy=entropy)
    variant |= dict(loss_mean=loss_mean, kl_clamp=kl_clamp, importance_cap=1.2)
    agrees(example(extreme=kl_clamp > 0), settings(**variant, **ALL_ON))


@pytest.mark.parametrize(
    "algo,objective_name,no_ref_kl", product(ALGOS, ["official", "paper"], [False, True])
)
def test_every_algorithm_is_the_slow_reference(algo, objective_name, no_ref_kl):
    cfg = settings(algo, objective=objective_name, no_ref_kl=no_ref_kl)
    x = example(seed=1, extreme=objective_name == "official")
    agrees({**x, "ref": x["ref"] if cfg.beta else None}, cfg)


@pytest.mark.parametrize("algo,objective_name", product(ALGOS, ["official", "paper"]))
def test_credit_combines_with_every_algorithm(algo, objective_name):
    x = example(seed=2, extreme=objective_name == "official")
    credit = torch.rand(x["mask"].shape, generator=torch.Generator().manual_seed(3)).double()
    x["credit"] = credit * (credit > 0.4)  # some tokens have none
    cfg = settings(algo, objective=objective_name, importance_cap=1.2)
    agrees({**x, "ref": x["ref"] if cfg.beta else None}, cfg)


def test_gradcheck_of_the_whole_objective(cfg):
    x = example(B=2, G=2, R=2)
    advantage = group_advantages(x["rewards"])
    exact = dict(perception="exact", entropy="exact", loss_mean="sequence")
    for variant in (replace(cfg, masked_grad=True), replace(cfg, masked_grad=True, **exact)):

        def f(logits, masked_logits, variant=variant):
            s = said({**x, "logits": logits, "masked_logits": masked_logits}, variant)
            N = Denominators(5, 4)
            return objective(s, advantage, x["mask"], x["sees"], N, variant)[0]

        inputs = (x["logits"].requires_grad_(), x["masked_logits"].requires_grad_())
        assert torch.autograd.gradcheck(f, inputs)


# ----------------------------------------------------------------------------- what must not matter

VARIANTS = [
    dict(),
    dict(loss_mean="sequence"),
    dict(perception="exact", entropy="exact", masked_grad=True),
    dict(objective="paper"),
]


@pytest.fixture(params=VARIANTS, ids=lambda v: "-".join(map(str, v.values())) or "official")
def variant(request):
    return settings(**{**request.param, **ALL_ON})


def test_micro_batches_add_up_to_the_batch(variant):
    """One denominator for the whole batch: any split gives the same gradient and the same
    metrics."""
    x = example(B=6)
    tokens, responses = int(x["mask"].sum()), int(x["mask"].any(-1).sum())
    loss, grad, sums = fast(x, variant)
    for cuts in ([1] * 6, [2, 4], [5, 1]):
        parts, start = [], 0
        for n in cuts:
            part = {k: v if k == "banned" else v[start : start + n] for k, v in x.items()}
            parts.append(fast(part, variant, tokens, responses))
            start += n
        assert torch.allclose(sum(p[0] for p in parts), loss)
        for name in grad:
            joined = torch.cat([p[1][name] for p in parts])
            assert torch.allclose(joined, grad[name], atol=1e-14)
        for name, value in sums.items():
            assert torch.allclose(sum(p[2][name] for p in parts).double(), value.double()), name


def test_padding_side_and_amount_change_nothing(variant):
    x = example()
    loss, grad, sums = fast(x, variant)
    for left, right in [(0, 3), (4, 0), (2, 1)]:

        def pad(v, fill, left=left, right=right):
            shape = list(v.shape)
            blocks = []
            for n in (left, right):
                shape[2] = n
                blocks.append(torch.full(shape, fill, dtype=v.dtype))
            return torch.cat([blocks[0], v, blocks[1]], 2)

        junk = {"logits": 3.0, "masked_logits": -2.0, "tokens": 3, "mask": False}
        junk |= {"old": float("nan"), "ref": float("inf"), "sampled": float("nan")}
        padded = {k: pad(v, junk[k]) if k in junk else v for k, v in x.items()}
        again, grad_again, sums_again = fast(padded, variant)
        assert torch.allclose(loss, again, atol=1e-14)
        for name in grad:
            inside = grad_again[name][:, :, left : left + 5]
            assert torch.allclose(inside, grad[name], atol=1e-14)
            assert not grad_again[name][:, :, :left].any()
            assert not grad_again[name][:, :, left + 5 :].any()
        assert all(torch.allclose(sums[k].double(), sums_again[k].double()) for k in sums)


def test_order_of_prompts_and_responses_changes_nothing(variant):
    x, prompts, responses = example(), torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    loss, grad, _ = fast(x, variant)
    shuffled = {
        k: v if k == "banned" else v[prompts] if v.ndim == 1 else v[prompts][:, responses]
        for k, v in x.items()
    }
    again, grad_again, _ = fast(shuffled, variant)
    assert torch.allclose(loss, again, atol=1e-14)
    assert all(
        torch.allclose(grad_again[k], grad[k][prompts][:, responses], atol=1e-14) for k in grad
    )


def test_inputs_are_left_as_they_were(variant):
    x = example()
    before = {k: v.clone() for k, v in x.items()}
    fast(x, variant)
    assert all(torch.equal(before[k], x[k]) or torch.isnan(x[k]).any() for k in x)


# ------------------------------------------------------------------------ what must have a gradient


def only(cfg, **on):
    """One term alone: the rewards are equal, so the policy term is silent."""
    return replace(cfg, **{**dict(gamma=0.0, beta=0.0, eta1=0.0, eta2=0.0), **on})


def silent(x):
    return {**x, "rewards": torch.ones_like(x["rewards"])}


def raised(x, cfg):
    """Minus the gradient of the loss in the sampled token's log-probability, up to a positive
    factor: is the token raised?"""
    grad = fast(silent(x), cfg)[1]["logits"].gather(-1, x["tokens"][..., None])[..., 0]
    seen, masked, _ = scores(x, cfg)
    said_of_them = {"logp": seen.logp[x["mask"]], "masked": masked.logp[x["mask"]]}
    return -grad[x["mask"]].sign(), said_of_them


@pytest.mark.lesson
def test_each_coefficient_moves_the_gradient_the_way_it_says(cfg):
    x = example()
    x["mask"][1] = False  # the prompt without a picture
    x["mask"][0, :2, 0] = False  # the tokens at a clamp, where nothing moves
    cfg = replace(cfg, kl_clamp=0.0)
    # gamma raises tokens that the picture made likelier and lowers those that the blind policy
    # likes better
    sign, s = raised(x, only(cfg, gamma=1.0))
    assert (sign == (s["logp"] - s["masked"]).sign()).all()
    assert (sign == 1).any() and (sign == -1).any()
    # beta pulls towards the reference
    sign, s = raised(x, only(cfg, beta=1.0))
    assert (sign == (x["ref"][x["mask"]] - s["logp"]).sign()).all()
    # eta1 lowers the sampled negative log-likelihood: every sampled token is raised
    assert (raised(x, only(cfg, eta1=1.0))[0] == 1).all()


@pytest.mark.lesson
def test_masked_branch_has_a_gradient_exactly_when_it_should(cfg):
    """eta2 is a constant in the released default, and moves the masked branch, and only that one,
    with masked_grad."""
    x = silent(example())
    for entropy in ("sampled", "exact"):
        loss, grad, _ = fast(x, only(cfg, eta2=1.0, entropy=entropy))
        assert loss > 0 and not grad["logits"].any() and not grad["masked_logits"].any()
        _, grad, _ = fast(x, only(cfg, eta2=1.0, entropy=entropy, masked_grad=True))
        with_picture = x["mask"] & x["sees"][:, None, None]
        assert not grad["logits"].any() and grad["masked_logits"][with_picture].any(-1).all()
    for perception in ("k3", "printed", "exact"):
        assert not fast(x, only(cfg, gamma=1.0, perception=perception))[1]["masked_logits"].any()
        grad = fast(x, only(cfg, gamma=1.0, perception=perception, masked_grad=True))[1]
        assert grad["logits"].any() and grad["masked_logits"].any()


@pytest.mark.lesson
def test_exact_entropy_is_lowered_on_the_branch_that_was_asked_for(cfg):
    x = silent(example())
    branches = [("eta1", "logits", "masked_logits"), ("eta2", "masked_logits", "logits")]
    for eta, name, other in branches:
        one = only(cfg, entropy="exact", masked_grad=True, **{eta: 1.0})
        loss, grad, _ = fast(x, one)
        assert not grad[other].any()
        assert fast({**x, name: x[name] - 0.1 * grad[name]}, one)[0] < loss


def test_the_perception_term_is_in_what_is_differentiated(cfg):
    """The released Qwen3 branch adds its terms to a variable that backward() never sees."""
    x = example()
    without = fast(x, replace(cfg, gamma=0.0))[1]["logits"]
    assert not torch.allclose(fast(x, cfg)[1]["logits"], without)


@pytest.mark.lesson
def test_a_prompt_without_a_picture_has_no_perception_term(cfg):
    x = silent(example())
    _, grad, sums = fast(x, only(cfg, gamma=1.0, eta2=1.0, masked_grad=True))
    assert not grad["logits"][1].any() and not grad["masked_logits"][1].any()
    assert grad["logits"][0].any()
    assert sums["perception_kl"][1] == x["mask"][[0, 2]].sum()


def test_tokens_at_a_clamp_are_counted(cfg):
    x = example()
    x["mask"][0, :2, 0] = True
    seen, masked, _ = scores(x, cfg)
    r = (seen.logp - masked.logp).exp()[x["mask"] & x["sees"][:, None, None]]
    assert fast(x, cfg)[2]["perception_clamped"][0] == (1 / r + r.log() - 1 > 10).sum() >= 2
    # the log-ratio at 20
    assert fast(x, replace(cfg, kl_clamp=0.0))[2]["perception_clamped"][0] == 1
    blind = {**x, "sees": torch.zeros(3, dtype=torch.bool)}
    assert fast(blind, cfg)[2]["perception_clamped"][0] == 0


# ------------------------------------------------------------------------------- groups and rewards


@pytest.mark.lesson
def test_advantages_by_hand():
    a = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]]))
    # 3 ** -0.5: the sample standard deviation of 1 0 0 1
    assert torch.allclose(a[0], torch.tensor([1.0, -1.0, -1.0, 1.0]) * 0.5 / (3**-0.5 + 1e-6))
    assert not a[1].any()
    for G in range(2, 17):  # rewards that float32 cannot hold, and whose mean is another number
        assert not group_advantages(torch.tensor([[0.1] * G, [0.9] * G])).any()
    with pytest.raises(ValueError, match="group"):
        group_advantages(torch.ones(2, 1))


@pytest.mark.lesson
def test_equal_rewards_still_train_the_other_terms(cfg):
    x = silent(example())
    assert fast(x, cfg)[1]["logits"][x["mask"]].any(-1).all()
    assert not fast(x, only(cfg))[1]["logits"].any()


class Questions:
    """Groups whose number of right answers is dealt from a list, over and over."""

    def __init__(self, right, G=4):
        self.right, self.G, self.drawn = right, G, 0

    def __call__(self, n):
        groups = [self.right[(self.drawn + i) % len(self.right)] for i in range(n)]
        self.drawn += n
        scores = [[{"accuracy": float(g < k)} for g in range(self.G)] for k in groups]
        return [Group(i, 0, None, own, [True] * self.G) for i, own in enumerate(scores)]


@pytest.mark.lesson
def test_dynamic_sampling_refills_and_counts():
    cfg = settings("dapo", prompts_per_step=4, prompts_per_round=5)
    # Of five groups one is all wrong and one all right.
    groups, fate = fill_batch(Questions([0, 4, 1, 2, 3]), cfg)
    assert [int(g.values("accuracy").sum()) for g in groups] == [1, 2, 3, 1]
    assert fate == {"generated": 10, "refused": 0, "too_easy": 2, "too_hard": 2, "surplus": 2}
    groups, fate = fill_batch(Questions([0, 4]), replace(cfg, dynamic_sampling=False))
    assert len(groups) == 4
    assert fate == {"generated": 4, "refused": 0, "too_easy": 0, "too_hard": 0, "surplus": 0}


def test_the_bounds_are_strict_and_can_be_set():
    bounds = dict(filter_low=0.25, filter_high=0.75)
    cfg = settings("dapo", prompts_per_step=2, prompts_per_round=4, **bounds)
    groups, fate = fill_batch(Questions([1, 2, 3, 2]), cfg)
    assert [int(g.values("accuracy").sum()) for g in groups] == [2, 2]
    assert (fate["too_hard"], fate["too_easy"]) == (1, 1)


def test_prompts_that_cannot_be_used_are_replaced_and_counted():
    """Every third prompt is refused: the step still gets all its groups, and a data set of refusals
    is said to be one."""
    cfg, questions, asked = settings("grpo", prompts_per_step=4), Questions([2]), []

    def draw(n):
        groups = questions(n)
        asked.append(n)
        return [g for i, g in enumerate(groups, questions.drawn - n) if i % 3]

    groups, fate = fill_batch(draw, cfg)
    assert len(groups) == 4 and asked == [4, 2]
    assert (fate["generated"], fate["refused"]) == (4, 2)
    with pytest.raises(ValueError, match="of 80 prompts 80 could not be used"):
        fill_batch(lambda n: [], replace(cfg, max_rounds=20))


@pytest.mark.lesson
def test_importance_weights_are_truncated_and_have_no_gradient():
    old = torch.tensor([0.0, -1.0, -2.0], requires_grad=True)
    sampled = torch.tensor([0.0, -2.0, -1.0])
    weight = importance_weight(old, sampled, 2.0)
    assert torch.allclose(weight, torch.tensor([1.0, 2.0, torch.e**-1]))
    assert not weight.requires_grad


def test_importance_weights_are_on_the_policy_term_only(cfg):
    x = example(extreme=False)
    weighed, plain = (
        fast(x, replace(only(cfg), importance_cap=c))[1]["logits"] for c in (1.5, 0.0)
    )
    ratio = (weighed.abs().sum(-1) / plain.abs().sum(-1))[plain.any(-1)]
    want = (x["old"] - x["sampled"]).exp().clamp(max=1.5)[plain.any(-1)]
    assert torch.allclose(ratio, want) and (want == 1.5).any() and (want < 1.5).any()
    for c in (0.0, 1.5):
        sums = fast(x, replace(cfg, importance_cap=c))[2]
        d = (x["old"] - x["sampled"])[x["mask"]]
        assert torch.allclose(sums["sampler_gap"][0], d.abs().sum())
        assert torch.allclose(sums["sampler_kl"][0], (d.exp() - d - 1).sum())
    caps = [replace(cfg, importance_cap=c) for c in (0.0, 1.5)]
    assert torch.equal(*(fast(silent(x), capped)[1]["logits"] for capped in caps))


def test_credit_is_on_the_policy_term_only(cfg):
    """Twice the credit is twice the policy's gradient, token by token; the other terms do not see
    it, and no credit is the plain algorithm to the last bit."""
    x = example(extreme=False)
    twice, once = ({**x, "credit": torch.full_like(x["old"], w)} for w in (2.0, 1.0))
    policy = only(cfg)
    assert torch.equal(fast(twice, policy)[1]["logits"], 2 * fast(x, policy)[1]["logits"])
    assert torch.equal(fast(once, cfg)[1]["logits"], fast(x, cfg)[1]["logits"])
    assert torch.equal(
        *(fast(silent(other), cfg)[1]["logits"] for other in (twice, {**x, "credit": None}))
    )
    sums = fast({**x, "credit": x["mask"] * torch.linspace(0, 2, 5)}, cfg)[2]
    mask = x["mask"]
    assert torch.allclose(sums["credit_weight"][0], (mask * torch.linspace(0, 2, 5)).sum().double())
    assert sums["credited_tokens"].tolist() == [mask[..., 1:].sum(), mask.sum()]
    assert "credit_weight" not in fast(x, cfg)[2]


@pytest.mark.parametrize("right,word", [([4], "too easy"), ([0], "too hard")])
def test_data_that_gives_nothing_is_said_to(right, word):
    cfg = settings("dapo", prompts_per_step=2, prompts_per_round=3, max_rounds=5)
    questions = Questions(right)
    with pytest.raises(ValueError, match=f"only 0 of 2 groups.*{word}"):
        fill_batch(questions, cfg)
    assert questions.drawn == 15


def test_soft_overlong_penalty_by_hand():
    """DAPO, Eq. 13, with a limit of 100 tokens and a buffer of 20."""
    lengths = torch.tensor([1, 80, 85, 90, 100])
    assert overlong_penalty(lengths, 100, 20).tolist() == [0, 0, -0.25, -0.5, -1]
    assert not overlong_penalty(lengths, 100, 0).any()
