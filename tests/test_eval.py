"""The evaluation command, and the arithmetic of its tables."""

import base64
import html
import io
import json
import random
import re
from functools import partial

import pytest
import torch
from conftest import ROOT, jsonl, lines_of, run_here, train_here
from PIL import Image

import eval as program
from plumbing.data.prompts import Example
from plumbing.data.sources import BENCHMARKS
from plumbing.report.ask import painted
from plumbing.report.compare import compare, paired_test, relative_gain, rescore
from plumbing.report.responses import accuracy_table, macro, read, summarise
from rollout import Rollout
from toy.task import ToyData


def record(question, accuracy, format=1.0, finished=True):
    about = {"format": format, "finished": finished, "tokens": 10}
    return {"id": question, "accuracy": accuracy, **about}


def test_avg_at_n_is_the_mean_over_questions_of_the_mean_over_responses():
    given = [("a", 1.0), ("a", 0.0), ("b", 1.0), ("b", 1.0, 0.0, False), ("c", 0.0), ("c", 0.0)]
    s = summarise([record(*numbers) for numbers in given])
    assert s["accuracy"] == 0.5 and s["questions"] == 3 and s["n"] == 2
    assert s["pass"] == pytest.approx(2 / 3) and s["cut_off"] == pytest.approx(1 / 6)
    assert s["format"] == pytest.approx(5 / 6) and s["tokens"] == 10
    assert s["each"] == {"accuracy": [0.5, 1.0, 0.0], "followed": []}  # a question each


def test_the_interval_is_the_textbook_one():
    """400 questions, half of them right: the 95 % interval of a mean is about +-1.96 * 0.5 / 20."""
    s = summarise([record(i, float(i % 2)) for i in range(400)])
    assert [s["low"], s["high"]] == pytest.approx([0.5 - 0.049, 0.5 + 0.049], abs=0.012)
    assert s == summarise([record(i, float(i % 2)) for i in range(400)])  # and repeats


# Table 1 of the paper: nine sets in the order of plumbing.data.sources.BENCHMARKS, and the averages
# that it prints: General, Vision, Overall.
TABLE_1 = """
GRPO-3B   28.72 59.34 58.90 57.24 55.25 38.14 55.81 25.66 52.26 51.89 42.97 47.92
PAPO_G-3B 30.95 61.38 60.09 57.39 57.14 38.67 62.56 27.11 53.95 53.39 45.57 49.92
GRPO-7B   40.18 65.48 68.12 72.26 66.51 45.62 73.94 35.17 61.71 62.51 54.11 58.78
PAPO_G-7B 40.25 69.53 66.79 72.52 68.43 46.07 89.81 36.63 64.97 63.50 59.37 61.66
DAPO-3B   31.20 60.89 59.95 66.83 56.25 40.69 74.25 28.42 53.09 55.02 49.11 52.40
PAPO_D-3B 35.65 62.53 62.67 64.09 60.51 41.67 83.56 28.76 57.72 57.09 52.93 55.24
DAPO-7B   35.92 61.91 58.51 75.93 55.64 37.05 90.05 29.02 51.04 57.58 51.79 55.01
PAPO_D-7B 44.11 67.53 68.30 80.61 68.58 46.70 91.38 36.34 64.87 65.83 59.82 63.16
GRPO-2B   39.29 53.58 57.12 47.71 47.98 29.84 80.13 20.51 45.41 49.13 43.97 46.84
PAPO_G-2B 41.08 56.08 59.17 48.57 51.89 32.83 80.63 23.42 50.05 51.36 46.73 49.30
"""
TABLE_1 = {row.split()[0]: [*map(float, row.split()[1:])] for row in TABLE_1.strip().splitlines()}
# The paper's relative gains, and what its own numbers give where that is not what it prints.
GAINS = {
    ("GRPO-3B", "PAPO_G-3B"): (3.38, 5.60, 4.36),
    ("GRPO-7B", "PAPO_G-7B"): (1.53, 7.96, 4.39),
    ("DAPO-3B", "PAPO_D-3B"): (5.00, 6.22, 5.54),
    ("DAPO-7B", "PAPO_D-7B"): (15.61, 19.96, 17.54),  # printed: 5.97 and 19.09
    ("GRPO-2B", "PAPO_G-2B"): (4.55, 8.76, 6.42),  # printed: 4.52, 6.27 and 5.25
}


by_set = lambda row: dict(zip(BENCHMARKS, TABLE_1[row]))


def test_averages_are_those_of_table_1():
    for row, numbers in TABLE_1.items():  # some are cut off, not rounded
        assert [*macro(by_set(row)).values()] == pytest.approx(numbers[9:], abs=0.011), row
    for pair, printed in GAINS.items():
        gains = macro(relative_gain(*map(by_set, pair)))
        assert list(gains.values()) == pytest.approx(printed, abs=0.012), pair
    missing = by_set("GRPO-3B") | {"counting": None}
    assert list(macro({k: v for k, v in missing.items() if v})) == ["General"]


