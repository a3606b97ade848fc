"""Supervised fine-tuning: the loss, what it counts, what is read, and the command as it is run."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_schemas import encoded
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import eval as evaluation
import sft
from plumbing.config import parser
from plumbing.config import resolve as resolve_training
from plumbing.conversations import Conversations, encode_conversation
from plumbing.data import Example, encode
from plumbing.optimiser import Optimiser, cosine
from plumbing.policy import Policy
from plumbing.processes import Processes
from plumbing.setup import setup as setup_training
from plumbing.sources import load
from plumbing.supervised import RECIPES, SftConfig, conversations, resolve, setup
from reward import FORMS
from toy import lessons
from toy.model import new_policy, processor, tokenizer
from toy.task import ToyData

ALONE = Processes(alone=True)


def untrained(name="toy"):
    """-> (policy with random weights, its processors): nothing here needs one that has learned."""
    tok = tokenizer()
    policy = Policy(new_policy(tok, name).eval(), torch.zeros(len(tok), dtype=torch.bool))
    return policy, (tok, processor(name))


def dialogues():
    """A picture asked about in three ways, no picture, two turns, a picture in the second turn."""
    a, b = (ToyData("train", 2)[i].images[0] for i in range(2))
    how, what = ("user", "<image> how many red objects are there ?"), ("user", "what is at a1 ?")
    said, then = ("assistant", "<think> red : 1 + 1 = 2 </think>"), ("assistant", "circle")
    rows = [
        ([how, said], [a]),
        ([how, then], [a]),
        ([what, then], []),
        ([("system", "describe the picture"), how, then, what, said], [b]),
        ([how, said, ("user", "and <image> ?"), then], [a, b]),
    ]
    return [Example(str(i), "", "", p, turns=turns) for i, (turns, p) in enumerate(rows)]


class Watched(Optimiser):
    """The optimiser, and the gradients that it was given last."""

    def step(self, policy):
        self.gradients = {n: p.grad.clone() for n, p in policy.named_parameters()}
        return super().step(policy)


def learned(policy, batches, N):
    """One update -> (loss, {name: gradient}), the weights as they were."""
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    optimiser = Watched(policy, SftConfig(max_grad_norm=1e9))
    loss = sft.update(batches, N, policy, optimiser, ALONE)[0]
    policy.load_state_dict(before)
    return loss, optimiser.gradients


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
    conversations = [encode_conversation(e, *processors) for e in dialogues()]
    N = sum(c.scored.sum().item() for c in conversations)
    loss, gradients = plain(policy, conversations, N)
    # However the conversations are shared out to passes; the first two are one row of one picture.
    whole, first, rest = (sft.pack(x, policy) for x in (conversations, *split(conversations)))
    assert len(whole.input_ids) == 4 and len(first.input_ids) == 1 and len(first.grid) == 1
    for batches in ([whole], [first, rest], [sft.pack([c], policy) for c in conversations]):
        ours, found = learned(policy, batches, N)
        assert ours == pytest.approx(loss, abs=1e-5)
        for n, expected in gradients.items():
            torch.testing.assert_close(found[n], expected, atol=1e-5, rtol=1e-4, msg=n)
    flat = Policy(policy.vlm, policy.banned, flat=True)  # all conversations in one row
    rows = sft.pack(conversations, flat)
    with torch.no_grad():
        assert len(rows.input_ids) == 1
        assert -flat(rows, rows.pixels).logp.sum() / N == pytest.approx(loss, abs=1e-5)


def split(conversations):
    return conversations[:2], conversations[2:]


def test_what_counts_in_a_conversation_of_two_turns():
    _, processors = untrained()
    words = (
        "<|im_start|> system describe the picture <|im_end|> "
        "<|im_start|> user how many red objects are there ? <|im_end|> "
        "<|im_start|> assistant [ 2 <|im_end|> ] "
        "<|im_start|> user and blue ? <|im_end|> <|im_start|> assistant [ none . <|im_end|> ]"
    ).split()
    turns = [
        ("system", "describe the picture"),
        ("user", "how many red objects are there ?"),
        ("assistant", "2"),
        ("user", "and blue ?"),
        ("assistant", "none ."),
    ]
    c = encode_conversation(Example("1", "", "", turns=turns), *processors)
    expected, counts, inside = [], [], False
    for word in words:
        if word in "[]":
            inside = word == "["
        else:
            expected, counts = [*expected, word], [*counts, inside]
    prompt = len(c.prompt.ids)
    ids = [*c.prompt.ids.tolist(), *c.tokens.tolist()]
    assert processors[0].convert_ids_to_tokens(ids) == expected
    assert [False] * prompt + c.scored.tolist() == counts
    # The whole is what the template writes; the toy's ends in white space, which is no token.
    chat = [{"role": role, "content": text} for role, text in turns]
    assert ids == processors[0].apply_chat_template(chat, tokenize=True)["input_ids"]


# --------------------------------------------------------------------------------- what is read

QUESTION = "<image> how many red objects are there ?"
TURNS = [("system", "count"), ("user", QUESTION), ("assistant", "red : 3")]


def chat(turns=TURNS, names=("role", "content")):
    return [dict(zip(names, turn)) for turn in turns]


def lines(path, rows):
    """Rows as a JSONL file beside the picture that they name."""
    (path.parent / "a.png").write_bytes(encoded())
    path.write_text("\n".join(json.dumps({"images": ["a.png"]} | row) for row in rows))
    return path


def test_the_rows_of_other_programs(tmp_path):
    """LLaMA-Factory's two shapes, as JSON, JSONL and parquet, and its column for the system."""
    import datasets

    _, processors = untrained()
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    other = chat([(names[role], text) for role, text in TURNS], ("from", "value"))
    rows = [
        {"messages": chat()},
        {"conversations": other},
        {"conversations": other[1:], "system": "count"},
        {"messages": [*chat()[:1], turn_in_parts(), *chat()[2:]]},
    ]
    for i, row in enumerate(rows):
        path = lines(tmp_path / f"{i}.jsonl", [row])
        if i == 0:
            (tmp_path / "0.json").write_text(json.dumps([{"images": ["a.png"]} | row]))
            table = datasets.Dataset.from_list([{"images": ["a.png"]} | row])
            table.to_parquet(tmp_path / "0.parquet")
        for file in [path, *(p for p in path.parent.glob(f"{i}.*") if p != path)]:
            data = Conversations(str(file), "train")
            assert not data.faults(*processors, 100), file
            assert data[0].turns == TURNS and data[0].images == [str(tmp_path / "a.png")]
            assert (data[0].problem, data[0].answer) == (f"count\n{QUESTION}", "red : 3")


