"""The evaluation command, and the arithmetic of its table."""
import json

import pytest

from conftest import command
from eval import summarise


def record(question, accuracy, **more):
    return {"id": question, "accuracy": accuracy, "format": 1.0, "finished": True, "tokens": 10, **more}


def test_avg_at_n_is_the_mean_over_questions_of_the_mean_over_responses():
    s = summarise([record("a", 1.0), record("a", 0.0), record("b", 1.0), record("b", 1.0, finished=False, format=0.0)])
    assert s["accuracy"] == 0.75 and s["questions"] == 2 and s["n"] == 2
    assert s["cut_off"] == 0.25 and s["format"] == 0.75 and s["tokens"] == 10


def test_the_interval_is_the_textbook_one():
    """400 questions, half of them right: the 95 % interval of a mean is about +-1.96 * 0.5 / 20."""
    s = summarise([record(i, float(i % 2)) for i in range(400)])
    assert s["low"] == pytest.approx(0.5 - 0.049, abs=0.012) and s["high"] == pytest.approx(0.5 + 0.049, abs=0.012)
    assert s == summarise([record(i, float(i % 2)) for i in range(400)])       # and repeats


def test_the_command(folder, tmp_path):
    flags = ["--model", folder, "--n", 2, "--questions", 8, "--out", tmp_path / "responses.jsonl"]
    done = command("eval.py", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 8 * 2 and {r["split"] for r in lines} == {"general", "vision", "blind"}
    for split in ("general", "vision", "blind"):
        mean = sum(r["accuracy"] for r in lines if r["split"] == split) / 16
        assert f"{split:<12}{100 * mean:>8.1f}" in done.stdout
    again = command("eval.py", *flags)
    assert again.stdout == done.stdout                                         # same seed, same responses
    assert "temperature 1.0, top_p 1.0" in done.stdout


def test_a_parquet_file_is_a_data_set(folder, tmp_path):
    """The columns of the released sets: problem, answer, images (as bytes)."""
    import io

    from datasets import Dataset
    from toy import ToyData
    rows = []
    for example in (ToyData("val", 4)[i] for i in range(4)):
        buffer = io.BytesIO()
        example.images[0].save(buffer, "PNG")
        rows.append({"problem": example.problem, "answer": example.answer, "images": [{"bytes": buffer.getvalue()}]})
    Dataset.from_list(rows).to_parquet(tmp_path / "small.parquet")
    done = command("eval.py", "--model", folder, "--data", tmp_path / "small.parquet", "--n", 2, "--out", tmp_path / "r.jsonl")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize("flags, words", [
    (["--model", "/nowhere"], "neither a folder"), (["--n", "2"], "--model"), (["--model", "toy", "--n", "0"], "at least 1")])
def test_bad_input(flags, words):
    done = command("eval.py", *flags)
    assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr
