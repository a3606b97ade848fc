"""The objective against the slow reference; signs, gradients, denominators, groups."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from reference import J

from loss import exact_entropy, exact_kl, policy_logits, token_logprobs
from papo import (
    Denominators,
    LogProbs,
    fill_batch,
    group_advantages,
    metrics_of,
    objective,
    terms_of,
)
from plumbing.run.config import resolve
from policy import Scores
from rollout import Group

ALGOS = ["grpo", "dapo", "papo_g", "papo_d", "grpo_no_ref_kl", "papo_g_no_ref_kl"]
VOCABULARY = 7


def example(B=3, G=4, R=5, seed=0, extreme=True):
    """A small ragged batch, one prompt without a picture; extreme: with a token at every clamp."""
    g = torch.Generator().manual_seed(seed)
    logits, masked = torch.randn(2, B, G, R, VOCABULARY, generator=g, dtype=torch.float64).unbind()
    if extreme:  # r = e^26 and 1/r = e^6 or so
        logits[0, 0, 0, 0], masked[0, 0, 0, 0] = 14.0, -14.0
        masked[0, 1, 0, 0] += 8.0
    tokens = torch.randint(2, VOCABULARY, (B, G, R), generator=g)
    tokens[0, :2, 0] = 0
    logp = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    old, ref, sampled = logp + 0.4 * torch.randn(3, B, G, R, generator=g, dtype=torch.float64)
    return {
        "logits": logits,
        "masked_logits": masked,
        "tokens": tokens,
        "old": old,
        "ref": ref,
        "sampled": sampled,
        "mask": torch.arange(R) < torch.randint(1, R + 1, (B, G, 1), generator=g),
        "rewards": torch.rand(B, G, generator=g, dtype=torch.float64).round(decimals=1),
        "pictured": torch.arange(B) != 1,
        "banned": torch.arange(VOCABULARY) == 1,
    }


def logprobs_of(x, cfg):
    """What policy.Policy makes of the two pictures' logits -> LogProbs. pi_mask comes with a
    gradient even where the objective must not use it."""

    def one(logits):
        logits = policy_logits(logits, cfg.temperature, x["banned"])
        logp = token_logprobs(logits.flatten(0, 2), x["tokens"].flatten()).view(x["tokens"].shape)
        dist = logits.log_softmax(-1)
        return Scores(logp, exact_entropy(dist)), dist

    (seen, dist), (masked, blind) = one(x["logits"]), one(x["masked_logits"])
    blind = blind if cfg.masked_branch == "grad" else blind.detach()
    kl = exact_kl(dist, blind, cfg.kl_clamp) if cfg.perception == "exact" else None
    return LogProbs(seen, x["old"], x["sampled"], masked, x["ref"], kl, x.get("weights"))


def with_picture(x):
    return x["mask"] & x["pictured"][:, None, None]


def loss_and_metrics(x, cfg, N):
    logprobs = logprobs_of(x, cfg)
    terms = terms_of(logprobs, group_advantages(x["rewards"]), with_picture(x), cfg)
    sums = metrics_of(terms, logprobs, x["mask"], with_picture(x))
    return objective(terms, x["mask"], N, cfg), sums


def with_gradients(x, value):
    """value(x), a loss and perhaps metrics -> the loss, {logits: its gradient}, and the metrics"""
    x = {k: v.clone().requires_grad_() if "logits" in k else v for k, v in x.items()}
    (loss, *more), inputs = value(x), ("logits", "masked_logits")
    grads = torch.autograd.grad(loss, [x[k] for k in inputs], materialize_grads=True)
    return loss.detach(), dict(zip(inputs, grads)), *more


def fast(x, cfg, tokens=None, responses=None):
    """The project's own way -> (loss, {input: gradient}, {metric: (sum, count)})"""
    N = tokens or int(x["mask"].sum()), responses or int(x["mask"].any(-1).sum())
    return with_gradients(x, lambda x: loss_and_metrics(x, cfg, Denominators(*N)))


def settings(algo="papo_g", **flags):
    return resolve({"model": "toy", "algo": algo, "temperature": 0.8, **flags}, False)[0]


ALL_ON = dict(gamma=0.1, beta=0.02, eta1=0.03, eta2=0.05)


@pytest.fixture
def cfg():
    return settings(**ALL_ON)


def agrees(x, cfg):
    wanted, slow = with_gradients(x, lambda x: [-J(x, cfg)])
    loss, gradients, _ = fast(x, cfg)
    assert abs(loss.item() - wanted.item()) < 1e-10
    for name in slow:
        assert (gradients[name] - slow[name]).abs().max() < 1e-10, name


@pytest.mark.parametrize("loss_mean,kl_clamp", [("token", 10.0), ("sequence", 0.0)])
@pytest.mark.parametrize(
    "perception,masked_branch,entropy",
    product(["k3", "printed", "exact"], ["kept", "grad"], ["sampled", "exact"]),
)
def test_every_way_is_the_slow_reference(perception, masked_branch, entropy, loss_mean, kl_clamp):
    way = dict(perception=perception, masked_branch=masked_branch, entropy=entropy)
    way |= dict(loss_mean=loss_mean, kl_clamp=kl_clamp, importance_cap=1.2)
    agrees(example(extreme=kl_clamp > 0), settings(**way, **ALL_ON))


