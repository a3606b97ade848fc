"""The toy task: right answers, honest splits, hints as promised."""

import re

import pytest
import torch
from conftest import ROOT

from plumbing.config import resolve
from plumbing.data import Example, encode
from reward import boxed
from toy import lessons
from toy.lessons import build, lesson
from toy.model import new_policy, processor, tokenizer
from toy.task import FAMILIES, GRID, NAMES, SPLITS, ToyData, held_out, make


def answer_by_looking(problem, board):
    """A second solver, written from the question alone."""
    question = problem.split(" . ")[1]
    if m := re.match(r"how many (\w+) objects are there \?|how many (\w+)s are there \?", question):
        word = m[1] or m[2]
        return str(sum(c is not None and word in c for c in board))
    if m := re.match(r"what (colour|shape) is at (\w+) \?", question):
        return board[NAMES.index(m[2])][m[1] == "shape"]
    if m := re.match(r"are there more (\w+) or more (\w+) objects \?", question):
        a, b = (sum(c is not None and c[0] == w for c in board) for w in m.groups())
        return m[1] if a > b else m[2] if b > a else "same"
    m = re.match(r"how many (\w+) and (\w+) objects are there together \?", question)
    return str(sum(c is not None and c[0] in m.groups() for c in board))


def test_answers_are_right_and_responses_carry_them():
    families = set()
    for i in range(200):
        example, response, board = make(3, "train", i)
        assert example.answer == answer_by_looking(example.problem, board) == boxed(response)
        families.add(example.tags["family"])
    assert families == set(FAMILIES)


def test_examples_are_a_pure_function_of_seed_split_and_index():
    for split in ("train", "general", "vision", "blind", "val"):
        a, b = make(1, split, 5), make(1, split, 5)
        assert a[0].problem == b[0].problem and a[0].images[0].tobytes() == b[0].images[0].tobytes()
    assert make(1, "train", 5)[2] != make(2, "train", 5)[2]
    assert make(1, "vision", 5)[2] != make(1, "val", 5)[2]


def test_train_and_test_pictures_never_coincide():
    """The divide is by content: every training board, the warm start's included, hashes to one side
    of it."""
    assert not any(held_out(make(seed, "train", i)[2]) for seed in (0, 1) for i in range(200))
    assert all(held_out(make(0, split, i)[2]) for split in [*SPLITS, "val"] for i in range(100))
    pictures = {lesson(i, 0)[0].images[0].tobytes() for i in range(100)}
    assert not pictures & {make(0, "vision", i)[0].images[0].tobytes() for i in range(100)}


@pytest.mark.parametrize("hint_right", [0.5, 0.65])
def test_hints_are_right_as_often_as_promised(hint_right):
    def right(split, n=1500):
        examples = (make(0, split, i, hint_right)[0] for i in range(n))
        return sum(example.tags["hint_right"] for example in examples) / n

    assert abs(right("train") - hint_right) < 0.05 and abs(right("general") - hint_right) < 0.05
    # vision: the hint is another picture's answer, right only as often as two pictures agree
    answers = [make(0, "vision", i)[0].answer for i in range(0, 12_000, 4)]
    agree = sum(a == b for a, b in zip(answers[:1500], answers[1500:])) / 1500
    assert right("vision") < 0.4 and agree < 0.4


def test_blind_asks_the_vision_questions_about_black_pictures():
    for i in range(8):
        seen, blind = make(0, "vision", i)[0], make(0, "blind", i)[0]
        assert seen.problem == blind.problem and seen.answer == blind.answer
        assert not any(blind.images[0].tobytes()) and any(seen.images[0].tobytes())


def test_every_word_is_in_the_vocabulary_and_one_cell_is_one_token(processors, prompts):
    tok = processors[0]
    for i in range(100):
        example, response, _ = make(0, "train", i)
        text = example.problem.replace("<image>", "") + " " + response
        assert tok.unk_token_id not in tok(text)["input_ids"]
        assert tok.decode(tok(response)["input_ids"]) == response
    assert (prompts[0].ids == tok.convert_tokens_to_ids("<|image_pad|>")).sum() == GRID**2


def test_the_warm_start_is_cached(folder):
    before = (folder / "model.safetensors").stat().st_mtime_ns
    from conftest import WARM

    assert build(WARM) == folder and (folder / "model.safetensors").stat().st_mtime_ns == before


def test_other_code_loads_the_folder_as_it_is(folder):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert model.config.model_type == "qwen2_5_vl"


