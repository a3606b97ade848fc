"""TAPO (arXiv 2602.07605): a picture of the same class to roll out on, one of another class in the
place of the masked picture, and one pool of rewards."""

import base64
import json
from dataclasses import replace

import pytest
import torch
from conftest import command
from PIL import Image
from safetensors.torch import load_file
from test_data import png
from test_train import one_run, train_on

import papo
import train as module
from groups import on_own_pictures
from plumbing.common import generator
from plumbing.config import resolve
from plumbing.data import Stream
from plumbing.families import to_picture
from plumbing.grader import Grader
from plumbing.setup import usable
from plumbing.sources import Rows, load
from reward import compute_score, score, tagged, well_tagged
from toy import kinds
from toy.task import ToyData


def triplets(n=4):
    """Toy examples whose positive and negative are other boards, of other sizes."""
    data, found = ToyData("train", 3 * n), []
    for i in range(n):
        positive, negative = data[n + i].images[0], data[2 * n + i].images[0]
        found.append(
            replace(
                data[i],
                positive=[positive.resize((90, 70))],
                contrast=[negative.resize((56, 112))],
            )
        )
    return found


def tapo_run(tmp_path, folder, examples, picture="positive", **flags):
    """Parts of a TAPO run on these examples, in the order of the stream."""
    flags = {"algo": "tapo", "dynamic_sampling": False, "reward": "official", **flags}
    parts = one_run(tmp_path, folder, rollout_picture="clean", **flags)
    cfg = replace(parts.cfg, rollout_picture=picture)
    return replace(parts, cfg=cfg, stream=Stream(examples, 1, *parts.processors))


@pytest.fixture
def tapo(tmp_path, folder):
    return tapo_run(tmp_path, folder, triplets())


def test_the_settings_are_the_papers():
    three, seven = (
        resolve({"algo": "tapo", "model": f"Qwen2.5-VL-{n}B", "data": "rows.json"}, True)[0]
        for n in (3, 7)
    )
    assert (three.prompts_per_step, three.prompts_per_update) == (384, 128)
    assert (seven.prompts_per_step, seven.prompts_per_update) == (192, 64)
    for cfg in (three, seven):
        assert (cfg.gamma, cfg.eta1, cfg.eta2) == (0.01, 0.03, 0.03)
        assert (cfg.clip_low, cfg.clip_high, cfg.beta) == (0.2, 0.28, 0)
        assert (cfg.group_size, cfg.lr, cfg.weight_decay) == (10, 1e-6, 0.01)  # 5 + 5
        assert cfg.dynamic_sampling and cfg.max_response_tokens == 2048
        assert (cfg.mask, cfg.update_on, cfg.reward) == ("contrast", "own", "tagged")
    printed = resolve({"algo": "tapo", "model": "toy", "data": "x", "objective": "paper"}, False)[0]
    assert (printed.update_on, printed.reward, printed.loss_mean) == ("anchor", "tagged", "token")


# n1 and n2, and the advantages of n1 wrong and n2 right responses. Two zeros and two ones have the
# mean 1/2 and the standard deviation 1/sqrt(3); three zeros and a one have 1/4 and 1/2.
POOLS = [(2, 2, -(0.75**0.5), 0.75**0.5), (3, 1, -0.5, 1.5)]


@pytest.mark.parametrize("n1, n2, wrong, right", POOLS)
def test_both_parts_form_one_pool_of_rewards(n1, n2, wrong, right, tapo):
    """The first part is all wrong, the second all right: each alone would have no advantage."""
    parts = replace(tapo, cfg=replace(tapo.cfg, second_rollouts=n2))
    groups, _, _ = module.collect(parts, module.Progress(), module.Clock())
    group = groups[0]
    assert len(group.scores) == 4 and len(group.rollout.tokens) == 4
    group.scores = [{"overall": float(i >= n1), "overlong_penalty": 0.0} for i in range(4)]
    group.advantages = papo.group_advantages(group.rewards)
    assert group.advantages.tolist() == pytest.approx([wrong] * n1 + [right] * n2, 1e-5)
    first, second = on_own_pictures([group], n2)
    assert (first.second, second.second) == (False, True)
    for part, own in ((first, slice(n1)), (second, slice(n1, None))):
        assert part.advantages.tolist() == group.advantages[own].tolist()
        assert part.rollout.texts == group.rollout.texts[own]
        assert part.scores == group.scores[own] and part.lengths == group.lengths[own]


