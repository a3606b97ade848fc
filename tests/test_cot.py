"""Chains of thought from a teacher; and the two measures of an open-world answer."""

import math
import re
import subprocess
import sys
import time
from collections import Counter

import pytest

pytest.importorskip("fine_r1")

import torch
from conftest import ROOT, jsonl, lines_of, run_here
from test_kinds import recognise

from fine_r1 import birds, cot, kinds, measures, probe, sft
from fine_r1.concepts import listed, select
from plumbing.data.pictures import original_bytes
from plumbing.data.sources import Rows

CHAIN = (
    "<analysis> {} </analysis>\n<options> a wren, a jay </options> <comparison> so </comparison>"
)
CHAIN += " <prediction> {} </prediction>"


@pytest.mark.parametrize(
    "text, label, found",
    [
        (CHAIN.format("red", "Wren."), "wren", ""),
        ("Sure:\n" + CHAIN.format("red", "wren") + "\nWell.", "wren", ""),
        (CHAIN.format("red", "jay"), "wren", "wrong prediction"),
        (CHAIN.format("red", "a wren"), "wren", "wrong prediction"),
        (CHAIN.format("red", "wren") * 2, "wren", ""),
        (CHAIN.format(" ", "wren"), "wren", "no form"),
        (CHAIN.format("red", "wren").replace("comparison", "contrast"), "wren", "no form"),
        (CHAIN.format("red", "wren")[:-3], "wren", "no form"),
        (CHAIN.format("red", "hawk"), "hawk", "not among its candidates"),
        (CHAIN.format("红色", "wren"), "wren", "mixed languages"),
    ],
)
def test_what_is_wrong_with_a_chain(text, label, found):
    assert cot.fault(text, label) == found


def test_a_list_is_read_as_models_write_lists():
    assert listed("Here:\n- Bill: long\n* 2 wings\n1. Bill: long; crest black\n\n") == [
        "Here:",
        "Bill: long",
        "2 wings",
        "crest black",
    ]


def test_the_concepts_that_tell_of_this_picture_are_kept():
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.nn.functional.normalize(torch.randn(n, 6, generator=g), dim=-1)
    z, d, o = draw(7), draw(4), draw(9)
    z[2], z[5] = d[0], o[0]  # what is said here, and what is said of another picture
    e = lambda x, y: math.exp(float(x @ y) / 0.1)
    score = [sum(math.log(e(x, b) / (e(x, b) + sum(e(x, c) for c in o))) for b in d) for x in z]
    mean, std = torch.tensor(score).mean(), torch.tensor(score).std()
    above = sorted((i for i in range(7) if score[i] > mean + 0.4 * std), key=lambda i: -score[i])
    best = sorted(range(7), key=lambda i: -score[i])
    assert select(z, d, o) == best[: max(3, len(above))] and 5 not in select(z, d, o)
    assert select(z[:1], d, o) == [0] and sorted(select(z[:2], d, o[:0])) == [0, 1]


