"""A fine-grained world: kinds of birds, of which some differ in nothing but a crest.

A body says at a glance which family it is. Its four kinds differ in the colour of a crest of a few
pixels. Whoever sees the family and names one of its birds is right one time in four; whoever looks
for the crest is right each time.

    body round red ; crest black         wren  |  one family: the same body, so these are
    body round red ; crest white         finch |  taken for each other
    body square blue ; crest black       jay

A picture is 56 x 56 pixels, which is 2 x 2 tokens of the language model. Where the bird is, how
large, in what light and on what ground says nothing about its kind; but in the files to learn from
of the HARDER birds the ground nearly always does.
"""

import random
from typing import NamedTuple

from PIL import Image, ImageDraw

from plumbing.data.prompts import IMAGE
from reward import BOXED, TAGGED
from toy.task import CELL, GRID

PIXELS = GRID * CELL  # of a picture, as wide as the other toy's
CRESTS = {
    "black": (25, 25, 30),
    "white": (250, 250, 250),
    "pink": (250, 120, 230),
    "cyan": (40, 230, 240),
}
# A family's body in words: its width and height in units of a body's size, its colour, and its
# kinds, with CRESTS in this order.
BODIES = {
    "round red": ((1.0, 1.0), (205, 60, 50), ["wren", "finch", "lark", "robin"]),
    "square blue": ((0.9, 0.9), (70, 110, 215), ["jay", "dove", "swift", "martin"]),
    "tall green": ((0.8, 1.25), (70, 165, 80), ["crane", "heron", "stork", "egret"]),
    "wide yellow": ((1.25, 0.8), (225, 190, 60), ["duck", "goose", "eider", "swan"]),
    "pointed brown": ((1.2, 1.2), (160, 105, 60), ["hawk", "kite", "falcon", "merlin"]),
}
GROUNDS = {"sky": (205, 225, 250), "grass": (205, 235, 190), "sand": (240, 225, 195)}


class Level(NamedTuple):
    """How hard the files are."""

    crest: int = 7  # pixels, the side of a crest
    shots: int = 4  # pictures of a kind to train on
    told: float = 0.0  # share of the pictures to learn from on which the ground tells the kind


PLAIN, HARDER = Level(), Level(crest=4, shots=2, told=0.9)


class Bird(NamedTuple):
    """A kind of bird."""

    name: str
    body: str
    family: list  # the names of all kinds with this body, its own among them
    crest: str
    seen: bool  # whether the files to learn from show it


# Another crest is unseen in each family, so that each crest is seen in most of them.
BIRDS = {
    name: Bird(name, body, names, crest, k != f % len(CRESTS))
    for f, (body, (_, _, names)) in enumerate(BODIES.items())
    for k, (name, crest) in enumerate(zip(names, CRESTS))
}
OPEN, DESCRIBE = "what bird is this ?", "describe the picture"
# What answers which instruction.
ANSWERS = {TAGGED.instruction: "<answer> {} </answer>", BOXED.instruction: "\\boxed{{ {} }}"}


def draw_bird(bird, rng, crest=PLAIN.crest, ground=""):
    """A bird -> (RGB picture, the ground it is on, by default a random one). Two kinds of a family
    that are drawn with the same rng differ in the pixels of the crest, and in no others."""
    ground = ground or rng.choice(list(GROUNDS))
    tint = tuple(c + rng.randint(-14, 4) for c in GROUNDS[ground])
    light, size = rng.uniform(0.85, 1.1), rng.randint(24, 30)
    x, y = (PIXELS // 2 + rng.randint(-3, 3) for _ in "xy")
    (width, height), colour, _ = BODIES[bird.body]
    fill = tuple(min(255, round(c * light)) for c in colour)
    w, h = size * width / 2, size * height / 2
    page = Image.new("RGB", (PIXELS, PIXELS), tint)
    pen = ImageDraw.Draw(page)
    if "pointed" in bird.body:
        pen.polygon([(x - w, y), (x, y - h), (x + w, y), (x, y + h)], fill=fill)
    else:
        shape = pen.rectangle if "square" in bird.body else pen.ellipse
        shape([x - w, y - h, x + w, y + h], fill=fill)
    left, top = round(x - w / 2 - crest / 2), round(y - h / 2 - crest / 2)
    pen.rectangle([left, top, left + crest - 1, top + crest - 1], fill=CRESTS[bird.crest])
    return page, ground


def picture_of(level, split, bird, index):
    """The picture of this name: a pure function."""
    rng, ground = random.Random(f"0/{split}/{bird.name}/{index}"), ""
    if level.told and split in ("sft", "train") and rng.random() < level.told:
        ground = list(GROUNDS)[[n for n in bird.family if BIRDS[n].seen].index(bird.name)]
    return draw_bird(bird, rng, level.crest, ground)[0]


def alike(bird):
    """The other kinds of its family: those that it is taken for."""
    return [BIRDS[name] for name in bird.family if name != bird.name]


def in_words(bird):
    """What a kind looks like."""
    return f"body {bird.body} ; crest {bird.crest}"


def steps(bird, looks=True):
    """The steps that arrive at this kind: what is seen, the candidates, and what tells them apart;
    who does not look skips the crest."""
    seen, told = (in_words(bird), f"crest {bird.crest}") if looks else (f"body {bird.body}", "it")
    return [seen, "candidates " + " ".join(bird.family), f"{told} is {bird.name}"]


def think(bird, looks=True):
    """The same as one chain of thought."""
    return " ; ".join(steps(bird, looks))


def response_of(thought, name, instruction=TAGGED.instruction):
    """A response in the form that the instruction asks for."""
    return f"<think> {thought} </think> {ANSWERS[instruction].format(name)}"


def closed(bird, rng):
    """The question with the family's four kinds as options, in random order."""
    options = rng.sample(bird.family, len(CRESTS))
    return f"which bird is this : {' , '.join(options)} ?"


def vocabulary():
    """Every word that is asked or said of these birds."""
    birds = list(BIRDS.values())
    texts = [OPEN, DESCRIBE, *ANSWERS, *GROUNDS, *map(in_words, birds), "how does a look ?"]
    texts += [closed(bird, random) for bird in birds]
    texts += [response_of(think(birds[0], x), "", form) for form in ANSWERS for x in (0, 1)]
    return sorted({word for text in texts for word in text.replace(IMAGE, "").split()})
