"""From a row with a conversation to token ids, and which of them are the assistant's.

The chat template writes the whole conversation. What it writes before an assistant's turn is what
it writes for a prompt that waits for an answer, so the row's prompt is the one that train.py
samples from; what follows up to the end token is the assistant's. Where this is not so, the row is
left out.
"""

from dataclasses import dataclass
from functools import partial

import torch

from plumbing.data.prompts import IMAGE, Prompt, chat_text, check_texts, expand, naming, patches
from plumbing.data.schemas import problem_of, text_of, turns_of
from plumbing.data.sources import DATA_SETS, Rows, load, opened
from reward import FORMS

TOY_ROWS = 2048  # of the toy's training data, which is made on demand, an epoch


@dataclass
class Conversation:
    """A conversation as a prompt and what follows it, R tokens."""

    prompt: Prompt  # up to where the assistant's first turn begins; with all pictures
    tokens: torch.Tensor  # (R,) the assistant's turns, and whatever comes between them
    scored: torch.Tensor  # (R,) bool: the assistant's own tokens, the end of each turn among them


class Conversations(Rows):
    """Rows that are chats of any number of turns, perhaps with a column `system`, and are used as
    they are; or a problem and a response each, and then the problem is asked as train.py asks it.
    """

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
        """The conversation as text, one token a picture. Raises ValueError as the two calls do."""
        texts = pieces(example, tok, [1] * len(example.images))
        token_ids(texts, tok)
        return "".join(texts)


def open_conversations(name, split, cfg):
    """The data set of this name. Ends with a sentence if it cannot be read."""
    if name in DATA_SETS:
        return load(name, split, TOY_ROWS, cfg.seed, cfg)
    columns = cfg.columns.split(",")
    asked = FORMS[cfg.reward].instruction
    return opened(name, partial(Conversations, name, split, columns, instruction=asked))


def dialogue_of(chat, system=None):
    """A chat of any number of turns -> [(role, text)]. system: what a column of its own says in the
    place of a first turn; None or "" for nothing."""
    turns = turns_of(chat)
    if system:
        turns.insert(0, ("system", text_of(system, "system")))
    roles = [role for role, _ in turns]
    if unknown := [role for role in roles if role not in ("system", "user", "assistant")]:
        raise ValueError(f"a turn of {unknown[0]}; system, user and assistant are known")
    if "assistant" not in roles:
        raise ValueError("no turn of the assistant's: there is nothing to learn from")
    both = roles[roles[0] == "system" :]
    if both != ["user", "assistant"] * (len(both) // 2):
        raise ValueError(
            f"the turns are {', '.join(roles)}; after a system turn or none, a user and the "
            "assistant must take turns, and the assistant come last"
        )
    for role, text in turns:
        if role != "system" and not text.strip():
            raise ValueError(f"an empty turn of the {role}'s")
        if role != "user" and IMAGE in text:
            raise ValueError(f"{IMAGE} in a turn of the {role}'s; only a user shows pictures")
    return turns


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
                "the model's chat template does not write its turns one after the other, each of "
                f"the assistant's up to {end}"
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
    with naming(example):
        pixels, grid, tokens = patches(example, image_processor)
        first, *rest = map(torch.tensor, token_ids(pieces(example, tok, tokens), tok))
    scored = [torch.full((len(ids),), k % 2 == 0) for k, ids in enumerate(rest)]
    return Conversation(Prompt(example, first, pixels, grid), torch.cat(rest), torch.cat(scored))
