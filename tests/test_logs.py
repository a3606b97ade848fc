"""--log: a step's line, sent to a program that draws it too."""

import json
import sys
from importlib.util import find_spec

import pytest
from conftest import SMALL

import train
from plumbing import logs, report
from plumbing.config import check, resolve

LINES = [
    {"step": s, "reward": 0.1 * s, "phases": {"rollout": 2.0 * s}, "refused_prompts": s}
    for s in range(1, 6)
]


def settings(out, name=""):
    return resolve({"model": "toy", "out": str(out), "sampler": "hf", "log": name}, False)[0]


def test_nothing_is_opened_when_it_is_not_asked_for(tmp_path):
    assert logs.open_log(settings(tmp_path), first=True) is None
    report.log(tmp_path, LINES[0])
    assert report.read_metrics(tmp_path) == LINES[:1]


@pytest.mark.parametrize("name", logs.LOGS)
def test_what_is_missing_is_said_in_one_sentence(name, tmp_path):
    if find_spec(name):
        return check(settings(tmp_path, name), 1, False)
    with pytest.raises(SystemExit, match=f"--log {name}: {name} is not installed; `pip install"):
        check(settings(tmp_path, name), 1, False)


def test_what_does_not_start_is_said_in_one_sentence(tmp_path, monkeypatch):
    """As when nobody is logged in; here a package whose import fails."""
    (tmp_path / "wandb.py").write_text("raise RuntimeError('no key\\nand more')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match=r"--log wandb does not start \(no key\); leave it out"):
        logs.open_log(settings(tmp_path, "wandb"), first=True)


def test_a_fork_adds_a_place_of_its_own(tmp_path, monkeypatch, folder):
    """One class under a name, which the command offers. A run opens it, sends the very lines of
    metrics.jsonl, and closes it. Only the first process does."""
    events = tmp_path / "events.jsonl"

    class Lines:
        def __init__(self, cfg):
            self.file = open(events, "a")
            self.write("opened")

        def write(self, *event):
            self.file.write(json.dumps(event) + "\n")
            self.file.flush()

        def send(self, numbers, step):
            self.write("line", step, numbers)

        def close(self):
            self.write("closed")
            self.file.close()

    monkeypatch.setitem(logs.LOGS, "json", Lines)  # json can be imported, as the package must be
    assert logs.open_log(settings(tmp_path, "json"), first=False) is None and not events.exists()
    flags = [
        "--model",
        folder,
        "--data",
        "toy",
        "--out",
        tmp_path / "run",
        *SMALL,
        "--val_data",
        "",
    ]
    argv = ["train.py", *SMALL, *flags, "--steps", 2, "--log", "json", "--algo", "grpo"]
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    train.main()
    opened, *lines, closed = [json.loads(x) for x in events.read_text().splitlines()]
    assert (opened, closed) == (["opened"], ["closed"])
    kept = report.read_metrics(tmp_path / "run")
    assert lines == [["line", m["step"], logs.numbers(m)] for m in kept] and len(lines) == 2
    assert lines[0][2]["phases/rollout"] == kept[0]["phases"]["rollout"]


def test_tensorboard_reads_every_line_once_after_a_resume_too(tmp_path):
    """A run that is killed after step 4 and goes on from its checkpoint of step 2."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for lines in (LINES[:4], LINES[2:]):
        opened = logs.open_log(settings(tmp_path, "tensorboard"), first=True)
        for line in lines:
            report.log(tmp_path, line, opened)
        opened.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(read.Tags()["scalars"]) == {"reward", "phases/rollout", "refused_prompts"}
    found = [(e.step, round(e.value, 4)) for e in read.Scalars("phases/rollout")]
    assert found == [(s, 2.0 * s) for s in range(1, 6)]
