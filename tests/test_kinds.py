"""The fine-grained toy: pictures that differ in a crest, and files that keep their promises."""

import collections
import io
import itertools
import random
import re
import sys

import numpy as np
import pytest
from conftest import ROOT, command
from PIL import Image

from plumbing.config import MODELS, resolve
from plumbing.conversations import Conversations, encode_conversation
from plumbing.data import encode
from plumbing.grader import Grader
from plumbing.sources import Rows
from reward import BOXED, score
from toy import birds, kinds
from toy.birds import COLOURS, CREST, CRESTS, FAMILIES, FORMS, KINDS, alike, draw, picture

sys.path.insert(0, str(ROOT / "bench"))

import emoji  # noqa: E402

VENDORS = [("google", 0), ("twitter", 9)]
LEARNED = ("sft", "train")
TESTED = [f"test_{who}_{how}" for who in ("seen", "unseen") for how in ("open", "closed")]
UNSEEN = {kind.name for kind in KINDS.values() if not kind.seen}


@pytest.fixture(scope="module")
def files():
    return kinds.files()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `python -m toy.kinds` writes, with a base that has learned nothing yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        out = tmp_path_factory.mktemp("files") / "kinds"
        kinds.write(out, steps=0)
    return out


def shown(row):
    """Every picture of a row, as bytes."""
    return [*row["images"], *(row[c] for c in ("positive", "negative") if c in row)]


def recognise(data):
    """The kind in a picture, from its pixels alone: a second reader."""
    x = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    (crest,) = (c for c, rgb in CRESTS.items() if (x == rgb).all(-1).sum() == CREST**2)
    body = (x != x[0, 0]).any(-1) & (x != CRESTS[crest]).any(-1)
    hue = np.median(x[body], 0) / np.linalg.norm(np.median(x[body], 0))
    near = {c: hue @ np.array(rgb) / np.linalg.norm(rgb) for c, rgb in COLOURS.items()}
    (family,) = (f for f in FAMILIES if f[1] == max(near, key=near.get))
    return FAMILIES[family][list(CRESTS).index(crest)]


def test_pictures_are_a_pure_function_of_their_name():
    lark = KINDS["lark"]
    same = [picture(1, "val", lark, 5).tobytes() for _ in range(2)]
    assert same[0] == same[1]
    for other in [(2, "val", lark, 5), (1, "train", lark, 5), (1, "val", lark, 6)]:
        assert picture(*other).tobytes() != same[0]


@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
def test_kinds_of_a_family_differ_in_the_pixels_of_the_crest_only(family):
    for i in range(20):
        drawn = [np.asarray(draw(KINDS[n], random.Random(i))[0]) for n in FAMILIES[family]]
        for one, other in itertools.combinations(drawn, 2):
            rows, columns = (one != other).any(-1).nonzero()
            assert len(rows) == CREST**2
            assert np.ptp(rows) == np.ptp(columns) == CREST - 1


def test_two_families_differ_at_a_glance():
    pictures = {}
    for family, names in FAMILIES.items():
        pictures[family] = np.asarray(draw(KINDS[names[0]], random.Random(0))[0]).astype(int)
    for a in FAMILIES:
        for b in set(FAMILIES) - {a}:
            assert (abs(pictures[a] - pictures[b]).sum(-1) > 60).sum() > 10 * CREST**2


def test_pictures_show_what_the_rows_say(files):
    for name in ["train", "val", *TESTED]:
        for row in files[name][::3]:
            assert recognise(row["images"][0]) == row["answer"]
    for row in files["sft"]:
        said = row["messages"][1]["content"]
        assert re.search(r"<answer> (\w+) </answer>$", said)[1] == recognise(row["images"][0])


def test_no_picture_to_test_on_is_learned_from(files):
    learned = {p for name in LEARNED for row in files[name] for p in shown(row)}
    tested = {p for name in ["val", *TESTED] for row in files[name] for p in shown(row)}
    # Each row has a picture of its own; a triplet's companions are other rows' pictures.
    assert len(learned) == sum(len(files[name]) for name in LEARNED) and not learned & tested
    warm = {x.images[0].tobytes() for i in range(1500) for x in kinds.lessons(i, None) if x.images}
    assert not warm & {Image.open(io.BytesIO(p)).tobytes() for p in tested | learned}


def test_unseen_kinds_are_in_no_file_to_learn_from(files):
    assert len(UNSEEN) == len(FAMILIES)
    assert {k.crest for k in KINDS.values() if not k.seen} == set(CRESTS)
    for name in [*LEARNED, "val"]:
        found = {recognise(p) for row in files[name] for p in shown(row)}
        assert found == set(KINDS) - UNSEEN
    for name in TESTED:
        answers = {row["answer"] for row in files[name]}
        assert answers == (UNSEEN if "unseen" in name else set(KINDS) - UNSEEN)


def test_the_positive_is_another_picture_of_the_kind_the_negative_another_of_its_family(files):
    negatives = collections.defaultdict(set)
    for row in files["train"]:
        kind = KINDS[row["answer"]]
        assert recognise(row["positive"]) == kind.name and row["positive"] != row["images"][0]
        other = recognise(row["negative"])
        assert other in {k.name for k in alike(kind)} - UNSEEN
        negatives[kind].add(other)
    assert sum(map(len, negatives.values())) > 1.5 * len(negatives)  # not always the same one


