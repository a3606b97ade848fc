"""Supervised fine-tuning: the loss, what it counts, what is read, and the command as it is run."""

import json
import os
import re
import signal

import pytest

pytest.importorskip("fine_r1")

import torch
from conftest import TORCHRUN, call, jsonl, lines_of, metrics, run_here
from safetensors.torch import load_file
from test_train import training

from fine_r1 import sft
from fine_r1.conversations import encode_conversation
from plumbing.base.optimizer import cosine
from plumbing.base.processes import Processes
from plumbing.data.prompts import Example
from plumbing.run.config import parser, resolve
from plumbing.run.setup import setup
from policy import Policy
from toy.model import new_policy, processor, tokenizer
from toy.task import ToyData

ALONE = Processes(alone=True)


def untrained(name="toy"):
    """-> (policy with random weights, its processors): nothing here needs one that has learned."""
    tok = tokenizer()
    policy = Policy(new_policy(tok, name).eval(), torch.zeros(len(tok), dtype=torch.bool))
    return policy, (tok, processor(name))


def dialogues():
    """A picture asked about, no picture, two turns, a picture in the second turn."""
    a, b = (ToyData("train", 2)[i].images[0] for i in range(2))
    how, what = ("user", "<image> how many red objects are there ?"), ("user", "what is at a1 ?")
    said, then = ("assistant", "<think> red : 1 + 1 = 2 </think>"), ("assistant", "circle")
    long = [("system", "describe the picture"), how, then, what, said]
    rows = [([how, said], [a]), ([what, then], []), (long, [b])]
    rows += [([how, said, ("user", "and <image> ?"), then], [a, b])]
    return [Example(str(i), "", "", p, turns=turns) for i, (turns, p) in enumerate(rows)]


class Kept:
    """An optimizer that keeps the gradients, and the weights as they are."""

    def sync_gradients(self, policy, now):
        pass

    def step(self, policy):
        self.gradients = {n: p.grad for n, p in policy.named_parameters()}
        policy.zero_grad()
        return 0.0, 0.0


def learned(policy, batches, N):
    """-> (loss, {name: gradient}) of an update"""
    optimizer = Kept()
    return sft.supervised_update(batches, N, policy, optimizer, ALONE)[0], optimizer.gradients


def plain(policy, conversations, N):
    """The same with transformers' own forward, one conversation at a time, without packing."""
    total = 0.0
    for c in conversations:
        ids = torch.cat([c.prompt.ids, c.tokens])
        kinds = (ids == policy.vlm.config.image_token_id).int()
        inputs = dict(pixel_values=c.prompt.pixels, image_grid_thw=c.prompt.grid)
        inputs |= dict(mm_token_type_ids=kinds[None], attention_mask=torch.ones(1, len(ids)))
        labels = torch.cat([torch.full_like(c.prompt.ids, -100), c.tokens])
        labels[len(c.prompt.ids) :][~c.scored] = -100
        logits = policy.vlm(input_ids=ids[None], **inputs).logits[0, :-1]
        each = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum") / N
        each.backward()
        total += each.item()
    gradients = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    return total, gradients


@pytest.mark.parametrize("name", ["toy", "toy-qwen3"])
def test_loss_and_gradients_are_those_of_a_plain_loop(name):
    policy, processors = untrained(name)
    read = [encode_conversation(e, *processors) for e in dialogues()]
    N = sum(c.scored.sum().item() for c in read)
    loss, gradients = plain(policy, read, N)
    whole, first, rest = (sft.pack_conversations(x, policy) for x in (read, read[:2], read[2:]))
    for batches in ([whole], [first, rest]):  # however they are shared out to passes
        ours, found = learned(policy, batches, N)
        assert ours == pytest.approx(loss, abs=1e-5)
        for n, expected in gradients.items():
            torch.testing.assert_close(found[n], expected, atol=1e-5, rtol=1e-4, msg=n)
    flat = Policy(policy.vlm, policy.banned, flat=True)  # all conversations in one row
    rows = sft.pack_conversations(read, flat)
    with torch.no_grad():
        assert len(rows.input_ids) == 1
        assert -flat(rows, rows.pixels).logp.sum() / N == pytest.approx(loss, abs=1e-5)


