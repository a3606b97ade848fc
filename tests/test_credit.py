"""Credit: the weights of VPPO and PGPO worked out by hand, and what must not change them."""

from types import SimpleNamespace

import pytest
import torch

import credit
from credit import Spread, response_mean, spread_of, weigh
from loss import k3
from plumbing.config import resolve
from plumbing.processes import Processes


def settings(**flags):
    return resolve({"model": "toy", **flags}, False)[0]


def laid_out(responses, R=6):
    """Lists of one number a token as a group: (1, G, R) and which of them are tokens."""
    values, scored = torch.full((1, len(responses), R), 7.0), torch.zeros(1, len(responses), R)
    for g, own in enumerate(responses):
        values[0, g, : len(own)], scored[0, g, : len(own)] = torch.tensor(own), 1
    return values, scored.bool()


def same(weights, wanted):
    for g, own in enumerate(wanted):
        assert torch.allclose(weights[0, g, : len(own)], torch.tensor(own), atol=1e-5), g


@pytest.mark.lesson
def test_vppo_by_hand():
    """k = 0.4 and beta_min = 0.9, three responses of 5, 2 and 1 tokens.

    Their means are 0.14, 0.30 and 0.02, so the mean of the batch is 0.46 / 3 = 0.02 + 0.4 / 3. Eq.
    (5) with a beta_max that makes the mean alpha 1 is 0.9 + 0.1 (S_i - 0.02) / (0.4 / 3): 0.99,
    1.11 and 0.90. Of 5, 2 and 1 tokens 2, 1 and 1 are kept.
    """
    kl, scored = laid_out([[0.4, 0.0, 0.2, 0.0, 0.1], [0.0, 0.6], [0.02]])
    spread = spread_of(response_mean(kl, scored).flatten().tolist())
    assert spread == pytest.approx((0.02, 0.46 / 3, 0.30))
    weights = credit.vppo(kl, torch.zeros(1, 3), scored, spread, settings(algo="vppo"))
    same(weights, [[0.99, 0.0, 0.99, 0.0, 0.0], [0.0, 1.11], [0.90]])


def test_vppo_ties_and_batches_that_look_alike():
    cfg = settings(algo="vppo", credit_share=0.5)
    kl, scored = laid_out([[0.1, 0.1, 0.1, 0.1], [0.1]])  # the first of equals is kept
    weights = credit.vppo(kl, None, scored, Spread(0.1, 0.1, 0.1), cfg)
    same(weights, [[1.0, 1.0, 0.0, 0.0], [1.0]])
    for k, n in [(0.1, 10), (0.6, 5), (0.7, 10), (0.3, 20)]:  # k n is whole: not one token more
        kl, scored = torch.rand(1, 1, n), torch.ones(1, 1, n, dtype=torch.bool)
        cfg = settings(algo="vppo", credit_share=k)
        kept = credit.vppo(kl, None, scored, Spread(0.0, 0.0, 0.0), cfg)
        assert kept.sum() == round(k * n), (k, n)


@pytest.mark.lesson
def test_pgpo_by_hand():
    """tau = 0.4 and beta = 2. The first response has log(1 + S) = 0, 0.2, 0.5, 1, which is I as it
    is, so u is 0, 0.2 / 0.4, 1 + 2 * 0.1 / 0.6 and 3, in sum 29 / 6, and w is u * 24 / 29."""
    L, scored = laid_out([[0.0, 0.2, 0.5, 1.0], [0.3, 0.3], [0.1, 0.3]])
    cfg = settings(algo="pgpo", credit_threshold=0.4, credit_boost=2.0)
    weights = credit.pgpo(L.expm1(), torch.zeros(1, 3), scored, None, cfg)
    first = [0.0, 0.5 * 24 / 29, 4 / 3 * 24 / 29, 3 * 24 / 29]
    same(weights, [first, [1.0, 1.0], [0.0, 2.0]])
    assert torch.allclose(torch.where(scored, weights, 0.0).sum(-1), scored.sum(-1).float())
    # A range that is only rounding is no difference.
    kl = torch.tensor([[[1e-9, 3e-9, 2e-9]]])
    alike = credit.pgpo(kl, None, torch.ones(1, 1, 3, dtype=torch.bool), None, cfg)
    assert torch.equal(alike, torch.ones(1, 1, 3))


# ----------------------------------------------------------------- over the whole optimiser batch


def update(B=6, G=3, R=5):
    """What is known of an update's tokens: ragged, one prompt without a picture, one response that
    does not count."""
    g = torch.Generator().manual_seed(0)
    old, masked = -3 * torch.rand(2, B, G, R, generator=g)
    scored = torch.arange(R) < torch.randint(1, R + 1, (B, G, 1), generator=g)
    scored[2, 1] = False
    return old, masked, scored, torch.arange(B) != 1


def weights_of(cuts, cfg, known=None):
    """Weights of the update when it is cut into micro-batches so large."""
    parts = SimpleNamespace(cfg=cfg, processes=Processes())
    pieces = [x.split(cuts) for x in known or update()]
    batches = [
        SimpleNamespace(
            old=old,
            masked=SimpleNamespace(logp=masked),
            rows=SimpleNamespace(scored=scored),
            pictured=pictured,
            advantages=torch.zeros(old.shape[:2]),
        )
        for old, masked, scored, pictured in zip(*pieces)
    ]
    weigh(batches, parts)
    return torch.cat([batch.credit for batch in batches])


@pytest.mark.parametrize("algo", ["vppo", "pgpo"])
def test_the_spread_is_that_of_the_batch_and_not_of_a_micro_batch(algo):
    cfg = settings(algo=algo)
    whole = weights_of([6], cfg)
    for cuts in ([1] * 6, [2, 4], [5, 1]):
        assert torch.equal(weights_of(cuts, cfg), whole)
    assert (whole >= 0).all() and whole.isfinite().all()
    old, masked, scored, pictured = update()
    counted = scored & pictured[:, None, None]
    assert (whole[~counted] == 1).all() and (whole[counted] != 1).any()
    if algo == "vppo":  # alpha has mean 1 over the responses that have one
        kl, _ = k3(old, masked, cfg.kl_clamp)
        assert response_mean(kl, counted)[counted.any(-1)].min() < 0.1  # they differ
        alphas = whole.masked_fill(~counted, 0).amax(-1)[counted.any(-1)]
        assert alphas.mean() == pytest.approx(1.0) and alphas.min() == pytest.approx(0.9)


def test_an_update_without_any_picture_is_the_plain_algorithm():
    words = (*update()[:3], torch.zeros(6, dtype=torch.bool))
    for algo in ("vppo", "pgpo"):
        assert (weights_of([2, 4], settings(algo=algo), words) == 1).all()
