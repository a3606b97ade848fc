"""TAPO (arXiv 2602.07605): a picture of the same class, one of another, and one pool of rewards."""

from dataclasses import replace

import pytest

pytest.importorskip("fine_r1")

import torch
from conftest import call, jsonl, metrics, one_run, train_on, watch_a_step
from PIL import Image
from test_schemas import encoded
from test_train import two_are_one

import train as module
from fine_r1 import kinds
from fine_r1.tapo import Tapo
from plumbing.base.common import generator
from plumbing.data.prompts import Stream
from plumbing.data.sources import Rows
from plumbing.models.families import to_picture
from plumbing.run.checkpoint import Progress
from plumbing.run.config import Config, resolve
from toy.task import ToyData


def triplets(n=4):
    """Toy examples whose positive and negative are other boards, of other sizes."""
    data, found = ToyData("train", 3 * n), []
    for i in range(n):
        positive, negative = data[n + i].images[0], data[2 * n + i].images[0]
        second = {"positive": [positive.resize((90, 70))], "contrast": [negative.resize((56, 112))]}
        found.append(replace(data[i], seconds=second))
    return found


def run_of(tmp_path, folder, examples, settings=Tapo, **flags):
    """Parts of a run on these examples, in the order of the stream."""
    plain = dict(dynamic_sampling=False, reward="official", anneal_steps=0) | flags
    parts = one_run(tmp_path, folder, settings, **plain)
    return replace(parts, stream=Stream(examples, 1, *parts.processors))


@pytest.fixture
def parts(tmp_path, folder):
    return run_of(tmp_path, folder, triplets())


def test_the_settings_are_the_papers():
    def settings(model, **flags):
        return resolve({"model": model, "data": "rows.json", **flags}, True, Tapo)[0]

    three, seven = settings("Qwen2.5-VL-3B"), settings("Qwen2.5-VL-7B")
    assert (three.prompts_per_step, three.prompts_per_update) == (384, 128)
    assert (seven.prompts_per_step, seven.prompts_per_update) == (192, 64)
    for cfg in (three, seven):
        assert (cfg.gamma, cfg.eta1, cfg.eta2) == (0.01, 0.03, 0.03)
        assert (cfg.clip_low, cfg.clip_high, cfg.beta) == (0.2, 0.28, 0)
        assert (cfg.group_size, cfg.second_size, cfg.lr) == (10, 5, 1e-6)
        assert cfg.dynamic_sampling and cfg.max_response_tokens == 2048
        assert (cfg.mask, cfg.update_on, cfg.reward) == ("contrast", "own", "tagged")
    printed = settings("Qwen2.5-VL-7B", objective="paper")
    assert (printed.update_on, printed.reward, printed.loss_mean) == ("anchor", "tagged", "token")
    assert three.second_pictures == ["contrast", "positive"]
    assert replace(three, gamma=0, eta2=0).second_pictures == ["positive"]


# n1 and n2, and the advantages of n1 wrong and n2 right responses. Two zeros and two ones have the
# mean 1/2 and the standard deviation 1/sqrt(3); three zeros and a one have 1/4 and 1/2.
POOLS = [(2, 2, -(0.75**0.5), 0.75**0.5), (3, 1, -0.5, 1.5)]


@pytest.mark.parametrize("n1, n2, wrong, right", POOLS)
def test_both_parts_form_one_pool_of_rewards(n1, n2, wrong, right, parts, monkeypatch):
    """The first part is all wrong, the second all right: each alone would have no advantage."""
    earned = ([0.0] * n1 + [1.0] * n2) * 4

    def graded(texts, truths, grader, rule):
        return [dict.fromkeys(("overall", "accuracy", "format"), x) for x in earned]

    monkeypatch.setattr(module, "score", graded)
    parts = replace(parts, cfg=replace(parts.cfg, second_rollouts=n2))
    groups, _, _ = module.collect(parts, Progress(), module.Clock())
    assert len(groups) == 4 and len(groups[0].rollout.tokens) == 4
    assert groups[0].advantages.tolist() == pytest.approx([wrong] * n1 + [right] * n2, 1e-5)
    first, second = parts.cfg.regroup(groups[:1])
    assert (first.second, second.second) == (False, True)
    for part, own in ((first, slice(n1)), (second, slice(n1, None))):
        assert part.advantages.tolist() == groups[0].advantages[own].tolist()
        assert part.rollout.texts == groups[0].rollout.texts[own]
        assert part.scores == groups[0].scores[own]


@pytest.mark.parametrize("n1, n2", [(2, 2), (3, 1)])
def test_the_filter_looks_at_the_pool(n1, n2, tmp_path, folder, monkeypatch):
    """Four prompts: all right, all wrong, right on the own picture only, on the positive only."""
    flags = dict(dynamic_sampling=True, second_rollouts=n2, prompts_per_update=4)
    parts = run_of(tmp_path, folder, triplets(), **flags)
    earned = [1] * 4 + [0] * 4 + [1] * n1 + [0] * n2 + [0] * n1 + [1] * n2

    def graded(texts, truths, grader, rule):
        assert len(texts) == len(truths) == len(earned)
        return [dict.fromkeys(("overall", "accuracy", "format"), float(x)) for x in earned]

    monkeypatch.setattr(module, "score", graded)
    groups, _, counts = module.collect(parts, Progress(), module.Clock())
    assert [group.position for group in groups] == [2, 3, 6, 7]  # two rounds of four prompts
    assert (counts["generated"], counts["too_easy"], counts["too_hard"]) == (8, 2, 2)