def test_text_only_and_two_pictures_are_encoded(processors):
    cells = ToyData("train", 2)
    none = encode(Example("t", "how many red objects are there ?", "3"), *processors)
    pictures = [cells[0].images[0], cells[1].images[0]]
    two = encode(Example("t", "<image> and <image> same ?", "3", pictures), *processors)
    assert none.pixels is None and none.grid is None
    placeholder = processors[0].convert_tokens_to_ids("<|image_pad|>")
    assert len(two.grid) == 2 and (two.ids == placeholder).sum() == 2 * GRID**2
    assert torch.equal(two.pixels[: 4 * GRID**2], encode(cells[0], *processors).pixels)


def test_toy_settings_are_the_toys_own():
    assert resolve({"model": "toy"}, cuda=True)[0].group_size == 8
    assert resolve({}, cuda=False)[0].model == "toy"
    assert resolve({}, cuda=True)[0].model == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_the_policy_is_as_small_as_the_readme_says(policy):
    from conftest import ROOT

    size = sum(p.numel() for p in policy.parameters())
    assert f"{size / 1e6:.2f} M parameters" in (ROOT / "docs" / "toy.md").read_text()


def test_the_warm_start_is_named_after_what_it_depends_on(monkeypatch, tmp_path):
    """A comment costs nobody two minutes; another lesson, model, task or number of steps does."""
    for name in lessons.FILES:
        source = (ROOT / "toy" / name).read_text()
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(lessons, "__file__", str(tmp_path / "lessons.py"))
    config = new_policy(tokenizer()).config

    def key(steps=60):
        settings = (steps, lessons.TRUSTING)
        return lessons.recipe(lessons.FILES, settings, config, processor())

    first = key()
    for name, old, new in [
        ("task.py", '"""', '"""Another first word. '),
        ("model.py", "\nimport torch\n", "\n# Why this is so.\nimport torch\n"),
        (
            "lessons.py",
            "HINT_RIGHT = 0.5  # how often",
            "HINT_RIGHT = 0.5  # with what probability",
        ),
    ]:
        source = (tmp_path / name).read_text()
        assert old in source
        (tmp_path / name).write_text(source.replace(old, new, 1))
        assert key() == first, name
    for name, old, new in [
        ("task.py", "GRID, CELL = 2, 28", "GRID, CELL = 3, 28"),
        ("model.py", "seed=0", "seed=1"),
        ("lessons.py", "HINT_RIGHT = 0.5", "HINT_RIGHT = 0.4"),
    ]:
        source = (tmp_path / name).read_text()
        assert old in source, name
        (tmp_path / name).write_text(source.replace(old, new, 1))
        assert key() != first, name
        (tmp_path / name).write_text(source)
    assert key(61) != first and key() == first
    monkeypatch.setattr(lessons, "SUPERVISED_STEP", lessons.SUPERVISED_STEP[1:])
    assert key() != first


def test_the_warm_start_is_named_after_the_supervised_step():
    import loss
    import sft
    from plumbing.optimiser import Optimiser

    assert {sft.update, Optimiser, loss.token_logprobs} <= set(lessons.SUPERVISED_STEP)


def test_the_trusting_teacher_repeats_the_hint_and_always_where_the_picture_is_masked():
    def share(teacher, masked):
        """How many of the answers repeat the hint without a look."""
        found = []
        for index in range(400):
            if lessons.is_masked(index, teacher) == masked:
                asked = lesson(index, 4, teacher)[1][:-1]
                found += ["a friend says" in answer for _, answer in asked]
        return sum(found) / len(found)

    assert share(lessons.TRUSTING, True) == 1
    assert abs(share(lessons.TRUSTING, False) - lessons.TRUSTING.trusts) < 0.04
    assert share(lessons.CARELESS, True) == share(lessons.CARELESS, False) == 0
    masked = sum(lessons.is_masked(i, lessons.TRUSTING) for i in range(400)) / 400
    assert masked == 1 / lessons.TRUSTING.masked


def test_the_two_last_teachers_make_two_policies(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPO_CACHE", str(tmp_path))
    assert build(0) == build(0, trust=True) != build(0, trust=False)


def test_the_page_describes_the_toy_as_it_is():
    from conftest import ROOT

    from plumbing.config import MODELS

    text = " ".join((ROOT / "docs" / "toy.md").read_text().split())
    assert f"{GRID} x {GRID} cells" in text
    assert MODELS["toy"]["hint_right"] == 4 / 5 and "hint is right four times out of five" in text
    assert lessons.TRUSTING.trusts == 1 / 4 and "repeats one hint in four without a look" in text
    assert abs(lessons.TRUSTING.careless - 1 / 3) < 0.02 and "misreads every third fact" in text
