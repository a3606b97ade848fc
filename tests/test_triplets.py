"""Triplets: positives and negatives of the right classes, drawn under names, bytes as they were."""

import collections
import random
import re

import pytest

pytest.importorskip("fine_r1")

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from conftest import jsonl, lines_of, run_here
from datasets import Image as Picture
from datasets import load_dataset
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from fine_r1.triplets import ASK, look_alikes, main, with_options
from plumbing.data.pictures import rgb
from plumbing.data.sources import Rows

# Two pairs of look-alikes: discs on white and crosses on grey, each in two shades.
CLASSES = {
    "amber disc": (255, 190, 0),
    "golden disc": (235, 170, 20),
    "navy cross": (0, 10, 120),
    "indigo cross": (30, 0, 140),
}
TWIN = dict(zip(CLASSES, ["golden disc", "amber disc", "indigo cross", "navy cross"]))


def picture(name, rng):
    """A picture of a class, of another size and with its shape at another place each time."""
    disc, size = name.endswith("disc"), (rng.randint(60, 90), rng.randint(60, 90))
    image = Image.new("RGB", size, "white" if disc else (60, 60, 60))
    pen, x, y = ImageDraw.Draw(image), rng.randint(2, 20), rng.randint(2, 20)
    for box in [(0, 0, 38, 38)] if disc else [(0, 14, 38, 22), (14, 0, 22, 38)]:
        corners = [a + b for a, b in zip(box, (x, y, x, y))]
        (pen.ellipse if disc else pen.rectangle)(corners, fill=CLASSES[name])
    return image


def draw_rows(folder, n=5, seed=0):
    """n rows of each class, and their pictures as JPEG files in a folder."""
    rng, rows = random.Random(seed), []
    folder.mkdir(exist_ok=True)
    for i in range(n):
        for name in CLASSES:
            file = f"{name}-{seed}-{i}.jpg"
            picture(name, rng).save(folder / file, quality=87)
            rows.append({"problem": "<image>Which?", "answer": name, "images": [file], "n": i})
    return rows


def bytes_of(folder, row):
    return (folder / row["images"][0]).read_bytes()


@pytest.fixture
def run(dino):
    """The command line, in this process -> the rows of the file that it writes."""

    def run(data, out, *flags, encoder=dino):
        print(run_here(main, data, "--out", out, "--encoder", encoder, *flags))
        return pq.read_table(out).to_pylist()

    return run


def test_positives_and_negatives_are_of_the_right_classes(tmp_path, run, capsys):
    rows = draw_rows(tmp_path)
    out = tmp_path / "new" / "triplets.parquet"
    new = run(jsonl(tmp_path / "rows.jsonl", rows), out)
    known = {bytes_of(tmp_path, row): row["answer"] for row in rows}
    assert len(new) == len(rows) == len(known) == 20
    for before, row in zip(rows, new):
        assert all(row[k] == before[k] for k in ("problem", "answer", "n"))
        own = bytes_of(tmp_path, before)
        assert [p["bytes"] for p in row["images"]] == [own]  # the file lies in another folder
        positive, negative = row["positive"]["bytes"], row["negative"]["bytes"]
        assert positive != own and known[positive] == before["answer"]
        assert known[negative] == TWIN[before["answer"]]
    shown = capsys.readouterr().out
    told = re.findall(r"^(\d\.\d{4})  (.+) with (.+)$", shown, re.M)
    assert {name: other for _, name, other in told} == TWIN
    assert [v for v, _, _ in told] == sorted((v for v, _, _ in told), reverse=True)
    assert "without a positive" not in shown


