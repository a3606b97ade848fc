"""Rows, laid out as people lay them out, are read as meant or left out with a reason."""

import base64
import io
import json
import random
import struct

import numpy as np
import pytest
from PIL import Image

from plumbing.data import encode, prompt_text
from plumbing.pictures import rgb, tokens_from_header
from plumbing.schemas import answer_of, pictures_of, problem_of, question_of
from plumbing.sources import Rows
from plumbing.summary import summarise


def encoded(size=(60, 60), kind="PNG", **kw):
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind, **kw)
    return buffer.getvalue()


def turn(role, content, names=("role", "content")):
    return dict(zip(names, (role, content)))


PICTURE = encoded()
USER, SAID = turn("user", "<image> red ?"), turn("assistant", "3")
PARTS = [{"type": "image", "text": None}, {"type": "text", "text": " red ?"}]


@pytest.mark.parametrize(
    "chat",
    [
        [USER, SAID],
        [turn("system", "be nice"), USER, SAID],
        [turn("user", PARTS), turn("assistant", [{"type": "text", "text": "3"}])],
        [turn("human", "<image> red ?", ("from", "value")), turn("gpt", "3", ("from", "value"))],
        [{"content": "<image> red ?"}, {"content": "3"}],
        # As Arrow holds turns of both kinds: every name in every turn.
        [{"role": None, "content": None, "from": "human", "value": "<image> red ?"}, SAID],
    ],
)
def test_a_chat_is_a_question_and_its_answer(chat):
    assert question_of(chat) == ("<image> red ?", "3")


@pytest.mark.parametrize(
    "chat, why",
    [
        ([], "none"),
        ([turn("system", "be nice")], "none"),
        ([SAID], "assistant"),
        ([USER, SAID, USER, SAID], "user, assistant, user, assistant"),
        ([USER, turn("tool", "3")], "user, tool"),
        (["red ?"], "not a dict"),
        (True, "the chat is of type bool"),
        (0.5, "the chat is of type float"),
        ([turn("user", [{"type": "video"}]), SAID], "neither text nor a picture"),
        ([turn("user", 5), SAID], "neither text nor a picture"),
        ([{"text": "red ?"}, SAID], "has no text"),
        ([{"role": ["user"], "content": "red ?"}, SAID], "a role that is none"),
    ],
)
def test_a_chat_of_another_shape_is_left_out(chat, why):
    with pytest.raises(ValueError, match=why):
        question_of(chat)


@pytest.mark.parametrize(
    "value, dtype, text",
    [
        ("3", None, "3"),
        (3, "int64", "3"),
        (True, "bool", "True"),
        (None, None, ""),
        (["3"], None, "3"),
        ({"ground_truth": "3", "style": "rule"}, None, "3"),
        ({"ground_truth": ["3"]}, None, "3"),
        (float(np.float32(0.1)), "float32", "0.1"),
        (0.1, "float64", "0.1"),
    ],
)
def test_answers_become_text(value, dtype, text):
    assert answer_of(value, dtype) == text


@pytest.mark.parametrize("value", [["3", "4"], [], {"label": "3"}, {}, float("nan"), float("inf")])
def test_answers_that_are_none_are_left_out(value):
    with pytest.raises(ValueError, match="the answer is"):
        answer_of(value)


@pytest.mark.parametrize("value", [None, 5, ["red ?"], {"text": "red ?"}, [], b"red ?"])
def test_problems_that_are_no_text_are_left_out(value):
    with pytest.raises(ValueError, match="the problem is no text"):
        problem_of(value)


