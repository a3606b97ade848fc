"""bench/gpu_selftest.py and gpu_page.py, as far as a CPU can tell; bench/step.py."""

import json
import os

import pytest
import torch
from conftest import ROOT, call, command

from plumbing.fit import verdict
from plumbing.models.shapes import without_weights
from plumbing.run.config import default_sampler, parser, resolve

gpu_selftest = pytest.importorskip("gpu_selftest", reason="there is no bench/ here")
gpu_page = pytest.importorskip("gpu_page")
REAL = "qwen2.5-vl-3b"


@pytest.mark.slow
def test_a_rehearsal_runs_every_stage_that_a_cpu_can(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    call("bench/gpu_selftest.py", "--rehearse", "--out", tmp_path, env=environment)
    told = json.loads((tmp_path / "selftest.json").read_text())
    assert [about["stage"] for about in told] == gpu_selftest.STAGES
    skipped = {about["stage"] for about in told if about["verdict"] == "skipped"}
    assert skipped == {"sleep"} | ({"sync"} if default_sampler(cuda=False)[0] == "hf" else set())


def test_a_stage_says_over_which_limit_it_is_and_those_that_need_a_failed_one_are_skipped(tmp_path):
    selftest = gpu_selftest.SelfTest(tmp_path, "toy", cuda=False)
    for stage, maker in [("start", "model"), ("step", "start"), ("sleep", "start")]:
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
    _, short = verdict(without_weights(tmp_path), cfg, 1, gigabytes * 1e9)
    assert short == ""
    longest = cfg.max_prompt_tokens + cfg.group_size * cfg.max_response_tokens
    assert longest == cfg.tokens_per_forward  # a group is the pass that is planned


@pytest.mark.slow
def test_the_measurement_of_a_step_runs():
    said = call("bench/step.py", *"--sampler hf --prompts 4 --group 2 --rounds 1".split())
    assert json.loads(said.splitlines()[-1])["seconds"]["papo_g"]["update"] > 0


@pytest.mark.slow
def test_a_rehearsal_of_the_page_runs_and_says_that_it_is_one(tmp_path):
    """Two stages beside each other, and those that measure; the others have tests of their own."""
    words = f"--rehearse --only flat card full throughput --out {tmp_path}".split()
    done = command("bench/gpu_page.py", *words, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    found = json.loads((tmp_path / "gpu.json").read_text())
    verdicts = {told["stage"]: told["verdict"] for told in found["stages"]}
    assert verdicts == dict.fromkeys(["flat", "card", "full", "throughput"], "ok"), done.stdout
    told = {told["stage"]: told["numbers"] for told in found["stages"]}
    gaps = told["flat"]["qwen3-vl-2b, rows, float32"]
    assert gaps["nats"] < 1e-5 and max(gaps["gradients"]) < 1e-5
    assert told["throughput"]["responses of 20 that are the same again"] == 20
    assert "A rehearsal, on a CPU" in (tmp_path / "gpu.md").read_text()


def test_a_stage_that_fails_or_is_cut_off_leaves_its_numbers(tmp_path, monkeypatch):
    def fails(stage):
        "Half of it."
        stage.tell({"known": 0.5})
        raise SystemExit("error: no more memory")

    (tmp_path / "about.json").write_text("{}")
    cut = {"stage": "toy", "verdict": "begun", "numbers": {"steps": 3}}
    (tmp_path / "toy.json").write_text(json.dumps(cut))
    monkeypatch.setattr(gpu_page, "STAGES", [fails, gpu_page.toy])
    gpu_page.run_stage("fails", tmp_path, True)
    gpu_page.write_page(tmp_path)
    page = (tmp_path / "gpu.md").read_text()
    assert "## fails: failed, error: no more memory\n\nHalf of it." in page
    assert "| known | 0.5 |" in page and "## toy: ended at its limit" in page


def test_the_page_of_the_h100_and_what_the_docs_say_of_it():
    found = json.loads((ROOT / "results" / "gpu.json").read_text())
    assert (ROOT / "results" / "gpu.md").read_text() == gpu_page.page_of(found)
    told, docs = {s["stage"]: s["numbers"] for s in found["stages"]}, (ROOT / "docs" / "gpus.md")
    docs = " ".join(docs.read_text().split())
    for name, stage in (("2B, all weights", "full"), ("3B, `--card 24gb`", "card")):
        of = told[stage]
        kept = ("allocated by torch", "reserved by torch", "in use for the driver")
        seen = [of["planned in all, GB"] - 3, *(of[f"{what}, GB"] for what in kept)]
        assert f"{name} | {' | '.join(f'{gb:.1f}' for gb in seen)} |" in docs
    full = told["full"]
    update = [full[f"papo_g{way}, last"]["update"] for way in (", unshared", "")]
    longer = sum(full["papo_g, s"]) / sum(full["grpo, s"]) - 1
    assert f"{update[0] / update[1]:.1f} times as fast as once a response" in docs
    assert f"PAPO_G trains for {longer:.0%} longer" in docs.replace(" %", "%")
    share = full["share of the peak, training"]
    assert f"{share:.0%} of the card's peak" in docs.replace(" %", "%")
    assert " ".join("\n".join(gpu_page.counted()).split()) in docs
    bits = [v for k, v in told["resume"].items() if "that differ" in k]
    assert len(bits) == 4 and not any(bits)


def test_operations_are_counted_as_torch_counts_them():
    """Of a decoder, on tensors without values. torch's counter takes all pairs of tokens to attend
    to each other, which here are 2 % of the operations."""
    from torch.utils.flop_counter import FlopCounterMode

    model = without_weights("qwen3-vl-2b")
    text = model.config.text_config
    once = gpu_page.operations(model, 100, 256, 4, 50)
    with FlopCounterMode(display=False) as counter:
        model.model.language_model(inputs_embeds=torch.empty(1, 300, 2048, device="meta"))
    head = 2 * 200 * text.vocab_size * text.hidden_size
    tower = gpu_page.operations(model, 0, 256, 0, 0)
    ours, theirs = once - head - tower, counter.get_total_flops()
    assert ours == pytest.approx(theirs, rel=0.02)
