"""The evaluation command, and the arithmetic of its tables."""

import base64
import io
import json
import random
import re

import pytest
import torch
from conftest import SMALL, command
from PIL import Image

from eval import record as line_of
from plumbing.compare import compare, paired_test, relative_gain, rescore
from plumbing.data import Example
from plumbing.responses import read
from plumbing.sources import BENCHMARKS
from plumbing.summary import macro, summarise, table
from rollout import Rollout


def record(question, accuracy, **more):
    whole = {"format": 1.0, "finished": True, "tokens": 10}
    return {"id": question, "accuracy": accuracy, **whole, **more}


def test_avg_at_n_is_the_mean_over_questions_of_the_mean_over_responses():
    s = summarise(
        [
            record("a", 1.0),
            record("a", 0.0),
            record("b", 1.0),
            record("b", 1.0, finished=False, format=0.0),
            record("c", 0.0),
            record("c", 0.0),
        ]
    )
    assert s["accuracy"] == 0.5 and s["questions"] == 3 and s["n"] == 2
    assert s["pass"] == pytest.approx(2 / 3) and s["cut_off"] == pytest.approx(1 / 6)
    assert s["format"] == pytest.approx(5 / 6) and s["tokens"] == 10


def test_the_interval_is_the_textbook_one():
    """400 questions, half of them right: the 95 % interval of a mean is about +-1.96 * 0.5 / 20."""
    s = summarise([record(i, float(i % 2)) for i in range(400)])
    assert s["low"] == pytest.approx(0.5 - 0.049, abs=0.012)
    assert s["high"] == pytest.approx(0.5 + 0.049, abs=0.012)
    assert s == summarise([record(i, float(i % 2)) for i in range(400)])  # and repeats


# Table 1 of the paper: nine sets in the order of plumbing.sources.BENCHMARKS, and the averages that
# it prints: General, Vision, Overall.
TABLE_1 = {
    "GRPO-3B": (
        [28.72, 59.34, 58.90, 57.24, 55.25, 38.14, 55.81, 25.66, 52.26],
        (51.89, 42.97, 47.92),
    ),
    "PAPO_G-3B": (
        [30.95, 61.38, 60.09, 57.39, 57.14, 38.67, 62.56, 27.11, 53.95],
        (53.39, 45.57, 49.92),
    ),
    "GRPO-7B": (
        [40.18, 65.48, 68.12, 72.26, 66.51, 45.62, 73.94, 35.17, 61.71],
        (62.51, 54.11, 58.78),
    ),
    "PAPO_G-7B": (
        [40.25, 69.53, 66.79, 72.52, 68.43, 46.07, 89.81, 36.63, 64.97],
        (63.50, 59.37, 61.66),
    ),
    "DAPO-3B": (
        [31.20, 60.89, 59.95, 66.83, 56.25, 40.69, 74.25, 28.42, 53.09],
        (55.02, 49.11, 52.40),
    ),
    "PAPO_D-3B": (
        [35.65, 62.53, 62.67, 64.09, 60.51, 41.67, 83.56, 28.76, 57.72],
        (57.09, 52.93, 55.24),
    ),
    "DAPO-7B": (
        [35.92, 61.91, 58.51, 75.93, 55.64, 37.05, 90.05, 29.02, 51.04],
        (57.58, 51.79, 55.01),
    ),
    "PAPO_D-7B": (
        [44.11, 67.53, 68.30, 80.61, 68.58, 46.70, 91.38, 36.34, 64.87],
        (65.83, 59.82, 63.16),
    ),
    "GRPO-2B": (
        [39.29, 53.58, 57.12, 47.71, 47.98, 29.84, 80.13, 20.51, 45.41],
        (49.13, 43.97, 46.84),
    ),
    "PAPO_G-2B": (
        [41.08, 56.08, 59.17, 48.57, 51.89, 32.83, 80.63, 23.42, 50.05],
        (51.36, 46.73, 49.30),
    ),
}
# The paper's relative gains, and what its own numbers give where that is not what it prints.
GAINS = {
    ("GRPO-3B", "PAPO_G-3B"): (3.38, 5.60, 4.36),
    ("GRPO-7B", "PAPO_G-7B"): (1.53, 7.96, 4.39),
    ("DAPO-3B", "PAPO_D-3B"): (5.00, 6.22, 5.54),
    ("DAPO-7B", "PAPO_D-7B"): (15.61, 19.96, 17.54),  # printed: 5.97 and 19.09
    ("GRPO-2B", "PAPO_G-2B"): (4.55, 8.76, 6.42),  # printed: 4.52, 6.27 and 5.25
}


def by_set(row):
    return dict(zip(BENCHMARKS, TABLE_1[row][0]))


@pytest.mark.parametrize("row", TABLE_1)
def test_averages_are_those_of_table_1(row):
    # Some are cut off, not rounded.
    assert list(macro(by_set(row)).values()) == pytest.approx(TABLE_1[row][1], abs=0.011)