@pytest.mark.parametrize("algo,printed", product(ALGOS, ["official", "paper"]))
def test_every_algorithm_is_the_slow_reference(algo, printed):
    """And with weights of the policy term, of which some are zero, as a variant may have them."""
    cfg = settings(algo, objective=printed)
    x = example(seed=1, extreme=printed == "official")
    x = {**x, "ref": x["ref"] if cfg.beta else None}
    agrees(x, cfg)
    weights = torch.rand(x["mask"].shape, generator=torch.Generator().manual_seed(3)).double()
    agrees({**x, "weights": weights * (weights > 0.4)}, replace(cfg, importance_cap=1.2))


# ----------------------------------------------------------------------------- what must not matter

WAYS = [
    dict(),
    dict(loss_mean="sequence"),
    dict(perception="exact", entropy="exact", masked_branch="grad"),
    dict(objective="paper"),
]


@pytest.fixture(params=WAYS, ids=lambda v: "-".join(map(str, v.values())) or "official")
def way(request):
    return settings(**{**request.param, **ALL_ON})


def test_micro_batches_add_up_to_the_batch(way):
    """One denominator for the whole batch: any split has the same gradient and metrics."""
    x = example(B=6)
    tokens, responses = int(x["mask"].sum()), int(x["mask"].any(-1).sum())
    loss, grad, sums = fast(x, way)
    names = [name for name in x if name != "banned"]
    for cuts in ([1] * 6, [2, 4], [5, 1]):
        pieces = zip(*(x[name].split(cuts) for name in names))
        given = ({**x, **dict(zip(names, piece))} for piece in pieces)
        losses, grads, metrics = zip(*(fast(part, way, tokens, responses) for part in given))
        assert torch.allclose(sum(losses), loss)
        for name in grad:
            assert torch.allclose(torch.cat([g[name] for g in grads]), grad[name], atol=1e-14)
        for name, value in sums.items():
            assert torch.allclose(sum(m[name] for m in metrics).double(), value.double()), name


def test_padding_changes_nothing_whatever_it_holds(way):
    x, (left, right) = example(), (2, 3)
    loss, grad, sums = fast(x, way)
    junk = {"logits": 3.0, "masked_logits": -2.0, "tokens": 3, "mask": False}
    junk |= {"old": float("nan"), "ref": float("inf"), "sampled": float("nan")}

    def pad(v, fill):
        ends = (torch.full((*v.shape[:2], n, *v.shape[3:]), fill).to(v) for n in (left, right))
        return torch.cat([next(ends), v, next(ends)], 2)

    padded = {k: pad(v, junk[k]) if k in junk else v for k, v in x.items()}
    again, grad_again, sums_again = fast(padded, way)
    assert torch.allclose(loss, again, atol=1e-14)
    for name in grad:
        assert torch.allclose(grad_again[name][:, :, left:-right], grad[name], atol=1e-14)
        assert not grad_again[name][:, :, :left].any()
        assert not grad_again[name][:, :, -right:].any()
    assert all(torch.allclose(sums[k].double(), sums_again[k].double()) for k in sums)


def test_inputs_are_left_as_they_were(way):
    x = example()
    before = {k: v.clone() for k, v in x.items()}
    fast(x, way)
    assert all(torch.equal(before[k], x[k]) for k in x)


# ------------------------------------------------------------------------ what must have a gradient


def only(cfg, **on):
    """One term alone: the rewards are equal, so the policy term is silent."""
    return replace(cfg, **{**dict(gamma=0.0, beta=0.0, eta1=0.0, eta2=0.0), **on})


def silent(x):
    return {**x, "rewards": torch.ones_like(x["rewards"])}


def raised(x, cfg):
    """Is each sampled token raised? -> the sign of minus the loss's gradient in its logit"""
    grad = fast(silent(x), cfg)[1]["logits"].gather(-1, x["tokens"][..., None])[..., 0]
    return -grad[x["mask"]].sign()


@pytest.mark.lesson
def test_each_coefficient_moves_the_gradient_the_way_it_says(cfg):
    x = example()
    x["mask"][1] = False  # the prompt without a picture
    x["mask"][0, :2, 0] = False  # the tokens at a clamp, where nothing moves
    cfg, mask = replace(cfg, kl_clamp=0.0), x["mask"]
    logprobs = logprobs_of(x, cfg)
    seen, masked = logprobs.seen.logp[mask], logprobs.masked.logp[mask]
    # gamma raises tokens that the picture made likelier and lowers those that the blind policy
    # likes better
    sign = raised(x, only(cfg, gamma=1.0))
    assert (sign == (seen - masked).sign()).all() and (sign == 1).any() and (sign == -1).any()
    # beta pulls towards the reference
    assert (raised(x, only(cfg, beta=1.0)) == (x["ref"][mask] - seen).sign()).all()
    # eta1 lowers the sampled negative log-likelihood: every sampled token is raised
    assert (raised(x, only(cfg, eta1=1.0)) == 1).all()


