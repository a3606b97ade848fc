"""The fine-grained toy: pictures that differ in a crest, its files, and what was got with them."""

import collections
import io
import itertools
import json
import random
import re

import numpy as np
import pytest

pytest.importorskip("fine_r1")

from conftest import ROOT, run_here
from PIL import Image

from eval import eval_parser
from fine_r1 import bench, birds, kinds, sft
from fine_r1.birds import BIRDS, BODIES, CRESTS, GROUNDS, HARDER, PLAIN
from fine_r1.conversations import Conversations
from fine_r1.tapo import Tapo
from plumbing.data.prompts import Example, encode
from plumbing.data.sources import Rows
from plumbing.models.weights import load_processors
from plumbing.run.config import Config, parser, resolve
from reward import BOXED, compute_score

CREST = PLAIN.crest
LEARNED = ("sft_4", "train")
TESTED = ("val", *bench.TESTS)
UNSEEN = {bird.name for bird in BIRDS.values() if not bird.seen}


@pytest.fixture(scope="module")
def files():
    return kinds.files_of_birds()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `python -m fine_r1.kinds` writes, with a base that has learned next to nothing."""
    out = tmp_path_factory.mktemp("files") / "kinds"
    kinds.write_kinds(out, updates=2)
    return out


def shown(row):
    """Every picture of a row, as bytes."""
    return [*row["images"], *(row[c] for c in ("positive", "negative") if c in row)]


def recognise(data, size=CREST):
    """The kind in a picture, from its pixels alone: a second reader. size: of its crest"""
    x = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    (crest,) = (c for c, rgb in CRESTS.items() if (x == rgb).all(-1).sum() == size**2)
    body = np.median(x[(x != x[0, 0]).any(-1) & (x != CRESTS[crest]).any(-1)], 0)
    alike = [(body @ np.array(c) / np.linalg.norm(c), names) for _, c, names in BODIES.values()]
    return max(alike)[1][list(CRESTS).index(crest)]


def test_kinds_of_a_family_differ_in_the_pixels_of_the_crest_only():
    for (_, _, names), i in itertools.product(BODIES.values(), range(10)):
        drawn = [np.asarray(birds.draw_bird(BIRDS[n], random.Random(i))[0]) for n in names]
        for one, other in itertools.combinations(drawn, 2):
            rows, columns = (one != other).any(-1).nonzero()
            assert len(rows) == CREST**2 and np.ptp(rows) == np.ptp(columns) == CREST - 1
    assert not [(a, b) for a in BIRDS for b in BIRDS if a != b and a in b]  # for Fine-R1's reward


def test_pictures_show_what_the_rows_say_and_are_learned_from_or_asked_about(files):
    for row in (row for name in TESTED for row in files[name][::3]):
        assert recognise(row["images"][0]) == row["answer"]
    assert [row["images"] for row in files["labels"]] == [row["images"] for row in files["sft"]]
    for row in files["sft_4"] + files["labels"]:
        answer = row["messages"][1]["content"]
        assert re.search(r"<answer> (\w+) </answer>$", answer)[1] == recognise(row["images"][0])
    learned = {p for name in LEARNED for row in files[name] for p in shown(row)}
    tested = {p for name in TESTED for row in files[name] for p in shown(row)}
    # Each row has a picture of its own; a triplet's companions are other rows' pictures.
    assert len(learned) == sum(len(files[name]) for name in LEARNED) and not learned & tested


def test_unseen_kinds_are_in_no_file_to_learn_from(files):
    assert {bird.crest for bird in BIRDS.values() if not bird.seen} == set(CRESTS)
    for name in [*LEARNED, "val"]:
        assert {recognise(p) for row in files[name] for p in shown(row)} == set(BIRDS) - UNSEEN
    for name in bench.TESTS:
        wanted = UNSEEN if "unseen" in name else set(BIRDS) - UNSEEN
        assert {row["answer"] for row in files[name]} == wanted


def test_the_positive_is_of_the_kind_and_the_negative_another_of_its_family(files):
    for row in files["train"]:
        bird, other = BIRDS[row["answer"]], recognise(row["negative"])
        assert recognise(row["positive"]) == bird.name and row["positive"] != row["images"][0]
        assert other in {b.name for b in birds.alike(bird)} - UNSEEN


def test_in_context_each_kind_of_the_family_that_is_learned_from_is_solved_first(files):
    for row in (row for name in bench.TESTS for row in files[f"in_context_{name}"][::9]):
        *solved, asked = map(recognise, row["images"])
        assert re.findall(r"<image> what bird is this [?] (\w+)", row["problem"]) == solved
        assert set(solved) == set(BIRDS[asked].family) - UNSEEN and asked == row["answer"]


def test_the_ground_of_the_harder_birds_tells_kinds_where_they_are_learned_from():
    files = kinds.files_of_birds(HARDER)

    def share(names):
        """Of how many pictures the ground is the usual one of the kind in sft_4."""
        rows = [row for name in names for row in files[name]]
        return sum(ground(row) == usual[kind_of(row)] for row in rows) / len(rows)

    def kind_of(row):
        return recognise(row["images"][0], HARDER.crest)

    def ground(row):
        page = np.asarray(Image.open(io.BytesIO(row["images"][0]))).astype(int)[0, 0]
        return min(GROUNDS, key=lambda name: abs(page - GROUNDS[name]).sum())

    grounds = {kind: [] for kind in set(BIRDS) - UNSEEN}
    for row in files["sft_4"]:
        grounds[kind_of(row)].append(ground(row))
    usual = {kind: collections.Counter(told).most_common(1)[0][0] for kind, told in grounds.items()}
    for _, _, family in BODIES.values():
        assert {usual[kind] for kind in family if kind in usual} == set(GROUNDS)
    assert share(["sft_4", "train"]) > 0.85 and len(files["train"]) == 15 * HARDER.shots
    # Of 480 a third each: 160, with a standard deviation of 10.3.
    assert abs(480 * share(["val", "test_seen_open"]) - 160) < 3.5 * 10.3


def test_options_are_shuffled_and_are_those_that_are_taken_for_each_other(files):
    for name in ("test_seen_closed", "test_unseen_closed"):
        places = collections.Counter()
        for row in files[name]:
            options = row["problem"].split(" : ")[1].removesuffix(" ?").split(" , ")
            assert set(options) == set(BIRDS[row["answer"]].family)
            places[options.index(row["answer"])] += 1
        # Of 240 a quarter each: 60, with a standard deviation of 6.7.
        assert all(abs(places[i] - 60) < 3.5 * 6.7 for i in range(4)), places


def test_the_hasty_teacher_is_as_hasty_as_it_says():
    lark, rng, n = BIRDS["lark"], random.Random(0), 2000
    for form, kind in zip(birds.ANSWERS, ("tagged", "official")):
        right = kinds.taught_answer(lark, rng, kinds.WITH_CARE, form)
        assert compute_score(right, "lark", kind=kind)["overall"] == 1
    hasty = [kinds.taught_answer(lark, rng, kinds.IN_HASTE, BOXED.instruction) for _ in range(n)]
    skips, misreads = kinds.IN_HASTE
    assert abs(sum("crest" not in text for text in hasty) / n - skips) < 0.04
    wanted = skips / len(CRESTS) + (1 - skips) * (1 - misreads)
    assert abs(sum("{ lark }" in text for text in hasty) / n - wanted) < 0.04


def test_the_folder_is_read_and_learned_from(folder, tmp_path):
    cfg, _ = resolve({"model": str(folder / "base"), "data": "x.parquet"}, cuda=False)
    both = load_processors(folder / "base", cfg)
    silent = load_processors(folder / "at_once", cfg)
    asked = [encode(Example("", "what bird is this ?", ""), *p).ids for p in (both, silent)]
    assert silent[0].decode(asked[1][len(asked[0]) :]) == "<think> </think>"
    data = Conversations(folder / "sft.parquet", "train")
    assert len(data) == len(BIRDS) - len(UNSEEN) and not data.faults(*both, 128)
    texts = [text for row in data for _, text in row.turns]
    for name in TESTED:
        rows = Rows(folder / f"{name}.parquet", "test")
        assert not rows.faults(*both, 128) and recognise(rows[0].images[0]) == rows[0].answer
        texts += [rows[i].problem for i in range(40)]
    for i, teacher in itertools.product(range(50), (None, kinds.IN_HASTE)):
        texts += [text for example in kinds.bird_lessons(i, teacher) for _, text in example.turns]
    assert both[0].unk_token_id not in both[0](" ".join(texts).replace("<image>", ""))["input_ids"]
    flags = ["--model", folder / "base", "--data", folder / "sft.parquet", "--steps", 1]
    run_here(sft.main, *flags, "--out", tmp_path / "run")
    assert (tmp_path / "run/checkpoint-1/model.safetensors").exists()
    with pytest.raises(SystemExit, match="base is there already"):
        kinds.write_kinds(folder)


def test_the_page_is_that_of_its_runs_and_the_readme_quotes_it():
    results = json.loads((ROOT / "results" / "fine_grained.json").read_text())
    page, told = bench.page(results), (ROOT / "fine_r1" / "README.md").read_text()
    assert page == (ROOT / "results" / "fine_grained.md").read_text()
    rows = re.findall(r"^\| (?:base|CoT SFT|DAPO|PAPO_D|TAPO) \| \d.*", told, re.M)
    assert len(rows) == 5 and all(row in page for row in rows)


def test_every_arm_is_a_command_on_a_file_and_every_rule_is_of_arms(files):
    settings = {"train.py": Config, "fine_r1/tapo.py": Tapo, "fine_r1/sft.py": sft.SftConfig}
    for arm in bench.ARMS.values():
        eval_parser().parse_args(arm.asked.split())  # or it ends with a sentence
        assert all(f"{arm.files}{test}" in files for test in bench.TESTS)
        if arm.line:
            program, *flags = arm.line.split()
            assert parser(settings[program]).parse_args(flags).steps == arm.steps
            assert arm.rows in files and arm.start in bench.ARMS
    pairs = [pair for *_, said in bench.RULES for pair in said.split(", ")]
    assert {arm for pair in pairs for arm in pair.split(" > ")} == set(bench.ARMS)
    assert len(pairs) == len(set(pairs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["in context", "answer only", "labels", "No-Thinking-RL", "inter"])
def test_an_arm_takes_two_steps_and_is_asked(name, folder, monkeypatch):
    small = {"labels": "", "CoT SFT": "", "inter": "--no-dynamic_sampling"}
    batch = "--prompts_per_step 4 --prompts_per_update 2 --group_size 4"
    for arm, more in (small | {name: small.get(name, "")}).items():
        a = bench.ARMS[arm]
        line = f"{a.line} {'' if 'sft' in a.line else batch} {more} --steps 2" if a.line else ""
        asked = f"{a.asked} --questions 4 --n 1"
        monkeypatch.setitem(bench.ARMS, arm, a._replace(line=line, asked=asked, steps=2))
    result, arm = bench.result_of(folder.parent, name, 3), bench.ARMS[name]
    assert list(result["after"]) == bench.TESTS
    assert bool(result["commit"]) == bool(result["command"])
    texts = (folder.parent / f"answers-{name}-seed3.jsonl").read_text().splitlines()
    tokens = [json.loads(line)["tokens"] for line in texts]
    assert len(tokens) == 16 and (max(tokens) <= 4) == ("--max" in arm.line + arm.asked)