def test_the_file_is_read_as_any_other(tmp_path, run):
    rows, file = draw_rows(tmp_path, 2), tmp_path / "triplets.parquet"
    first = run(jsonl(tmp_path / "rows.jsonl", rows), file)
    for before, example in zip(rows, Rows(file, "train")):
        assert example.answer == before["answer"] and example.problem.startswith("<image>Which?")
        assert rgb(example.images[0]).size == Image.open(tmp_path / before["images"][0]).size
    found = load_dataset("parquet", data_files=str(file), split="train")
    assert found.features["positive"] == found.features["negative"] == Picture()
    # Mined again, the columns are replaced, and other pictures stay as they are.
    found.rename_column("negative", "other").to_parquet(tmp_path / "other.parquet")
    again = run(tmp_path / "other.parquet", tmp_path / "again.parquet", "--seed", 5)
    assert list(again[0]) == ["problem", "answer", "images", "n", "positive", "other", "negative"]
    assert [row["other"] for row in again] == [row["negative"] for row in first]


def test_a_seed_says_it_all(tmp_path, run):
    data = jsonl(tmp_path / "rows.jsonl", draw_rows(tmp_path))
    first = run(data, tmp_path / "a.parquet", "--options", 3)
    assert run(data, tmp_path / "b.parquet", "--options", 3) == first
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    other = run(data, tmp_path / "c.parquet", "--options", 3, "--seed", 2)
    for column in ("problem", "positive", "negative"):
        assert [row[column] for row in other] != [row[column] for row in first]


def test_the_truth_stands_at_each_place_equally_often():
    classes, places = ["truth", "x", "y", "z"], collections.Counter()
    for row in range(4000):
        lines = with_options("?", classes, 1, "options", row).split("\n")[-4:]
        assert sorted(line[3:] for line in lines) == sorted(classes)
        places[[line[3:] for line in lines].index("truth")] += 1
    # A share of 1 / 4 of 4000: mean 1000, standard deviation 27.
    assert all(abs(places[k] - 1000) < 110 for k in range(4))


def test_unseen_classes_have_a_file_of_their_own(tmp_path, run):
    """Neither file shows a picture, or names a class, of the other; and another split of the same
    classes, in another order, has the same unseen ones."""
    rows = draw_rows(tmp_path, 3)
    run(jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "t.parquet", "--unseen", 2, "--options", 2)
    known = {bytes_of(tmp_path, row): row["answer"] for row in rows}
    files = [pq.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("t", "t_unseen")]
    seen, unseen = ({row["answer"] for row in file} for file in files)
    assert len(seen) == len(unseen) == 2 and seen | unseen == set(CLASSES)
    for file, own in zip(files, (seen, unseen)):
        assert len(file) == 6
        for row in file:
            assert {known[row[c]["bytes"]] for c in ("positive", "negative")} == own
            assert known[row["positive"]["bytes"]] == row["answer"]
            listed = row["problem"].partition(ASK + "\n")[2].split("\n")
            assert {line.partition(". ")[2] for line in listed} == own
    other = jsonl(tmp_path / "other.jsonl", draw_rows(tmp_path, 2, 1)[::-1])
    test = run(other, tmp_path / "test.parquet", "--unseen", 2)
    assert {row["answer"] for row in test} == seen


def test_look_alikes_are_ranked_by_the_cosine():
    means = {"a": [1.0, 0.0], "b": [3.0, 3.0], "c": [0.0, 5.0], "d": [-1.0, 0.1]}
    found = look_alikes({name: torch.tensor(m) for name, m in means.items()}, 3)
    assert [name for name, _ in found["a"]] == ["b", "c", "d"]
    assert [c for _, c in found["a"]] == pytest.approx([0.7071, 0, -0.9950], abs=1e-4)
    assert [name for name, _ in found["d"]] == ["c", "b", "a"]


def test_several_questions_about_a_picture(tmp_path, run, capsys):
    """Its positive is another picture, and it counts once in the mean of its class."""
    rows, told = draw_rows(tmp_path, 2), []
    for some in (rows, rows + [row | {"problem": "<image>What?"} for row in rows]):
        new = run(jsonl(tmp_path / "rows.jsonl", some), tmp_path / "t.parquet")
        assert len(new) == len(some)
        assert all(row["positive"]["bytes"] != row["images"][0]["bytes"] for row in new)
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] and "written" in told[0]


