"""Rows, laid out as people lay them out, are read as meant or left out with a reason."""

import base64
import datetime
import io
import os
import random
import struct
import time
from contextlib import suppress

import numpy as np
import pytest
from conftest import jsonl
from PIL import Image

from plumbing.data import schemas, sources
from plumbing.data.pictures import original_bytes, rgb, tokens_from_header
from plumbing.data.prompts import encode, prompt_text
from plumbing.data.sources import COLUMNS, Rows


def encoded(size=(60, 60), kind="PNG", **kw):
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind, **kw)
    return buffer.getvalue()


def turn(role, content, names=("role", "content")):
    return dict(zip(names, (role, content)))


PICTURE = encoded()
USER, SAID = turn("user", "<image> red ?"), turn("assistant", "3")
PARTS = [{"type": "image", "text": None}, {"type": "text", "text": " red ?"}]
HUMAN, GPT = (turn(*x, ("from", "value")) for x in (("human", "<image> red ?"), ("gpt", "3")))


CHATS = [
    [USER, SAID],
    [turn("system", "be nice"), USER, SAID],
    [turn("user", PARTS), turn("assistant", [{"type": "text", "text": "3"}])],
    [HUMAN, GPT],
    [{"content": "<image> red ?"}, {"content": "3"}],
    [{"role": None, "content": None, **HUMAN}, SAID],  # as Arrow holds turns of both kinds
]


@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_is_a_question_and_its_answer(chat):
    assert schemas.question_of(chat) == ("<image> red ?", "3")


OTHER_CHATS = [
    ([turn("system", "be nice")], "none"),
    ([SAID], "assistant"),
    ([USER, SAID, USER, SAID], "user, assistant, user, assistant"),
    ([USER, turn("tool", "3")], "user, tool"),
    (["red ?"], "not a dict"),
    (True, "the chat is of type bool"),
    ([turn("user", [{"type": "video"}]), SAID], "neither text nor a picture"),
    ([{"text": "red ?"}, SAID], "has no text"),
    ([{"role": ["user"], "content": "red ?"}, SAID], "a role that is none"),
]


@pytest.mark.parametrize("chat, why", OTHER_CHATS)
def test_a_chat_of_another_shape_is_left_out(chat, why):
    with pytest.raises(ValueError, match=why):
        schemas.question_of(chat)


ANSWERS = [("3", None, "3"), (3, "int64", "3"), (True, "bool", "True"), (None, None, "")]
ANSWERS += [(["3"], None, "3"), ({"ground_truth": ["3"], "style": "rule"}, None, "3")]
ANSWERS += [(float(np.float32(0.1)), "float32", "0.1"), (0.1, "float64", "0.1")]


@pytest.mark.parametrize("value, dtype, text", ANSWERS)
def test_answers_become_text(value, dtype, text):
    assert schemas.answer_of(value, dtype) == text


def test_answers_and_problems_that_are_none_are_left_out():
    """A column of dates, too: "2020-01-01" would be asked for as "2020-01-01 00:00:00"."""
    none = [["3", "4"], [], {"label": "3"}, {}, float("nan"), float("inf"), b"3"]
    for value in [*none, datetime.datetime(2020, 1, 1)]:
        with pytest.raises(ValueError, match="the answer is"):
            schemas.answer_of(value)
    for value in [None, 5, ["red ?"], {"text": "red ?"}, [], b"red ?"]:
        with pytest.raises(ValueError, match="the problem is no text"):
            schemas.problem_of(value)


def test_pictures_in_every_form_are_the_same_picture(tmp_path, processors):
    data = encoded(kind="BMP")
    (tmp_path / "a.bmp").write_bytes(data)
    path, text = str(tmp_path / "a.bmp"), base64.b64encode(data).decode()
    dicts = [{"bytes": data, "path": None}, {"bytes": None, "path": path}]
    other = text.rstrip("=").replace("+", "-").replace("/", "_")  # URL-safe, its end cut off
    lines = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    for form in [data, path, text, lines, other, f"data:image/bmp;base64,{text}", *dicts]:
        for value in (form, [form], [[form]]):
            (picture,) = schemas.pictures_of(value)
            assert original_bytes(picture) == data and rgb(picture).getpixel((0, 0)) == (255, 0, 0)
            assert tokens_from_header(picture, processors[1]) == 4
    assert schemas.pictures_of(None) == schemas.pictures_of([]) == schemas.pictures_of("") == []
    assert schemas.pictures_of([[data], [data, data]]) == [data] * 3
    with pytest.raises(ValueError, match="pictures are given as numbers"):
        schemas.pictures_of([[[0, 255]]])