def test_a_page_says_what_the_released_checkpoints_are_to_come_to():
    page = (ROOT / "docs" / "evaluation.md").read_text()
    rows = re.findall(r"^\| `PAPOGalaxy/\S+` \| (\S+) \| (.+) \|$", page, re.M)
    assert len(rows) == 5
    assert all([*map(float, x.split(" | "))] == TABLE_1[row][9:] for row, x in rows)


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


row_of = lambda name, text: next(x.split() for x in text.splitlines() if x.split()[:1] == [name])


run = partial(run_here, program.main)


@pytest.fixture(scope="module")
def answered(folder, tmp_path_factory):
    """A finished evaluation: its flags, output and file."""
    out = tmp_path_factory.mktemp("eval") / "responses.jsonl"
    flags = ["--model", folder, "--sampler", "hf", "--n", 2, "--questions", 8, "--out", out]
    return flags, run(*flags), out


def test_the_command(answered):
    _, stdout, out = answered
    lines = lines_of(out)
    assert len(lines) == 3 * 8 * 2 and {r["split"] for r in lines} == {"general", "vision", "blind"}
    assert all({"id", "prompt", "predict", "label"} <= set(r) for r in lines)
    for split in ("general", "vision", "blind"):
        mean = sum(r["accuracy"] for r in lines if r["split"] == split) / 16
        assert row_of(split, stdout)[1] == f"{100 * mean:.1f}"
    assert "temperature 1.0, top_p 1.0" in stdout and "pass@n" in stdout


def test_a_stopped_evaluation_goes_on_where_it_stopped(answered, tmp_path):
    """Cut the file in the middle of a question and of a line: the rest is sampled again."""
    (*flags, _), stdout, out = answered
    copy, settings = tmp_path / "responses.jsonl", tmp_path / "responses.settings.json"
    copy.write_text("\n".join([*out.read_text().splitlines()[:41], '{"split": "gen']))
    settings.write_text(out.with_name(settings.name).read_text())
    order = lambda path: sorted(map(json.dumps, lines_of(path)))
    again = run(*flags, copy)
    assert order(copy) == order(out) and again.splitlines()[:-1] == stdout.splitlines()[:-1]
    assert run(*flags, copy) == again  # nothing is left to do: no model is loaded
    with pytest.raises(SystemExit, match=r"another evaluation: seed \(1 then, 2 now\); give"):
        run(*flags, copy, "--seed", 2)
    settings.unlink()
    with pytest.raises(SystemExit, match="which describes it, does not; give another --out"):
        run(*flags, copy)  # what cannot be recognised is not overwritten
    assert order(copy) == order(out)


def test_rescore_and_compare(answered, tmp_path):
    _, stdout, out = answered
    done = run("--rescore", out, "--out", tmp_path / "again.jsonl")
    assert row_of("vision", done) == row_of("vision", stdout)
    better = jsonl(tmp_path / "better.jsonl", [{**r, "accuracy": 1.0} for r in lines_of(out)])
    said = run("--compare", out, better)
    row = row_of("vision", said)
    assert said.startswith(f"first: {out}, second: {better}\n")
    assert float(row[2]) == 100 and float(row[7]) < 0.05
    assert float(row[3]) == pytest.approx(100 - float(row[1]), abs=0.01)


def test_blind_is_a_black_picture(answered, tmp_path):
    """The same draws: what was seen without a picture already stays, and the rest does not."""
    (*flags, _), _, out = answered
    black = tmp_path / "black.jsonl"
    assert "every picture black" in run(*flags, black, "--blind")
    texts = lambda file, split: [r["predict"] for r in lines_of(file) if r["split"] == split]
    assert texts(out, "blind") == texts(black, "blind") != []
    assert texts(out, "vision") != texts(black, "vision")


def test_a_question_about_ones_own_picture(folder, tmp_path):
    """The words in the terminal are those of the page; a darker one depends more on the picture."""
    picture, page = tmp_path / "a.png", tmp_path / "page.html"
    ToyData("vision", 1)[0].images[0].save(picture)
    asked = ["--ask", picture, "how many circles are there ?", "--n", 2, "--out", page]
    warned, *lines = run("--model", folder, *asked).splitlines()
    assert "does not know" in warned and "what is asked" in warned  # its own words, all but BOXED's
    text = page.read_text()
    found = re.findall('<span style="--s:(.+?)" title=".+? nats">(.*?)</span>', text, re.S)
    assert len(lines) == 3 and lines[2] == f"written: {page}"
    assert html.unescape("".join(word for _, word in found)) == "".join(lines[:2])
    assert text.count("data:image/png") == 2 and "how many circles" in text
    assert len({shade for shade, _ in found}) > 1 and "reward" not in text
    coloured = painted([("a", 0.0, 0.0), ("b\x1b", 3.0, 1.0)], True)
    assert "48;2;255;255;255ma" in coloured and "48;2;255;140;0mb\\x1b\x1b[0m" in coloured
    with pytest.raises(SystemExit, match="--ask: example b.png: .* is no file"):
        run("--model", folder, "--ask", tmp_path / "b.png", "what ?")


