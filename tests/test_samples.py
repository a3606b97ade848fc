"""The words of report.html are what each token adds to the text before it."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from plumbing.report.samples import words
from toy.model import tokenizer


@pytest.fixture(scope="module")
def in_bytes():
    """A tokenizer with byte-level BPE, as Qwen's, that has learned few words and no emoji."""
    base, bytewise = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.pre_tokenizer, base.decoder = bytewise, decoders.ByteLevel()
    learn = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=bytewise.alphabet(), special_tokens=["<|im_end|>"]
    )
    base.train_from_iterator(["the area of the triangle is é ∠ABC 30°"] * 2, learn)
    return PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<|im_end|>")


def by_prefixes(tokens, tok):
    """By definition: what each beginning adds that does not break off in a character of 4 bytes."""
    found, start = [], 0
    for end in range(1, len(tokens) + 1):
        before, upto = (tok.decode(tokens[:i]) for i in (start, end))
        if not upto.endswith("�") or end - start == 4 or end == len(tokens):
            found.append(upto[len(before) :])
            start = end
    return found


def said(tokens, tok):
    return [word for word, _, _ in words(tokens, None, tok)]


def test_characters_of_several_tokens(in_bytes):
    tokens = in_bytes("the △ 😀👍🏽 is 30° é ∠ABC<|im_end|>")["input_ids"]
    assert {"△", "😀"} <= {word.strip() for word in said(tokens, in_bytes)}
    assert "�" not in "".join(said(tokens, in_bytes)) and len(said(tokens, in_bytes)) < len(tokens)
    for i in range(len(tokens)):  # whole, and with a byte or a word missing
        left = tokens[:i] + tokens[i + 1 :]
        assert said(left, in_bytes) == by_prefixes(left, in_bytes)
    assert said(tokens, in_bytes) == by_prefixes(tokens, in_bytes)


def test_tokens_in_any_order(in_bytes):
    """Of random weights, whose bytes are no characters; and of the toy."""
    draw = torch.Generator().manual_seed(0)
    for tok in (in_bytes, tokenizer()):
        for n in range(1, 60):
            tokens = torch.randint(len(tok), (n,), generator=draw)
            assert said(tokens, tok) == by_prefixes(tokens, tok)


def test_the_work_grows_with_the_length(in_bytes, monkeypatch):
    read = []
    decode = in_bytes.decode
    monkeypatch.setattr(in_bytes, "decode", lambda ids: read.append(len(ids)) or decode(ids))
    said([5] * 400, in_bytes)
    assert sum(read) < 10 * 400


def test_a_word_has_its_tokens_nats(in_bytes):
    tokens = in_bytes("the area")["input_ids"]
    nats = [0.1 * i for i in range(len(tokens))]
    assert [kl for _, kl, _ in words(tokens, nats, in_bytes)] == nats
    tokens = in_bytes("😀")["input_ids"]  # four bytes, and so much is how far all of it is off
    ((text, *numbers),) = words(tokens, [0.1, 0.2, 0.3, 0.4], in_bytes)
    assert text == "😀" and numbers == pytest.approx([1.0, 1 / 3])
