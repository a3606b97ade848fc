"""VPPO, PGPO, NoisyRollout, blind weights: settings, weights and noise by hand; each trains."""

from dataclasses import replace

import pytest

pytest.importorskip("variants.vppo")

import torch
from conftest import both_families, one_run, train_here, train_on
from PIL import Image
from test_train import two_are_one

import train
from papo import group_advantages
from plumbing.base.common import Clock, generator
from plumbing.data.prompts import Example, encode
from plumbing.run.config import Config, parser, resolve
from plumbing.run.setup import WARM
from reward import boxed
from variants.blind_weight import BlindWeight
from variants.noisy_rollout import Noisy, noised
from variants.pgpo import Pgpo
from variants.vppo import Vppo

VARIANTS = {"vppo": Vppo, "pgpo": Pgpo, "noisy": Noisy}
FILES = {"vppo": "vppo", "pgpo": "pgpo", "noisy": "noisy_rollout"}


def settings(kind, **flags):
    return resolve({"model": "Qwen/Qwen2.5-VL-7B-Instruct", **flags}, True, kind)[0]


# Table 9 and appendix B of VPPO (arXiv 2510.09285); Table 6, section 5.1 and appendix A of PGPO
# (arXiv 2604.01840); section 3 and Table 13 of NoisyRollout (arXiv 2504.13055), Geometry3K at 7B.
SHARED = dict(clip_low=0.2, beta=0.0, gamma=0.0, eta2=0.0, lr=1e-6, weight_decay=0.01)
SHARED |= dict(prompts_per_update=128, temperature=1.0, max_response_tokens=2048)
SHARED |= dict(loss_mean="token", anneal_steps=0, masked_branch="kept")
DAPO = dict(prompts_per_step=384, top_p=0.99, clip_high=0.28, dynamic_sampling=True)
PAPERS = {
    "vppo": dict(credit_share=0.4, credit_floor=0.9, mask="random", mask_ratio=0.5, eta1=0.06)
    | dict(group_size=8, reward="paper", **DAPO),
    "pgpo": dict(credit_threshold=0.4, credit_boost=2.0, mask="absent", eta1=0.0)
    | dict(group_size=5, reward="official", **DAPO),
    "noisy": dict(noise_steps=500, noise_slope=30.0, eta1=0.0, group_size=12, reward="official")
    | dict(clip_high=0.2, dual_clip=0.0, prompts_per_step=512, top_p=1.0, dynamic_sampling=False),
}


@pytest.mark.parametrize("algo", VARIANTS)
def test_the_settings_are_the_papers(algo):
    cfg = settings(VARIANTS[algo])
    cfg.check(4, True)
    for name, value in {"algo": algo, **SHARED, **PAPERS[algo]}.items():
        assert getattr(cfg, name) == value, name
    paper = settings(VARIANTS[algo], objective="paper")
    assert (paper.loss_mean, paper.top_p) == ("token", cfg.top_p)
    assert paper.reward == ("official" if algo == "pgpo" else "paper")


def test_each_has_flags_of_its_own():
    for kind, flag in ((Vppo, "credit_share"), (Pgpo, "credit_boost"), (Noisy, "noise_slope")):
        given = vars(parser(kind).parse_args([f"--{flag}", "0.7"]))
        assert getattr(settings(kind, **given), flag) == 0.7
        with pytest.raises(SystemExit, match=f"unrecognized arguments: --{flag}"):
            parser(Config).parse_args([f"--{flag}", "0.7"])
    bad = [(Noisy, dict(second_rollouts=12), "at least one is sampled on the clean picture")]
    bad += [(Vppo, dict(mask_ratio=0.0), "--mask_ratio 0 masks nothing")]
    bad += [(Pgpo, dict(mask="raw", mask_ratio=0.0), "--mask_ratio 0 masks nothing")]
    bad += [(Vppo, dict(credit_share=1.5), "--credit_share 1.5: must lie between 0 and 1")]
    for kind, flags, words in bad:
        with pytest.raises(SystemExit, match=f"^error: .*{words}"):
            settings(kind, **flags).check(4, True)


