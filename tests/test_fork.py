"""A fork touches one place: a mask, a reward, an algorithm, a flag in a script; and the hooks."""

import json
import os
import shutil
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from conftest import ROOT, SMALL, call, command, metrics, one_run, watch_a_step

import masking
import papo
import reward
import train
from plumbing.models.families import to_picture
from plumbing.run.config import Config
from plumbing.run.hooks import with_token_weights
from policy import Scores
from rollout import Rollout

# The mask means places: the left half of each picture. Rows of pixels come in blocks of merge x
# merge patches (row_order), the pictures of a prompt one after the other; a grid is (1, h, w).
FORK = """
from dataclasses import dataclass

import torch

import train
from masking import kind, mask_patches
from papo import ALGORITHMS, row
from plumbing.models.families import row_order
from plumbing.run.config import Config, knob
from reward import rule

SETTINGS = dict(mask="left", reward="brief")
ALGORITHMS["gentle"] = row(0.30, 0.0, 0.003, 0.001, 0.0, False, as_printed=SETTINGS, **SETTINGS)

@kind("left")
def left_half(prompt, masker, generator):
    merge = masker.image_processor.merge_size
    columns = [row_order(grid, merge) % grid[2] for grid in prompt.grid]
    chosen = [column < grid[2] // 2 for column, grid in zip(columns, prompt.grid)]
    return mask_patches(prompt.pixels, torch.cat(chosen), masker.black)

@rule("brief")
def brief(graded):
    return graded.accuracy + 1 / len(graded.response)

@dataclass
class Gentle(Config):
    push: float = knob(1.0, "weight of every token's policy term", part="Gentle", low=0)

    def token_weights(self, kl, counted, gather):
        return [torch.full_like(x, self.push) for x in kl]

if __name__ == "__main__":
    train.main(Gentle)
"""


def test_a_script_of_ones_own_trains(tmp_path):
    script, out = tmp_path / "fork.py", tmp_path / "run"
    script.write_text(FORK)
    flags = "--algo gentle --objective paper --push 0.5 --steps 2 --val_data".split()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    call(script, "--out", out, *SMALL, *flags, "", env=environment)
    lines, cfg = metrics(out), json.loads((out / "config.json").read_text())["config"]
    assert [m["step"] for m in lines] == [1, 2]
    assert (cfg["algo"], cfg["mask"], cfg["reward"]) == ("gentle", "left", "brief")
    assert (cfg["beta"], cfg["gamma"], cfg["eta1"], cfg["push"]) == (0.0, 0.003, 0.001, 0.5)
    assert (cfg["perception"], cfg["loss_mean"]) == ("printed", "sequence")
    flags = ["--model", out / "checkpoint-2", *"--n 1 --questions 2 --sampler hf".split()]
    asked = ["-c", "import fork, eval; eval.main()", *flags]
    assert "vision" in call(*asked, env=environment, cwd=tmp_path)
    for m in lines:
        assert "ref_kl" not in m and m["perception_kl"] > 0 and m["token_weight"] == 0.5
        # The toy's responses are a few hundred characters at the most.
        assert m["accuracy"] + 1e-3 < m["reward"] < m["accuracy"] + 1