def test_a_checkpoint_of_a_script_of_ones_own_gets_a_sentence(folder, tmp_path):
    (tmp_path / "config.json").write_text('{"config": {"reward": "brief"}}')
    (tmp_path / "checkpoint-1").symlink_to(folder)
    with pytest.raises(SystemExit, match="--reward brief is not among .*import SCRIPT, eval"):
        run("--model", tmp_path / "checkpoint-1")


def test_bad_input(folder, tmp_path):
    for flags, words in (
        (["--model", "/nowhere", "--data", "toy,geo3kk"], "--data geo3kk: .* geo3k may be meant"),
        (["--model", "/nowhere"], "there is no such folder"),
        (["--n", "2"], "--model"),
        (["--model", "toy", "--n", "0"], "at least 1"),
        (["--compare", "/nowhere", "/nowhere"], "cannot be read"),
        (["--model", folder, "--data", "/nowhere.jsonl", "--out", tmp_path / "r"], "no such file"),
    ):
        with pytest.raises(SystemExit, match=words):
            run(*flags)


def test_following_a_wrong_hint_is_counted_where_there_is_one():
    def line(text, hint, right):
        example = Example("a", "q", "4", [], tags={"hint": hint, "hint_right": right})
        rollout = Rollout([torch.tensor([1])], [torch.zeros(1)], [True], [text])
        return program.record(example, rollout, 0, {"accuracy": 0.0, "format": 1.0})

    texts = "a friend says 3 \\boxed{ 3 }", "\\boxed{ 4 }", "nothing"
    wrong = [line(text, "3", False) for text in texts]
    assert [r["followed"] for r in wrong] == [1, 0, 0]
    right = line("\\boxed{ 4 }", "4", True)  # who follows it cannot be told from who looks
    assert summarise([*wrong, right])["followed"] == 1 / 3
    assert summarise([*wrong, {**right, "id": "b"}])["each"]["followed"] == [1 / 3]
    assert "followed" not in right and "followed" not in summarise([right])
    tables = [accuracy_table({"set": summarise(rows)}) for rows in (wrong[:2], [right])]
    assert tables[0][1].endswith("  50.0") and "wrong hint" in tables[0][0]
    assert "wrong hint" not in tables[1][0]


def test_the_released_evaluations_files_are_rescored(tmp_path):
    """No set and no grade; a text with a line separator in it, and a response that is null."""
    said = "<think>a\u2028b</think> \\boxed{3}"
    whole = {"prompt": "?", "predict": said, "label": 3}
    records = [{"idx": i, "id": f"q{i // 2}", **whole} for i in range(4)]
    records[3]["predict"] = None
    file = jsonl(tmp_path / "released.jsonl", records)
    with pytest.raises(SystemExit, match="not graded; eval.py --rescore grades them"):
        compare(file, file)
    lines = rescore(file, tmp_path / "graded.jsonl")
    assert any(line.startswith("released") and " 75.0" in line for line in lines)
    graded = read(tmp_path / "graded.jsonl")["released"]
    assert [r["accuracy"] for r in graded] == [1, 1, 1, 0] and graded[0]["predict"] == said
    compare(tmp_path / "graded.jsonl", tmp_path / "graded.jsonl")


def test_lines_that_cannot_be_read_are_counted(tmp_path, capsys):
    good = {"id": "q", "predict": "3", "label": "3"}
    odd = [{"predict": {"text": "3"}}, {"label": ["3", "4"]}, {"accuracy": "?"}]
    odd += [{"label": ["3"], "predict": ["\\boxed{3}"]}]
    file = jsonl(tmp_path / "odd.jsonl", [good | x for x in odd])
    rescore(file, tmp_path / "new" / "out.jsonl")  # a list of one is its item, as in training data
    assert [r["accuracy"] for r in read(tmp_path / "new" / "out.jsonl")["odd"]] == [1]
    assert "3 of 4 lines" in capsys.readouterr().out
    file = jsonl(tmp_path / "some.jsonl", [good, {"id": "q"}, [1], good])
    file.write_text(file.read_text() + '\n{"id": "q", "pre')
    assert len(read(file)["some"]) == 2
    assert f"2 of 5 lines of {file} cannot be read, the first is line 2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no line with id, predict and label"):
        read(jsonl(tmp_path / "none.jsonl", [{"id": "q"}] * 2))
    file.write_bytes(b"\xe9")
    with pytest.raises(SystemExit, match="cannot be read"):
        read(file)


@pytest.mark.slow
def test_a_set_of_which_nothing_can_be_asked_is_a_sentence(folder, tmp_path):
    """Its pictures are whole in their headers, which is what the check looks at, and end there."""
    picture = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(picture, "PNG")
    cut = base64.b64encode(picture.getvalue()[:-200]).decode()
    row = {"problem": "<image> how many ?", "answer": "3", "images": [cut]}
    model, file = ["--model", folder], jsonl(tmp_path / "cut.jsonl", [row])
    with pytest.raises(SystemExit, match="cut: no question can be asked; the warnings above say"):
        run(*model, "--sampler", "hf", "--data", file, "--out", tmp_path / "a.jsonl")
    with pytest.raises(SystemExit, match="no question of test can be asked"):
        train_here(*model, "--data", "toy", "--val_data", file, "--out", tmp_path / "run")