@pytest.mark.parametrize("algo", VARIANTS)
def test_each_trains_two_steps(algo, tmp_path, folder):
    parts, progress = one_run(tmp_path, folder, VARIANTS[algo], steps=2), train.Progress()
    first, last = (train.train_step(parts, progress) for _ in range(2))
    assert last["grad_norm"] > 0 and last["skipped_updates"] == 0
    assert "ref_kl" not in last and ("perception_kl" in last) == (algo != "noisy")
    assert ("token_weight" in last) == (algo != "noisy")
    if algo == "noisy":
        assert (first["noise_steps"], last["noise_steps"]) == (496, 0)  # 5 of lambda's 30 each way
    else:  # dynamic sampling kept informative groups only
        assert last["equal_groups"] == 0 and last["generated_prompts"] >= 4
    if algo == "vppo":  # 0.4 of each response's tokens, rounded up, with a mean alpha of 1
        assert 0.4 < last["weighted_tokens"] < 0.6
        assert last["token_weight"] == pytest.approx(last["weighted_tokens"], rel=0.1)
    if algo == "pgpo":  # each response keeps its advantage in sum
        assert last["token_weight"] == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("algo", VARIANTS)
def test_the_command_on_two_processes_with_other_micro_batches_is_one(algo, tmp_path):
    flags = ["--steps", 2, "--val_data", "", "--max_response_tokens", 24]
    train_here("--out", tmp_path / "1", *flags, settings=VARIANTS[algo])
    script, flags = f"variants/{FILES[algo]}.py", [*flags, "--tokens_per_forward", 400]
    train_on(2, tmp_path / "2", *flags, script=script)
    two_are_one(tmp_path / "1", tmp_path / "2")


# ------------------------------------------------------------------------------- weights by hand


def weights_of(cfg, *batches):
    """batches: one group's lists of S_it for each micro-batch -> weights, a list a response"""
    # Where no token counts, there is a 7.
    kl = [torch.full((1, len(group), 1 + max(map(len, group))), 7.0) for group in batches]
    counted = [torch.zeros(x.shape, dtype=torch.bool) for x in kl]
    for values, mask, group in zip(kl, counted, batches):
        for g, own in enumerate(group):
            values[0, g, : len(own)], mask[0, g, : len(own)] = torch.tensor(own), True
    found = cfg.token_weights(kl, counted, lambda items: items)
    return [w[0, g, : len(own)] for w, b in zip(found, batches) for g, own in enumerate(b)]


def same(weights, wanted):
    assert [w.tolist() for w in weights] == [pytest.approx(own, abs=1e-5) for own in wanted]


@pytest.mark.lesson
def test_vppo_by_hand():
    """k = 0.4 and beta_min = 0.9, three responses of 5, 2 and 1 tokens, in two micro-batches.

    Their means are 0.14, 0.30 and 0.02, so the mean of the batch is 0.46 / 3 = 0.02 + 0.4 / 3. Eq.
    (5) with a beta_max that makes the mean alpha 1 is 0.9 + 0.1 (S_i - 0.02) / (0.4 / 3): 0.99,
    1.11 and 0.90. Of 5, 2 and 1 tokens 2, 1 and 1 are kept.
    """
    groups = [[0.4, 0.0, 0.2, 0.0, 0.1], [0.0, 0.6]], [[0.02]]
    wanted = [[0.99, 0.0, 0.99, 0.0, 0.0], [0.0, 1.11], [0.90]]
    same(weights_of(settings(Vppo), *groups), wanted)


def test_vppo_ties_and_batches_that_look_alike():
    cfg = settings(Vppo, credit_share=0.5)
    same(weights_of(cfg, [[0.1, 0.1, 0.1, 0.1], [0.1]]), [[1.0, 1.0, 0.0, 0.0], [1.0]])
    for k, n, kept in [(0.6, 5, 3), (0.28, 25, 7)]:  # k n is whole: not one token more
        (weights,) = weights_of(settings(Vppo, credit_share=k), [torch.rand(n).tolist()])
        assert (weights > 0).sum() == kept


@pytest.mark.lesson
def test_pgpo_by_hand():
    """tau = 0.4 and beta = 2. The first response has log(1 + S) = 0, 0.2, 0.5, 1, which is I as it
    is, so u is 0, 0.2 / 0.4, 1 + 2 * 0.1 / 0.6 and 3, in sum 29 / 6, and w is u * 24 / 29. The last
    one's range is only rounding, and no difference."""
    L = [[0.0, 0.2, 0.5, 1.0], [0.3, 0.3], [0.1, 0.3], [1e-9, 3e-9, 2e-9]]
    S = [torch.tensor(own).expm1().tolist() for own in L]
    first = [0.0, 0.5 * 24 / 29, 4 / 3 * 24 / 29, 3 * 24 / 29]
    weights = weights_of(settings(Pgpo), S[:2], S[2:])
    same(weights, [first, [1.0, 1.0], [0.0, 2.0], [1.0, 1.0, 1.0]])
    assert [w.sum().item() for w in weights] == pytest.approx([4, 2, 2, 3])