def test_what_counts():
    """The row of the docstring, and a conversation of two turns."""
    _, (tok, image_processor) = untrained()
    lines = {x.split()[0]: x.split()[1:] for x in sft.__doc__.splitlines() if x.startswith("    ")}
    text, ids, scored = ([x for x in lines[n] if x != "|"] for n in ("text", "ids", "scored"))
    assert "<image> what shape is at a1 ?      assistant  circle" in sft.__doc__
    turns = [("user", "<image> what shape is at a1 ?"), ("assistant", "circle")]
    picture = ToyData("train", 1)[0].images[0].resize((28, 28))
    c = encode_conversation(Example("1", "", "", [picture], turns=turns), tok, image_processor)
    assert [*c.prompt.ids.tolist(), *c.tokens.tolist()] == list(map(int, ids))
    assert [False] * len(c.prompt.ids) + c.scored.tolist() == [x == "x" for x in scored]
    names = {"start": "<|im_start|>", "end": "<|im_end|>", "img": "<|image_pad|>"}
    names |= {"[": "<|vision_start|>", "]": "<|vision_end|>"}
    assert tok.convert_tokens_to_ids([names.get(x, x) for x in text]) == list(map(int, ids))
    turns = [("system", "describe the picture"), ("user", "how many red objects are there ?")]
    turns += [("assistant", "2"), ("user", "and blue ?"), ("assistant", "none .")]
    c = encode_conversation(Example("1", "", "", turns=turns), tok, image_processor)
    assert tok.decode(c.tokens[c.scored]) == "2 <|im_end|> none . <|im_end|>"
    # The whole is what the template writes; the toy's ends in white space, which is no token.
    whole = tok.apply_chat_template([{"role": r, "content": t} for r, t in turns], tokenize=True)
    assert [*c.prompt.ids.tolist(), *c.tokens.tolist()] == whole["input_ids"]


# -------------------------------------------------------------------- settings, and the command


def test_fine_r1s_recipe():
    flags = {"model": "Qwen/Qwen2.5-VL-3B-Instruct", "data": "rows.json"}
    cfg, origin = sft.resolve_sft(flags, True)
    assert (cfg.recipe, cfg.epochs, cfg.steps, cfg.prompts_per_update) == ("fine_r1", 10, 0, 64)
    assert (cfg.lr, cfg.warmup_updates, cfg.weight_decay, cfg.cutoff) == (5e-6, 6, 0.1, 4096)
    assert cfg.freeze_vision and cfg.dtype == "bfloat16"
    assert (origin["lr"], origin["data"]) == ("RECIPES, row fine_r1", "as asked")
    assert sft.resolve_sft({**flags, "lora_rank": 8}, True)[0].lr == 5e-5
    cfg = sft.resolve_sft({"recipe": "fine_r1", "lr": 1e-5}, False)[0]
    assert (cfg.model, cfg.data, cfg.lr, cfg.max_pixels) == ("toy", "toy", 1e-5, 64 * 28 * 28)
    assert sft.resolve_sft({}, False)[0].recipe == "toy"
    share = cosine(2, 10)  # a warm-up and half a cosine
    assert [share(k) for k in (0, 1, 2, 6)] == pytest.approx([0.5, 1, 1, 0.5]) and share(9) > 0
    assert parser(sft.SftConfig, "").format_help().count("\n  --") >= 30


def toy_rows(path, n=6):
    """Perfect responses to n of the toy's questions."""
    rows = []
    for i, example in enumerate(ToyData("train", n)[j] for j in range(n)):
        example.images[0].save(path.parent / f"{i}.png")
        chat = [{"role": role, "content": text} for role, text in example.turns]
        rows.append({"messages": chat, "images": [f"{i}.png"]})
    return jsonl(path, rows)


def flags_of(data, out, *flags):
    small = "--model toy --recipe toy --min_pixels 784 --tokens_per_forward 300 --warmup_updates 2"
    return [*small.split(), *map(str, ["--data", data, "--out", out, *flags])]


def run(data, out, *flags):
    """The command in this process -> what it said"""
    return run_here(sft.main, *flags_of(data, out, *flags))