def test_its_mask_is_where_it_should_be(cfg, processors, prompts, monkeypatch):
    for module, name in ((masking, "MASKS"), (reward, "REWARDS"), (reward, "FORMS")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    monkeypatch.setattr(papo, "ALGORITHMS", dict(papo.ALGORITHMS))
    exec(FORK, {"__name__": "fork"})
    masker, prompt = masking.Masker(replace(cfg, mask="left"), processors[1]), prompts[0]
    both = prompt.pixels, masker(prompt, None)
    whole, masked = (to_picture(x, prompt.grid[0], processors[1]) for x in both)
    half = whole.shape[1] // 2
    assert not masked[:, :half].any() and torch.equal(masked[:, half:], whole[:, half:])


def test_a_mask_that_masks_nothing_has_no_perception_loss(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(masking.MASKS, "none", lambda prompt, masker, generator: prompt.pixels)
    parts = one_run(tmp_path, folder, mask="none", prompts_per_step=2)
    # In a step of one update pi_mask has its very weights.
    assert abs(train.train_step(parts, train.Progress())["perception_kl"]) < 1e-9


# A loss term of one's own: (file, in front of what it stands there, what is added).
TERM = [
    ("loss.py", "def policy_logits", "def squared(logp):\n    return logp.square()\n\n\n"),
    ("papo.py", "from loss import", "from loss import squared\n"),
    ("papo.py", "    high: Tensor  # bool", "    squared: Tensor\n"),
    ("papo.py", "high, low, None)", "squared(logp), "),
    ("papo.py", "high, low, clamped & with", "squared(logp),\n        "),
    ("papo.py", "        - cfg.gamma * terms", "        + cfg.delta * terms.squared\n"),
    ("papo.py", '    sums |= {"clip_high', '    sums |= {"squared": total(terms.squared)}\n'),
    ("plumbing/run/config.py", "    gamma: float", '    delta: float = knob(0.0, "mine")\n'),
]


@pytest.mark.slow
def test_what_a_fork_adds_leaves_the_tests_of_the_house_green(tmp_path):
    """A loss term in the places that the README's row names, a variant, a script in the folder."""
    row = next(x for x in (ROOT / "README.md").read_text().splitlines() if "| a loss term" in x)
    for name in ("loss.py", "papo.Terms", "terms_of", "objective", "plumbing/run/config.py"):
        assert f"`{name}`" in row
    project = tmp_path / "fork"
    left = shutil.ignore_patterns(".git", "*venv*", "*cache*", "out")
    shutil.copytree(ROOT, project, ignore=left)
    for name, place, added in TERM:
        text = (project / name).read_text()
        assert text.count(place) == 1, place
        (project / name).write_text(text.replace(place, added + place))
    for path in ("s.py", "variants/mine.py"):
        (project / path).write_text(FORK)
    tests = [f"tests/test_{name}.py" for name in ("house", "docs", "answers", "waiting")]
    chosen = ["-k", "house or docs or nothing_else or mine"]
    call("-m", "pytest", "-q", "-n0", *tests, *chosen, cwd=project)
    losses = []
    for delta in ("0", "0.5"):
        out, flags = tmp_path / delta, ["--steps", 1, "--prompts_per_update", 4, "--val_data", ""]
        call("train.py", *SMALL, *flags, "--out", out, "--delta", delta, cwd=project)
        losses += [(m["loss"], m["squared"]) for m in metrics(out)]
    (without, squared), (with_it, _) = losses
    assert with_it - without == pytest.approx(0.5 * squared, rel=1e-3) and squared > 0.01


# --------------------------------------------------------------------------------------- the hooks


@dataclass
class Noised(Config):
    """The last two of each group are sampled on a picture with noise."""

    second_size: ClassVar = 2

    def second_prompt(self, prompt, image_processor, generator):
        pixels = masking.add_noise(prompt.pixels, 0.3, generator, image_processor)
        return replace(prompt, pixels=pixels)


@dataclass
class NoisedToTheEnd(Noised):
    """And are scored on it."""

    def regroup(self, groups):
        return [part(g, own, second) for g in groups for own, second in HALVES]


HALVES = (slice(2), False), (slice(2, None), True)


def part(group, own, second):
    rollout = Rollout(*(getattr(group.rollout, f.name)[own] for f in fields(Rollout)))
    lists = dict(scores=group.scores[own], advantages=group.advantages[own], rollout=rollout)
    return replace(group, second=second, **lists)


@pytest.mark.parametrize("kind", [Noised, NoisedToTheEnd])
def test_on_which_picture_a_response_is_trained(kind, tmp_path, folder, monkeypatch):
    """On the prompt's own, pi_old included, unless the variant regroups; rewards form one pool."""
    parts = one_run(tmp_path, folder, kind)
    seen, heard, gaps = watch_a_step(parts, monkeypatch)
    if kind is Noised:
        assert len(heard) == 4 and all(seen)
        assert all(gap[:2].max() < 1e-3 < gap[2:].max() for gap in gaps)
    else:
        assert len(heard) == 8 and sum(seen) == len(seen) // 2
        assert torch.cat(gaps).max() < 1e-3
    sums = [advantages.sum() for _, advantages, *_ in heard]
    assert torch.stack(sums).sum().item() == pytest.approx(0, abs=1e-5)


def test_token_weights_come_from_the_policy_before_the_updates_and_need_a_picture():
    """kl is k3 of pi_old and pi_mask; a token that does not count, or has no picture, keeps 1."""
    old, masked = torch.zeros(2, 1, 3), torch.tensor([1.0, 2.0, 3.0]).expand(2, 1, 3)
    scored = torch.tensor([[[True, True, False]]] * 2)
    rows, pictured = SimpleNamespace(scored=scored), torch.tensor([True, False])
    cfg = SimpleNamespace(kl_clamp=0.0, token_weights=lambda kl, counted, gather: kl)
    parts = SimpleNamespace(cfg=cfg, processes=SimpleNamespace(gather=None))
    fixed = [train.Fixed(old, Scores(masked, None), None)]
    (known,) = with_token_weights([train.MicroBatch(rows, None, pictured, None)], fixed, parts)
    wanted = torch.tensor([[[torch.e - 2, torch.e**2 - 3, 1.0]], [[1.0, 1.0, 1.0]]])
    assert torch.allclose(known.weights, wanted)


@pytest.mark.slow
def test_the_toy_needs_neither_datasets_nor_an_engine_nor_what_draws(tmp_path):
    """The page is missed in one line, and a file of rows in one sentence."""
    gone = 'import sys\nfor name in ("datasets", "matplotlib", "vllm"): sys.modules[name] = None\n'
    (tmp_path / "sitecustomize.py").write_text(gone)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    said = call("train.py", *SMALL, "--steps", 1, "--out", tmp_path / "run", env=env)
    assert "warning: report.html is not written" in said and "look at" not in said
    assert metrics(tmp_path / "run")
    (rows := tmp_path / "rows.jsonl").write_text('{"problem": "how many ?", "answer": "3"}\n')
    done = command("train.py", *SMALL, "--data", rows, "--out", tmp_path / "other", env=env)
    assert done.returncode == 1 and "`pip install datasets`" in done.stderr.splitlines()[-1]
