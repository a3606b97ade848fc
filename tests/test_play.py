"""docs/play.html: its numbers are the project's, and it is what toy/play.py makes."""

import random
import re

import pytest
import torch

from loss import PERCEPTION
from papo import group_advantages
from toy import play

HTML = play.PAGE.read_text("utf-8")


@pytest.fixture(scope="module")
def script():
    """The page's first script, which needs no document, in an engine of its own."""
    racer = pytest.importorskip("py_mini_racer", reason="pip install -r requirements-dev.txt")
    engine = racer.MiniRacer()
    engine.eval(re.search(r'<script id="numbers">(.*?)</script>', HTML, re.S)[1])
    return engine


@pytest.fixture(scope="module")
def played():
    return {name: play.play(tried) for name, tried in play.TRIES.items()}


def test_the_page_is_what_the_generator_makes():
    assert play.render(play.held(HTML)) == HTML, "make it again: python -m toy.play"
    assert len(HTML) < 1e6 and play.ANIMATION.stat().st_size < 1e6
    fetched = re.findall(r"""(?:src|href|url)\s*[=(]\s*["'`]?(?!data:)[\w/.:]+""", HTML)
    assert not fetched and "connect-src" not in HTML and "default-src 'none'" in HTML


GRID = [
    dict(perception=perception, masked_branch=branch, entropy=entropy, kl_clamp=clamp)
    for perception in (*PERCEPTION, "exact")
    for branch in ("fresh", "grad")
    for entropy in ("sampled", "exact")
    for clamp in (10.0, 0.3, 0.0)
]


@pytest.mark.parametrize("choices", GRID, ids=lambda choices: "-".join(map(str, choices.values())))
def test_values_and_gradients_are_those_of_autograd(script, choices):
    """From policies that are alike to such as no clamp lets pass, log-ratios above 20 included."""
    clamped = 0
    for seed, spread in enumerate([0.3, 1.0, 2.0, 40.0]):
        g = torch.Generator().manual_seed(seed)
        z, m, ref = spread * torch.randn(3, 6, generator=g, dtype=torch.float64)
        rng = random.Random(seed)
        weights = {name: rng.uniform(0.1, 2) for name in ("gamma", "beta", "eta1", "eta2")}
        settings = play.FIRST | choices | weights | {"rewarded": seed % 2 == 1}
        loss, terms = play.loss_of(z.requires_grad_(), m.requires_grad_(), ref, settings)
        found = script.call("objective", z.tolist(), m.tolist(), ref.tolist(), settings)
        dz, dm = torch.autograd.grad(-loss, [z, m], allow_unused=True, materialize_grads=True)
        close = dict(rel=1e-9, abs=1e-9)
        assert found["J"] == pytest.approx(-loss.item(), **close)
        assert found["dz"] == pytest.approx(dz.tolist(), **close)
        assert found["dm"] == pytest.approx(dm.tolist(), **close)
        assert any(found["dm"]) == (choices["masked_branch"] == "grad")
        for name in ("KL_ref", "KL_prcp", "H", "H_mask"):
            value = getattr(terms, name).sum().item()
            assert found["terms"][name]["value"] == pytest.approx(value, **close)
        share = terms.clamped.sum().item()
        assert found["terms"]["KL_prcp"]["clamped"] == pytest.approx(share, **close)
        clamped += share > 0
    assert clamped or not choices["kl_clamp"]


def test_the_advantages_are_those_of_a_large_group():
    pi, size = torch.tensor(play.STARTS["coupled"][0], dtype=torch.float64), 20_000
    counts = (size * pi).round().long().tolist()
    rights = [round(n * right) for n, right in zip(counts, play.RIGHT)]
    rewards = [[1.0] * k + [0.0] * (n - k) for n, k in zip(counts, rights)]
    group = group_advantages(torch.tensor(sum(rewards, []), dtype=torch.float64))
    means = torch.stack([part.mean() for part in group.split(counts)])
    assert torch.allclose(means, play.advantages(pi), atol=1e-4)


@pytest.mark.parametrize("name", play.TRIES)
def test_a_hundred_updates_are_those_of_an_optimizer(script, played, name):
    settings = play.FIRST | play.TRIES[name]
    start = torch.tensor(play.STARTS[settings["start"]], dtype=torch.float64).log().tolist()
    states = script.call("play", *start, settings)
    logits = torch.tensor([[s["z"], s["m"]] for s in states], dtype=torch.float64)
    assert torch.allclose(logits.softmax(-1), played[name], atol=1e-6)


def test_what_to_try_shows_what_is_said(played):
    ends = {name: states[-1] for name, states in played.items()}
    said = {name: play.TOKENS[pi.argmax()] for name, (pi, _) in ends.items()}
    assert said["gamma 0"] == said["gamma 0.5, not coupled"] == "4"
    assert said["gamma 0.5"] == said["eta1 0.3, exact"] == "3"
    assert said["gamma 2, not coupled"] == "circle"
    assert torch.allclose(ends["eta1 0.3, sampled"], ends["gamma 2, not coupled"], atol=1e-6)
    reference = torch.tensor(play.STARTS["not coupled"][0])
    assert (ends["beta 3"][0] - reference).abs().max() < 0.1  # the policy stays by it
    more = play.play(play.LARGE | {"eta1": 1.0, "entropy": "exact"})[-1, 0]
    assert more.argmax() == reference.argmax() == play.TOKENS.index("4")
    pi, mask = ends["masked branch with gradient"].log()
    tried = play.FIRST | play.TRIES["masked branch with gradient"]
    assert play.loss_of(pi, mask, reference.log(), tried)[1].KL_prcp.sum() > 9


def test_the_runs_are_two_with_the_same_questions():
    runs = play.held(HTML)
    grpo, papo = runs["runs"]
    assert (grpo["algo"], papo["algo"]) == ("grpo", "papo_g") and len(runs["questions"]) == 4
    assert [step for step, _ in grpo["samples"]] == [step for step, _ in papo["samples"]]
    ends = [run["curves"]["val_accuracy"][-1] for run in (grpo, papo)]
    assert all(step == grpo["steps"] for step, _ in ends) and ends[1][1] > ends[0][1]