def test_pictures_in_every_form_are_the_same_picture(tmp_path, processors):
    data = encoded(kind="BMP")
    (tmp_path / "a.bmp").write_bytes(data)
    text = base64.b64encode(data).decode()
    pixels = np.array(Image.open(io.BytesIO(data)))
    forms = [
        data,
        str(tmp_path / "a.bmp"),
        {"bytes": data, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.bmp")},
        text,
        f"data:image/bmp;base64,{text}",
        Image.open(io.BytesIO(data)),
        pixels,
        pixels.tolist(),
    ]
    for form in forms:
        for value in (form, [form], [[form]]):
            (picture,) = pictures_of(value)
            assert np.array_equal(np.array(rgb(picture)), pixels), form
            assert tokens_from_header(picture, processors[1]) == 4
    assert pictures_of(None) == pictures_of([]) == pictures_of("") == []
    assert pictures_of([[data], [data, data]]) == [data] * 3
    with pytest.raises(ValueError, match="pixels cannot be read"):
        pictures_of([[0.5, 0.25]])


def jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def faults(path, processors, columns=("problem", "answer", "images")):
    rows = Rows(path, "train", columns)
    return rows, rows.faults(*processors, 1000)


def test_the_layouts_of_other_programs(tmp_path, processors):
    (tmp_path / "a.png").write_bytes(encoded())
    pictured = {"images": ["a.png"]}
    verl = {"prompt": [USER], "reward_model": {"ground_truth": "3", "style": "rule"}} | pictured
    llama = {"conversations": [turn("human", "<image> red ?", ("from", "value"))]} | pictured
    llama["conversations"].append(turn("gpt", "3", ("from", "value")))
    trl = {"messages": [turn("system", "be nice"), USER, SAID]} | pictured
    columns = {"verl": ("prompt", "reward_model", "images")}
    for name, row in {"verl": verl, "llama": llama, "trl": trl}.items():
        path = jsonl(tmp_path / f"{name}.jsonl", [row])
        rows, found = faults(path, processors, columns.get(name, ("problem", "answer", "images")))
        assert not found and rows[0].answer == "3" and rows[0].problem.startswith("<image> red ?")


def test_one_row_that_is_no_example_is_left_out_alone(tmp_path, processors):
    good = {"problem": "red ?", "answer": ["3"], "images": []}
    bad = [{"problem": None}, {"answer": ["3", "4"]}, {"answer": []}, {"images": [["no.png"]]}]
    path = jsonl(tmp_path / "rows.jsonl", [good, *(good | b for b in bad), good])
    rows, found = faults(path, processors)
    assert list(found) == [1, 2, 3, 4]
    assert rows[0].answer == rows[5].answer == "3"


def test_two_rows_of_one_id_are_two_questions(tmp_path):
    rows = [{"id": "7", "problem": f"{c} ?", "answer": c, "images": []} for c in ("red", "blue")]
    data = Rows(jsonl(tmp_path / "rows.jsonl", rows), "test")
    more = {"accuracy": 1.0, "format": 1.0, "finished": True, "tokens": 1}
    records = [{"id": data[i].id, **more} for i in (0, 0, 1, 1)]
    assert summarise(records)["questions"] == 2 and summarise(records)["n"] == 2


@pytest.mark.parametrize("word", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>"])
@pytest.mark.parametrize("problem", ["red {} blue ?", "red {} <image> blue ?", "<image> {}"])
def test_a_control_token_in_a_problem_is_no_text(word, problem, tmp_path, processors):
    """The tokenizer would take it for the real one: what follows would be cut off, or be a turn."""
    (tmp_path / "a.png").write_bytes(encoded())
    row = {"answer": "3", "images": ["a.png"] * problem.count("<image>")}
    rows = [row | {"problem": problem.format(x)} for x in ("and", word)]
    rows, found = faults(jsonl(tmp_path / "rows.jsonl", rows), processors)
    assert list(found) == [1] and f"contains {word}" in found[1]
    encode(rows[0], *processors)
    with pytest.raises(ValueError, match="which is no text to this model"):
        encode(rows[1], *processors)


def exif(*tags):
    """EXIF of (tag, type, bytes): a JPEG's, with whatever types."""
    entries = [struct.pack("<HHI", t, kind, len(b) if kind != 3 else 1) + b for t, kind, b in tags]
    head = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags))
    return head + b"".join(e.ljust(12, b"\0") for e in entries) + struct.pack("<I", 0)


def test_exif_of_wrong_types_is_harmless(processors):
    """A tag that is wrong where the orientation is right; an orientation that is no number."""
    quarter = (0x112, 3, struct.pack("<H", 6))
    turned = encoded((300, 90), "JPEG", exif=exif((0x100, 2, b"30\0"), quarter))
    assert rgb(turned).size == (90, 300)
    grid_tokens = tokens_from_header(turned, processors[1])
    assert grid_tokens == tokens_from_header(encoded((90, 300)), processors[1])
    for kind, value in ((2, b"6\0"), (1, b"\x06"), (7, b"\x06"), (3, struct.pack("<H", 77))):
        picture = encoded((300, 90), "JPEG", exif=exif((0x112, kind, value)))
        assert rgb(picture).size == (300, 90)
        assert tokens_from_header(picture, processors[1]) == tokens_from_header(
            encoded((300, 90)), processors[1]
        )