@pytest.mark.parametrize("algo", ["blind_weight", "blind_weight_d"])
def test_blind_weights_are_one_minus_the_accuracy_on_a_black_picture(algo, tmp_path):
    """Against black pictures that went through the image processor, asked and graded one by one."""
    few = dict(algo=algo, steps=2, prompts_per_step=16, prompts_per_update=8, hint_right=0.8)
    parts = one_run(tmp_path, WARM / "toy", BlindWeight, **few)
    prompts = parts.stream.read(range(16), range(16, 32))
    groups, weights = train.roll_out(prompts, parts, 1, Clock()), set()
    for g in groups:
        asked = prompts[g.position].example
        black = [Image.new("RGB", picture.size) for picture in asked.images]
        prompt = encode(replace(asked, images=black), *parts.processors)
        named = [(parts.cfg.seed, "blind", 1, g.position)]
        (blind,) = parts.sampler.generate([prompt], 4, named)
        wrong = sum(boxed(text) != asked.answer for text in blind.texts) / 4
        assert torch.allclose(g.advantages, wrong * group_advantages(g.rewards), atol=1e-6)
        weights.add(wrong)
    assert 0.0 in weights and 1.0 in weights
    progress = train.Progress()
    assert all(train.train_step(parts, progress)["grad_norm"] > 0 for _ in range(2))
    words = {i: replace(p, pixels=None, grid=None) for i, p in prompts.items()}
    assert parts.cfg.weigh(groups, words, parts, 1)[0].advantages is groups[0].advantages


# ----------------------------------------------------------------------------------------- noise


def test_the_noise_fades_as_the_paper_has_it():
    """Its 60 steps of Geometry3K with lambda 30 and gamma 40, worked out by hand: at step t,
    500 / (1 + exp((t - 40) / 2)), rounded down."""
    cfg = settings(Noisy, steps=60)
    assert cfg.noise_middle * 60 == pytest.approx(40)
    at = {t: cfg.at_step(t - 1).noise_steps for t in (1, 30, 38, 40, 42, 50, 53, 60)}
    assert at == {1: 499, 30: 496, 38: 365, 40: 250, 42: 134, 50: 3, 53: 0, 60: 0}
    longer = settings(Noisy, steps=90, noise_anneal_steps=60)
    assert longer.at_step(49).noise_steps == 3 and longer.at_step(89).noise_steps == 0
    both = settings(Noisy, gamma=0.02, steps=202, anneal_steps=101).at_step(101)
    assert both.gamma == 0 and both.noise_steps == 496  # t = 102 of 202


@both_families
def test_a_noised_picture_is_a_step_of_diffusion(prompts, processors):
    """sqrt(a) and sqrt(1 - a), worked out in plain Python, are found again in a grey picture, whose
    noise is hardly ever cut."""
    grey = Image.new("RGB", (84, 84), (128,) * 3)
    prompt = encode(Example("", "<image> ?", "1", [grey]), *processors)
    image_processor = processors[1]
    mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
    expected = {100: (0.99829, 0.05841), 250: (0.98913, 0.14702), 500: (0.86302, 0.50517)}
    for steps, (kept, noise) in expected.items():
        pixels = noised(prompt, steps, generator("noise"), image_processor).pixels
        x = pixels.view(len(pixels), 3, -1) * std[:, None] + mean[:, None]  # 0 black, 1 white
        drawn = kept * 128 / 255 + noise * torch.randn(100_000, generator=generator("another"))
        assert x.mean().item() == pytest.approx(drawn.clamp(0, 1).mean().item(), abs=0.01)
        assert x.std().item() == pytest.approx(drawn.clamp(0, 1).std().item(), rel=0.05)
    # A new prompt, of the same words; the prompt itself once the noise has faded, or without one.
    before, again = prompt.pixels.clone(), noised(prompt, 300, generator("noise"), image_processor)
    assert torch.equal(prompt.pixels, before) and again.ids is prompt.ids
    assert noised(prompt, 0, generator(0), image_processor) is prompt
    words = replace(prompt, pixels=None, grid=None)
    assert noised(words, 300, generator(0), image_processor) is words