def turn_in_parts():
    text = QUESTION.removeprefix("<image>")
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


def test_a_problem_is_asked_as_in_training(tmp_path):
    _, processors = untrained()
    path = lines(tmp_path / "rows.jsonl", [{"question": QUESTION, "cot": "3"}])
    data = Conversations(str(path), "train", ("question", "cot", "images"))
    c = encode_conversation(data[0], *processors)
    asked = encode(Example("1", c.prompt.example.problem, "", data[0].images), *processors)
    assert torch.equal(c.prompt.ids, asked.ids) and torch.equal(c.prompt.pixels, asked.pixels)
    assert processors[0].decode(c.tokens) == "3 <|im_end|>" and c.scored.all()


USER, SAID = ("user", QUESTION), ("assistant", "3")
BAD = {
    "no assistant": ([USER], "no turn of the assistant's"),
    "nothing": ([], "no turn of the assistant's"),
    "an empty turn": ([USER, ("assistant", " ")], "an empty turn of the assistant's"),
    "an empty question": ([("user", ""), SAID], "an empty turn of the user's"),
    "the assistant first": ([SAID, USER, SAID], "turns are assistant, user, assistant"),
    "two users": ([USER, USER, SAID], "must take turns"),
    "the user last": ([USER, SAID, ("user", "and ?")], "the assistant come last"),
    "a late system": ([USER, ("system", "be nice"), SAID], "must take turns"),
    "a tool": ([USER, ("tool", "3"), SAID], "a turn of tool; system, user and assistant"),
    "a role that is none": ([USER, ({"a": 1}, "3"), SAID], "a role that is none"),
    "no picture": ([("user", "how many ?"), SAID], "0 <image> placeholders but 1 pictures"),
    "two pictures": ([("user", "<image> <image> ?"), SAID], "2 <image> placeholders but 1 pict"),
    "who shows": ([("user", "?"), ("assistant", "<image>")], "<image> in a turn of the assistant"),
    "control": ([USER, ("assistant", "3 <|im_end|>")], "the assistant's turn contains <|im_end|>"),
    "control of a user": ([("user", "<|image_pad|> <image>"), SAID], "the user's turn contains <|"),
    "long": ([USER, ("assistant", "red " * 300)], "tokens are more than --cutoff 200"),
    "no text": ([USER, ("assistant", 3)], "neither text nor a picture"),
    "no content": ([USER, ("assistant",)], "has no text"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_cannot_be_learned_is_named(case, tmp_path):
    turns, why = BAD[case]
    _, processors = untrained()
    data = Conversations(str(lines(tmp_path / "rows.jsonl", [{"messages": chat(turns)}])), "train")
    found = data.faults(*processors, 200)
    assert list(found) == [0] and why in found[0]


@pytest.mark.parametrize(
    "row, why",
    [
        ({"problem": QUESTION, "response": ""}, "an empty turn of the assistant's"),
        ({"problem": QUESTION, "response": ["3", "4"]}, "the response is no text but a list"),
        ({"problem": 5, "response": "3"}, "the problem is no text"),
        ({"messages": "what ?"}, "the chat is of type str"),
        ({"messages": chat(), "system": "again"}, "must take turns"),
        ({"messages": chat(), "tools": "a calculator"}, "it has tools, which are not read"),
        ({"messages": chat(), "images": ["none.png"]}, "none.png"),
    ],
)
def test_a_row_of_another_kind_is_named(row, why, tmp_path):
    _, processors = untrained()
    columns = ("problem", "response", "images")
    data = Conversations(str(lines(tmp_path / "rows.jsonl", [row])), "train", columns)
    (found,) = data.faults(*processors, 200).values()
    assert why in found


@pytest.mark.parametrize("reward", FORMS)
def test_a_problem_is_asked_as_train_asks_it(reward, tmp_path):
    row = {"problem": QUESTION, "response": "<think> x </think>", "answer": "3", "images": []}
    path = str(lines(tmp_path / "rows.jsonl", [row]))
    flags = {"model": "toy", "data": path, "reward": reward}
    (learned,) = conversations(path, "train", resolve(flags, False))
    (asked,) = load(path, "train", 1, 0, resolve_training(flags, False)[0])
    assert learned.turns[0] == ("user", asked.problem) and asked.problem != QUESTION


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def lines_of_words(template):
    """A tokenizer that joins line breaks, as Qwen's does, with a chat template."""
    special = ["<|im_start|>", "<|im_end|>"]
    words = [*special, "<unk>", "\n", "\n\n", "user", "assistant", "red", "?", "so", "3"]
    base = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|[^\n ]+"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=base,
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=special,
        chat_template=template,
    )


def conversation(template, *turns):
    example = Example("1", "", "", turns=list(zip(["user", "assistant"] * 2, turns)))
    return encode_conversation(example, lines_of_words(template), None)


def test_what_a_template_does_to_a_turn_is_followed_or_refused():
    c = conversation(CHATML, "red ?", "so 3")
    assert c.prompt.ids[-1] == 3 and c.scored.all() and c.tokens[-1] == 1  # "\n"; "<|im_end|>"
    with pytest.raises(ValueError, match="begins with white space"):
        conversation(CHATML, "red ?", "\n3")
    # A template may cut a turn down once others follow it, as Qwen3's does with its thoughts.
    short = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[-1:] }}")
    assert len(conversation(short, "red ?", "so 3").tokens) == 4
    with pytest.raises(ValueError, match="does not write its turns one after the other"):
        conversation(short, "red ?", "so 3", "red ?", "3")
    endless = CHATML.replace("<|im_end|>", "")
    with pytest.raises(ValueError, match="each of the assistant's up to <|im_end|>"):
        conversation(endless, "red ?", "3")
    strict = CHATML + "{{ raise_exception('no users here') }}"
    with pytest.raises(ValueError, match="chat template refuses it .no users here"):
        conversation(strict, "red ?", "3")


