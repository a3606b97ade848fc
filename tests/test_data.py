"""Pictures of every mode become RGB, and a data set's rows become examples."""

import base64
import copy
import io
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import COPIES, ROOT, SMALL, command
from PIL import Image, ImageFile

from plumbing import setup
from plumbing.config import resolve
from plumbing.data import Example, encode
from plumbing.families import to_picture
from plumbing.pictures import rgb, tokens_from_header
from plumbing.processes import Processes
from plumbing.sources import (
    BENCHMARKS,
    Rows,
    Selection,
    left_out,
    load,
    shared_rows,
    usable,
    warn_of_shared_rows,
)
from plumbing.splits import splits_of_files
from toy.task import ToyData


def colour(picture, at=(0, 0)):
    assert picture.mode == "RGB"
    return picture.getpixel(at)


def test_palette_pictures_are_looked_up_before_anything_is_masked():
    """Index 0 of a palette is not black: the released code blackens by writing zeros into the
    indices."""
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([250, 10, 20, 0, 0, 255])
    assert colour(rgb(picture)) == (250, 10, 20)


def test_grey_two_level_and_cmyk():
    assert colour(rgb(Image.new("L", (4, 4), 90))) == (90, 90, 90)
    assert colour(rgb(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    assert colour(rgb(Image.new("CMYK", (4, 4), (0, 0, 0, 0)))) == (255, 255, 255)
    assert colour(rgb(Image.new("CMYK", (4, 4), (0, 255, 255, 0)))) == (255, 0, 0)


def test_sixteen_bits_are_scaled_not_cut_off():
    levels = np.array([[0, 255, 32896, 65535]], dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    for picture in (
        Image.fromarray(levels),
        buffer.getvalue(),
        Image.fromarray(levels.astype(np.int32)),
    ):
        assert [colour(rgb(picture), (x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    eight_bits_in_32 = Image.fromarray(np.full((2, 2), 200, np.int32))
    assert colour(rgb(eight_bits_in_32)) == (200, 200, 200)


@pytest.mark.parametrize(
    "mode,clear,ink", [("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)), ("LA", (0, 0), (0, 255))]
)
def test_a_black_drawing_on_nothing_stays_readable(mode, clear, ink):
    picture = Image.new(mode, (4, 4), clear)
    picture.putpixel((1, 1), ink)
    assert colour(rgb(picture)) == (255, 255, 255) and colour(rgb(picture), (1, 1)) == (0, 0, 0)


def test_transparency_of_a_palette_picture():
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.putpixel((1, 1), 1)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=0)
    assert colour(rgb(buffer.getvalue())) == (255, 255, 255)
    assert colour(rgb({"bytes": buffer.getvalue(), "path": None}), (1, 1)) == (255, 0, 0)


def test_the_cameras_orientation_is_followed():
    picture, exif = Image.new("RGB", (20, 10)), Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter to show
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=exif)
    assert rgb(buffer.getvalue()).size == (10, 20)


def test_the_contrast_column_is_read(tmp_path):
    from datasets import Dataset, Features, Sequence, Value
    from datasets import Image as ImageFeature

    pictures = [Image.new("RGB", (30, 30), c) for c in ("red", "blue")]
    features = Features(
        {
            "problem": Value("string"),
            "answer": Value("string"),
            "images": Sequence(ImageFeature()),
            "contrast": Sequence(ImageFeature()),
        }
    )
    rows = {
        "problem": ["<image> ?", "?"],
        "answer": ["1", "2"],
        "images": [pictures[:1], []],
        "contrast": [pictures[1:], []],
    }
    path = tmp_path / "rows.parquet"
    Dataset.from_dict(rows, features=features).to_parquet(path)
    data = Rows(str(path), "train")
    assert colour(rgb(data[0].images[0])) == (255, 0, 0)
    assert colour(rgb(data[0].contrast[0])) == (0, 0, 255)
    assert data[1].images == [] and data[1].contrast == []


# ---------------------------------------------------------------- files in the released schema


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path, rows):
    """A file as the released sets are: pictures as an Image feature that holds bytes."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    features = Features(
        {
            "id": Value("string"),
            "problem": Value("string"),
            "answer": Value("string"),
            "images": List(ImageFeature()),
        }
    )
    Dataset.from_generator(
        lambda: ({**r, "images": [{"bytes": b, "path": None} for b in r["images"]]} for r in rows),
        features=features,
        writer_batch_size=500,
        cache_dir=str(path.parent / "cache"),
    ).to_parquet(path, batch_size=500)
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def example_rows(n=8, split="train"):
    return [
        {"id": f"r{i}", "problem": e.problem, "answer": e.answer, "images": [png(e.images[0])]}
        for i, e in enumerate(ToyData(split, n)[j] for j in range(n))
    ]


BROKEN = {
    "broken picture": dict(images=[b"\x89PNG not a picture"]),
    "too long": dict(problem="<image> " + "red " * 400),
    "placeholder without a picture": dict(problem="<image> and <image> same ?"),
    "no answer": dict(answer=" "),
    "huge": None,
}


def test_every_way_to_hold_a_picture_is_the_same_picture(tmp_path, processors):
    rows, want = example_rows(2), None
    pictures = [rgb(r["images"][0]) for r in rows]
    pictures[0].save(tmp_path / "0.png")
    pictures[1].save(tmp_path / "1.png")
    plain = [{"problem": r["problem"], "answer": r["answer"]} for r in rows]
    parquet(tmp_path / "bytes.parquet", rows)
    (tmp_path / "paths.jsonl").write_text(
        "\n".join(json.dumps({**r, "images": [f"{i}.png"]}) for i, r in enumerate(plain))
    )
    (tmp_path / "dicts.json").write_text(
        json.dumps([{**r, "images": [{"path": f"{i}.png"}]} for i, r in enumerate(plain)])
    )
    chat = [
        {
            "messages": [
                {"role": "user", "content": r["problem"]},
                {"role": "assistant", "content": r["answer"]},
            ],
            "images": [f"{i}.png"],
        }
        for i, r in enumerate(plain)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, chat)))
    for name in ("bytes.parquet", "paths.jsonl", "dicts.json", "chat.jsonl"):
        data = Rows(str(tmp_path / name), "train")
        got = [encode(data[i], *processors) for i in range(len(data))]
        want = want or got
        assert len(got) == 2 and all(
            (a.ids == b.ids).all()
            and (a.pixels == b.pixels).all()
            and a.example.answer == b.example.answer
            for a, b in zip(got, want)
        ), name


def test_pictures_are_not_written_to_the_disk_a_second_time(tmp_path):
    """`datasets` turns a parquet file into an Arrow file. Reading its pictures as bytes must not
    add another copy of all of them."""
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
    "train-0.parquet validation-0.parquet": "train validation",
    "geo_train.jsonl geo_test.jsonl": "train test",
    "data/train-00000-of-00001.parquet data/mini-00000-of-00001.parquet": "train mini",
    "rows.parquet more.parquet": "",
    "contest.parquet restraining.parquet": "",
    "train.parquet": "train",
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
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("{}")
    ours = {split: set(map(str, found)) for split, found in splits_of_files(folder).items()}
    assert set(ours) == set(FOLDERS[files].split() or [""])
    patterns = get_data_patterns(str(folder))
    theirs = DataFilesDict.from_patterns(patterns, base_path=str(folder))
    if "" in ours:
        theirs = {"": theirs["train"]}  # there every file is a training file then
    assert ours == {str(k): set(v) for k, v in theirs.items()}


def test_no_row_of_another_split_is_read(tmp_path):
    rows = example_rows(7)
    for file, part in [("train/0000", rows[:4]), ("test/0000", rows[4:6])]:
        (tmp_path / file).parent.mkdir()
        parquet(tmp_path / f"{file}.parquet", part)
    assert [len(Rows(tmp_path, split)) for split in ("train", "test")] == [4, 2]
    assert len(Rows(f"{tmp_path}@eval", "train")) == 2  # a word that `datasets` takes for test
    with pytest.raises(SystemExit, match="it has test, train and not validation"):
        load(f"{tmp_path}@validation", "train", 0, 0)
    # A file, or files that no name sorts, are whatever is wanted.
    parquet(tmp_path / "a@b.parquet", rows[6:])
    assert len(Rows(tmp_path / "a@b.parquet", "test")) == 1
    with pytest.raises(SystemExit, match="nothing in it is called test"):
        load(f"{tmp_path / 'a@b.parquet'}@test", "train", 0, 0)
    (tmp_path / "train" / "test.jsonl").write_text("{}")
    (tmp_path / "train_test").mkdir()
    (tmp_path / "train_test" / "a.jsonl").write_text("{}")
    with pytest.raises(SystemExit, match="train_test/a.jsonl could be train or test"):
        load(str(tmp_path), "train", 0, 0)


def test_rows_to_validate_on_that_are_trained_on_are_named(tmp_path, capsys):
    rows = example_rows(6)
    train = Rows(parquet(tmp_path / "train.parquet", rows[:4]), "train")
    # The same text with another picture is another question.
    other = rows[1] | {"images": rows[2]["images"]}
    held_out = Rows(parquet(tmp_path / "test.parquet", [rows[4], rows[3], other, rows[0]]), "test")
    assert shared_rows(train, held_out) == [1, 3]
    chat = [{"messages": [{"content": r["problem"]}, {"content": r["answer"]}]} for r in rows]
    lines = [json.dumps(c | {"images": [f"{i}.png"]}) for i, c in enumerate(chat)]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines[:3]))
    (tmp_path / "more.jsonl").write_text("\n".join(lines[2:]))
    both = [Rows(tmp_path / f, "train") for f in ("chat.jsonl", "more.jsonl")]
    assert shared_rows(*both) == [0]
    # A picture is its bytes, in whatever form a file holds it; what is none is only itself.
    text = [base64.b64encode(r["images"][0]).decode() for r in (rows[2], rows[5])]
    same = [rows[i] | {"images": [x]} for i, x in zip((2, 3, 1), [*text, "nowhere.png"])]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, same)))
    assert shared_rows(train, Rows(tmp_path / "text.jsonl", "train")) == [0]
    warn_of_shared_rows(Selection(train, {}), Selection(held_out, {}))
    assert "2 of 4 rows of test are in train too, the first is row 1" in capsys.readouterr().out
    warn_of_shared_rows(Selection(train, {}), Selection(both[0], {}))
    assert capsys.readouterr().out == ""


def test_what_save_to_disk_leaves(tmp_path):
    from datasets import Dataset, DatasetDict

    sets = {k: Dataset.from_list(example_rows(n)) for k, n in (("train", 3), ("validation", 2))}
    DatasetDict(sets).save_to_disk(tmp_path / "both")
    sets["train"].save_to_disk(tmp_path / "one")
    assert len(Rows(tmp_path / "both", "train")) == 3
    assert len(Rows(f"{tmp_path / 'both'}@val", "train")) == 2
    assert len(Rows(tmp_path / "one", "test")) == 3
    with pytest.raises(SystemExit, match="it has train, validation and not test"):
        load(str(tmp_path / "both"), "test", 0, 0)


def test_folders_splits_and_column_names(tmp_path):
    rows = example_rows(4)
    parquet(tmp_path / "train-0.parquet", rows[:2])
    parquet(tmp_path / "train-1.parquet", rows[2:3])
    parquet(tmp_path / "test-0.parquet", rows[3:])
    assert len(Rows(tmp_path, "train")) == 3 and len(Rows(f"{tmp_path}@test", "train")) == 1
    (tmp_path / "other.jsonl").write_text(
        json.dumps({"question": "<image> ?", "label": 3, "pictures": ["a.png"]})
    )
    example = Rows(tmp_path / "other.jsonl", "train", ("question", "label", "pictures"))[0]
    assert example.problem.startswith("<image> ?")
    assert example.answer == "3" and example.images == ["a.png"]
    with pytest.raises(SystemExit, match="it has test, train and not nonsense; @test at"):
        load(f"{tmp_path}@nonsense", "train", 0, 0)
    numbered = [{"id": i, "problem": "?", "answer": "3", "images": []} for i in (2, 0, 1)]
    (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, numbered)))
    ids = [Rows(tmp_path / "ids.jsonl", "train")[i].id for i in range(3)]
    assert ids == ["ids-2", "ids-0", "ids-1"]
    (tmp_path / "broken.jsonl").write_text("{'not': json}\n")
    with pytest.raises(SystemExit, match="cannot be read"):
        load(str(tmp_path / "broken.jsonl"), "train", 0, 0)
    with pytest.raises(SystemExit, match="has no column answer, problem.*--problem_column"):
        Rows(tmp_path / "other.jsonl", "train", ("problem", "answer", "pictures"))


def test_a_benchmark_is_read_where_the_released_downloader_puts_it(tmp_path):
    part = BENCHMARKS["counting"][0]
    (tmp_path / "papo").mkdir()
    (tmp_path / "images" / "c").mkdir(parents=True)
    Image.new("RGB", (30, 30), "red").save(tmp_path / "images" / "c" / "1.png")
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image> how many?"},
                {"role": "assistant", "content": "4"},
            ],
            "images": ["c/1.png"],
        }
    ]
    (tmp_path / "papo" / f"{part}.json").write_text(json.dumps(rows))
    data = load("counting", "test", 0, 0, root=tmp_path)
    assert len(data) == 1 and data[0].answer == "4"
    assert colour(rgb(data[0].images[0])) == (255, 0, 0)
    assert sum(size for _, size, _ in BENCHMARKS.values()) == 11_206
    assert [column for _, _, column in BENCHMARKS.values()].count("vision") == 4


def test_rows_that_cannot_be_used_are_found_by_arithmetic(tmp_path, processors, monkeypatch):
    """Each kind once, named; the number of tokens is exact; and no picture is decoded."""
    rows = example_rows(6)
    for r, change in zip(rows, BROKEN.values()):
        r |= change or {"images": [png(Image.new("1", (20_000, 10_000)))]}
    data = Rows(str(parquet(tmp_path / "rows.parquet", rows)), "train")
    with monkeypatch.context() as m:
        m.setattr(ImageFile.ImageFile, "load", lambda self: 1 / 0)
        faults = data.faults(*processors, 256)
    assert sorted(faults) == [0, 1, 2, 3, 4]
    reasons = [
        "cannot be read",
        "more than --max_prompt_tokens 256",
        "2 <image> placeholders but 1 pictures",
        "answer is empty",
        "too large",
    ]
    for index, words in enumerate(reasons):
        why = faults[index]
        assert words in why or (index == 4 and "cannot be read" in why), why
    kept = Selection(data, faults)
    assert len(kept) == 1 and kept[0].id == "rows-r5"
    exact = len(encode(data[5], *processors).ids)
    assert data.faults(*processors, exact, slice(5, 6)) == {}
    assert "more than" in data.faults(*processors, exact - 1, slice(5, 6))[5]
    with pytest.raises(SystemExit, match="row 0 of rows: .*cannot be read"):
        left_out(tmp_path, data, faults, strict=True)
    with pytest.raises(SystemExit, match="none of the 6 rows of rows can be used"):
        left_out(tmp_path, data, {i: "no" for i in range(6)}, strict=False)


@pytest.mark.parametrize("size", [(84, 84), (30, 40), (333, 250), (2000, 300), (57, 900)])
def test_picture_tokens_are_those_of_the_processor(size, processors):
    picture, merged = Image.new("RGB", size), processors[1].merge_size ** 2
    grid = processors[1]([picture], return_tensors="pt")["image_grid_thw"][0]
    assert tokens_from_header(png(picture), processors[1]) == int(grid.prod()) // merged
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    picture.save(turned, "JPEG", exif=exif)
    grid = processors[1]([rgb(turned.getvalue())], return_tensors="pt")["image_grid_thw"][0]
    assert tokens_from_header(turned.getvalue(), processors[1]) == int(grid.prod()) // merged


@pytest.mark.parametrize(
    "name, size, low, high",
    [
        ("least is most", (60, 60), 256 * 784, 256 * 784),
        ("least is most, and not square", (640, 480), 1280 * 784, 1280 * 784),
        ("near each other", (640, 480), 1229 * 784, 1280 * 784),
        ("thin", (4203, 36), 784, 64 * 784),
        ("thinner", (7855, 41), 784, 64 * 784),
        ("usual", (640, 480), 256 * 784, 1280 * 784),
        *[(f"random {seed}", None, None, None) for seed in range(60)],
    ],
)
def test_the_engine_sees_the_grid_that_the_trainer_sees(name, size, low, high, processors):
    """vLLM resizes again the picture that it is handed: it must keep its size, or the row is left
    out before anything is loaded."""
    if size is None:
        rng = random.Random(name)
        size = tuple(int(10 ** rng.uniform(1, 3.2)) for _ in range(2))
        low = rng.randrange(1, 40) * 784
        high = low + rng.choice([0, 0, 1, 5, 50]) * 784
    image_processor = copy.deepcopy(processors[1])
    image_processor.size = {"shortest_edge": low, "longest_edge": high}
    picture = Image.new("RGB", size)
    example = Example("x", "<image> ?", "3", [picture])
    try:
        tokens = tokens_from_header(png(picture), image_processor)
    except ValueError:
        with pytest.raises(ValueError):
            encode(example, processors[0], image_processor)
        return
    prompt = encode(example, processors[0], image_processor)
    assert int(prompt.grid.prod()) == 4 * tokens
    handed = Image.fromarray(to_picture(prompt.pixels, prompt.grid[0], image_processor).numpy())
    again = image_processor([handed], return_tensors="pt")["image_grid_thw"]
    assert (again == prompt.grid).all()


FILTER = """
import sys, time, resource
sys.path.insert(0, {root!r})
from plumbing.config import resolve
from plumbing.policy import load_processors
from plumbing.sources import Rows
cfg = resolve({{"model": {folder!r}, "data": "toy", "sampler": "hf"}}, False)[0]
processors = load_processors({folder!r}, cfg)
data = Rows({path!r}, "train")
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
faults = data.faults(*processors, 256)
seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(data), len(faults), seconds, (after - before) / 1024)
"""


@pytest.mark.slow
def test_39_000_rows_are_checked_in_a_minute_and_memory_does_not_grow_with_them(tmp_path, folder):
    """As many rows as ViRL39K, with JPEGs of 640 x 480; a few of them unusable. The time includes a
    margin for a busy machine."""
    rng, pictures = random.Random(0), []
    for _ in range(40):
        buffer = io.BytesIO()
        Image.effect_noise((640, 480), 60).save(buffer, "JPEG", quality=20)
        pictures.append(buffer.getvalue())
    seen = {}
    for count in (4_000, 39_000):
        rows = [
            {
                "id": str(i),
                "problem": f"<image> a friend says {i % 7} . "
                + "how many red objects are there ? " * rng.randint(1, 6),
                "answer": "3",
                "images": [b"" if i % 1000 == 0 else pictures[i % 40]],
            }
            for i in range(count)
        ]
        path = parquet(tmp_path / f"{count}.parquet", rows)
        code = FILTER.format(root=str(ROOT), folder=str(folder), path=str(path))
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        n, faults, seconds, memory = map(float, done.stdout.split())
        assert n == count and faults == count // 1000
        seen[count] = seconds, memory
    print(seen)
    assert seen[39_000][0] < 90 and seen[39_000][1] < seen[4_000][1] + 300, seen


@pytest.mark.slow
def test_from_filter_to_training_step_to_evaluation(tmp_path, folder):
    """The whole way on files in the released schema: a broken picture, an overlong prompt, a row of
    text, a row with two pictures."""
    rows = example_rows(8)
    rows[1] |= BROKEN["broken picture"]
    rows[2] |= BROKEN["too long"]
    rows[3] |= {"problem": "how many red objects are there ?", "images": []}
    rows[4] |= {
        "problem": "<image> and <image> same ?",
        "images": rows[4]["images"] + rows[5]["images"],
    }
    # Whole in its header, broken in its body: found when it is read.
    rows[6] |= {"images": [rows[6]["images"][0][:-200]]}
    held_out = example_rows(4, "val")
    # Such a row in the validation data ends nothing either.
    held_out[1] |= {"images": [held_out[1]["images"][0][:-200]]}
    train = parquet(tmp_path / "train.parquet", rows)
    test = parquet(tmp_path / "test.parquet", held_out)
    pairs = zip(SMALL[::2], SMALL[1::2])
    toy = [f for flags in pairs if flags[0] not in ("--warm_steps",) for f in flags]
    limits = (
        "--steps 2 --eval_every 1 --max_prompt_tokens 256 --max_response_tokens 32 "
        "--dtype float32 --min_pixels 784 --max_pixels 50176"
    ).split()
    files = ["--model", folder, "--data", train, "--val_data", test, "--out", tmp_path / "run"]
    done = command("train.py", *files, *toy, *limits)
    assert done.returncode == 0, done.stderr[-3000:]
    left = lines_of(tmp_path / "run" / "left_out-train-train.jsonl")
    assert [(r["row"], "cannot be read" in r["why"], "more than" in r["why"]) for r in left] == [
        (1, True, False),
        (2, False, True),
    ]
    assert "2 of 8 rows of train are left out" in done.stdout + done.stderr
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 2 and sum(m["refused_prompts"] for m in lines) >= 1
    assert "example train-r6" in done.stdout + done.stderr
    assert all("val_accuracy" in m and m["val_seconds"] > 0 for m in lines)
    assert all(m["perception_kl"] > 0 for m in lines)
    trained, out = tmp_path / "run" / "checkpoint-2", tmp_path / "answers.jsonl"
    flags = ["--sampler", "hf", "--data", f"{train},{test}", "--n", 2]
    done = command("eval.py", "--model", trained, *flags, "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = lines_of(out)
    assert len(answers) == 2 * (5 + 3) and {r["split"] for r in answers} == {"train", "test"}
    flags = ["--sampler", "hf", "--data", train, "--strict", "--out", tmp_path / "s.jsonl"]
    strict = command("eval.py", "--model", folder, *flags)
    assert strict.returncode != 0 and "row 1 of train: a picture cannot be read" in strict.stderr


def test_words_that_the_tokenizer_lacks_are_named(processors, cfg, tmp_path, capsys):
    """The toy's knows few: it would read "ball" as it reads every other unknown word."""
    rows = example_rows(3)
    rows[1] |= {"problem": "<image> what colour is the ball ?", "answer": "magenta"}
    for name, some in (("known", rows[:1]), ("unknown", rows)):
        data = Rows(str(parquet(tmp_path / f"{name}.parquet", some)), "train")
        where = replace(cfg, out=str(tmp_path))
        assert len(usable(data, processors, 256, where, Processes(alone=True))) == len(some)
        said = capsys.readouterr().out
        assert ("does not know" in said) == (name == "unknown")
    assert "ball" in said and "magenta" in said and "<image>" not in said and "colour" not in said


def test_columns_are_looked_at_before_a_model_is(tmp_path, monkeypatch):
    """Nothing is downloaded or learned for a file that lacks one."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "how many ?", "answer": "3"}))
    monkeypatch.setattr(setup, "model_folder", lambda *_: pytest.fail("a model was looked for"))
    cfg = resolve({"model": "toy", "data": str(path), "out": str(tmp_path / "run")}, False)[0]
    with pytest.raises(SystemExit, match="has no column images, problem; it has question, answer"):
        setup.setup(cfg)


def test_files_that_do_not_fit_together_are_named(tmp_path):
    for name, row in (("a", {"problem": "?", "answer": "3", "images": []}), ("b", {"other": "x"})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit, match="cannot be read .*column names don't match"):
        load(str(tmp_path), "train", 0, 0, resolve({"model": "toy"}, False)[0])