def test_parts_of_unequal_size_share_a_pass(tmp_path, folder):
    """Three responses to the prompt's own picture and one to its positive: one pass is as four."""
    found = []
    for tokens in (1, 4096):
        flags = dict(second_rollouts=1, tokens_per_forward=tokens)
        parts = run_of(tmp_path / str(tokens), folder, triplets(), **flags)
        found.append(module.train_step(parts, Progress()))
    for name in ("loss", "policy_loss", "perception_kl", "entropy", "grad_norm"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("update_on, n1, n2", [("own", 2, 2), ("own", 3, 1), ("anchor", 3, 1)])
def test_on_which_picture_a_response_is_trained(update_on, n1, n2, parts, monkeypatch):
    """Log-probs are the sampler's where it is the picture that a response was sampled on."""
    parts = replace(parts, cfg=replace(parts.cfg, update_on=update_on, second_rollouts=n2))
    seen, known, gaps = watch_a_step(parts, monkeypatch)
    if update_on == "own":
        assert len(known) == 8 and sum(seen) == len(seen) // 2
        assert sorted(map(len, gaps)) == sorted([n1, n2] * 2)
        assert torch.cat(gaps).max() < 1e-3
    else:
        assert len(known) == 4 and all(seen)
        assert all(g[:n1].max() < 1e-3 < g[n1:].max() for g in gaps)


def test_without_positives_and_with_the_masked_picture_it_is_papo_d(tmp_path, folder):
    """No second prompt, and the negative is what PAPO_D masks: the same step, to rounding."""
    flags = dict(settings=Config, algo="papo_d", gamma=0.1)
    papo_d = run_of(tmp_path / "d", folder, triplets(), **flags)
    examples = [None] * 4
    for position in range(4):
        prompt = papo_d.stream[position]
        masked = papo_d.masker(prompt, generator(papo_d.cfg.seed, "mask", 0, position))
        picture = to_picture(masked, prompt.grid[0], papo_d.processors[1]).numpy()
        second = {"contrast": [Image.fromarray(picture)]}
        examples[papo_d.stream.order[1][position]] = replace(prompt.example, seconds=second)
    flags |= dict(settings=Tapo, second_rollouts=-1, mask="contrast")
    parts = run_of(tmp_path / "t", folder, examples, **flags)
    assert parts.cfg.second_pictures == ["contrast"]
    ours, theirs = (module.train_step(p, Progress()) for p in (parts, papo_d))
    for name in ("loss", "policy_loss", "perception_kl", "masked_entropy", "entropy", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-7), name
    assert ours["perception_kl"] > 0.01
    pairs = zip(parts.policy.parameters(), papo_d.policy.parameters())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


# --------------------------------------------------------------------------- rows, and the command


@pytest.mark.parametrize("columns", [("negative", "positive"), ("image_aug", "image_noisy")])
def test_rows_without_a_positive_or_a_negative_are_left_out_and_named(
    columns, tmp_path, processors
):
    negative, positive = columns
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "b.png").write_bytes(b"no picture")
    row = {"problem": "<image> which ?", "answer": "wren"}
    row |= {column: ["a.png"] for column in ("images", *columns)}
    rows = [row, row | {positive: []}, row | {negative: ["a.png"] * 2}]
    rows += [row | {negative: ["b.png"]}]
    data = Rows(jsonl(tmp_path / "rows.jsonl", rows), "train")
    faults = data.faults(*processors, 256, second=["contrast", "positive"])
    assert list(faults) == [1, 2, 3] and "cannot be read" in faults[3]
    assert faults[1] == "1 pictures but 0 in the column positive; it needs one for each"
    assert faults[2] == "1 pictures but 2 in the column contrast; it needs one for each"
    assert not data.faults(*processors, 256)  # plain PAPO needs none of them


def test_what_cannot_be_done_gets_one_sentence():
    cfg = resolve({"model": "toy", "second_rollouts": 8}, False, Tapo)[0]
    with pytest.raises(SystemExit, match="--second_rollouts 8: must lie between -1 and 7"):
        cfg.check(1, False)
    with pytest.raises(SystemExit, match="python -m fine_r1.kinds"):
        replace(cfg, second_rollouts=0).check(1, False)


@pytest.mark.slow
def test_both_stages_and_how_they_are_shared_out_changes_nothing(tmp_path):
    """On the birds, with each response on its own picture, wherever the parts of its group are."""
    kinds.write_kinds(tmp_path / "kinds", updates=0)
    learn = "--prompts_per_update 15 --lr 2e-3 --steps 40".split()
    places = ["--data", tmp_path / "kinds/sft.parquet", "--out", tmp_path / "sft"]
    call("fine_r1/sft.py", "--model", tmp_path / "kinds/base", *places, *learn)
    flags = ["--model", tmp_path / "sft/checkpoint-40", "--steps", 1]
    flags += ["--data", tmp_path / "kinds/train.parquet"]
    one, *others = (tmp_path / name for name in ("1-1", "2-1", "1-400"))
    for out in (one, *others):
        processes, tokens = out.name.split("-")
        train_on(processes, out, *flags, "--tokens_per_forward", tokens, script="fine_r1/tapo.py")
    (line,) = metrics(one)
    assert line["equal_groups"] == 0 and 0 < line["accuracy"] < 1
    assert line["too_hard_prompts"] + line["too_easy_prompts"] > 0  # there was something to filter
    for other in others:
        two_are_one(one, other)
