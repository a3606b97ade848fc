"""Examples and prompts: from a question in words to what the model can read.

    Example   what a data set holds: a problem with <image> placeholders, pictures, an answer
    Prompt    the same as tensors: token ids with image placeholders expanded, patch rows, grids

A picture of h x w patches takes h * w / 4 tokens of the language model (plumbing/families.py). Its
placeholder is expanded here, with the tokenizer and the image processor alone, so that prompts need
neither torchvision nor a video processor.
"""

import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from PIL import Image

from plumbing.ahead import Ahead
from plumbing.common import first_line, generator
from plumbing.console import say, track
from plumbing.families import IMAGE_TOKEN, encode_pictures, picture_tokens
from plumbing.pictures import rgb

IMAGE = "<image>"
# The chat template of a thinking model, such as Qwen3-VL-Thinking, ends with it.
OPENED = re.compile(r"(<think>\s*)?$")


@dataclass
class Example:
    id: str
    problem: str  # with one <image> a picture
    answer: str
    images: list = field(default_factory=list)
    contrast: list = field(default_factory=list)  # second pictures, one each, for --mask contrast
    positive: list = field(default_factory=list)  # and for --rollout_picture positive
    tags: dict = field(default_factory=dict)  # whatever else the data set knows, for tables
    turns: list = field(default_factory=list)  # [(role, text)]: what sft.py learns from


@dataclass
class Prompt:
    """One prompt as tensors. P tokens, K pictures, N patches in all of them."""

    example: Example
    ids: torch.Tensor  # (P,) int64, image placeholders expanded
    pixels: torch.Tensor | None  # (N, D), rows in merge-block order; None without a picture
    grid: torch.Tensor | None  # (K, 3) patches along t, h, w
    opening: str = ""  # of every response, where the chat template has written it: "<think>"


@cache
def control_tokens(tok):
    """The spellings that a tokenizer takes for one of its control tokens; listed once, since every
    row of a data set is held against them."""
    return [t.content for t in tok.added_tokens_decoder.values() if t.special]


def check_texts(example, texts, tok):
    """Raises ValueError when placeholders and pictures disagree in number, and for a text in which
    a control token is spelled: the tokenizer would take it for the real one.

    texts: [(what it is, text)], all that becomes token ids of this example
    """
    placeholders = sum(text.count(IMAGE) for _, text in texts)
    if placeholders != len(example.images):
        raise ValueError(
            f"example {example.id}: {placeholders} {IMAGE} placeholders but "
            f"{len(example.images)} pictures; the text needs one placeholder for each picture"
        )
    for what, text in texts:
        if found := [token for token in control_tokens(tok) if token in text]:
            raise ValueError(
                f"example {example.id}: the {what} contains {found[0]}, which is no text to this "
                "model"
            )


def chat_text(turns, tok, to_answer):
    """[(role, text)] as the chat template writes it, with one IMAGE_TOKEN a picture.

    to_answer: up to where the assistant's next turn begins. Raises ValueError where the template
    refuses these turns.
    """
    from jinja2 import TemplateError

    chat = [{"role": r, "content": parts_of(t) if r == "user" else t} for r, t in turns]
    try:
        return tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=to_answer)
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses it ({first_line(error)})") from error


def parts_of(text):
    """A user's text as chat templates take it: pieces of text, and pictures between them."""
    content = []
    for i, part in enumerate(text.split(IMAGE)):
        content += [{"type": "image"}] if i else []
        content += [{"type": "text", "text": part.strip()}] if part.strip() else []
    return content


def expand(texts, tokens):
    """Repeat the placeholder of picture k, counted through all these texts, tokens[k] times."""
    left = iter(tokens)
    return [re.sub(re.escape(IMAGE_TOKEN), lambda m: m[0] * next(left), text) for text in texts]


def prompt_text(example, tok, tokens):
    """The chat in which the problem is the user's turn, as text.

    Picture k's placeholder is repeated tokens[k] times. Raises ValueError as check_texts.
    """
    check_texts(example, [("problem", example.problem)], tok)
    (text,) = expand([chat_text([("user", example.problem)], tok, True)], tokens)
    return text


@contextmanager
def named(example):
    """What is wrong with a picture is said with the name of its example."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"example {example.id}: {error}") from error


def look(example, image_processor):
    """The pictures of an example -> (pixels, grid, tokens that each picture takes). Raises
    ValueError for a broken one."""
    if not example.images:
        return None, None, []
    with named(example):
        pixels, grid = encode_pictures([rgb(p) for p in example.images], image_processor)
    return pixels, grid, picture_tokens(grid, image_processor)


def encode(example, tok, image_processor):
    """Example -> Prompt. Raises ValueError when placeholders and pictures disagree in number, or a
    picture is broken."""
    pixels, grid, tokens = look(example, image_processor)
    text = prompt_text(example, tok, tokens)
    ids = torch.tensor(tok(text, add_special_tokens=False)["input_ids"])
    return Prompt(example, ids, pixels, grid, OPENED.search(text)[0])


def seconds(example, names):
    """The second pictures of an example, of the fields with these names. Raises ValueError if there
    is not one of each for every picture."""
    for name in names:
        if len(getattr(example, name)) != len(example.images):
            raise ValueError(
                f"example {example.id}: {len(example.images)} pictures but "
                f"{len(getattr(example, name))} in the column {name}; it needs one for each"
            )
    return [picture for name in names for picture in getattr(example, name)]


def encode_with(second, example, tok, image_processor):
    """`encode` of an example whose second pictures must be readable too. Raises ValueError as
    encode and seconds."""
    for picture in seconds(example, second):
        with named(example):
            rgb(picture)
    return encode(example, tok, image_processor)


def readable(read, items):
    """Yield (item, read(item)) of those that can be read; the others are named on the console."""
    for item in track(items, "reading", "prompts"):
        try:
            yield item, read(item)
        except ValueError as error:
            say(f"warning: left out: {error}", here=True)


def encode_all(examples, tok, image_processor, blind=False):
    """[Example] -> [Prompt] of those that can be read; the others are named on the console.

    blind: every picture is black.
    """

    def read(example):
        prompt = encode(example, tok, image_processor)
        if not blind:
            return prompt
        black = [Image.new("RGB", rgb(p).size) for p in example.images]
        return encode(replace(example, images=black), tok, image_processor)

    return [prompt for _, prompt in readable(read, examples)]


class Stream:
    """The endless stream of training prompts: stream[position] -> Prompt.

    An epoch is a shuffle with the name (seed, "shuffle", epoch). Raises ValueError for a prompt
    that cannot be read. encode: what is made of an example; sft.py makes conversations.
    """

    def __init__(self, examples, seed, tok, image_processor, encode=encode):
        self.examples, self.seed, self.encode = examples, seed, encode
        self.tok, self.image_processor = tok, image_processor
        self.order = (None, [])  # of the epoch that was last asked for
        self.ahead = Ahead(self.__getitem__)

    def __getitem__(self, position):
        epoch, i = divmod(position, len(self.examples))
        order = self.order  # two threads may be here, at the border of two epochs
        if epoch != order[0]:
            named = generator(self.seed, "shuffle", epoch)
            order = epoch, torch.randperm(len(self.examples), generator=named).tolist()
            self.order = order
        return self.encode(self.examples[order[1][i]], self.tok, self.image_processor)

    def read(self, positions, later=()):
        """{position: Prompt} of those that can be read; the others are named on the console.

        later: what will probably be read next; a thread begins with it, and needs host memory for
        as many prompts again.
        """
        found = dict(readable(self.ahead, positions))
        self.ahead.begin(later)
        return found