@pytest.mark.lesson
@pytest.mark.parametrize("branch", ["kept", "fresh", "grad"])
def test_the_masked_branch_has_a_gradient_exactly_when_it_should(branch, cfg):
    """eta2 is a constant in the released default; with --masked_branch grad it moves pi_mask, and
    only that. A kept or a fresh pi_mask has no gradient, whatever it comes with."""
    x, cfg = silent(example()), replace(cfg, masked_branch=branch)
    for entropy in ("sampled", "exact"):
        loss, grad, _ = fast(x, only(cfg, eta2=1.0, entropy=entropy))
        assert loss > 0 and not grad["logits"].any()
        assert (grad["masked_logits"][with_picture(x)].any(-1) == (branch == "grad")).all()
    for perception in ("k3", "printed", "exact"):
        grad = fast(x, only(cfg, gamma=1.0, perception=perception))[1]
        assert grad["logits"].any() and grad["masked_logits"].any() == (branch == "grad")


@pytest.mark.lesson
def test_a_prompt_without_a_picture_has_no_perception_term(cfg):
    x = silent(example())
    _, grad, sums = fast(x, only(cfg, gamma=1.0, eta2=1.0, masked_branch="grad"))
    assert not grad["logits"][1].any() and not grad["masked_logits"][1].any()
    assert grad["logits"][0].any()
    assert sums["perception_kl"][1] == x["mask"][[0, 2]].sum()


def test_metrics_are_sums_over_the_tokens_that_count(cfg):
    """The reference does not have these; the other ones are terms of the objective."""
    x = example()
    x["mask"][0, :2, 0] = True  # at the clamps
    mask, weights = x["mask"], torch.linspace(0, 2, 5).expand(x["mask"].shape)
    logprobs, sums = logprobs_of(x, cfg), fast({**x, "weights": weights}, cfg)[2]
    r = (logprobs.seen.logp - logprobs.masked.logp).exp()[with_picture(x)]
    assert sums["perception_clamped"][0] == (1 / r + r.log() - 1 > 10).sum() >= 2
    # The log-ratio at 20, where the value has no clamp.
    assert fast(x, replace(cfg, kl_clamp=0.0))[2]["perception_clamped"][0] == 1
    d = (x["old"] - x["sampled"])[mask]
    assert torch.allclose(sums["sampler_gap"][0], d.abs().sum())
    assert torch.allclose(sums["sampler_kl"][0], (d.exp() - d - 1).sum())
    assert torch.allclose(sums["token_weight"][0], weights[mask].sum().double())
    assert sums["weighted_tokens"].tolist() == [mask[..., 1:].sum(), mask.sum()]
    assert "token_weight" not in fast(x, cfg)[2]


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


class Questions:
    """Groups of four whose number of right answers is dealt from a list, over and over."""

    def __init__(self, right):
        self.right, self.drawn = right, 0

    def __call__(self, n):
        numbers = [self.right[(self.drawn + i) % len(self.right)] for i in range(n)]
        self.drawn += n
        scores = [[{"accuracy": float(g < k)} for g in range(4)] for k in numbers]
        return [Group(i, 0, None, own, torch.zeros(4)) for i, own in enumerate(scores)]


@pytest.mark.lesson
def test_dynamic_sampling_keeps_what_differs_refills_and_counts():
    cfg = settings("dapo", prompts_per_step=4, prompts_per_update=5)
    # Of five groups one is all wrong and one all right.
    groups, counts = fill_batch(Questions([0, 4, 1, 2, 3]), cfg)
    assert [int(g.values("accuracy").sum()) for g in groups] == [1, 2, 3, 1]
    assert counts == dict(generated=10, refused=0, too_easy=2, too_hard=2, surplus=2)
    groups, counts = fill_batch(Questions([0, 4]), replace(cfg, dynamic_sampling=False))
    assert len(groups) == 4
    assert counts == dict(generated=4, refused=0, too_easy=0, too_hard=0, surplus=0)


def test_prompts_that_cannot_be_used_are_replaced_and_counted():
    """Every third is refused: the step still gets all its groups; refusals alone are an error."""
    cfg, questions, asked = settings("grpo", prompts_per_step=4), Questions([2]), []

    def draw(n):
        groups = questions(n)
        asked.append(n)
        return [g for i, g in enumerate(groups, questions.drawn - n) if i % 3]

    groups, counts = fill_batch(draw, cfg)
    assert len(groups) == 4 and asked == [4, 2]
    assert (counts["generated"], counts["refused"]) == (4, 2)
    with pytest.raises(ValueError, match="of 400 prompts 400 could not be used"):
        fill_batch(lambda n: [], cfg)


@pytest.mark.parametrize("right,word", [([4], "too easy"), ([0], "too hard")])
def test_data_that_gives_nothing_is_said_to(right, word):
    cfg = settings("dapo", prompts_per_step=2, prompts_per_update=3)
    questions = Questions(right)
    with pytest.raises(ValueError, match=f"only 0 of 2 groups.*{word}"):
        fill_batch(questions, cfg)
    assert questions.drawn == 300
