"""From rows of conversations to token ids: what is read, and what is refused."""

import pytest

pytest.importorskip("fine_r1")

import torch
from conftest import jsonl
from test_schemas import encoded
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fine_r1.conversations import Conversations, encode_conversation, open_conversations
from fine_r1.sft import resolve_sft
from plumbing.data.prompts import Example, encode
from plumbing.run.config import resolve
from plumbing.run.setup import open_data
from reward import FORMS
from toy.model import processor, tokenizer

QUESTION = "<image> how many red objects are there ?"
TURNS = [("system", "count"), ("user", QUESTION), ("assistant", "red : 3")]


def chat(turns=TURNS, names=("role", "content")):
    return [dict(zip(names, turn)) for turn in turns]


def lines(path, rows):
    """Rows as a JSONL file beside the picture that they name."""
    (path.parent / "a.png").write_bytes(encoded())
    return jsonl(path, [{"images": ["a.png"]} | row for row in rows])


def test_the_rows_of_other_programs(tmp_path):
    """LLaMA-Factory's two shapes, its column for the system, and a content in parts."""
    processors = tokenizer(), processor()
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    other = chat([(names[role], text) for role, text in TURNS], ("from", "value"))
    text = QUESTION.removeprefix("<image>")
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    rows = [{"messages": chat()}, {"conversations": other}]
    rows += [{"conversations": other[1:], "system": "count"}]
    rows += [{"messages": [*chat()[:1], asked, *chat()[2:]]}]
    for i, row in enumerate(rows):
        data = Conversations(str(lines(tmp_path / f"{i}.jsonl", [row])), "train")
        assert not data.faults(*processors, 100)
        assert data[0].turns == TURNS and data[0].images == [str(tmp_path / "a.png")]
        assert (data[0].problem, data[0].answer) == (f"count\n{QUESTION}", "red : 3")


USER, SAID = ("user", QUESTION), ("assistant", "3")
BAD = [
    ([USER], "no turn of the assistant's"),
    ([USER, ("assistant", " ")], "an empty turn of the assistant's"),
    ([SAID, USER, SAID], "turns are assistant, user, assistant"),
    ([USER, SAID, ("user", "and ?")], "the assistant come last"),
    ([USER, ("system", "be nice"), SAID], "must take turns"),
    ([USER, ("tool", "3"), SAID], "a turn of tool; system, user and assistant"),
    ([("user", "<image> <image> ?"), SAID], "2 <image> placeholders but 1 pictures"),
    ([("user", "?"), ("assistant", "<image>")], "<image> in a turn of the assistant"),
    ([USER, ("assistant", "3 <|im_end|>")], "the assistant's turn contains <|im_end|>"),
    ([USER, ("assistant", "red " * 300)], "tokens are more than --cutoff 200"),
]
OTHERS = [
    ({"problem": QUESTION, "response": ["3", "4"]}, "the response is no text but"),
    ({"messages": chat(), "system": "again"}, "must take turns"),
    ({"messages": chat(), "tools": "a calculator"}, "it has tools, which are not read"),
    ({"messages": chat(), "images": ["none.png"]}, "none.png"),
]
ROWS = [({"messages": chat(turns)}, why) for turns, why in BAD] + OTHERS


@pytest.mark.parametrize("row, why", ROWS)
def test_a_row_that_cannot_be_learned_is_named(row, why, tmp_path):
    columns = ("problem", "response", "images")
    data = Conversations(str(lines(tmp_path / "rows.jsonl", [row])), "train", columns)
    (found,) = data.faults(tokenizer(), processor(), 200).values()
    assert why in found


@pytest.mark.parametrize("reward", FORMS)
def test_a_problem_is_asked_as_train_asks_it(reward, tmp_path):
    processors = tokenizer(), processor()
    row = {"problem": "how many ?", "response": "<think> x </think>", "answer": "3", "images": []}
    path = str(lines(tmp_path / "rows.jsonl", [row]))
    flags = {"model": "toy", "data": path, "reward": reward}
    (mine,) = open_conversations(path, "train", resolve_sft(flags, False)[0])
    (asked,), _ = open_data(resolve(flags, False)[0])
    assert (
        mine.turns[0]
        == ("user", asked.problem)
        == ("user", "how many ?" + FORMS[reward].instruction)
    )
    c = encode_conversation(mine, *processors)
    assert torch.equal(c.prompt.ids, encode(asked, *processors).ids) and c.scored.all()


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversation(template, *turns):
    """With a tokenizer that joins line breaks, as Qwen's does."""
    special = ["<|im_start|>", "<|im_end|>"]
    words = [*special, "<unk>", "\n", "\n\n", "user", "assistant", "red", "?", "so", "3"]
    base = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|[^\n ]+"), "isolated")
    ends = dict(eos_token="<|im_end|>", unk_token="<unk>", additional_special_tokens=special)
    tok = PreTrainedTokenizerFast(tokenizer_object=base, chat_template=template, **ends)
    example = Example("1", "", "", turns=list(zip(["user", "assistant"] * 2, turns)))
    return encode_conversation(example, tok, None)


def test_what_a_template_does_to_a_turn_is_followed_or_refused():
    c = conversation(CHATML, "red ?", "so 3")
    assert c.prompt.ids[-1] == 3 and c.scored.all() and c.tokens[-1] == 1  # "\n"; "<|im_end|>"
    # A template may cut a turn down once others follow it, as Qwen3's does with its thoughts.
    short = CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else m.content[-1:] }}")
    assert len(conversation(short, "red ?", "so 3").tokens) == 4
    strict, endless = CHATML + "{{ raise_exception('no') }}", CHATML.replace("<|im_end|>", "")
    for template, turns, why in [
        (CHATML, ("red ?", "\n3"), "begins with white space"),
        (short, ("red ?", "so 3", "red ?", "3"), "does not write its turns one after the other"),
        (endless, ("red ?", "3"), "each of the assistant's up to <|im_end|>"),
        (strict, ("red ?", "3"), "chat template refuses it .no"),
    ]:
        with pytest.raises(ValueError, match=why):
            conversation(template, *turns)
