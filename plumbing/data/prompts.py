"""Examples and prompts: from a question in words to what the model can read.

    Example   what a data set holds: a problem with <image> placeholders, pictures, an answer
    Prompt    the same as tensors: token ids with image placeholders expanded, patch rows, grids

A picture of h x w patches takes h * w / 4 tokens (plumbing/models/families.py). Its placeholder is
expanded here, so that prompts need neither torchvision nor a video processor.
"""

import re
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from PIL import Image

from plumbing.base.common import first_line, generator
from plumbing.base.console import say, track
from plumbing.data.pictures import rgb
from plumbing.data.schemas import IMAGE
from plumbing.models.families import IMAGE_TOKEN, encode_pictures, picture_tokens

# The chat template of a thinking model, such as Qwen3-VL-Thinking, ends with it.
OPENED = re.compile(r"(<think>\s*)?$")


@dataclass
class Example:
    id: str
    problem: str  # with one <image> a picture
    answer: str
    images: list = field(default_factory=list)
    seconds: dict = field(default_factory=dict)  # {name: [second pictures, one each]}
    tags: dict = field(default_factory=dict)  # whatever else the data set knows, for tables
    turns: list = field(default_factory=list)  # [(role, text)]: what fine_r1/sft.py learns from


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
    """The spellings of a tokenizer's control tokens, listed once for all rows of a data set."""
    return [t.content for t in tok.added_tokens_decoder.values() if t.special]


def check_texts(example, texts, tok):
    """Raises ValueError when placeholders and pictures disagree in number, and for a text in which
    a control token is spelled: the tokenizer would take it for the real one. texts: [(what it is,
    text)], all that becomes token ids of this example"""
    placeholders = sum(text.count(IMAGE) for _, text in texts)
    if placeholders != len(example.images):
        counts = f"{placeholders} {IMAGE} placeholders but {len(example.images)} pictures"
        raise ValueError(f"{counts}; the text needs one placeholder for each picture")
    for what, text in texts:
        if found := [token for token in control_tokens(tok) if token in text]:
            raise ValueError(f"the {what} contains {found[0]}, which is no text to this model")


def chat_text(turns, tok, to_answer):
    """[(role, text)] as the chat template writes it, with one IMAGE_TOKEN a picture; to_answer: up
    to where the assistant's next turn begins. Raises ValueError where the template refuses them."""
    from jinja2 import TemplateError

    chat = [{"role": r, "content": parts_of(t) if r == "user" else t} for r, t in turns]
    try:
        return tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=to_answer)
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses it ({first_line(error)})") from error


def parts_of(text):
    """A user's text as chat templates take it: pieces of text, and pictures between them."""
    parts = [part.strip() for part in re.split(f"({IMAGE})", text) if part.strip()]
    return [{"type": "image"} if p == IMAGE else {"type": "text", "text": p} for p in parts]


def expand(texts, tokens):
    """Repeat the placeholder of picture k, counted through all these texts, tokens[k] times."""
    left = iter(tokens)
    return [re.sub(re.escape(IMAGE_TOKEN), lambda m: m[0] * next(left), text) for text in texts]


def prompt_text(example, tok, tokens):
    """The chat in which the problem is the user's turn, as text, with tokens[k] placeholders of
    picture k. Raises ValueError as check_texts."""
    check_texts(example, [("problem", example.problem)], tok)
    return expand([chat_text([("user", example.problem)], tok, True)], tokens)[0]


@contextmanager
def naming(example):
    """What is wrong with an example is said with its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"example {example.id}: {error}") from error


def patches(example, image_processor):
    """The pictures of an example -> (pixels, grid, tokens that each picture takes). Raises
    ValueError for a broken one."""
    if not example.images:
        return None, None, []
    pixels, grid = encode_pictures([rgb(p) for p in example.images], image_processor)
    return pixels, grid, picture_tokens(grid, image_processor)


def encode(example, tok, image_processor, second=()):
    """Example -> Prompt. Raises ValueError when placeholders and pictures disagree in number, or a
    picture is broken; one of `second`, names of second pictures, too."""
    with naming(example):
        pixels, grid, tokens = patches(example, image_processor)
        for picture in second_pictures(example, second):
            rgb(picture)
        text = prompt_text(example, tok, tokens)
    ids = torch.tensor(tok(text, add_special_tokens=False)["input_ids"])
    return Prompt(example, ids, pixels, grid, OPENED.search(text)[0])


def second_pictures(example, names):
    """The second pictures of an example that have these names. Raises ValueError if there is not
    one of each for every picture."""
    found = {name: example.seconds.get(name, []) for name in names}
    for name, pictures in found.items():
        if len(pictures) != len(example.images):
            counts = f"{len(example.images)} pictures but {len(pictures)} in the column {name}"
            raise ValueError(f"{counts}; it needs one for each")
    return sum(found.values(), [])


def read_each(items, read):
    """Yield (item, read(item)) of those that can be read; the others are named on the console."""
    for item in track(items, "reading", "prompts"):
        try:
            yield item, read(item)
        except ValueError as error:
            say(f"warning: left out: {error}", every_rank=True)


def encode_all(examples, tok, image_processor, blind=False):
    """[Example] -> [Prompt] of those that can be read; the others are named on the console. blind:
    every picture is black."""

    def read(example):
        if blind:
            with naming(example):
                black = [Image.new("RGB", rgb(p).size) for p in example.images]
            example = replace(example, images=black)
        return encode(example, tok, image_processor)

    return [prompt for _, prompt in read_each(examples, read)]


class Stream:
    """The endless stream of training prompts: stream[position] -> Prompt.

    An epoch is a shuffle with the name (seed, "shuffle", epoch). Raises ValueError for a prompt
    that cannot be read. encode: what is made of an example; fine_r1/sft.py makes conversations.
    """

    def __init__(self, examples, seed, tok, image_processor, encode=encode):
        self.examples, self.seed, self.encode = examples, seed, encode
        self.tok, self.image_processor = tok, image_processor
        self.order = (None, [])  # of the epoch that was last asked for
        self.promised = {}  # {position: Future of its prompt}, what a thread reads meanwhile

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

        later: what will probably be read next. A thread begins with it, so that a GPU need not wait
        for pictures to be decoded, and takes host memory for it. What it has not begun with is read
        by whoever asks. When the program ends, the thread ends after the prompt at hand.
        """
        found = dict(read_each(positions, self._take))
        for future in self.promised.values():  # a guess that was wrong costs only the reading
            future.cancel()
        self.promised = {position: Future() for position in later}
        threading.Thread(target=self._read_ahead, args=(list(self.promised.items()),)).start()
        return found

    def _take(self, position):
        future = self.promised.pop(position, None)
        return self[position] if future is None or future.cancel() else future.result()

    def _read_ahead(self, promised):
        for position, future in promised:
            if threading.main_thread().is_alive() and future.set_running_or_notify_cancel():
                try:
                    future.set_result(self[position])
                except BaseException as error:  # said by whoever asks for it
                    future.set_exception(error)