# ------------------------------------------------------------------------------------- settings


def test_fine_r1s_recipe():
    cfg = resolve({"model": "Qwen/Qwen2.5-VL-3B-Instruct", "data": "rows.json"}, True)
    assert (cfg.recipe, cfg.epochs, cfg.steps, cfg.prompts_per_update) == ("fine_r1", 10, 0, 64)
    assert (cfg.lr, cfg.warmup_updates, cfg.weight_decay) == (5e-6, 6, 0.1)
    assert (cfg.cutoff, cfg.freeze_vision, cfg.dtype, cfg.packing) == (
        4096,
        True,
        "bfloat16",
        "flat",
    )
    flags = {"recipe": "fine_r1", "data": "toy", "lr": 1e-5, "freeze_vision": False}
    cfg = resolve(flags, False)
    assert (cfg.model, cfg.lr, cfg.freeze_vision, cfg.epochs) == ("toy", 1e-5, False, 10)
    assert cfg.max_pixels == 64 * 28 * 28 and resolve({}, False).recipe == "toy"
    readme = (ROOT / "README.md").read_text()
    row = next(line for line in readme.splitlines() if line.startswith("| `--recipe`"))
    assert re.findall(r"`(\w+)`", row.split("|")[2]) == list(RECIPES)
    with pytest.raises(SystemExit, match="--data is needed"):
        resolve({"model": "Qwen/Qwen2.5-VL-3B-Instruct"}, True)


