"""bench/gpu_selftest.py: every stage that a CPU can run, and what a GPU is needed for, as far as it
can be told without one; and bench/step.py."""

import json
import os
import sys

import pytest
import torch
from conftest import ROOT, command

from plumbing.fit import verdict
from plumbing.models.shapes import without_weights
from plumbing.run.config import default_sampler, parser, resolve

sys.path.insert(0, str(ROOT / "bench"))

gpu_selftest = pytest.importorskip("gpu_selftest", reason="there is no bench/ here")
REAL = "qwen2.5-vl-3b"


@pytest.mark.slow
def test_a_rehearsal_runs_every_stage_that_a_cpu_can(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = command("bench/gpu_selftest.py", "--rehearse", "--out", tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    told = json.loads((tmp_path / "selftest.json").read_text())
    assert [about["stage"] for about in told] == gpu_selftest.STAGES
    skipped = {about["stage"] for about in told if about["verdict"] == "skipped"}
    assert skipped == {"sleep"} | ({"sync"} if default_sampler(cuda=False)[0] == "hf" else set())
    numbers = {about["stage"]: about["numbers"] for about in told}
    assert numbers["resume"] == {"steps before": [1], "steps after": [1, 2]}


def test_a_stage_says_over_which_limit_it_is_and_those_that_need_a_failed_one_are_skipped(tmp_path):
    selftest = gpu_selftest.SelfTest(tmp_path, "toy", cuda=False)
    for stage, maker in [("start", "model"), ("step", "start"), ("packing", "gap")]:
        about = gpu_selftest.run_stage(stage, selftest)
        assert (about["verdict"], about["why"]) == ("skipped", f"{maker} failed")
    selftest.versions = lambda: {"gap": (0.2, 0.1), "share": (0.1, 0.2)}
    about = gpu_selftest.run_stage("versions", selftest)
    assert (about["verdict"], about["why"]) == ("failed", "gap: at or above the limit")


@pytest.mark.parametrize("gigabytes", [23.7, 31.8, 42.4, 84.9, 191])
def test_the_planner_says_that_the_run_fits(tmp_path, gigabytes):
    """On an L4, a 5090, an A100 of either size and a B200."""
    from shapes import settings_of

    settings = settings_of(REAL, gpu_selftest.depth_for(gigabytes * 1e9))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    selftest = gpu_selftest.SelfTest(tmp_path, REAL, cuda=True)
    selftest.folder = tmp_path
    words = [*selftest.words(), "--sampler", "vllm"]
    cfg = resolve(vars(parser().parse_args(words)), cuda=True)[0]
    made, short = verdict(without_weights(tmp_path), cfg, 1, gigabytes * 1e9)
    assert short == "" and made.level == 2
    longest = cfg.max_prompt_tokens + cfg.group_size * cfg.max_response_tokens
    assert longest == cfg.tokens_per_forward  # a group is the pass that is planned


def test_an_updates_own_memory(tmp_path, monkeypatch):
    """How far the most that was allocated while it ran is above what there was before."""
    peak, rises = iter([7e9, 9e9]), []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5e9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peak))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    update = gpu_selftest.SelfTest(tmp_path, REAL, cuda=True).rising(max, rises)
    assert [update(1, 2), update(3, 2)] == [2, 3] and rises == [2e9, 4e9]


@pytest.mark.slow
def test_the_measurement_of_a_step_runs():
    done = command("bench/step.py", *"--sampler hf --prompts 4 --group 2 --rounds 1".split())
    assert json.loads(done.stdout.splitlines()[-1])["seconds"]["papo_g"]["update"] > 0
