"""exercises/: the stubs are red, the project's own functions green, and each mistake is named."""

import sys
from unittest.mock import Mock

import pytest
from conftest import ROOT, SMALL, command, metrics

sys.path.insert(0, str(ROOT / "exercises"))
graded = pytest.importorskip("test_mine", reason="there are no exercises/ here")
RUN = [*SMALL, *"--algo papo_g --entropy exact --eta1 0.05 --steps 2".split(), "--val_data", ""]
FILLED = "import sys; sys.path.insert(0, 'exercises'); import mine, test_mine, train_with_mine as t"
FILLED += "\nvars(mine).update(test_mine.RIGHT); t.main()"


@pytest.mark.parametrize("name", graded.RIGHT)
def test_an_exercise_is_red_then_green_and_says_what_is_wrong(name):
    assert "not written yet" in graded.judge(name, Mock(side_effect=NotImplementedError))
    assert graded.judge(name, graded.RIGHT[name]) == ""
    for said, mistake in graded.USUAL[name].items():
        assert graded.judge(name, mistake) == said
    assert "is right" in graded.judge("k3", lambda a, b: (graded.k3(a, b)[0], a))


@pytest.mark.slow
def test_training_with_the_projects_own_functions_is_training(tmp_path):
    command("train.py", *RUN, "--out", tmp_path / "a", check=True)
    done = command("-c", FILLED, *RUN, "--out", tmp_path / "b")
    assert "yours: advantages, masked_picture, masked_log" in done.stdout, done.stderr[-2000:]
    same = "loss grad_norm perception_kl entropy reward step".split()
    a, b = ([[m[name] for name in same] for m in metrics(tmp_path / x)] for x in "ab")
    assert a[0] == pytest.approx(b[0], rel=1e-4) and a[1] == pytest.approx(b[1], rel=1e-4)
