"""bench/gpu_selftest.py: every stage that a CPU can run, with the vLLM engine where one is
installed; and what a GPU is needed for, as far as it can be told without one."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, command

from plumbing.config import default_sampler, resolve
from plumbing.fit import measuring, models, verdict
from plumbing.shapes import SHAPES
from plumbing.simulation import shallow

sys.path.insert(0, str(ROOT / "bench"))

import gpu_selftest  # noqa: E402

REAL = "qwen2.5-vl-3b"


@pytest.mark.slow
def test_a_rehearsal_runs_every_stage_that_a_cpu_can(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    program = ROOT / "bench/gpu_selftest.py"
    done = command(program, "--rehearse", "--out", tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    told = json.loads((tmp_path / "selftest.json").read_text())
    assert [about["stage"] for about in told] == gpu_selftest.STAGES
    skipped = {about["stage"] for about in told if about["verdict"] == "skipped"}
    engine = default_sampler(cuda=False)[0] == "vllm"
    assert skipped == ({"sleep"} if engine else {"sleep", "sync"})
    numbers = {about["stage"]: about["numbers"] for about in told}
    assert numbers["resume"] == {"steps before": [1], "steps after": [1, 2]}
    assert numbers["step"]["tokens_per_second"] > 0
    for stage in ("packing", "vision"):
        number, limit = numbers[stage]["gradients"]
        assert number < limit


def test_a_stage_that_hangs_fails_and_leaves_no_time_to_others():
    hangs = SimpleNamespace(versions=lambda: subprocess.run(["sleep", "100"]))
    began = time.monotonic()
    about = gpu_selftest.run_stage("versions", hangs, 1)
    assert (about["verdict"], about["why"]) == ("failed", "it took more than 1 s")
    assert 1 <= time.monotonic() - began < 20
    about = gpu_selftest.run_stage("versions", hangs, 0)
    assert about["verdict"] == "skipped" and "--minutes" in about["why"]


def test_a_stage_that_lacks_what_an_earlier_one_makes_is_skipped(tmp_path):
    selftest = gpu_selftest.SelfTest(tmp_path, "toy", cuda=False)
    for stage, maker in [("start", "model"), ("step", "start"), ("packing", "gap")]:
        about = gpu_selftest.run_stage(stage, selftest, 60)
        assert (about["verdict"], about["why"]) == ("skipped", f"{maker} failed")


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [23.7, 31.8, 42.4, 84.9, 191])
def test_the_planner_says_that_the_run_fits(tmp_path, gigabytes):
    """On an L4, a 5090, an A100 of either size and a B200."""
    selftest, memory = gpu_selftest.SelfTest(tmp_path, REAL, cuda=True), gigabytes * 1e9
    selftest.folder = REAL
    cfg = resolve(selftest.settings() | {"sampler": "vllm"}, cuda=True)[0]
    settings = shallow(SHAPES[REAL], *gpu_selftest.depth_for(memory))
    made, short = verdict(models(settings), cfg, 1, memory, measuring(settings, 1))
    assert short == "" and made.level == 2
    longest = cfg.max_prompt_tokens + cfg.group_size * cfg.max_response_tokens
    assert longest == cfg.tokens_per_forward  # a group is the pass that is simulated


def test_an_updates_own_memory(tmp_path, monkeypatch):
    """How far the most that was allocated while it ran is above what there was before."""
    peak = iter([7e9, 9e9])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5e9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peak))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(gpu_selftest.train, "update", lambda *batches: sum(batches))
    whole = gpu_selftest.train.update
    with gpu_selftest.SelfTest(tmp_path, REAL, cuda=True).rises() as rises:
        assert [gpu_selftest.train.update(1, 2), gpu_selftest.train.update(3)] == [3, 3]
    assert rises == [2e9, 4e9] and gpu_selftest.train.update is whole