def test_options_are_shuffled_and_are_those_that_are_taken_for_each_other(files):
    for name in ("test_seen_closed", "test_unseen_closed"):
        places = collections.Counter()
        for row in files[name]:
            options = row["problem"].split(" : ")[1].removesuffix(" ?").split(" , ")
            assert set(options) == set(FAMILIES[KINDS[row["answer"]].family])
            places[options.index(row["answer"])] += 1
        expected = len(files[name]) / len(CRESTS)  # 60; its standard deviation is 6.7
        assert all(abs(places[i] - expected) < 3.5 * 6.7 for i in range(len(CRESTS))), places


def test_a_perfect_chain_of_thought_is_graded_right():
    every = KINDS.values()
    responses = [birds.respond(birds.think(k), k.name, BOXED.instruction) for k in every]
    wrong = [birds.respond(birds.think(k), alike(k)[0].name, BOXED.instruction) for k in every]
    truths, grader = [k.name for k in every], Grader(workers=1)
    graded = score(responses + wrong, truths * 2, grader)
    grader.close()
    assert all(s["overall"] == 1 for s in graded[: len(KINDS)])
    assert all(s["accuracy"] == 0 and s["format"] == 1 for s in graded[len(KINDS) :])
    assert birds.respond(birds.think(KINDS["lark"]), "lark") == (
        "<think> body round red ; crest pink ; candidates wren finch lark robin ; "
        "crest pink is lark </think> <answer> lark </answer>"
    )


def test_no_name_is_part_of_another():
    """Fine-R1's reward looks for the truth anywhere in the answer."""
    assert not [(a, b) for a in KINDS for b in KINDS if a != b and a in b]


def test_every_word_is_known(files):
    tok = kinds.new_processors()[0]
    texts = {row["problem"] + form for name in TESTED for row in files[name] for form in FORMS}
    texts |= {m["content"] for row in files["sft"] for m in row["messages"]}
    for i in range(100):
        for teacher in (None, kinds.Teacher(), kinds.CARELESS):
            texts |= {text for x in kinds.lessons(i, teacher) for _, text in x.turns}
    whole = " ".join(texts).replace("<image>", "")
    assert tok.unk_token_id not in tok(whole)["input_ids"]


def test_the_careless_teacher_is_as_careless_as_it_says():
    lark, rng, n = KINDS["lark"], random.Random(0), 4000
    said = [kinds.answer(lark, rng, kinds.CARELESS, BOXED.instruction) for _ in range(n)]
    skips, misreads = kinds.CARELESS
    assert abs(sum("crest" not in text for text in said) / n - skips) < 0.03
    right = skips / len(CRESTS) + (1 - skips) * (1 - misreads)
    assert abs(sum("{ lark }" in text for text in said) / n - right) < 0.03
    looked = [text for text in said if "crest" in text]
    named = [re.search(r"crest (\w+) is (\w+) ", text).groups() for text in looked]
    assert all(
        KINDS[name].crest == crest for crest, name in named
    )  # what it says, it concludes from


def test_the_loaders_read_the_files(folder):
    both = kinds.new_processors()
    data = Conversations(folder / "sft.parquet", "train")
    assert len(data) == len(KINDS) - len(UNSEEN) and not data.faults(*both, 128)
    assert encode_conversation(data[0], *both).scored.any()
    for name in ["train", "val", *TESTED]:
        rows = Rows(folder / f"{name}.parquet", "test")
        assert not rows.faults(*both, 128)
        assert len(encode(rows[0], *both).pixels) == 16
        assert recognise(rows[0].images[0]) == rows[0].answer
    triplet = Rows(folder / "train.parquet", "train").rows[0]
    assert recognise(triplet["positive"]) == triplet["answer"] != recognise(triplet["negative"])


def test_the_base_is_a_folder_that_sft_learns_from(folder, tmp_path):
    model, data = folder / "base", folder / "sft.parquet"
    cfg, _ = resolve({"model": str(model), "data": str(data)}, cuda=False)
    assert cfg.lr == MODELS["tiny"]["lr"] and cfg.min_pixels == 28 * 28
    flags = "--steps 1 --prompts_per_update 15 --lr 1e-3".split()
    ran = command("sft.py", "--model", model, "--data", data, "--out", tmp_path / "kinds", *flags)
    assert (tmp_path / "kinds/checkpoint-1/model.safetensors").exists(), ran.stderr


def test_of_the_emoji_no_row_to_train_on_shows_an_unseen_class():
    """bench/emoji.py on made-up drawings. `same` is most like b and is unseen, as every third of a
    subcategory is; so the negative of b is the most similar one of those that are seen."""
    shades = {"a": 0, "b": 100, "same": 101, "c": 130, "d": 250, "e": 251}
    drawn = {
        name: {vendor: Image.new("RGB", (64, 64), (shade, 0, blue)) for vendor, blue in VENDORS}
        for name, shade in shades.items()
    }
    rows = emoji.rows_of({"birds": drawn})
    known = {kinds.png(drawn[name]["google"]): name for name in shades}
    negatives = {row["answer"]: known[row["negative"]] for row in rows["train"]}
    assert negatives == {"a": "b", "b": "c", "c": "b", "d": "c"}
    assert {row["answer"] for row in rows["test_unseen"]} == {"same", "e"}
    assert {row["answer"] for row in rows["test_seen"]} == set(negatives)
    for row in rows["train"]:
        assert row["positive"] == kinds.png(drawn[row["answer"]]["twitter"])
    unseen = [row["images"][0] for row in rows["test_unseen"]]
    assert unseen == [kinds.png(drawn[name]["twitter"]) for name in ("same", "e")]
