"""From a row with a conversation to token ids, and which of them are the assistant's.

The chat template writes the whole conversation. What it writes before an assistant's turn is what
it writes for a prompt that waits for an answer, so the row's prompt is the one that train.py
samples from; what follows up to the end token is the assistant's. A row for which this is not so
is left out: the template drops the thoughts of earlier turns, or a turn begins with white space
that the tokenizer joins to the template's.
"""

from dataclasses import dataclass

import torch

from plumbing.data import Prompt, chat_text, check_texts, expand, look
from plumbing.schemas import dialogue_of, problem_of, text_of
from plumbing.sources import Rows


@dataclass
class Conversation:
    """A conversation as a prompt and what follows it, R tokens."""

    prompt: Prompt  # up to where the assistant's first turn begins; with all pictures
    tokens: torch.Tensor  # (R,) the assistant's turns, and whatever comes between them
    scored: torch.Tensor  # (R,) bool: the assistant's own tokens, the end of each turn among them


class Conversations(Rows):
    """A data set on disk or from the hub whose rows are conversations.

    A row is a chat of any number of turns, perhaps with a column `system`; it is used as it is. Or
    it is a problem and a response, and then the problem is asked as train.py asks it.
    """

    column_flags = "--problem_column, --response_column and --images_column"
    limit = "tokens are more than --cutoff"

    def said(self, row):
        """What the row says, as fields of an Example."""
        if other := [c for c in ("tools", "videos", "audios") if row.get(c)]:
            raise ValueError(f"it has {other[0]}, which are not read")
        if self.chat:
            turns = dialogue_of(row[self.chat] or [], row.get("system"))
        else:
            problem = problem_of(row[self.columns[0]]) + self.instruction
            response = text_of(row[self.columns[1]], "response")
            turns = dialogue_of([{"content": problem}, {"content": response}])
        before, (_, answer) = turns[:-1], turns[-1]
        return {"problem": "\n".join(t for _, t in before), "answer": answer, "turns": turns}

    def written(self, example, tok):
        """The conversation as text, one token a picture. Raises ValueError as pieces and
        token_ids do."""
        texts = pieces(example, tok, [1] * len(example.images))
        token_ids(texts, tok)
        return "".join(texts)


def pieces(example, tok, tokens):
    """The conversation as text, up to the end of its last turn, in pieces: the even ones are the
    template's and the user's, the odd ones the assistant's, each with its end token.

    Picture k's placeholder is repeated tokens[k] times. Raises ValueError as check_texts, and where
    the template writes a turn in another way once others follow it.
    """
    turns, found, start = example.turns, [], 0
    check_texts(example, [(f"{role}'s turn", text) for role, text in turns], tok)
    whole, end = chat_text(turns, tok, False), tok.eos_token
    for k, (role, _) in enumerate(turns):
        if role != "assistant":
            continue
        before, after = chat_text(turns[:k], tok, True), chat_text(turns[: k + 1], tok, False)
        said, ended, _ = after[len(before) :].partition(end)
        stop = len(before) + len(said) + len(end)
        if not ended or not after.startswith(before) or whole[:stop] != after[:stop]:
            raise ValueError(
                f"example {example.id}: the model's chat template does not write its turns one "
                f"after the other, each of the assistant's up to {end}"
            )
        found += [whole[start : len(before)], whole[len(before) : stop]]
        start = stop
    return expand(found, tokens)


def token_ids(texts, tok):
    """Pieces of a conversation -> the token ids of each. Raises ValueError unless together they are
    those of the whole."""
    whole, *apart = tok(["".join(texts), *texts], add_special_tokens=False)["input_ids"]
    if sum(apart, []) != whole:
        raise ValueError(
            "a turn of the assistant's begins with white space that the tokenizer joins to the "
            "chat template's; take it off"
        )
    return apart


def encode_conversation(example, tok, image_processor):
    """Example with turns -> Conversation. Raises ValueError for one that cannot be used, or a
    broken picture."""
    pixels, grid, tokens = look(example, image_processor)
    first, *rest = map(torch.tensor, token_ids(pieces(example, tok, tokens), tok))
    scored = [torch.full((len(ids),), k % 2 == 0) for k, ids in enumerate(rest)]
    return Conversation(Prompt(example, first, pixels, grid), torch.cat(rest), torch.cat(scored))


def by_prompt(conversations, image_token):
    """[Conversation] -> lists of those that share one prompt: the rows of packing.pack, in which
    it is computed once. One that shows pictures later shares with none."""
    groups = []
    for new in conversations:
        alone = (new.tokens == image_token).any()
        same = (g for g in groups if not alone and same_prompt(g[0].prompt, new.prompt))
        if (group := next(same, None)) is None:
            groups.append([new])
        else:
            group.append(new)
    return groups


def same_prompt(a, b):
    """Have two prompts the same tokens and pictures?"""
    if a.pixels is None or b.pixels is None:
        return a.pixels is b.pixels and torch.equal(a.ids, b.ids)
    return torch.equal(a.ids, b.ids) and torch.equal(a.pixels, b.pixels)