def test_a_class_of_one_picture_and_rows_that_cannot_be_used(tmp_path, run, capsys):
    rows = [r for r in draw_rows(tmp_path, 3) if r["answer"] != "navy cross" or r["n"] == 0]
    (tmp_path / rows[0]["images"][0]).write_bytes(b"\xff\xd8 no picture")
    rows += [rows[1] | {"images": rows[1]["images"] * 2}, rows[1] | {"answer": " "}]
    new = run(jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "t.parquet")
    why = {x["row"]: x["why"] for x in lines_of(tmp_path / "left_out-rows-train.jsonl")}
    assert "a picture cannot be read" in why.pop(0)
    assert why == {10: "2 pictures; a row of triplets has one", 11: "the answer is empty"}
    alone = [row for row in new if row["positive"] is None]
    assert len(new) == 9 and [row["answer"] for row in alone] == ["navy cross"]
    told = "rows without a positive, their class having one picture: 1 (navy cross)"
    assert alone[0]["negative"] and told in capsys.readouterr().out


def test_other_columns_and_pictures_in_the_file(tmp_path, run):
    rows = draw_rows(tmp_path, 2)
    original = [bytes_of(tmp_path, row) for row in rows]
    columns = {"question": [r["problem"] for r in rows], "class": [r["answer"] for r in rows]}
    columns["photo"] = [{"bytes": b, "path": None} for b in original]
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    flags = "--columns question,class,photo".split()
    new = run(tmp_path / "rows.parquet", tmp_path / "t.parquet", *flags)
    assert [row["photo"][0]["bytes"] for row in new] == original
    assert {row["positive"]["bytes"] for row in new} <= set(original)


def test_what_cannot_be_done_gets_one_sentence(tmp_path, run, dino):
    rows = draw_rows(tmp_path, 1)
    data, out = jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "t.parquet"
    one = jsonl(tmp_path / "one.jsonl", [r for r in rows if r["answer"] == "navy cross"])
    turns = [[{"content": r["problem"]}, {"content": r["answer"]}] for r in rows]
    rows = [{"messages": t, "images": r["images"]} for t, r in zip(turns, rows)]
    chat = jsonl(tmp_path / "chat.jsonl", rows)
    for message, flags in {
        "one.jsonl has one class only, navy cross: it has no negatives": (one, out),
        "--options 5: from 2 to 4, for so many classes": (data, out, "--options", 5),
        "--options 1: from 2 to 4": (data, out, "--options", 1),
        "--unseen 3 of 4 classes: 2 or more have to be": (data, out, "--unseen", 3),
        "--unseen -1 of 4 classes": (data, out, "--unseen", -1),
        "--options 3: from 2 to 2, for": (data, out, "--options", 3, "--unseen", 2),
        "--out .*t.csv: give a name that ends in .parquet": (data, tmp_path / "t.csv"),
        "--options adds to a column of problems; .* has messages": (chat, out, "--options", 2),
        "no column label": (data, out, "--columns", "problem,label,images"),
    }.items():
        with pytest.raises(SystemExit, match=message):
            run(*flags, encoder="/nowhere")  # none is loaded before this is known
    for name in ("bert", "less"):
        (tmp_path / name).mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "less" / "config.json").write_text((dino / "config.json").read_text())
    weights = load_file(dino / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, tmp_path / "less" / "model.safetensors", {"format": "pt"})
    reasons = {"bert": "it is a bert, and no DINOv2", "less": "it lacks 1 weights", "none": ""}
    for name, why in reasons.items():
        with pytest.raises(SystemExit, match=f"--encoder .*{name} cannot be loaded .*{why}"):
            run(data, out, encoder=tmp_path / name)
    assert not out.exists()
    assert len(run(chat, out)) == 4  # a chat's answer is a class too
