"""A fork touches one place: a mask, a reward and an algorithm that are registered from outside, and
train two steps of the toy through the command's own entry point."""

import json
import os
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SMALL, command

import masking
from plumbing.families import to_picture

ENTRY = "\n\nif __name__ == '__main__':\n    import train\n    train.main()\n"


def fork(tmp_path, code, *flags):
    """Train with a script that registers something -> (its metrics, its configuration)"""
    script, out = tmp_path / "fork.py", tmp_path / "run"
    script.write_text(code + ENTRY)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = command(script, "--out", out, *SMALL, "--steps", 2, *flags, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (out / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert [m["step"] for m in metrics] == [1, 2]
    return metrics, json.loads((out / "config.json").read_text())["config"]


def test_a_new_mask(tmp_path):
    code = """
from masking import kind

@kind("none")
def nothing_masked(prompt, masker, generator):
    return prompt.pixels.clone()
"""
    metrics, cfg = fork(tmp_path, code, "--mask", "none", "--prompts_per_step", 2)
    # One update a step, so the other picture is scored under the weights of that very update, and
    # is the same picture.
    assert cfg["mask"] == "none" and all(abs(m["perception_kl"]) < 1e-9 for m in metrics)


# A mask that means places: the left half of each picture. Rows of pixels come in blocks of merge x
# merge patches (row_order), the pictures of a prompt one after the other; a grid is (1, h, w).
LEFT_HALF = """
import torch

from masking import kind, mask_patches
from plumbing.families import row_order

@kind("left")
def left_half(prompt, masker, generator):
    merge = masker.image_processor.merge_size
    columns = [row_order(grid, merge) % grid[2] for grid in prompt.grid]
    chosen = [column < grid[2] // 2 for column, grid in zip(columns, prompt.grid)]
    return mask_patches(prompt.pixels, torch.cat(chosen), masker.black)
"""


@pytest.mark.slow
def test_a_mask_that_means_places(tmp_path):
    metrics, cfg = fork(tmp_path, LEFT_HALF, "--mask", "left", "--prompts_per_step", 2)
    assert cfg["mask"] == "left" and all(m["perception_kl"] > 0 for m in metrics)


def test_its_mask_is_where_it_should_be(folder, cfg, processors, prompts, monkeypatch):
    monkeypatch.setattr(masking, "MASKS", dict(masking.MASKS))
    exec(LEFT_HALF, {})
    masker = masking.Masker(replace(cfg, mask="left"), processors[1])
    prompt = prompts[0]
    seen = (
        to_picture(x, prompt.grid[0], processors[1]) for x in (prompt.pixels, masker(prompt, None))
    )
    whole, masked = seen
    half = whole.shape[1] // 2
    assert not masked[:, :half].any() and torch.equal(masked[:, half:], whole[:, half:])


def test_a_new_reward(tmp_path):
    code = """
from reward import rule

@rule("brief")
def brief(graded):
    return graded.accuracy + 1 / len(graded.response)
"""
    metrics, cfg = fork(tmp_path, code, "--reward", "brief")
    assert cfg["reward"] == "brief"
    for m in metrics:  # the toy's responses are a few hundred characters at the most
        assert m["accuracy"] + 1e-3 < m["reward"] < m["accuracy"] + 1


def test_a_new_algorithm(tmp_path):
    code = """
import papo

papo.ALGORITHMS["gentle"] = papo.ALGORITHMS["papo_g"] | dict(beta=0.0, gamma=0.003, eta1=0.001)
papo.ALGORITHMS["gentle/paper"] = dict(loss_mean="token")
"""
    metrics, cfg = fork(tmp_path, code, "--algo", "gentle", "--objective", "paper")
    assert (cfg["algo"], cfg["beta"], cfg["gamma"], cfg["eta1"]) == ("gentle", 0.0, 0.003, 0.001)
    assert (cfg["perception"], cfg["loss_mean"]) == ("printed", "token")
    assert all("ref_kl" not in m for m in metrics)
    for m in metrics:  # minus J is the sum of its terms, those that the row turned on
        terms = m["policy_loss"] - 0.003 * m["perception_kl"] + 0.001 * m["entropy"]
        assert abs(m["loss"] - terms) < 1e-6