@pytest.mark.parametrize("pair", GAINS, ids="-".join)
def test_relative_gains_are_means_over_sets_of_each_sets_gain(pair):
    gains = macro(relative_gain(*map(by_set, pair)))
    assert list(gains.values()) == pytest.approx(GAINS[pair], abs=0.012)


def test_a_column_with_a_set_missing_is_not_averaged():
    values = by_set("GRPO-3B")
    del values["counting"]
    assert list(macro(values)) == ["General"]


def test_the_paired_test_is_the_textbook_one():
    """No difference: p near 1 half of the time. 400 questions at +5 points with a paired spread of
    .3: about 3.3 standard errors."""
    rng = random.Random(0)
    a = {i: rng.random() for i in range(400)}
    d, low, high, p = paired_test(a, {i: x + rng.gauss(0.05, 0.3) for i, x in a.items()})
    assert d == pytest.approx(0.05, abs=0.03) and low < d < high and p < 0.02
    assert high - low == pytest.approx(2 * 1.96 * 0.3 / 20, rel=0.15)
    assert paired_test(a, {i: x + rng.gauss(0, 0.3) for i, x in a.items()})[3] > 0.05
    assert paired_test(a, dict(a))[0] == 0 and paired_test(a, dict(a))[3] == 1
    with pytest.raises(ValueError, match="share no question"):
        paired_test(a, {"other": 1.0})


@pytest.fixture(scope="module")
def answered(folder, tmp_path_factory):
    """A finished evaluation: its flags, output and file."""
    out = tmp_path_factory.mktemp("eval") / "responses.jsonl"
    flags = ["--model", folder, "--sampler", "hf", "--n", 2, "--questions", 8, "--out", out]
    done = command("eval.py", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    return flags, done.stdout, out


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command(answered):
    _, stdout, out = answered
    lines = lines_of(out)
    assert len(lines) == 3 * 8 * 2 and {r["split"] for r in lines} == {"general", "vision", "blind"}
    assert all({"id", "prompt", "predict", "label", "accuracy"} <= set(r) for r in lines)
    for split in ("general", "vision", "blind"):
        mean = sum(r["accuracy"] for r in lines if r["split"] == split) / 16
        assert f"{split:<12}{100 * mean:>8.1f}" in stdout
    assert "temperature 1.0, top_p 1.0" in stdout and "pass@n" in stdout


@pytest.mark.slow
def test_a_stopped_evaluation_goes_on_where_it_stopped(answered, tmp_path):
    """Cut the file in the middle of a question and of a line: the rest is sampled again, and ends
    up the same."""
    flags, stdout, out = answered
    copy = tmp_path / "responses.jsonl"
    kept = "".join(line + "\n" for line in out.read_text().splitlines()[:21])
    copy.write_text(kept + '{"split": "gen')
    settings = tmp_path / "responses.settings.json"
    settings.write_text(out.with_name("responses.settings.json").read_text())
    done = command("eval.py", *flags[:-1], copy)
    assert done.returncode == 0, done.stderr[-2000:]
    order = lambda path: sorted(map(json.dumps, lines_of(path)))
    assert order(copy) == order(out) and done.stdout.splitlines()[:-1] == stdout.splitlines()[:-1]
    again = command("eval.py", *flags[:-1], copy)  # nothing left to do: no model is loaded
    assert again.stdout == done.stdout
    settings.rename(tmp_path / "elsewhere.json")
    lost = command("eval.py", *flags[:-1], copy)  # what cannot be recognised is not overwritten
    assert lost.returncode != 0 and "give another --out" in lost.stderr
    assert order(copy) == order(out)
    (tmp_path / "elsewhere.json").rename(settings)
    other = command("eval.py", *flags[:-1], copy, "--seed", 2)
    assert other.returncode != 0
    assert "holds another evaluation: seed (1 then, 2 now)" in other.stderr


def test_rescore_and_compare(answered, tmp_path):
    _, stdout, out = answered
    done = command("eval.py", "--rescore", out, "--out", tmp_path / "again.jsonl")
    assert done.returncode == 0, done.stderr[-2000:]
    vision = lambda text: [line for line in text.splitlines() if line.startswith("vision")]
    assert vision(done.stdout) == vision(stdout)
    better, chart = tmp_path / "better.jsonl", tmp_path / "bars.png"
    records = [{**r, "accuracy": 1.0} for r in lines_of(out)]
    better.write_text("\n".join(map(json.dumps, records)))
    done = command("eval.py", "--compare", out, better, "--out", chart)
    assert done.returncode == 0, done.stderr[-2000:]
    row = vision(done.stdout)[0].split()
    assert float(row[2]) == 100 and float(row[7]) < 0.05
    assert float(row[3]) == pytest.approx(100 - float(row[1]), abs=0.01)
    assert chart.read_bytes()[:4] == b"\x89PNG"


def test_blind_is_the_toys_own_blind_split(answered, folder, tmp_path):
    """The vision questions with every picture made black at evaluation: the answers that the toy's
    blind split gets, but for the draws."""
    flags = "--sampler hf --n 4 --questions 8 --blind".split()
    done = command("eval.py", "--model", folder, *flags, "--out", tmp_path / "b.jsonl")
    assert done.returncode == 0 and "every picture black" in done.stdout
    rows = {m[1]: m[2] for m in re.finditer(r"^(\w+) +([\d.]+)", done.stdout, re.M)}
    assert {"general", "vision", "blind"} <= set(rows)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model", "/nowhere"], "there is no such folder"),
        (["--n", "2"], "--model"),
        (["--model", "toy", "--n", "0"], "at least 1"),
        (["--compare", "/nowhere", "/nowhere"], "cannot be read"),
        (["--model", "FOLDER", "--data", "/nowhere.jsonl"], "no such file"),
    ],
)
def test_bad_input(flags, words, folder, tmp_path):
    out = ["--out", tmp_path / "r.jsonl"] if "FOLDER" in flags else []
    done = command("eval.py", *(folder if f == "FOLDER" else f for f in flags), *out)
    assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr


def test_following_a_wrong_hint_is_counted_where_there_is_one():
    def line(text, hint, right):
        example = Example("a", "q", "4", [], tags={"hint": hint, "hint_right": right})
        rollout = Rollout([torch.tensor([1])], [torch.zeros(1)], [True], [text])
        return line_of(example, rollout, 0, {"accuracy": 0.0, "format": 1.0})

    followed = line("a friend says 3 \\boxed{ 3 }", "3", False)
    ignored = line("\\boxed{ 4 }", "3", False)
    no_answer = line("nothing", "3", False)
    right = line("\\boxed{ 4 }", "4", True)
    assert (followed["followed"], ignored["followed"], no_answer["followed"]) == (1, 0, 0)
    assert "followed" not in right  # who follows a right hint cannot be told from who looks
    records = [followed, ignored, no_answer, right]
    assert summarise([dict(r, id=i) for i, r in enumerate(records)])["followed"] == 1 / 3
    assert "followed" not in summarise([dict(right, id=0)])
    tables = [table({"set": summarise(rows)}) for rows in ([followed, ignored], [right])]
    assert "50.0%" in tables[0][1] and "wrong hint" in tables[0][0]
    assert "wrong hint" not in tables[1][0]


def written(path, records):
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8")
    return path


def test_the_released_evaluations_files_are_rescored(tmp_path):
    """idx, id, prompt, predict and label, no set and no grade; a text with a line separator in it,
    and a response that is null."""
    said = "<think>a\u2028b</think> \\boxed{3}"
    records = [
        {"idx": i, "id": f"q{i // 2}", "prompt": "?", "predict": said, "label": 3} for i in range(4)
    ]
    records[3]["predict"] = None
    file = written(tmp_path / "released.jsonl", records)
    with pytest.raises(SystemExit, match="not graded; eval.py --rescore grades them"):
        compare(file, file, tmp_path / "chart.png")
    lines = rescore(file, tmp_path / "graded.jsonl")
    assert any(line.startswith("released") and " 75.0" in line for line in lines)
    graded = read(tmp_path / "graded.jsonl")["released"]
    assert [r["accuracy"] for r in graded] == [1, 1, 1, 0] and graded[0]["predict"] == said
    compare(tmp_path / "graded.jsonl", tmp_path / "graded.jsonl", tmp_path / "chart.png")


def test_lines_that_cannot_be_read_are_counted(tmp_path, capsys):
    good = {"id": "q", "predict": "3", "label": "3"}
    file = written(tmp_path / "some.jsonl", [good, {"id": "q"}, [1], good])
    with open(file, "a") as f:
        f.write('\n{"id": "q", "pre')
    assert len(read(file)["some"]) == 2
    said = capsys.readouterr()
    assert "2 of 5 lines" in said.out + said.err and "line 2" in said.out + said.err
    with pytest.raises(SystemExit, match="no line with id, predict and label"):
        read(written(tmp_path / "none.jsonl", [{"id": "q"}] * 2))
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    with pytest.raises(SystemExit, match="cannot be read"):
        read(tmp_path / "latin.jsonl")


@pytest.mark.slow
def test_a_set_of_which_nothing_can_be_asked_is_a_sentence(folder, tmp_path):
    """Its pictures are whole in their headers, which is what the check looks at, and end there."""
    picture = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(picture, "PNG")
    cut = base64.b64encode(picture.getvalue()[:-200]).decode()
    row = {"problem": "<image> how many ?", "answer": "3", "images": [cut]}
    file = tmp_path / "cut.jsonl"
    file.write_text(json.dumps(row) + "\n")
    flags = ["--model", folder, "--sampler", "hf", "--data", file, "--out", tmp_path / "a.jsonl"]
    done = command("eval.py", *flags)
    assert done.returncode == 1 and done.stderr.endswith(
        "error: cut: no question can be asked; the warnings above say why\n"
    )
    flags = ["--model", folder, *SMALL, "--steps", 1, "--data", "toy", "--val_data", file]
    done = command("train.py", *flags, "--out", tmp_path / "run")
    assert done.returncode == 1 and "no question of test can be asked" in done.stderr