KINDS = [
    "PNG",
    "JPEG",
    "GIF",
    "BMP",
    "WEBP",
    "TIFF",
    "AVIF",
    "ICO",
    "IM",
    "PCX",
    "PPM",
    "TGA",
    "SGI",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_picture_of_any_format_is_a_picture_that_cannot_be_read(kind, processors):
    good, rng = encoded((64, 48), kind), np.random.default_rng(0)
    for trial in range(150):
        bad = bytearray(good)
        for at in rng.integers(0, len(bad), 1 + trial % 4):
            bad[at] ^= 1 << rng.integers(8)
        bad = bytes(bad[: rng.integers(1, len(bad))] if trial % 3 == 0 else bad)
        for read in (rgb, lambda picture: tokens_from_header(picture, processors[1])):
            try:
                read(bad)
            except ValueError:
                pass  # the one kind of error that leaves a row out


def test_a_column_of_single_pictures_with_a_broken_one(tmp_path, processors):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    good = {"bytes": encoded(), "path": None}
    pictures = [good, {"bytes": b"", "path": None}, {"bytes": b"hello", "path": None}, good]
    features = {"problem": Value("string"), "answer": Value("string"), "images": ImageFeature()}
    rows = [{"problem": "<image> red ?", "answer": "3", "images": p} for p in pictures]
    Dataset.from_list(rows, Features(features)).to_parquet(tmp_path / "rows.parquet")
    rows, found = faults(tmp_path / "rows.parquet", processors)
    assert list(found) == [1, 2]
    assert len(encode(rows[3], *processors).pixels) == 16


def random_value(rng, depth=0):
    """Anything that a column of a JSON or parquet file may hold."""
    plain = [
        "",
        "3",
        "<image> red ?",
        "a.png",
        "<|im_end|>",
        0,
        -5,
        10**30,
        0.5,
        float("nan"),
        True,
    ]
    plain += [None, b"", PICTURE, PICTURE[:-20], b"hello"]
    what = rng.random()
    if depth > 3 or what < 0.5:
        return rng.choice(plain)
    if what < 0.7:
        return [random_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    names = "role content from value bytes path url text type ground_truth".split()
    return {rng.choice(names): random_value(rng, depth + 1) for _ in range(rng.randint(0, 3))}


def test_rows_of_random_types_are_read_or_left_out(tmp_path, processors):
    """Only a ValueError leaves a row out; any other error would end a run."""
    plain, chat = tmp_path / "plain.jsonl", tmp_path / "chat.jsonl"
    plain.write_text(json.dumps({"problem": "red ?", "answer": "3", "images": []}))
    chat.write_text(json.dumps({"messages": [USER, SAID], "images": []}))
    sets, rng, read = [Rows(str(plain), "train"), Rows(str(chat), "train")], random.Random(0), 0
    for trial in range(1000):
        columns = ("problem", "answer", "images", "contrast", "messages")
        row = {name: random_value(rng) for name in columns}
        row |= {"images": []} if trial % 2 else {"problem": "<image> red ?", "messages": [USER]}
        for rows in sets:
            try:
                example = rows.example(0, row)
                sizes = [tokens_from_header(p, processors[1]) for p in example.images]
                prompt_text(example, processors[0], sizes)
                encode(example, *processors)
                read += 1
            except ValueError as error:
                assert "\n" not in str(error)
    assert read > 50


def test_the_number_of_a_class_is_its_name(tmp_path, processors):
    """A file of `datasets` with a ClassLabel, the usual form of a classification set."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features(
        problem=Value("string"), label=ClassLabel(names=["wren", "lark"]), images=ImageFeature()
    )
    picture = {"bytes": PICTURE, "path": None}
    rows = [{"problem": "<image> ?", "label": k, "images": picture} for k in (1, 0, -1)]
    Dataset.from_list(rows, features).to_parquet(tmp_path / "rows.parquet")
    rows, found = faults(tmp_path / "rows.parquet", processors, ("problem", "label", "images"))
    assert [rows[i].answer for i in (0, 1)] == ["lark", "wren"]
    assert found == {2: "the answer is class -1 of 2"}