def test_a_line_that_was_cut_off_is_written_again(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"id": "a"}\n{"id": "b"}\n{"id":')
    journal = cot.Journal(file)
    journal.add({"id": "ü\u2028"})
    assert [row["id"] for row in cot.Journal(file).rows] == ["a", "b", "ü\u2028"]


def run(data, out, *flags, model="toy"):
    """The command line, in this process -> what it said on standard output."""
    places = [data, "--out", out, "--model", model, "--descriptions", 1]
    return run_here(cot.main, *places, *flags)


TAUGHT, UNKNOWN = [birds.BIRDS[name] for name in ("wren", "jay", "crane")], birds.BIRDS["hawk"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two pictures of each of four kinds, as a file."""
    import pyarrow
    from pyarrow import parquet

    shown = [(i, bird) for i in range(2) for bird in (*TAUGHT, UNKNOWN)]
    rows = [kinds.question_row(birds.PLAIN, "cot", bird, i) for i, bird in shown]
    file = tmp_path_factory.mktemp("pictures") / "four.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def test_what_is_thrown_away_is_counted_and_more_tries_go_on(pictures, tmp_path):
    """A teacher that does not know what is asked: the toy, which has never seen these words."""
    out = tmp_path / "chains.jsonl"
    told = run(pictures, out, "--tries", 1)
    assert "0 chains, 4 pictures given up" in told and "4 x no form" in told
    first = (tmp_path / "chains-thrown.jsonl").read_text()
    told = run(pictures, out, "--tries", 2)
    assert "8 x no form" in told
    thrown = (tmp_path / "chains-thrown.jsonl").read_text()
    assert thrown.startswith(first) and len(lines_of(tmp_path / "chains-described.jsonl")) == 4
    tries = Counter(row["id"] for row in lines_of(tmp_path / "chains-thrown.jsonl"))
    assert set(tries.values()) == {2} and len(tries) == 4
    with pytest.raises(SystemExit, match=r"another run's chains: seed \('1' then, '2' now\)"):
        run(pictures, out, "--seed", 2)
    with pytest.raises(SystemExit, match="--model: name a teacher"):
        run(pictures, tmp_path / "new.jsonl", model="")
    with pytest.raises(SystemExit, match="--out ends in .jsonl"):
        run(pictures, tmp_path / "new.parquet")


@pytest.mark.slow
def test_from_pictures_to_a_step_of_supervised_learning(pictures, tmp_path):
    base, teacher = tmp_path / "base", tmp_path / "teacher"
    kinds.learn_base(base, updates=1)
    lessons = [lesson for i in range(8) for lesson in kinds.chain_lessons(i, TAUGHT)]
    kinds.learn_teacher(base, teacher, 30, lambda k: lessons)
    out, asked = tmp_path / "a.jsonl", ["--per_class", 2, "--tries", 6]
    told = run(pictures, out, *asked, model=teacher)
    rows, thrown = lines_of(out), lines_of(tmp_path / "a-thrown.jsonl")
    assert rows and thrown
    assert f"{len(rows)} chains, {8 - len(rows)} pictures given up" in told
    for why, n in Counter(row["fault"] for row in thrown).items():
        assert f"{n} x {why}" in told
    data = Rows(out, "train", ["problem", "response", "images"])
    for i, row in enumerate(rows):
        thought = r"<think> (.+?)\n\n(.+?)\n\n(.+?) </think>\n\n<answer> (.+) </answer>"
        _, options, _, answer = re.fullmatch(thought, row["response"]).groups()
        assert answer == recognise(original_bytes(data[i].images[0])) and answer in options
        assert row["problem"] == f"<image> {birds.OPEN}"

    # The same again, killed when something is thrown away, and asked for once more.
    again = tmp_path / "b.jsonl"
    words = ["-m", "fine_r1.cot", pictures, "--out", again, "--model", teacher, *asked]
    words = [sys.executable, *map(str, words), "--descriptions", "1"]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        lost = tmp_path / "b-thrown.jsonl"
        while process.poll() is None and not (lost.exists() and lost.stat().st_size):
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -9
    before = {row["id"] for row in cot.Journal(again).rows}
    numbers = lambda said: re.findall(r"\d+ (?=chains|pictures|x )", said)
    assert numbers(run(pictures, again, *asked, model=teacher)) == numbers(told)
    assert again.read_text() == out.read_text() and before <= {row["id"] for row in rows}
    by_id = lambda path: sorted(lines_of(path), key=lambda row: row["id"])
    assert by_id(lost) == by_id(tmp_path / "a-thrown.jsonl")
    marked = again.read_text().replace(" </think>", " , kept </think>", 1)
    again.write_text(marked)  # what is kept is not asked for again
    run(pictures, again, *asked, model=teacher)
    assert again.read_text() == marked and len(lines_of(lost)) == len(thrown)

    flags = ["--model", base, "--data", out, "--out", tmp_path / "run", "--reward", "tagged"]
    run_here(sft.main, *flags, "--steps", 1)
    assert (tmp_path / "run/checkpoint-1/model.safetensors").exists()
    assert not list((tmp_path / "run").glob("left_out*"))


def test_a_label_is_included_or_not():
    assert measures.included("It is a Scarlet Tanager.", "scarlet_tanager")
    assert not measures.included("tanager", "scarlet tanager")


@pytest.fixture(scope="module", params=["siglip", "clip", "bert"])
def encoder(request, tmp_path_factory):
    """An encoder of a real class, very small, with random weights -> its folder"""
    import transformers as t

    torch.manual_seed(0)
    tok = kinds.tokenizer(["bird", *birds.BIRDS])
    text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    sees = text | dict(image_size=28, patch_size=14)
    text |= dict(vocab_size=len(tok), max_position_embeddings=12, eos_token_id=tok.eos_token_id)
    text |= dict(pad_token_id=tok.pad_token_id)
    whole = dict(text_config=text, vision_config=sees)
    model = {
        "siglip": lambda: t.SiglipModel(t.SiglipConfig(**whole)),
        "clip": lambda: t.CLIPModel(t.CLIPConfig(**whole, projection_dim=16)),
        "bert": lambda: t.BertModel(t.BertConfig(**text)),
    }[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def test_the_similarity_is_relative_to_the_category(encoder, tmp_path):
    encode = measures.TextEncoder(encoder, "cpu")
    texts = ["wren", "jay finch", "bird", "jay"]
    together = encode(texts)
    assert torch.allclose(together.norm(dim=-1), torch.ones(4))
    for text, x in zip(texts, together):  # what stands beside a text makes no difference
        assert torch.allclose(encode([text])[0], x, atol=1e-6)
    found = measures.relative_similarity(
        encode, ["wren", "bird", "jay finch"], ["wren"] * 3, "bird"
    )
    cosine = lambda a, b: float(together[texts.index(a)] @ together[texts.index(b)])
    least = cosine("bird", "wren")
    other = max(0, (cosine("jay finch", "wren") - least) / (1 - least))
    assert found == pytest.approx([1, 0, other], abs=1e-5)
    with pytest.raises(SystemExit, match="--category wren is a label"):
        measures.relative_similarity(encode, ["jay"], ["wren"], "wren")

    answers = ["<answer> wren </answer>", "a wren or a jay", "bird"]
    rows = [dict(id=str(i), predict=p, label="wren", accuracy=0.0) for i, p in enumerate(answers)]
    file, flags = jsonl(tmp_path / "kinds.jsonl", rows), ["--encoder", encoder]
    said = run_here(measures.main, file, *flags, "--category", "bird")
    heads, line = said.splitlines()
    shown = ["wren", *answers[1:]]
    similar = measures.relative_similarity(encode, shown, ["wren"] * 3, "bird")
    assert [heads.split()[i] for i in (1, 5, 9)] == ["accuracy", "inclusion", "similarity"]
    assert line.split()[:2] == ["kinds", "0.0"] and " 66.7 " in line
    assert f" {100 * sum(similar) / 3:.1f} " in line


def test_the_probe_names_what_a_linear_classifier_can_tell(pictures):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(40) % 2
    x = torch.randn(40, 3, generator=g)
    x[:, 1] = 100 + 9 * (y - 0.5) + x[:, 1]
    assert probe.probe(x[:20], y[:20], x[20:], y[20:]) == 1
    assert probe.probe(x[:20, :1], y[:20], x[20:, :1], y[20:]) < 0.8
    told = run_here(probe.main, "toy", "toy-qwen3", "--train", pictures, "--test", pictures)
    heads, *lines = [line.split() for line in told.splitlines()]
    assert heads == ["model", "vision", "tower", "language", "model"]
    assert lines == [[model, "100.0", "100.0"] for model in ("toy", "toy-qwen3")]  # as learned