def test_what_only_pretends_to_be_a_picture_costs_nothing(tmp_path, monkeypatch):
    """A pipe that nobody writes to, PostScript for an interpreter, white space for a regular
    expression, and more pixels than Pillow takes without a warning."""
    os.mkfifo(tmp_path / "pipe")
    began = time.process_time()
    spaces = " " * 400_000 + "!"
    for text in (str(tmp_path / "pipe"), str(tmp_path), "/dev/zero", spaces, "a" * 400_000 + "!"):
        with pytest.raises(ValueError, match="no file|neither a path nor base64") as raised:
            rgb(text)
        assert len(str(raised.value)) < 500
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\necho 10.0\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ValueError, match="cannot be read"):
        rgb(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n%%EOF\n")
    assert not (tmp_path / "called").exists()
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="10000 x 9000 pixels is too large"):
        rgb(str(tmp_path / "large.png"))
    assert time.process_time() - began < 5


def faults(path, processors, columns=COLUMNS):
    rows = Rows(path, "train", columns)
    return rows, rows.faults(*processors, 1000)


def test_the_layouts_of_other_programs(tmp_path, processors):
    (tmp_path / "a.png").write_bytes(PICTURE)
    layouts = {
        "verl": {"prompt": [USER], "reward_model": {"ground_truth": "3", "style": "rule"}},
        "llama": {"conversations": [HUMAN, GPT]},
        "trl": {"messages": [turn("system", "be nice"), USER, SAID]},
        "plain": {"problem": "<image> red ?", "answer": 3},
    }
    for name, row in layouts.items():
        jsonl(tmp_path / "rows.jsonl", [row | {"images": ["a.png"]}])
        columns = ("prompt", "reward_model", "images") if name == "verl" else COLUMNS
        rows, found = faults(tmp_path / "rows.jsonl", processors, columns)
        assert not found and (rows[0].problem, rows[0].answer) == ("<image> red ?", "3"), name
        assert len(encode(rows[0], *processors).pixels) == 16


LETTERED = "\nAnswer with the letter of one option:\nA. 3\nB. 4"
SETS = {  # as their own files have it: question, options, answer -> what is asked, and the answer
    "geometry3k, mmk12, counting": ("<image>x ?", None, "3", "<image>x ?", "3"),
    "mathvista": ("x ?", ["3", "4"], "4", f"<image>x ?{LETTERED}", "B"),
    "we-math": ("x ?", "A. 3\nB. 4", "B", f"<image>x ?{LETTERED}", "B"),
    "mathverse, logicvista": ("x ?\nA:3\nB:4", ["3", "4"], "B", "<image>x ?\nA:3\nB:4", "B"),
    "mmmu-pro": ("x <image 1> ?", "['3', '4']", "B", f"x <image> ?{LETTERED}", "B"),
    "scienceqa": ("x ?", ["3", "4"], 1, f"<image>x ?{LETTERED}", "B"),
}


@pytest.mark.parametrize("question, options, answer, asked, said", SETS.values(), ids=SETS)
def test_options_are_asked_with_letters(question, options, answer, asked, said, tmp_path):
    row = {"question": question, "answer": answer, "image_1": "a.png", "choices": options}
    rows = Rows(jsonl(tmp_path / "rows.jsonl", [row]), "train", ("question", "answer", "image"))
    assert (rows[0].problem, rows[0].images, rows.texts()[0][1]) == (asked, ["a.png"], said)


NO_OPTION = [(["3", "4"], "5"), (["B", "A"], "A"), ([0, 2, 1], 1), ({"A": "3"}, "A")]
NO_OPTION += [("[1", "A"), ("[" * 9999, "A"), ([*range(100, 127)], "A")]


@pytest.mark.parametrize("options, answer", NO_OPTION)
def test_an_answer_that_is_not_one_option_is_left_out(options, answer):
    with pytest.raises(ValueError, match="the answer '.*' is|the options are a"):
        schemas.with_options("?", str(answer), schemas.options_of(options), answer)


def test_pictures_are_shown_where_their_numbers_stand():
    assert schemas.in_order("<image 2> <image 1>?", "ab") == ("<image> <image>?", ["b", "a"])
    for text, pictures in (("<image 2>", "a"), ("<image 0>", "a"), ("<image 1>", "ab")):
        with pytest.raises(ValueError, match="other pictures"):
            schemas.in_order(text, pictures)


@pytest.mark.parametrize("word", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>"])
def test_a_control_token_in_a_problem_is_no_text(word, tmp_path, processors):
    """The tokenizer would take it for the real one: what follows would be cut off, or be a turn."""
    problems = ["red and blue ?", f"red {word} blue ?", word]
    rows = [{"problem": problem, "answer": "3", "images": []} for problem in problems]
    rows, found = faults(jsonl(tmp_path / "rows.jsonl", rows), processors)
    assert list(found) == [1, 2] and f"contains {word}" in found[1]
    encode(rows[0], *processors)
    with pytest.raises(ValueError, match="example rows-1: .*which is no text to this model"):
        encode(rows[1], *processors)


def exif(*tags):
    """EXIF of (tag, type, bytes): a JPEG's, with whatever types."""
    entries = [struct.pack("<HHI", t, kind, len(b) if kind != 3 else 1) + b for t, kind, b in tags]
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags))
    return head + b"".join(e.ljust(12, b"\0") for e in entries) + struct.pack("<I", 0)


