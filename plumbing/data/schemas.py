"""From a row, laid out as people lay rows out, to a problem, an answer and pictures. Whatever
docs/data.md does not list is a ValueError, and the row is left out: nothing is guessed."""

import math
from numbers import Number

import numpy as np

CHATS = ("messages", "conversations")  # columns that hold a question and its answer as turns
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}  # other words for the same


def turns_of(chat):
    """A chat -> [(role, text)]. Turns are {"role", "content"} or {"from", "value"}; without either
    name they alternate, the user first. A content may be a list of parts, as chat templates take.
    """
    if not isinstance(chat, list):
        raise ValueError(f"the chat is of type {type(chat).__name__}; a list of turns is needed")
    found = []
    for k, turn in enumerate(chat):
        if not isinstance(turn, dict):
            raise ValueError("a turn of the chat is not a dict")
        role = turn.get("role") or turn.get("from") or ("user", "assistant")[k % 2]
        content = turn.get("value") if turn.get("content") is None else turn["content"]
        if not isinstance(role, str) or content is None:
            raise ValueError("a turn of the chat has no text, or a role that is none")
        parts = content if isinstance(content, list) else [content]
        found.append((ROLES.get(role, role), "".join(map(part_text, parts))))
    return found


def part_text(part):
    """One part of a turn's content as text, with <image> where a picture is."""
    if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
        return "<image>"
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        raise ValueError("a turn of the chat holds something that is neither text nor a picture")
    return text


def question_of(chat):
    """A chat -> (problem, answer or ""). A system turn is left out: an instruction of ours
    (reward.py) takes its place."""
    turns = [turn for turn in turns_of(chat) if turn[0] != "system"]
    roles = [role for role, _ in turns]
    if roles not in (["user"], ["user", "assistant"]):
        said = ", ".join(map(str, roles)) or "none"
        raise ValueError(f"a chat with the turns {said}; a user's and an assistant's are needed")
    return turns[0][1], turns[1][1] if len(turns) > 1 else ""


def text_of(value, what):
    """What a column of text holds -> text."""
    if not isinstance(value, str):
        raise ValueError(f"the {what} is no text but a {type(value).__name__}")
    return value


def problem_of(value):
    """What a problem's column holds -> text."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return question_of(value)[0]
    return text_of(value, "problem")


def answer_of(value, dtype=None, names=None):
    """What an answer's column holds -> text, "" for none; {"ground_truth": ...} is its value, and a
    list of one its item. dtype: of the column, where it has one: a float32 is written 0.1, not
    0.10000000149; names: of the classes, where the column holds their numbers (a ClassLabel)"""
    if isinstance(value, dict) and value.get("ground_truth") is not None:
        return answer_of(value["ground_truth"])
    if isinstance(value, list) and len(value) == 1:
        return answer_of(value[0], dtype, names)
    if not isinstance(value, str | Number | None):
        raise ValueError(f"the answer is a {type(value).__name__}; text or a number is needed")
    if names and isinstance(value, int):
        if not 0 <= value < len(names):
            raise ValueError(f"the answer is class {value} of {len(names)}")
        return names[value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"the answer is {value}")
        if dtype in ("float16", "float32"):
            return str(np.dtype(dtype).type(value))
    return "" if value is None else str(value)


def pictures_of(value):
    """What a column of pictures holds -> [bytes, path or dict]. Lists may be nested."""
    if isinstance(value, list):
        return [picture for item in value for picture in pictures_of(item)]
    if isinstance(value, int | float):
        raise ValueError("pictures are given as numbers; files, or what files hold, are needed")
    return [value] if value else []
