"""From a row, laid out as people lay rows out, to a problem, an answer and pictures.

docs/data.md lists what is read. Whatever is not is a ValueError with the reason, and the row is
left out: nothing is guessed.
"""

import math

import numpy as np

CHATS = ("messages", "conversations")  # columns that hold a question and its answer as turns
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}  # other words for the same


def turns_of(chat):
    """A chat -> [(role, text)]. Turns are {"role", "content"} or {"from", "value"}; without either
    name they alternate, the user first. A content may be a list of parts, as chat templates take.
    """
    if not isinstance(chat, list):
        raise ValueError(f"the chat is {kind(chat)}; a list of turns is needed")
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


def dialogue_of(chat, system=None):
    """A chat of any number of turns, to learn the assistant's from -> [(role, text)]

    system: what a column of its own says in the place of a first turn; None or "" for nothing.
    """
    turns = turns_of(chat)
    if system:
        turns.insert(0, ("system", text_of(system, "system")))
    roles = [role for role, _ in turns]
    if unknown := [role for role in roles if role not in ("system", "user", "assistant")]:
        raise ValueError(f"a turn of {unknown[0]}; system, user and assistant are known")
    if "assistant" not in roles:
        raise ValueError("no turn of the assistant's: there is nothing to learn from")
    both = turns[roles[0] == "system" :]
    if [role for role, _ in both] != ["user", "assistant"] * (len(both) // 2):
        raise ValueError(
            f"the turns are {', '.join(roles)}; after a system turn or none, a user and the "
            "assistant must take turns, and the assistant come last"
        )
    if silent := [role for role, text in both if not text.strip()]:
        raise ValueError(f"an empty turn of the {silent[0]}'s")
    if pictured := [role for role, text in turns if role != "user" and "<image>" in text]:
        raise ValueError(f"<image> in a turn of the {pictured[0]}'s; only a user shows pictures")
    return turns


def text_of(value, what):
    """What a column of text holds -> text."""
    if not isinstance(value, str):
        raise ValueError(f"the {what} is no text but {kind(value)}")
    return value


def is_chat(value):
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def problem_of(value):
    """What a problem's column holds -> text."""
    if is_chat(value):
        return question_of(value)[0]
    return text_of(value, "problem")


def answer_of(value, dtype=None, names=None):
    """What an answer's column holds -> text, "" for none. dtype: of the column, where it has one;
    names: of the classes, where the column holds their numbers (a ClassLabel of `datasets`)

    {"ground_truth": ...} is its value, and a list of one its item. A float32 is written as short as
    it can be: 0.1, not 0.10000000149.
    """
    if isinstance(value, dict) and value.get("ground_truth") is not None:
        return answer_of(value["ground_truth"])
    if isinstance(value, list) and len(value) == 1:
        return answer_of(value[0])
    if isinstance(value, dict | list):
        raise ValueError(f"the answer is {kind(value)}; text or a number is needed")
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
    """What a column of pictures holds -> [bytes, path, dict or PIL picture]. Lists may be nested;
    pixels may be an array or nested lists of numbers."""
    if value is None or isinstance(value, str | bytes) and not value:
        return []
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        return [value]
    innermost, deep = value, 0
    while isinstance(innermost, list):
        innermost, deep = innermost[0] if innermost else None, deep + 1
    if isinstance(innermost, int | float) and deep in (2, 3):
        return [from_pixels(value)]
    return [picture for item in value for picture in pictures_of(item)]


def from_pixels(value):
    """Rows of pixels, from 0 to 255, as a PIL picture."""
    from PIL import Image

    try:
        pixels = np.array(value)
        if pixels.min() < 0 or pixels.max() > 255 or (pixels != pixels.round()).any():
            raise ValueError("they are not from 0 to 255")
        return Image.fromarray(pixels.astype(np.uint8))
    except (ValueError, TypeError) as error:
        raise ValueError(f"a picture's pixels cannot be read ({error})") from error


def kind(value):
    """What a value is, for a sentence."""
    if isinstance(value, dict):
        return f"a dict of {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "nothing" if value is None else f"of type {type(value).__name__}"