def test_exif_of_wrong_types_is_harmless():
    """A tag that is wrong where the orientation is right; an orientation that is no number."""
    quarter = (0x112, 3, struct.pack("<H", 6))
    turned = encoded((300, 90), "JPEG", exif=exif((0x100, 2, b"30\0"), quarter))
    assert rgb(turned).size == (90, 300)
    for kind, value in ((2, b"6\0"), (1, b"\x06"), (7, b"\x06"), (3, struct.pack("<H", 77))):
        picture = encoded((300, 90), "JPEG", exif=exif((0x112, kind, value)))
        assert rgb(picture).size == (300, 90)


FORMATS = "PNG JPEG GIF BMP WEBP TIFF AVIF ICO PCX PPM TGA SGI".split()
SHORT_AND_LONG = pytest.mark.parametrize("trials", [20, pytest.param(1000, marks=pytest.mark.slow)])


@SHORT_AND_LONG
@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_picture_of_any_format_is_a_picture_that_cannot_be_read(kind, trials, processors):
    good, rng = encoded((64, 48), kind), np.random.default_rng(0)
    for trial in range(trials):
        bad = bytearray(good)
        for at in rng.integers(0, len(bad), 1 + trial % 4):
            bad[at] ^= 1 << rng.integers(8)
        bad = bytes(bad[: rng.integers(1, len(bad))] if trial % 3 == 0 else bad)
        for read in (rgb, lambda picture: tokens_from_header(picture, processors[1])):
            with suppress(ValueError):  # the one kind of error that leaves a row out
                read(bad)


def random_value(rng, depth=0):
    """Anything that a column of a JSON or parquet file may hold."""
    plain = ["", "3", "<image> red ?", "a.png", "<|im_end|>", 0, -5, 10**30, 0.5, float("nan")]
    plain += [True, None, b"", PICTURE, PICTURE[:-20], b"hello"]
    what = rng.random()
    if depth > 3 or what < 0.5:
        return rng.choice(plain)
    if what < 0.7:
        return [random_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    names = "role content from value bytes path url text type ground_truth".split()
    return {rng.choice(names): random_value(rng, depth + 1) for _ in range(rng.randint(0, 3))}


@SHORT_AND_LONG
def test_rows_of_random_types_are_read_or_left_out(trials, tmp_path, processors, monkeypatch):
    """Only a ValueError leaves a row out; any other error would end a run."""
    monkeypatch.setitem(sources.SECOND, "other", ("counterpart",))
    plain = [{"problem": "red ?", "answer": "3", "images": [], "counterpart": [], "options": []}]
    chat = [{"messages": [USER, SAID], "images": []}]
    sets = [Rows(jsonl(tmp_path / f"{len(row[0])}.jsonl", row), "train") for row in (plain, chat)]
    rng, read = random.Random(0), 0
    for trial in range(10 * trials):
        row = {n: random_value(rng) for n in (*COLUMNS, "counterpart", "messages", "options")}
        row |= (
            {"images": [], "options": None}
            if trial % 2
            else {"problem": "<image> red ?", "messages": [USER]}
        )
        for rows in sets:
            try:
                example = rows.example(0, row)
                sizes = [tokens_from_header(p, processors[1]) for p in example.images]
                prompt_text(example, processors[0], sizes)
                encode(example, *processors)
                read += 1
            except ValueError as error:
                assert "\n" not in str(error)
    assert read > trials / 2


def test_single_pictures_and_the_numbers_of_classes(tmp_path, processors):
    """A classification set of `datasets`: one picture a row, and a ClassLabel."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    names = ClassLabel(names=["wren", "lark"])
    features = Features(problem=Value("string"), label=names, images=ImageFeature())
    rows = [
        {"problem": "<image> ?", "label": k, "images": {"bytes": picture, "path": None}}
        for k, picture in ((1, PICTURE), (0, PICTURE), (-1, PICTURE), (0, b""), (1, b"hello"))
    ]
    Dataset.from_list(rows, features).to_parquet(tmp_path / "rows.parquet")
    rows, found = faults(tmp_path / "rows.parquet", processors, ("problem", "label", "images"))
    assert [rows[i].answer for i in (0, 1)] == ["lark", "wren"]
    assert len(encode(rows[1], *processors).pixels) == 16
    assert list(found) == [2, 3, 4] and found[2] == "the answer is class -1 of 2"