@pytest.mark.parametrize("n1, n2", [(2, 2), (3, 1)])
def test_the_filter_looks_at_the_pool(n1, n2, tmp_path, folder, monkeypatch):
    """0 < #correct < n1 + n2: of four prompts the first is answered right on both pictures, the
    second on none, the third on its own one only, and the fourth on the positive only. The last two
    are kept, though neither part of them differs within itself."""
    flags = dict(dynamic_sampling=True, second_rollouts=n2, prompts_per_round=4)
    parts = tapo_run(tmp_path, folder, triplets(), **flags)
    earned = [1] * 4 + [0] * 4 + [1] * n1 + [0] * n2 + [0] * n1 + [1] * n2

    def graded(texts, truths, grader, rule):
        assert len(texts) == len(truths) == len(earned)
        return [dict.fromkeys(("overall", "accuracy", "format"), float(x)) for x in earned]

    monkeypatch.setattr(module, "score", graded)
    groups, _, fate = module.collect(parts, module.Progress(), module.Clock())
    assert [group.position for group in groups] == [2, 3, 6, 7]  # two rounds of four prompts
    assert (fate["generated"], fate["too_easy"], fate["too_hard"]) == (8, 2, 2)
    for group in groups:
        right = group.position % 4 == 2
        assert group.values("accuracy").tolist() == [right] * n1 + [not right] * n2


