"""Pictures of every mode become RGB, and a data set's rows become examples."""

import base64
import copy
import io
import json
import os
import random
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import COPIES, ROOT, SMALL, call, jsonl, lines_of, metrics
from PIL import Image, ImageFile

from plumbing.base.processes import Processes
from plumbing.data import sources
from plumbing.data.pictures import rgb, tokens_from_header
from plumbing.data.prompts import Example, encode
from plumbing.data.sources import BENCHMARKS, Rows, left_out, load, splits_of_files, usable, without
from plumbing.models.families import to_picture
from plumbing.run import setup
from plumbing.run.config import resolve
from reward import FORMS
from toy.task import ToyData


def colour(picture, at=(0, 0)):
    assert picture.mode == "RGB"
    return picture.getpixel(at)


def png(picture, **more):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **more)
    return buffer.getvalue()


def test_pictures_of_every_mode_become_rgb():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([250, 10, 20, 0, 0, 255])  # index 0 of a palette is not black
    assert colour(rgb(palette)) == (250, 10, 20)
    assert colour(rgb(Image.new("L", (4, 4), 90))) == (90, 90, 90)
    assert colour(rgb(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    assert colour(rgb(Image.new("CMYK", (4, 4), (0, 0, 0, 0)))) == (255, 255, 255)
    assert colour(rgb(Image.new("CMYK", (4, 4), (0, 255, 255, 0)))) == (255, 0, 0)


def test_sixteen_bits_are_scaled_not_cut_off():
    levels = np.array([[0, 255, 32896, 65535]], dtype=np.uint16)
    pictures = [Image.fromarray(levels), Image.fromarray(levels.astype(np.int32))]
    for picture in (*pictures, png(pictures[0])):
        assert [colour(rgb(picture), (x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    eight_bits_in_32 = Image.fromarray(np.full((2, 2), 200, np.int32))
    assert colour(rgb(eight_bits_in_32)) == (200, 200, 200)


def test_a_black_drawing_on_nothing_stays_readable():
    drawn = Image.new("RGBA", (4, 4))
    drawn.putpixel((1, 1), (0, 0, 0, 255))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0] * 6)
    palette.putpixel((1, 1), 1)
    for picture in (drawn, drawn.convert("LA"), png(palette, transparency=0)):
        assert colour(rgb(picture)) == (255, 255, 255) and colour(rgb(picture), (1, 1)) == (0, 0, 0)


@pytest.mark.parametrize("size", [(84, 84), (333, 250), (57, 900)])
def test_picture_tokens_are_those_of_the_processor(size, processors):
    """Turned by its camera or not."""
    picture, exif = Image.new("RGB", size), Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter to show
    for data, shown in ((png(picture), size), (png(picture, exif=exif), size[::-1])):
        assert rgb(data).size == shown
        grid = processors[1]([rgb(data)], return_tensors="pt")["image_grid_thw"][0]
        assert tokens_from_header(data, processors[1]) == int(grid.prod()) // 4


LIMITS = [  # the smallest and the largest picture, in tokens
    ((60, 60), 256, 256),
    ((640, 480), 1229, 1280),
    ((4203, 36), 1, 64),
    ((7855, 41), 1, 64),
    *[(None, None, None)] * 60,  # random ones
]


def test_the_engine_sees_the_grid_that_the_trainer_sees(processors):
    """vLLM resizes the picture that it is handed: it must keep its size, or the row is left out."""
    image_processor, seen, rng = copy.deepcopy(processors[1]), 0, random.Random(0)
    for size, low, high in LIMITS:
        if size is None:
            size = tuple(int(10 ** rng.uniform(1, 3.2)) for _ in range(2))
            low = rng.randrange(1, 40)
            high = low + rng.choice([0, 0, 1, 5, 50])
        image_processor.size = {"shortest_edge": low * 784, "longest_edge": high * 784}
        example = Example("x", "<image> ?", "3", [Image.new("RGB", size)])
        try:
            tokens = tokens_from_header(png(example.images[0]), image_processor)
        except ValueError:
            with pytest.raises(ValueError):
                encode(example, processors[0], image_processor)
            continue
        prompt, seen = encode(example, processors[0], image_processor), seen + 1
        assert int(prompt.grid.prod()) == 4 * tokens
        handed = Image.fromarray(to_picture(prompt.pixels, prompt.grid[0], image_processor).numpy())
        again = image_processor([handed], return_tensors="pt")["image_grid_thw"]
        assert (again == prompt.grid).all(), (size, low, high)
    assert seen > len(LIMITS) / 2


def parquet(path, rows):
    """A file as the released sets are: pictures as an Image feature that holds bytes."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    kinds = {str: Value("string"), list: List(ImageFeature())}
    features = Features({name: kinds[type(value)] for name, value in rows[0].items()})
    cache = str(path.parent / "cache")
    data = Dataset.from_generator(lambda: iter(rows), features=features, cache_dir=cache)
    data.to_parquet(path, batch_size=500)
    return path


def example_rows(n=8, split="train"):
    return [
        {"id": f"r{i}", "problem": e.problem, "answer": e.answer, "images": [png(e.images[0])]}
        for i, e in enumerate(ToyData(split, n)[j] for j in range(n))
    ]


BROKEN = {
    "cannot be read": dict(images=[b"\x89PNG not a picture"]),
    "more than --max_prompt_tokens 256": dict(problem="<image> " + "red " * 400),
    "2 <image> placeholders but 1 pictures": dict(problem="<image> and <image> same ?"),
    "answer is empty": dict(answer=" "),
    "300 x 400 pixels is too large": dict(images=[png(Image.new("1", (300, 400)))]),
}


def test_second_pictures_are_read_from_the_columns_that_are_registered(tmp_path, monkeypatch):
    monkeypatch.setitem(sources.SECOND, "other", ("missing", "counterpart"))
    red, blue = (png(Image.new("RGB", (30, 30), c)) for c in ("red", "blue"))
    rows = [{"problem": "<image> ?", "answer": "1", "images": [red], "counterpart": [blue]}]
    rows.append({"problem": "?", "answer": "2", "images": [], "counterpart": []})
    data = Rows(parquet(tmp_path / "rows.parquet", rows), "train")
    assert colour(rgb(data[0].images[0])) == (255, 0, 0)
    assert colour(rgb(data[0].seconds["other"][0])) == (0, 0, 255)
    assert data[1].images == data[1].seconds["other"] == []


def test_a_data_set_that_is_made_registers_itself(tmp_path, monkeypatch):
    """Its name is all that --data needs. What is read has an instruction at the end."""

    def squares(split, size, seed, cfg):
        return [Example(f"{split}-{i}", f"{i} ^ 2 ?", str(i * i)) for i in range(min(size, 3))]

    mine = sources.DataSet(squares, {"hard": "large numbers"}, validation="easy")
    monkeypatch.setitem(sources.DATA_SETS, "squares", mine)
    rows = [{"problem": "?", "answer": "3", "images": []}]
    flags = {"model": "toy", "val_data": "squares", "reward": "tagged"}
    flags["data"] = str(jsonl(tmp_path / "rows.jsonl", rows))
    train, held_out = setup.open_data(resolve(flags, False)[0])
    assert train[0].problem == "?" + FORMS["tagged"].instruction
    ids = {split: data[2].id for split, data in held_out.items()}
    assert ids == {"easy": "easy-2", "hard": "hard-2"}
    assert sources.splits_of("rows.jsonl") == ["test"] == [sources.validation_split("rows.jsonl")]


def test_pictures_are_not_written_to_the_disk_a_second_time(tmp_path):
    """`datasets` makes an Arrow file of a parquet file; reading pictures as bytes adds no other."""
    rows = [{**r, "images": [os.urandom(500_000)]} for r in example_rows(4)]
    path = parquet(tmp_path / "rows.parquet", rows)
    before = set(Path(COPIES.name).rglob("*"))
    data = Rows(str(path), "train")
    assert data[0].images[0]["bytes"] == rows[0]["images"][0]
    written = [f for f in Path(COPIES.name).rglob("*") if f.is_file() and f not in before]
    assert 1 <= sum(f.stat().st_size for f in written) / 2e6 < 1.1


FOLDERS = {
    "train/0000.parquet test/0000.parquet": "train test",
    "data/train/0000.parquet data/validation/0000.parquet": "train validation",
    "geo_train.jsonl geo_test.jsonl": "train test",
    "data/train-00000-of-00001.parquet data/mini-00000-of-00001.parquet": "train mini",
    "contest.parquet restraining.parquet": "",
    "train.jsonl extra.jsonl": "train",
    "rows.jsonl dataset_infos.json README.md .cache/test.jsonl": "",
    "dev/a.jsonl training/a.jsonl": "validation train",
    "test/train-0.parquet": "test",
}


@pytest.mark.parametrize("files", FOLDERS)
def test_the_splits_of_a_folder_are_those_that_datasets_infers(files, tmp_path):
    from datasets.data_files import DataFilesDict, get_data_patterns

    # The name of the folder itself, or of one above it, says nothing of splits.
    folder = tmp_path / "test" / "train-set"
    for file in files.split():
        jsonl(folder / file, [{}])
    ours = {split: set(map(str, found)) for split, found in splits_of_files(folder).items()}
    assert set(ours) == set(FOLDERS[files].split() or [""])
    patterns = get_data_patterns(str(folder))
    theirs = DataFilesDict.from_patterns(patterns, base_path=str(folder))
    if "" in ours:
        theirs = {"": theirs["train"]}  # there every file is a training file then
    assert ours == {str(k): set(v) for k, v in theirs.items()}
    jsonl(folder / "images" / "train_test" / "1.png", [{}])  # beside rows, pictures say nothing
    assert set(splits_of_files(folder)) == set(ours)


def test_no_row_of_another_split_is_read(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = example_rows(7)
    for file, part in [("train-0", rows[:3]), ("train-1", rows[3:4]), ("test-0", rows[4:6])]:
        parquet(tmp_path / f"{file}.parquet", part)
    assert [len(Rows(tmp_path, split)) for split in ("train", "test")] == [4, 2]
    assert len(Rows(f"{tmp_path}@eval", "train")) == 2  # a word that `datasets` takes for test
    # A file, or files that no name sorts, are whatever is wanted.
    alone = parquet(tmp_path / "a@b.parquet", rows[6:])
    assert len(Rows(alone, "test")) == 1
    both, one = tmp_path / "both", tmp_path / "one"
    sets = {k: Dataset.from_list(rows[:n]) for k, n in (("train", 3), ("validation", 2))}
    DatasetDict(sets).save_to_disk(both)
    sets["train"].save_to_disk(one)
    assert [len(Rows(x, "train")) for x in (both, f"{both}@val", one)] == [3, 2, 3]
    jsonl(tmp_path / "mixed" / "train_test" / "a.jsonl", [{}])
    parquet(jsonl(tmp_path / "kinds" / "a.jsonl", [{}]).with_name("b.parquet"), rows[:1])
    for name, why in {
        f"{both}@x": "it has train, validation and not x; @train at the end picks one",
        f"{alone}@test": "nothing in it is called test",
        both: "it has train, validation and not test",
        tmp_path / "mixed": "train_test/a.jsonl could be train or test",
        tmp_path / "kinds": "it holds json and parquet files; give one of them",
    }.items():
        with pytest.raises(SystemExit, match=why):
            load(str(name), "test", 0, 0)


def test_rows_to_validate_on_that_are_trained_on_are_named(tmp_path, capsys):
    rows = example_rows(6)
    train = Rows(parquet(tmp_path / "train.parquet", rows[:4]), "train")
    # The same text with another picture is another question; a picture is its bytes.
    other = rows[1] | {"images": rows[2]["images"]}
    parquet(tmp_path / "test.parquet", [rows[4], rows[3], other, rows[0]])
    held_out = Rows(f"{tmp_path}@test", "train")  # one folder's splits share a name
    text = [row | {"images": [base64.b64encode(row["images"][0]).decode()]} for row in rows]
    text = [text[5], text[2], text[3] | {"problem": None}]
    texts = Rows(jsonl(tmp_path / "text.jsonl", text), "train")
    folder = f"2 of 4 rows of {tmp_path.name}"
    for data, same in ((held_out, folder), (texts, "1 of 3 rows of text")):
        sources.warn_of_shared_rows(without(train, {}), without(data, {2}))
        named = f"{same} ({data.split}) are in train (train) too, the first is row 1"
        assert named in capsys.readouterr().out
    sources.warn_of_shared_rows(without(train, {}), without(held_out, {1, 3}))
    assert capsys.readouterr().out == ""


def test_columns_and_ids_have_names(tmp_path):
    row = {"question": "<image> ?", "label": 3, "pictures": "a"}
    other = jsonl(tmp_path / "other.jsonl", [row])
    example = Rows(other, "train", ("question", "label", "pictures"))[0]
    assert (example.problem, example.answer, example.images) == ("<image> ?", "3", ["a"])
    boxes = [[1, 0], [2, 0], [3, 0]]
    for ids, names in [([2, 0, 1], [2, 0, 1]), ("aba", range(3)), (boxes, boxes)]:
        numbered = [{"id": i, "problem": "?", "answer": "3", "images": []} for i in ids]
        data = Rows(jsonl(tmp_path / "ids.jsonl", numbered), "train")
        assert [data[k].id for k in range(3)] == [f"ids-{name}" for name in names]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_texts_that_are_dates_stay_as_they_are_written(name, tmp_path):
    """Arrow reads a column of JSON in which every text is a date as points in time."""
    said = ["2020-01-01", "2021-02-03 10:30"]
    rows = [{"problem": a, "answer": {"ground_truth": a}, "images": [], "id": [a]} for a in said]
    lines = json.dumps(rows) if name == "rows.json" else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(lines, encoding="utf-8-sig")
    assert Rows(tmp_path / name, "train").texts() == list(zip(said, said))


def test_a_benchmark_is_read_where_the_released_downloader_puts_it(tmp_path):
    (tmp_path / "images" / "c").mkdir(parents=True)
    Image.new("RGB", (30, 30), "red").save(tmp_path / "images" / "c" / "1.png")
    chat = [{"content": "<image> how many?"}, {"content": "4"}]
    file = tmp_path / "papo" / f"{BENCHMARKS['counting'][0]}.json"
    jsonl(file, [[{"messages": chat, "images": ["c/1.png"]}]])
    data = sources.benchmark("counting", " Think.", tmp_path)
    assert len(data) == 1 and data[0].answer == "4" and data[0].id == "counting-0"
    assert data[0].problem == "<image> how many? Think."
    assert colour(rgb(data[0].images[0])) == (255, 0, 0)
    assert sum(size for _, size, _ in BENCHMARKS.values()) == 11_206
    assert [column for _, _, column in BENCHMARKS.values()].count("vision") == 4


def test_rows_that_cannot_be_used_are_found_by_arithmetic(tmp_path, processors, monkeypatch):
    """Each kind once, named; the number of tokens is exact; and no picture is decoded."""
    rows = [*map(dict.__or__, example_rows(5), BROKEN.values()), example_rows(6)[5]]
    data = Rows(parquet(tmp_path / "rows.parquet", rows), "train")
    with monkeypatch.context() as m, pytest.warns(Image.DecompressionBombWarning):
        m.setattr(ImageFile.ImageFile, "load", lambda self: 1 / 0)
        m.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
        faults = data.faults(*processors, 256)
    assert sorted(faults) == [0, 1, 2, 3, 4]
    assert all(why in faults[index] for index, why in enumerate(BROKEN)), faults
    kept = without(data, faults)
    assert len(kept) == 1 and kept[0].id == "rows-r5"
    exact = len(encode(data[5], *processors).ids)
    assert data.faults(*processors, exact, slice(5, 6)) == {}
    assert "more than" in data.faults(*processors, exact - 1, slice(5, 6))[5]
    with pytest.raises(SystemExit, match=r"none of the 6 rows of rows can be used \(row 0: no\)"):
        left_out(tmp_path, data, {i: "no" for i in range(6)})


def test_words_that_the_tokenizer_lacks_are_named(processors, cfg, tmp_path, capsys):
    """The toy's knows few: it would read "ball" as it reads every other unknown word."""
    rows = example_rows(3)
    rows[1] |= {"problem": "<image> what colour is the ball ?", "answer": "magenta"}
    for name, some in (("known", rows[:1]), ("unknown", rows)):
        path = parquet(tmp_path / f"{name}.parquet", some)
        data = Rows(path, "train", instruction=" Nobody wrote this.")
        where = replace(cfg, out=str(tmp_path))
        assert len(usable(data, processors, 256, where, Processes(alone=True))) == len(some)
        said = capsys.readouterr().out
        assert ("does not know 2 words of unknown" in said) == (name == "unknown")
        assert "3 words of the instruction behind every problem (--reward bare has none)" in said
    assert "ball, magenta" in said
    assert FORMS["bare"] == FORMS["official"]._replace(instruction="")


def test_files_that_cannot_be_read_are_named_before_a_model_is_looked_for(tmp_path, monkeypatch):
    """Nothing is downloaded for them."""
    monkeypatch.setattr(setup, "model_folder", lambda *_: pytest.fail("a model was looked for"))
    jsonl(tmp_path / "lacks.jsonl", [{"question": "how many ?", "answer": "3"}])
    jsonl(tmp_path / "differ" / "a.jsonl", [{"problem": "?", "answer": "3", "images": []}])
    jsonl(tmp_path / "differ" / "b.jsonl", [{"other": "x"}])
    (tmp_path / "broken.jsonl").write_text("{'not': json}\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "none.json").write_text("[]")
    for name, why in {
        "empty.jsonl": "cannot be read .it holds no rows",
        "none.json": "cannot be read .it holds no rows",
        "lacks.jsonl": "has no column images, problem; it has question, answer .--columns",
        "differ": "cannot be read .*column names don't match",
        "broken.jsonl": "cannot be read .*JSON parse error",
    }.items():
        flags = {"model": "toy", "data": str(tmp_path / name), "out": str(tmp_path / "run")}
        with pytest.raises(SystemExit, match=why):
            setup.setup(resolve(flags, False)[0])


def test_names_are_looked_at_before_anything_is_opened(tmp_path, monkeypatch):
    jsonl(tmp_path / "birds" / "train.jsonl", [{}])
    monkeypatch.chdir(tmp_path)
    check = lambda name: resolve({"model": "toy", "data": name}, False)[0].check(1, False)
    for name in ("birds@train", "./birds@train", f"{tmp_path}/birds@train", "geo3k", "me/geo3kk"):
        check(name)
    for name, why in {
        "./brids@train": "--data ./brids@train: there is no such file or folder",
        "rows.jsonl": "there is no such file or folder, seen from",
        "geo3kk": "there is no data set or file of that name; geo3k may be meant",
    }.items():
        with pytest.raises(SystemExit, match=why):
            check(name)


@pytest.mark.slow
def test_forty_pictures_of_ones_own_are_learned_as_the_page_says(tmp_path):
    """docs/data.md: its script, its rows and its two commands, as they stand there."""
    page = (ROOT / "docs" / "data.md").read_text()
    page = page[page.index("## Forty pictures") : page.index("## Files and splits")]
    script, rows, commands = re.findall(r"```(?:python|json)?\n(.*?)```", page, re.S)
    call("-c", script, cwd=tmp_path)
    assert (tmp_path / "mine" / "train.jsonl").read_text().startswith(rows)
    train, ask = (shlex.split(line)[1:] for line in commands.splitlines())
    assert "does not know" not in call(ROOT / train[0], *train[1:], cwd=tmp_path)
    found = json.loads((tmp_path / "out" / "mine" / "evaluation.json").read_text())
    before, after = (found[when]["test"]["accuracy"] for when in ("before", "after"))
    assert before < 0.4 and after > before + 0.15
    assert call(ROOT / ask[0], *ask[1:], cwd=tmp_path).count("boxed") >= 4


@pytest.mark.slow
def test_from_filter_to_training_step(tmp_path, folder):
    """The whole way on files in the released schema, some of whose rows cannot be used."""
    rows, held_out = example_rows(8), example_rows(4, "val")
    rows[1] |= BROKEN["cannot be read"]
    rows[2] |= BROKEN["more than --max_prompt_tokens 256"]
    rows[3] |= {"problem": "how many red objects are there ?", "images": []}
    rows[4] |= {"problem": "<image> and <image> same ?", "images": 2 * rows[4]["images"]}
    for row in (rows[6], held_out[1]):  # whole in its header, broken in its body
        row |= {"images": [row["images"][0][:-200]]}
    train = parquet(tmp_path / "train.parquet", rows)
    test = parquet(tmp_path / "test.parquet", held_out)
    limits = "--steps 2 --eval_every 1 --max_prompt_tokens 256 --max_response_tokens 32 "
    limits += "--dtype float32 --min_pixels 784 --max_pixels 50176"
    files = ["--model", folder, "--data", train, "--val_data", test, "--out", tmp_path / "run"]
    said = call("train.py", *files, *SMALL, *limits.split())
    left = lines_of(tmp_path / "run" / "left_out-train-train.jsonl")
    assert [(r["row"], "cannot be read" in r["why"]) for r in left] == [(1, True), (2, False)]
    assert "2 of 8 rows of train are left out" in said
    lines = metrics(tmp_path / "run")
    assert len(lines) == 2 and sum(m["refused_prompts"] for m in lines) >= 1
    assert "example train-r6" in said
    assert all("val_accuracy" in m and m["perception_kl"] > 0 for m in lines)
