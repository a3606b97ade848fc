"""--log: a step's line, sent to a program that draws it too."""

import pytest

from plumbing.base import logs
from plumbing.report import record
from plumbing.run.config import parser, resolve

PHASES = [{"phases": {"rollout": 2.0 * s}} for s in range(1, 6)]
LINES = [{"step": s, "reward": 0.1 * s, **more} for s, more in enumerate(PHASES, 1)]


def settings(out, name=""):
    return resolve({"model": "toy", "out": str(out), "sampler": "hf", "log": name}, False)[0]


def test_what_is_missing_or_does_not_start_is_said_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(logs.LOGS, "nowhere", None)
    lacks = "--log nowhere: nowhere is not installed; `pip install no"
    with pytest.raises(SystemExit, match=lacks):
        settings(tmp_path, "nowhere").check(1, False)
    # As when nobody is logged in; here a package whose import fails.
    (tmp_path / "wandb.py").write_text("raise RuntimeError('no key\\nand more')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match=r"--log wandb does not start \(no key\); leave it out"):
        logs.open_log(settings(tmp_path, "wandb"), first=True)


def test_a_fork_adds_a_place_of_its_own_which_ends_no_run(tmp_path, monkeypatch, capsys):
    """One class under a name, which the command offers, and which only the first process opens."""
    sent = []

    class Lines:
        def __init__(self, cfg):
            sent.append(cfg.out)

        def send(self, numbers, step):
            sent.append((numbers, step / (3 - step)))  # step 3 fails

        def close(self):
            raise OSError("no network\nand more")

    monkeypatch.setitem(logs.LOGS, "json", Lines)  # json can be imported, as the package must be
    cfg = settings(tmp_path, parser().parse_args(["--log", "json"]).log)
    assert logs.open_log(cfg, first=False) is logs.open_log(settings(tmp_path), True) is None
    opened = logs.open_log(cfg, first=True)
    for line in LINES[:3]:
        record.log(tmp_path, line, opened)
    opened.close()
    assert sent[::2] == [cfg.out, ({"reward": 0.2, "phases/rollout": 4.0}, 2.0)] and len(sent) == 3
    said = capsys.readouterr().out
    assert said.count("warning: --log json") == 2 and "(no network)\n" in said
    assert record.read_metrics(tmp_path) == LINES[:3]
