"""From a row, laid out as people lay rows out, to a problem, an answer and pictures. Whatever
docs/data.md does not list is a ValueError, and the row is left out: nothing is guessed."""

import ast
import math
import re
from numbers import Number
from string import ascii_uppercase

import numpy as np

IMAGE = "<image>"  # where a text shows a picture
CHATS = ("messages", "conversations")  # columns that hold a question and its answer as turns
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}  # other words for the same
OPTIONS = ("options", "choices", "option")  # columns of what a question gives to choose from
CHOOSE = "Answer with the letter of one option:"
NUMBERED = re.compile(r"<image (\d{1,2})>")


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
        return IMAGE
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


def lettered(options):
    """[text] -> a line each, with its letter."""
    return [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, options)]


def options_of(value):
    """What a column of options holds -> [text] of a list, or of one written down as text; another
    text as it is; [] for none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError("the options are a list that cannot be read") from error
    if not isinstance(value, str | list | None):
        raise ValueError(f"the options are a {type(value).__name__}; a list or text is needed")
    return value.strip() if isinstance(value, str) else [str(x).strip() for x in value or []]


def with_options(problem, answer, options, place=None):
    """A problem that shows its options, unless it does already, and its answer as the letter of one
    of them. answer: that letter, or the option's text; place: or its index from 0. Raises
    ValueError unless exactly one is meant. Options that are one text have their letters."""
    if isinstance(options, str):
        return problem if options in problem else f"{problem}\n{CHOOSE}\n{options}", answer
    letters, said = dict(zip(ascii_uppercase, options)), answer.strip()
    found = {a for k, a in enumerate(letters) if k == place or said in (a, f"({a})", letters[a])}
    if len(found) != 1 or len(options) > len(letters):
        which = " and ".join(sorted(found)) or "none"
        raise ValueError(f"the answer {said!r} is {which} of {len(options)} options")
    if not all(re.search(rf"{a}\W{{1,3}}{re.escape(t)}", problem) for a, t in letters.items()):
        problem = "\n".join([problem, CHOOSE, *lettered(options)])
    return problem, found.pop()


def in_order(problem, pictures):
    """<image 2> shows the second picture: -> the problem with <image>, and the pictures in the
    order in which they are shown. Raises ValueError unless all are. Where nothing says where they
    belong, they come first."""
    order = [int(number) - 1 for number in NUMBERED.findall(problem)]
    if not order and IMAGE not in problem:
        return IMAGE * len(pictures) + problem, pictures
    if order and {*order} != {*range(len(pictures))}:
        raise ValueError(f"the text shows other pictures than its {len(pictures)} by number")
    return NUMBERED.sub(IMAGE, problem), [pictures[i] for i in order] if order else pictures
