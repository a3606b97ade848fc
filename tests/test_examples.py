"""The worked examples of the docstrings, computed: the code does what a reader sees there."""

import re

import pytest
import torch

import loss
import papo
import reward
import rollout
from plumbing.data.prompts import Prompt
from plumbing.models import packing


def row_of(text, name):
    """The nine integers of the example's line that begins with this name."""
    line = re.search(rf"^ +{name} +([-\d |]+)", text, re.M)[1]
    return [int(x) for x in re.findall(r"-?\d+", line)][:9]


def test_the_packed_row(policy, processors):
    text, tok = packing.__doc__, processors[0]
    ids, part, position = (row_of(text, name) for name in ("input_ids", "part", "position"))
    words = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "shape", "is", "the"]
    assert tok.convert_tokens_to_ids(words) == [3, 5, 4, 31, 32, 40] and tok.eos_token_id == 2
    assert [ids[:3], ids[3:6], ids[6:8]] == [[3, 5, 4], [31, 32, 2], [40, 2]]
    pixels, grid = torch.zeros(4, 3 * 2 * 14 * 14), torch.tensor([[1, 2, 2]])
    prompt = Prompt(None, torch.tensor(ids[:3]), pixels, grid)
    # Beside a longer one, the example's row is padded.
    groups = [[torch.tensor(ids[3:6]), torch.tensor(ids[6:8])], [torch.arange(31, 34)] * 2]
    rows = policy.pack([prompt, prompt], groups)
    assert rows.input_ids[0].tolist() == ids and rows.part[0].tolist() == part
    assert rows.position_ids[:, 0].tolist() == [position] * 3
    predictor, targets, scored = re.search(
        r"`predictor` is\s+(\[\[.+?\]\]), `targets` (\[\[.+?\]\]) and `scored` (\[\[.+?\]\])", text
    ).groups()
    assert rows.predictor[0].tolist() == eval(predictor)
    assert rows.targets[0].tolist() == eval(targets)
    assert rows.scored[0].tolist() == eval(scored, {"T": True, "F": False})
    sees = packing.attention_mask(rows)[0, 0]
    lines = re.findall(r"place (\d), token +(\d+): ([\d |]+)", text)
    assert len(lines) == 3
    for place, token, seen in lines:
        assert ids[int(place)] == int(token)
        assert sees[int(place)].nonzero()[:, 0].tolist() == [
            int(x) for x in re.findall(r"\d+", seen)
        ]
    for tokens, predictors in zip(rows.targets[0].tolist(), rows.predictor[0].tolist()):
        for token, place in zip(tokens, predictors):
            assert token == 0 or f"{token} from {place}" in re.sub(" +", " ", text)


@pytest.mark.lesson
def test_k3_on_three_tokens():
    lines = re.findall(
        r"(\.\d+) +(\.\d+) +(\S+) +(\S+) +(\S+) +(?:raised|left|lowered)", loss.k3.__doc__
    )
    assert len(lines) == 3
    for pi, pi_mask, d, k3, slope in (map(float, line) for line in lines):
        logp = torch.tensor(pi).log().requires_grad_()
        masked = torch.tensor(pi_mask).log()
        value, clamped = loss.k3(logp, masked)
        value.backward()
        assert (masked - logp).item() == pytest.approx(d, abs=6e-4)
        assert value.item() == pytest.approx(k3, abs=6e-4) and not clamped
        assert logp.grad.item() == pytest.approx(slope, abs=6e-4)


@pytest.mark.lesson
def test_the_advantages_of_three_responses():
    text = papo.group_advantages.__doc__
    rewards = torch.tensor([1.0, 0.1, 0.1])
    one_line = " ".join(text.split())
    assert "1, 0.1 and 0.1, their mean is 0.4 and their standard deviation 0.52," in one_line
    assert rewards.mean().item() == pytest.approx(0.4) and f"{rewards.std():.2f}" == "0.52"
    said = [float(x) for x in re.search(r"are\s+(\S+), (\S+) and (\S+)\. ", text).groups()]
    assert [round(x, 2) for x in papo.group_advantages(rewards).tolist()] == said


@pytest.mark.lesson
def test_a_nucleus_of_four_tokens():
    p = torch.tensor([[0.15, 0.5, 0.05, 0.3]])  # in any order
    for top_p, kept in ((0.7, [0, 0.625, 0, 0.375]), (1.0, p[0].tolist()), (1e-9, [0, 1, 0, 0])):
        assert rollout.nucleus(p, top_p)[0].tolist() == pytest.approx(kept)
    assert "top_p = .7 keeps the first two, as .625 and .375" in rollout.nucleus.__doc__


@pytest.mark.lesson
def test_the_rewards_of_three_responses(grader):
    lines = re.findall(
        r"^    (.+?) {3,}truth (\d): accuracy (\d), format (\d)", reward.__doc__, re.M
    )
    assert len(lines) == 3
    responses, truths, accuracy, form = zip(*lines)
    scores = reward.score(responses, truths, grader)
    assert [s["accuracy"] for s in scores] == [float(x) for x in accuracy]
    assert [s["format"] for s in scores] == [float(x) for x in form]
