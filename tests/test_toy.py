"""The toy task: right answers, honest splits, hints as promised; and its warm starts."""

import hashlib
import re

import pytest
import torch
from conftest import ROOT, SMALL, call, command
from transformers import AutoModelForImageTextToText

from plumbing.data.prompts import Example, encode
from plumbing.models.families import TOYS
from plumbing.run.config import MODELS
from plumbing.run.setup import WARM
from policy import Policy
from reward import boxed
from toy import attention, errors, lessons
from toy.model import new_policy, processor, tokenizer
from toy.task import CELL_NAMES, GRID, SPLITS, held_out, make, respond


def answer_by_looking(problem, board):
    """A second solver, written from the question alone."""
    question = problem.split(" . ")[1]
    if m := re.match(r"how many (\w+) objects are there \?|how many (\w+)s are there \?", question):
        return str(sum(c is not None and (m[1] or m[2]) in c for c in board))
    if m := re.match(r"what (colour|shape) is at (\w+) \?", question):
        return board[CELL_NAMES.index(m[2])][m[1] == "shape"]
    if m := re.match(r"are there more (\w+) or more (\w+) objects \?", question):
        a, b = (sum(c is not None and c[0] == w for c in board) for w in m.groups())
        return m[1] if a > b else m[2] if b > a else "same"
    both = re.match(r"how many (\w+) and (\w+) objects are there together \?", question).groups()
    return str(sum(c is not None and c[0] in both for c in board))


def test_answers_are_right_and_every_word_is_in_the_vocabulary():
    tok = tokenizer()
    for i in range(200):
        example, response, board = make(3, "train", i)
        assert example.answer == answer_by_looking(example.problem, board) == boxed(response)
        assert tok.unk_token_id not in tok(example.problem.removeprefix("<image> "))["input_ids"]
        assert tok.decode(tok(response)["input_ids"]) == response


def test_examples_are_a_pure_function_and_blind_asks_what_vision_asks():
    def shown(split, index, seed=1):
        example = make(seed, split, index)[0]
        return example.problem, example.answer, example.images[0].tobytes()

    assert shown("train", 5) == shown("train", 5) != shown("train", 5, seed=2)
    assert shown("vision", 5) != shown("val", 5)
    for i in range(8):
        *asked, black = shown("blind", i)
        assert asked == [*shown("vision", i)[:2]] and not any(black)


def test_train_and_test_pictures_never_coincide():
    """By content: every training board, the warm start's included, hashes to one side."""
    assert not any(held_out(make(seed, "train", i)[2]) for seed in (0, 1) for i in range(200))
    assert all(held_out(make(0, split, i)[2]) for split in [*SPLITS, "val"] for i in range(100))
    learned = {lessons.lesson(i, 0)[0].images[0].tobytes() for i in range(100)}
    assert not learned & {make(0, "vision", i)[0].images[0].tobytes() for i in range(100)}


def test_hints_are_right_as_often_as_promised():
    def right(split, promised, n=800):
        return sum(make(0, split, i, promised)[0].tags["hint_right"] for i in range(n)) / n

    for promised in (0.5, 0.65):
        assert all(abs(right(split, promised) - promised) < 0.05 for split in ("train", "general"))
    assert right("vision", 0.65) < 0.4  # another picture's answer: right when two pictures agree


