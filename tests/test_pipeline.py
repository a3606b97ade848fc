"""bench/pipeline.py measures what it says, and docs/speed.md quotes what it measured."""

import json
import re
import statistics
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import pipeline  # noqa: E402

from plumbing.data import Stream  # noqa: E402
from plumbing.families import encode_pictures  # noqa: E402
from toy.model import tokenizer  # noqa: E402

KEPT = json.loads((ROOT / "results" / "pipeline.json").read_text())
KINDS = ["JPEG, 640 x 480", "toy, 56 x 56"]


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_see_the_same_pictures(kind, monkeypatch):
    """What the earlier way processes again are the pixels that the present way hands over."""
    again, handed = [], []

    def processed(pictures, image_processor):
        again.append(encode_pictures(pictures, image_processor)[0])
        return again[-1], None

    monkeypatch.setattr(pipeline, "encode_pictures", processed)
    monkeypatch.setattr(pipeline, "name_of_picture", lambda pixels, _: handed.append(pixels))
    examples, image_processor, dtype = pipeline.kinds(3)[kind]
    streams = [Stream(examples, 1, tokenizer(), image_processor) for _ in range(2)]
    old, new = pipeline.Times(), pipeline.Times()
    pipeline.before(streams[0], range(3), old)
    pipeline.after(streams[1], range(3), range(3, 6), dtype, new)
    assert len(again) == len(handed) == 3 == len(streams[1].ahead.promised)
    assert all(f.done() for f in streams[1].ahead.promised.values())
    for a, b in zip(again, handed):
        assert b.dtype == dtype and torch.allclose(a, b.float(), atol=0.02)
    assert [s for s, ms in old.by_step.items() if ms] == ["read", "back", "again"]
    assert [s for s, ms in new.by_step.items() if ms] == ["read", "hand over"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_quotes_the_results(kind):
    found = KEPT[kind]
    lines = (ROOT / "docs" / "speed.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(f"| {kind} |")]
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[:4] == [f"{found[step]:.1f}" for step in pipeline.STEPS]
    ratios = [statistics.median(found[f"ratios of {what}"]) for what in ("waiting", "work")]
    assert [re.match(r"([\d.]+) times less", cell)[1] for cell in cells[4:]] == [
        f"{ratio:.1f}" for ratio in ratios
    ]
    assert len(found["ratios of work"]) == KEPT["rounds"]


def test_the_page_says_of_a_step_what_was_measured():
    page = (ROOT / "docs" / "speed.md").read_text()
    found = json.loads((ROOT / "results" / "step.json").read_text())
    share = round(100 * found["memory_ratio"])
    assert f"{found['update_speedup']:.1f} times as fast, {share} % of the memory" in page
    assert f"+{100 * found['papo_over_grpo']:.0f} % (the paper" in page
    words = " ".join(page.split())
    assert f"training is {found['compiled_speedup']:.2f} times as fast" in words


def test_the_page_says_what_was_measured_against_trl():
    page = (ROOT / "docs" / "speed.md").read_text()
    found = json.loads((ROOT / "results" / "versus_trl.json").read_text())["by_trl_batch"]
    default, best = found["8"], found["128"]
    rows = (default, "ours"), (best, "ours"), (default, "ours, masked_grad")
    for table, name in rows:
        step, training = table[name]["times_as_fast"]
        assert f"| {step:.1f} times, and {training:.1f} times without sampling |" in page