def test_every_knob_of_the_command_has_a_help_line():
    text = parser(SftConfig).format_help()
    for f in dataclasses.fields(SftConfig):
        assert f"--{f.name}" in text and len(f.metadata["help"]) > 5


def test_a_warm_up_and_half_a_cosine():
    share = cosine(2, 10)
    rates = [share(update) for update in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5)
    assert rates[9] == pytest.approx(0.5 * (1 + torch.cos(torch.tensor(torch.pi * 7 / 8)).item()))
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[9] > 0


# ----------------------------------------------------------------------------------- the command


def toy_rows(path, n=6):
    """Perfect responses to n of the toy's questions, as problem and response."""
    rows = []
    for i, example in enumerate(ToyData("train", n)[j] for j in range(n)):
        example.images[0].save(path.parent / f"{i}.png")
        chat = [{"role": role, "content": text} for role, text in example.turns]
        rows.append({"messages": chat, "images": [f"{i}.png"]})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def flags_of(data, out):
    flags = f"--model toy --recipe toy --data {data} --out {out} --min_pixels 784 --dtype float32"
    return [*flags.split(), *"--tokens_per_forward 300 --warmup_updates 2".split()]


def run(monkeypatch, data, out, *flags):
    """The command in this process -> its lines of metrics."""
    monkeypatch.setattr(sys, "argv", ["sft.py", *flags_of(data, out), *map(str, flags)])
    sft.main()
    return metrics(out)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_the_folder_goes_on(tmp_path, monkeypatch, capsys):
    """Every row once an epoch; then eval.py and train.py take what was learned."""
    data, out = toy_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    flags = ["--prompts_per_update", 4, "--epochs", 12, "--val_data", data, "--eval_every", 10]
    found = run(monkeypatch, data, out, *flags, "--lr", 4e-3, "--save_every", 100)
    assert [m["step"] for m in found] == list(range(1, 25))
    assert [m["epoch"] for m in found[:4]] == pytest.approx([4 / 6, 1, 1 + 4 / 6, 2])
    epochs = {found[i]["tokens"] + found[i + 1]["tokens"] for i in range(0, 24, 2)}
    assert len(epochs) == 1
    assert all(m[k] > 0 for m in found for k in ("loss", "lr", "grad_norm", "seconds"))
    losses = json.loads((out / "evaluation.json").read_text())
    assert losses["before"] > 4 and losses["after"] < 1.5
    assert ["val_loss" in m for m in found] == [m["step"] in (10, 20, 24) for m in found]
    assert losses["after"] == found[-1]["val_loss"]
    assert "6 of 6 rows of rows are in rows too" in capsys.readouterr().out
    model = out / "checkpoint-24"
    flags = ["--model", model, "--data", "toy", "--questions", 1, "--n", 1, "--sampler", "hf"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    evaluation.main()
    assert "vision" in capsys.readouterr().out
    flags = {"model": str(model), "data": "toy", "out": str(tmp_path / "rl"), "sampler": "hf"}
    cfg = resolve_training({**flags, "eval_questions": 1, "beta": 0.0}, False)[0]
    parts = setup_training(cfg)
    flags = {"model": str(model), "data": str(data), "val_data": str(data), "min_pixels": 784}
    again = setup(resolve({**flags, "recipe": "toy", "out": str(tmp_path / "more")}, False))
    assert sft.validate(again) == pytest.approx(losses["after"], rel=1e-5)
    a, b = again.policy.vlm.state_dict(), parts.policy.vlm.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    parts.close()


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    data = toy_rows(tmp_path / "rows.jsonl")
    flags = ["--prompts_per_update", 4, "--epochs", 3, "--freeze_vision"]
    whole = run(monkeypatch, data, tmp_path / "whole", *flags)
    watch, out = sft.watch, tmp_path / "stopped"

    def ask_to_stop(parts, line, say):
        watch(parts, line, say)
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sft, "watch", ask_to_stop)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, data, out, *flags)
    assert stopped.value.code == 130 and len(metrics(out)) == 3
    with pytest.raises(SystemExit, match="epochs .3.0 then, 4.0 now"):
        run(monkeypatch, data, out, *flags, "--resume", "--epochs", 4)
    found = run(monkeypatch, data, out, *flags, "--resume")
    for name in ("loss", "tokens", "lr", "grad_norm", "epoch"):
        assert [m[name] for m in found] == [m[name] for m in whole]
    a, b, start = (
        load_file(folder / "model.safetensors")
        for folder in (out / "checkpoint-6", tmp_path / "whole/checkpoint-6", out / "untrained")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    moved = {k for k in a if not torch.equal(a[k], start[k])}
    assert moved and not any("visual" in k for k in moved)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, monkeypatch):
    """Seven rows in updates of three, three and one: where a process has a row less, it looks at
    one of the other's again; a frozen tower has no gradients to exchange."""
    data = toy_rows(tmp_path / "rows.jsonl", 7)
    flags = ["--prompts_per_update", 3, "--epochs", 1, "--val_data", data, "--eval_every", 0]
    flags += ["--freeze_vision"]
    one = run(monkeypatch, data, tmp_path / "one", *flags)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc_per_node", "2", "sft.py", *flags_of(data, tmp_path / "two")]
    kwargs = dict(cwd=ROOT, text=True, capture_output=True, timeout=300)
    done = subprocess.run([*launch, *map(str, flags)], **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(one, metrics(tmp_path / "two"), strict=True):
        assert a["tokens"] == b["tokens"] and a["lr"] == b["lr"]
        for name in ("loss", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-3), name
    a, b = (json.loads((tmp_path / n / "evaluation.json").read_text()) for n in ("one", "two"))
    assert b == pytest.approx(a, rel=1e-3) and a["after"] < a["before"]


def test_a_picture_that_breaks_off_is_left_out_of_its_step(tmp_path, monkeypatch, capsys):
    """Its header is whole, so only the step finds out; an update without a row left is none."""
    data = toy_rows(tmp_path / "rows.jsonl", 4)
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    lost = run(monkeypatch, data, tmp_path / "a", "--prompts_per_update", 2, "--epochs", 1)
    assert sorted(m["left_out"] for m in lost) == [0, 1] and all(m["loss"] > 0 for m in lost)
    lost = run(monkeypatch, data, tmp_path / "b", "--prompts_per_update", 1, "--epochs", 1)
    assert [m["tokens"] == 0 for m in lost] == [m["left_out"] == 1 for m in lost]
    assert ["loss" in m for m in lost].count(False) == 1 and len(lost) == 4
    assert "warning: left out: example rows-2" in capsys.readouterr().out


def test_rows_that_cannot_be_used_are_counted_and_named(tmp_path, monkeypatch, capsys):
    data, out = toy_rows(tmp_path / "rows.jsonl", 3), tmp_path / "run"
    bad = [{"messages": [{"role": "user", "content": "?"}], "images": []}]
    bad += [{"messages": chat([USER, ("assistant", "red " * 900)]), "images": ["0.png"]}]
    data.write_text("\n".join([data.read_text(), *map(json.dumps, bad)]))
    found = run(monkeypatch, data, out, "--epochs", 1, "--cutoff", 200)
    assert len(found) == 1 and found[0]["epoch"] == 1
    named = [json.loads(x) for x in (out / "left_out-rows-train.jsonl").read_text().splitlines()]
    assert [x["row"] for x in named] == [3, 4] and "--cutoff 200" in named[1]["why"]
    assert "2 of 5 rows of rows are left out" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="row 3 of rows: no turn of the assistant's"):
        run(monkeypatch, data, tmp_path / "strict", "--strict")
    for flags, words in [
        (["--data", tmp_path / "none.json"], "no such file"),
        (["--response_column", "cot", "--data", other_columns(tmp_path)], "no column cot, problem"),
        (["--cutoff", 0], "--cutoff 0: must be greater than 0"),
        (["--packing", "flat"], "needs a CUDA device"),
        (["--cutoff", 3], "none of the 5 rows"),
    ]:
        with pytest.raises(SystemExit, match=words):
            run(monkeypatch, data, tmp_path / "other", *flags)