@pytest.mark.parametrize("name", TOYS)
def test_the_committed_warm_starts_are_those_of_their_page_and_load_anywhere(name):
    folder, page = WARM / name, (WARM / "README.md").read_text()
    checksum = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert f"| `{name}/model.safetensors` | `{checksum}` |" in page
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_the_warm_start_is_the_plain_loop_to_the_last_bit(monkeypatch):
    """lessons.warm_start against an optimizer, a clip and a schedule written out."""
    monkeypatch.setattr(lessons, "PICTURES", 2)
    steps, processors = 7, (tokenizer(), processor())
    nothing = torch.zeros(len(processors[0]), dtype=torch.bool)
    ours, policy = new_policy(processors[0]), Policy(new_policy(processors[0]), nothing)
    careful, ours = lessons.warm_start(ours, processors, steps, [lessons.CAREFUL, lessons.TRUSTING])
    adamw = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(steps):
        adamw.param_groups[0]["lr"] = 2e-3 * ((step + 1) / 30 if step < 6 else 0.5)
        lesson = 4 if step else 0, lessons.CAREFUL if step < 6 else lessons.TRUSTING
        rows = lessons.lesson_rows((2 * step, 2 * step + 1), *lesson, policy, processors)
        (-policy(rows, rows.pixels).logp.sum() / rows.scored.sum()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
    assert all(map(torch.equal, ours.parameters(), policy.vlm.parameters()))
    assert not all(map(torch.equal, careful.parameters(), ours.parameters()))


@pytest.mark.slow
def test_a_warm_start_of_ones_own_is_made_and_trained_on(tmp_path):
    out, run = tmp_path / "warm", tmp_path / "run"
    call("-m", "toy.lessons", out, "--steps", 20, "--coupled", 0, "--trusts", 0.38)
    call("train.py", "--model", out, "--data", "toy", *SMALL, "--steps", 1, "--out", run)
    assert (run / "checkpoint-1").exists()
    for words, sentence in (((out,), "is there already"), ((run, "--coupled", 2), "between 0 and")):
        refused = command("-m", "toy.lessons", *words)
        assert refused.returncode == 1 and sentence in refused.stderr, refused.stderr


def test_the_trusting_teacher_repeats_the_hint_and_always_where_the_picture_is_masked():
    def share(teacher, masked):
        chosen = [i for i in range(400) if lessons.is_masked(i, teacher) == masked]
        answers = [a for i in chosen for _, a in lessons.lesson(i, 4, teacher)[1][:-1]]
        return sum("a friend says" in answer for answer in answers) / len(answers)

    assert share(lessons.TRUSTING, True) == 1 and share(lessons.CAREFUL, True) == 0
    assert abs(share(lessons.TRUSTING, False) - lessons.TRUSTING.trusts) < 0.04
    uncoupled = lessons.TRUSTING._replace(coupled=0.0, trusts=0.38)
    assert all(abs(share(uncoupled, masked) - 0.38) < 0.06 for masked in (True, False))
    half = lessons.TRUSTING._replace(coupled=0.5)
    assert abs(share(half, True) - (0.5 + 0.5 * 0.25)) < 0.06


@pytest.mark.prose
def test_the_page_describes_the_toy_as_it_is(policy):
    text = " ".join((ROOT / "docs" / "toy.md").read_text().split())
    assert f"{GRID} x {GRID} cells" in text
    assert f"{policy.vlm.num_parameters() / 1e6:.2f} M parameters" in text
    assert MODELS["toy"]["hint_right"] == 4 / 5 and "hint is right four times out of five" in text
    assert lessons.TRUSTING.trusts == 1 / 4 and "repeats one hint in four without a look" in text
    assert abs(lessons.TRUSTING.careless - 1 / 3) < 0.02 and "misreads every third fact" in text


MISTAKES = """red : 1 + 0 = 1 / 1 / right, a friend says 1 / 1 / right,
    a friend says 3 / 3 / habit, red : 1 + 2 = 3 / 3 / perception,
    red : 1 + 0 = 2 / 2 / calculation, red : 1 + 0 = 1 / 2 / calculation,
    blue : 1 + 2 = 3 / 3 / question, red : 1 + 0 + 1 = 2 / 2 / form, a1 : red circle / red / form"""


@pytest.mark.parametrize("case", MISTAKES.split(","))
def test_each_kind_of_mistake_is_known(case):
    thought, answer, kind = map(str.strip, case.split("/"))
    example = Example("", "", "1", tags={"hint": "3"})
    perfect = respond("red : 1 + 0 = 1", "1")
    assert errors.kind_of(respond(thought, answer), example, perfect) == kind


def test_attention_to_the_picture_is_a_share_by_layer():
    """Of a response's tokens, the first of which the prompt's last token predicts."""
    found = attention.measure(str(WARM / "toy"), questions=4, n=1)
    assert len(found["layers"]) == 4 and all(0 < x < 1 for x in [*found["layers"], found["cell"]])
    assert found["kl"] > 0
    vlm = AutoModelForImageTextToText.from_pretrained(WARM / "toy", attn_implementation="eager")
    example, response, _ = make(0, "vision", 0)
    prompt = encode(example, tokenizer(), processor())
    tokens = tokenizer()(response, return_tensors="pt")["input_ids"][0]
    seen = attention.on_picture(vlm, prompt, tokens)
    assert seen.shape == (4, len(tokens), GRID**2) and (seen.sum(-1) < 1).all()
    assert torch.allclose(seen[:, :3], attention.on_picture(vlm, prompt, tokens[:3]), atol=1e-6)