@pytest.mark.parametrize("n1, n2", [(2, 2), (3, 1)])
@pytest.mark.parametrize("update_on", ["anchor", "own"])
def test_on_which_picture_a_response_is_trained(update_on, n1, n2, tapo, monkeypatch):
    """Each response's log-probs are the sampler's where it is trained on the picture that it was
    sampled on, and others where it is not."""
    parts = replace(tapo, cfg=replace(tapo.cfg, update_on=update_on, second_rollouts=n2))
    anchors = [parts.stream[i].pixels for i in range(4)]
    seen, said, real, forward = [], [], papo.objective, parts.policy.forward

    def watched(rows, pixels, *rest, **more):
        if pixels is rows.pixels:
            seen.append(any(torch.equal(pixels, one) for one in anchors))
        return forward(rows, pixels, *rest, **more)

    monkeypatch.setattr(parts.policy, "forward", watched)
    monkeypatch.setattr(papo, "objective", lambda *x: said.append(x[0]) or real(*x))
    module.train_step(parts, module.Progress())
    first = said[: len(said) // 2]  # of the first update: pi_old has the sampler's weights
    gaps = [(s.old - s.sampled).abs().amax(-1).flatten() for s in first]  # (G,) each
    if update_on == "own":
        assert len(said) == 8 and sum(seen) == len(seen) // 2
        assert sorted(map(len, gaps)) == sorted([n1, n2] * 2)
        assert torch.cat(gaps).max() < 1e-3
    else:
        assert len(said) == 4 and all(seen)
        assert all(g[:n1].max() < 1e-3 < g[n1:].max() for g in gaps)


def test_without_positives_and_with_the_masked_picture_it_is_papo_d(tmp_path, folder):
    """n2 = 0, and the negative is what PAPO_D masks: the same step, to rounding."""
    flags = dict(dynamic_sampling=False, eval_every=0)
    papo_d = one_run(tmp_path / "d", folder, algo="papo_d", gamma=0.1, anneal_steps=0, **flags)
    stream = Stream(triplets(), 1, *papo_d.processors)
    papo_d, examples = replace(papo_d, stream=stream), [None] * 4
    for position in range(4):
        prompt = stream[position]
        masked = papo_d.masker(prompt, generator(papo_d.cfg.seed, "mask", 0, position))
        picture = to_picture(masked, prompt.grid[0], papo_d.processors[1]).numpy()
        contrast = [Image.fromarray(picture)]
        examples[stream.order[1][position]] = replace(prompt.example, contrast=contrast)
    flags |= dict(gamma=0.1, picture="clean", top_p=papo_d.cfg.top_p)
    parts = tapo_run(tmp_path / "t", folder, examples, group_size=4, **flags)
    ours, theirs = (module.train_step(p, module.Progress()) for p in (parts, papo_d))
    for name in ("loss", "policy_loss", "perception_kl", "masked_entropy", "entropy", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-7), name
    assert ours["perception_kl"] > 0.01
    pairs = zip(parts.policy.parameters(), papo_d.policy.parameters())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


# ------------------------------------------------------------------------- the command, as released


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both stages on the birds of toy/kinds.py, from random weights -> (flags of a run, its folder,
    its metrics)"""
    root = tmp_path_factory.mktemp("tapo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPO_CACHE", str(root / "cache"))
        kinds.write(root / "kinds", steps=0)
    learn = "--prompts_per_update 15 --lr 2e-3 --steps 40".split()
    places = ["--data", root / "kinds/sft.parquet", "--out", root / "sft"]
    done = command("sft.py", "--model", root / "kinds/base", *places, *learn)
    assert done.returncode == 0, done.stderr[-3000:]
    flags = ["--algo", "tapo", "--model", root / "sft/checkpoint-40", "--steps", 1]
    flags += ["--data", root / "kinds/train.parquet"]
    return flags, root / "one", train_on(1, root / "one", *flags)


@pytest.mark.slow
def test_the_command_ends_with_groups_that_teach(trained):
    """Dynamic sampling, the reward of tagged names, each response on its own picture."""
    _, out, (line,) = trained
    cfg = json.loads((out / "config.json").read_text())["config"]
    assert (cfg["reward"], cfg["dynamic_sampling"], cfg["update_on"]) == ("tagged", True, "own")
    assert line["equal_groups"] == 0 and 0 < line["accuracy"] < 1
    assert line["too_hard_prompts"] + line["too_easy_prompts"] > 0  # there was something to filter
    assert line["perception_kl"] > 0 and line["masked_entropy"] > 0 and line["grad_norm"] > 0
    assert (out / "checkpoint-1" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes, tokens", [(2, 1), (1, 400)])
def test_processes_and_micro_batches_change_nothing(processes, tokens, trained, tmp_path):
    """Each response is trained on its own picture, wherever the two parts of its group are."""
    flags, out, (one,) = trained
    (line,) = train_on(processes, tmp_path / "run", *flags, "--tokens_per_forward", tokens)
    names = "reward accuracy loss policy_loss perception_kl entropy masked_entropy grad_norm"
    for name in names.split():
        assert line[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name
    files = (x / "checkpoint-1" / "model.safetensors" for x in (out, tmp_path / "run"))
    x, y = map(load_file, files)
    assert x.keys() == y.keys() and all(torch.allclose(x[k], y[k], atol=1e-3) for k in x)


# --------------------------------------------------------------------------------- rows and rewards


def rows_of(path, *columns):
    """A file of triplets, its second pictures in these columns."""

    def text(picture):
        return base64.b64encode(png(picture)).decode()

    lines = []
    for e in triplets():
        pictures = [e.images, e.contrast, e.positive]
        named = zip(("images", *columns), pictures)
        row = {"problem": "<image> which ?", "answer": e.answer}
        lines.append(row | {name: [text(p) for p in found] for name, found in named})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("columns", [("negative", "positive"), ("image_aug", "image_noisy")])
def test_the_columns_of_triplets(columns, tmp_path):
    rows = Rows(str(rows_of(tmp_path / "rows.jsonl", *columns)), "train")
    assert rows[1].contrast and rows[1].positive and rows[1].contrast != rows[1].positive


def test_rows_without_a_positive_or_a_negative_are_left_out_and_named(
    tmp_path, folder, processors, cfg
):
    file = rows_of(tmp_path / "rows.jsonl", "negative", "positive")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["positive"] = []
    lines[2]["negative"] = lines[2]["negative"] * 2
    lines[3]["negative"] = ["aGVsbG8="]
    file.write_text("\n".join(map(json.dumps, lines)))
    rows = Rows(str(file), "train")
    faults = rows.faults(*processors, 256, second=["contrast", "positive"])
    assert list(faults) == [1, 2, 3] and "cannot be read" in faults[3]
    assert faults[1] == "1 pictures but 0 in the column positive; it needs one for each"
    assert faults[2] == "1 pictures but 2 in the column contrast; it needs one for each"
    assert not rows.faults(*processors, 256)  # plain PAPO needs none of them
    flags = "--algo tapo --sampler hf --steps 1".split()
    done = command("train.py", *flags, "--model", folder, "--out", tmp_path, "--data", "toy")
    assert done.returncode == 1 and "python -m toy.kinds" in done.stderr
    plain = load(str(rows_of(tmp_path / "plain.jsonl")), "train", 4, 0, cfg)
    with pytest.raises(SystemExit, match="none of the 4 rows of plain can be used"):
        usable(plain, processors, 256, replace(cfg, out=str(tmp_path)), ALONE, ["positive"])


class ALONE:
    """What `usable` asks of a process group of one."""

    rank, world, first = 0, 1, True

    def gather(items):
        return items


WREN = "<think> small , brown </think> <answer> Wren </answer>"


@pytest.mark.parametrize(
    "response, accuracy, form",
    [
        (WREN, 1, 1),
        (WREN.replace("Wren", "the wren"), 0, 1),
        (WREN.replace("Wren", "finch"), 0, 1),
        # The released rule finds the truth in each of these.
        (WREN.replace("Wren", "finch, wren, lark"), 0, 1),
        (WREN.replace("Wren", "finch wren"), 0, 1),
        (WREN.replace("Wren", "not a wren"), 0, 1),
        (WREN.replace("Wren", "finch = wren"), 0, 1),
        (WREN.replace("Wren", "answer: wren"), 0, 1),
        (WREN.replace("Wren", "[wren]"), 0, 1),
        (WREN.replace(" Wren ", "\n WREN. "), 1, 1),
        ("<answer>wren</answer>", 1, 0),
        (WREN + " or a finch", 1, 0),
        (WREN + " <answer> finch </answer>", 0, 0),
        ("wren", 0, 0),
        ("<think> a wren </think> \\boxed{wren}", 0, 0),
        ("<answer>" * 50000, 0, 0),
    ],
)
def test_a_class_has_to_be_the_whole_answer(response, accuracy, form):
    grader = Grader(workers=1)
    (got,) = score([response], ["wren"], grader, "tagged")
    grader.close()
    assert (got["accuracy"], got["format"]) == (accuracy, form)
    assert got["overall"] == pytest.approx(0.9 * accuracy + 0.1 * form)
    assert well_tagged(response) == form and (tagged(response) is None) == (
        "</answer" not in response
    )


@pytest.mark.parametrize(
    "answer, truth, same",
    [
        ("Boeing 747-100", "747-100", False),
        ("647", "747-100", False),  # as a sum they are equal
        ("CD-3", "DC-3", False),
        ("dc-3", "DC-3", True),
        ("B, A", "A, B", False),
        ("bird of paradise", "Bird_of_paradise", True),
        ("St.  Bernard", "St. Bernard", True),
        ("2.0", "2", False),
    ],
)
def test_a_name_is_not_calculated_with(answer, truth, same):
    response = f"<think> it is seen </think> <answer> {answer} </answer>"
    assert compute_score(response, truth, kind="tagged")["accuracy"] == same