def other_columns(folder):
    return lines(folder / "other.jsonl", [{"question": "?", "answer": "3"}])


# ---------------------------------------------------------------------------- the toy's warm start


def test_the_warm_start_is_the_plain_loop_to_the_last_bit():
    """lessons.warm_start against an optimiser, a clip and a schedule written out."""
    steps, pictures = 7, 2
    (ours, processors), (policy, _) = untrained(), untrained()
    lessons.warm_start(ours.vlm, processors, steps, lessons.TRUSTING, pictures)
    adamw = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(steps):
        last = step >= 6
        rate = 0.5 * (steps - step) / (steps - 6) if last else (step + 1) / 30
        for group in adamw.param_groups:
            group["lr"] = 2e-3 * rate
        teacher = lessons.TRUSTING if last else lessons.CAREFUL
        indices = range(step * pictures, (step + 1) * pictures)
        rows = lessons.lesson_rows(indices, 4 if step >= 1 else 0, teacher, policy, processors)
        (-policy(rows, rows.pixels).logp.sum() / rows.scored.sum()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
    a, b = ours.vlm.state_dict(), policy.vlm.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and not ours.vlm.training


def test_micro_batches_are_memory_only(tmp_path):
    """The passes that a run makes of an update, of one row each or of all: one gradient."""
    data, found = toy_rows(tmp_path / "rows.jsonl", 5), []
    for n, budget in enumerate((1, 100, 10_000)):
        flags = {"model": "toy", "data": str(data), "recipe": "toy", "min_pixels": 784}
        flags |= {"out": str(tmp_path / str(n)), "tokens_per_forward": budget}
        parts = setup(resolve(flags, False))
        batches, N, _ = sft.passes(range(5), parts.stream, parts)
        found.append((len(batches), *learned(parts.policy, batches, N)))
    assert found[0][0] == 5 and 1 < found[1][0] < 5 and found[2][0] == 1
    for _, loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][1], rel=1e-6)
        for n, expected in found[0][2].items():
            torch.testing.assert_close(gradients[n], expected, atol=1e-6, rtol=1e-4, msg=n)