def test_the_loss_falls_and_the_folder_goes_on(tmp_path):
    """Every row once an epoch; then train.py, and SFT again, take what was learned."""
    data, out = toy_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    flags = ["--prompts_per_update", 4, "--epochs", 12, "--val_data", data, "--eval_every", 10]
    said = run(data, out, *flags, "--lr", 4e-3, "--save_every", 100)
    found = metrics(out)
    assert [m["step"] for m in found] == list(range(1, 25))
    assert [m["epoch"] for m in found[:4]] == pytest.approx([4 / 6, 1, 1 + 4 / 6, 2])
    assert len({found[i]["tokens"] + found[i + 1]["tokens"] for i in range(0, 24, 2)}) == 1
    losses = json.loads((out / "evaluation.json").read_text())
    assert losses["before"] > 4 and losses["after"] < 1.5
    assert [m["step"] for m in found if "val_loss" in m] == [10, 20, 24]
    assert losses["after"] == found[-1]["val_loss"]
    assert re.search(r"6 of 6 rows of rows \(\w+\) are in rows \(train\) too", said)
    model = str(out / "checkpoint-24")
    flags = {"model": model, "data": str(data), "min_pixels": 784, "out": str(tmp_path / "more")}
    setup(resolve({**flags, "data": "toy", "sampler": "hf"}, False)[0]).close()
    again = sft.sft_setup(sft.resolve_sft({**flags, "val_data": str(data)}, False)[0])
    assert sft.validation_loss(again) == pytest.approx(losses["after"], rel=1e-5)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    data, out, measure = toy_rows(tmp_path / "rows.jsonl"), tmp_path / "stopped", sft.measure_loss
    flags = ["--prompts_per_update", 4, "--epochs", 3, "--freeze_vision"]
    run(data, tmp_path / "whole", *flags)

    def ask_to_stop(parts, line):
        measure(parts, line)
        if line["step"] == 2:  # it takes the step that is under way to its end, and one more
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sft, "measure_loss", ask_to_stop)
    with pytest.raises(SystemExit) as stopped:
        run(data, out, *flags)
    assert stopped.value.code == 130 and len(metrics(out)) == 3
    with pytest.raises(SystemExit, match="epochs .3.0 then, 4.0 now"):
        run(data, out, *flags, "--resume", "--epochs", 4)
    run(data, out, *flags, "--resume")
    assert training(out) == training(tmp_path / "whole")
    folders = out / "checkpoint-6", tmp_path / "whole/checkpoint-6", out / "untrained"
    a, b, start = (load_file(folder / "model.safetensors") for folder in folders)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    moved = {k for k in a if not torch.equal(a[k], start[k])}
    assert moved and not any("visual" in k for k in moved)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """Seven rows in updates of three, three and one: where a process has a row less, it looks at
    one of the other's again; a frozen tower has no gradients to exchange."""
    data = toy_rows(tmp_path / "rows.jsonl", 7)
    flags = ["--prompts_per_update", 3, "--epochs", 1, "--val_data", data, "--eval_every", 0]
    flags += ["--freeze_vision"]
    run(data, tmp_path / "one", *flags)
    call(*TORCHRUN, 2, "fine_r1/sft.py", *flags_of(data, tmp_path / "two", *flags))
    for a, b in zip(*(metrics(tmp_path / n) for n in ("one", "two")), strict=True):
        for name in ("tokens", "lr", "loss", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-3), name
    a, b = (json.loads((tmp_path / n / "evaluation.json").read_text()) for n in ("one", "two"))
    assert b == pytest.approx(a, rel=1e-3) and a["after"] < a["before"]


def test_rows_that_cannot_be_used_are_counted_and_named(tmp_path):
    """Only the step finds a picture that breaks off; an update without a row left is none."""
    data, out = toy_rows(tmp_path / "rows.jsonl", 3), tmp_path / "run"
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    bad = [{"messages": [{"role": "user", "content": "?"}], "images": []}]
    long = [{"content": "<image> ?"}, {"content": "red " * 900}]
    bad += [{"messages": long, "images": ["0.png"]}]
    data.write_text("\n".join([data.read_text(), *map(json.dumps, bad)]))
    flags = ["--epochs", 1, "--cutoff", 200, "--prompts_per_update", 1]
    told = run(data, out, *flags)
    lost = sorted((m["left_out"], m["tokens"] == 0, "loss" in m) for m in metrics(out))
    assert lost == [(0, False, True), (0, False, True), (1, True, False)]
    named = lines_of(out / "left_out-rows-train.jsonl")
    assert [x["row"] for x in named] == [3, 4] and "--cutoff 200" in named[1]["why"]
    assert "2 of 5 rows of rows are left out" in told and "left out: example rows-2" in told
    for flags, words in [
        (["--data", tmp_path / "none.json"], "no such file"),
        (["--cutoff", 0], "--cutoff 0: must be greater than 0"),
        (["--cutoff", 3], "none of the 5 rows"),
    ]:
        with pytest.raises(SystemExit, match=words):
            run(data, tmp_path / "other", *flags)


@pytest.mark.slow
def test_with_lora(tmp_path):
    data, out = toy_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    run(data, out, "--steps", 2, "--prompts_per_update", 4, "--lora_rank", 4)
    assert (out / "checkpoint-2" / "adapter_model.safetensors").exists()
