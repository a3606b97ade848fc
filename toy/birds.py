"""A fine-grained world: kinds of birds, of which some differ in nothing but a crest.

The shape and the colour of a body say at a glance which family it is. Its four kinds differ in the
colour of a crest of a few pixels. Whoever sees the family and names one of its birds is right one
time in four; whoever looks for the crest is right each time.

    body round red ; crest black         wren  |  one family: the same body, so these four are
    body round red ; crest white         finch |  taken for each other
    body round red ; crest pink          lark  |
    body round red ; crest cyan          robin |
    body square blue ; crest black       jay

A picture is SIDE x SIDE pixels, which is 2 x 2 tokens of the language model. Where the bird is, how
large, in what light and on what ground says nothing about its kind. Every picture is a pure
function of (seed, split, kind, index). toy/kinds.py makes a base model and files of it.
"""

import random
from typing import NamedTuple

from PIL import Image, ImageDraw

from plumbing.data import IMAGE
from reward import BOXED, TAGGED
from toy.task import CELL, GRID

SIDE, CREST = GRID * CELL, 7  # pixels: of a picture, as wide as the other toy's, and of a crest
COLOURS = {
    "red": (205, 60, 50),
    "blue": (70, 110, 215),
    "green": (70, 165, 80),
    "yellow": (225, 190, 60),
    "brown": (160, 105, 60),
}
SHAPES = {  # width and height, in units of a body's size
    "round": (1.0, 1.0),
    "square": (0.9, 0.9),
    "tall": (0.8, 1.25),
    "wide": (1.25, 0.8),
    "pointed": (1.2, 1.2),
}
CRESTS = {
    "black": (25, 25, 30),
    "white": (250, 250, 250),
    "pink": (250, 120, 230),
    "cyan": (40, 230, 240),
}
# (shape, colour): its kinds, with CRESTS in this order.
FAMILIES = {
    ("round", "red"): ["wren", "finch", "lark", "robin"],
    ("square", "blue"): ["jay", "dove", "swift", "martin"],
    ("tall", "green"): ["crane", "heron", "stork", "egret"],
    ("wide", "yellow"): ["duck", "goose", "eider", "swan"],
    ("pointed", "brown"): ["hawk", "kite", "falcon", "merlin"],
}
GROUNDS = {"sky": (205, 225, 250), "grass": (205, 235, 190), "sand": (240, 225, 195)}


class Kind(NamedTuple):
    name: str
    family: tuple  # (shape, colour)
    crest: str
    seen: bool  # whether the files to learn from show it


# Another crest is unseen in each family, so that each crest is seen in most of them.
KINDS = {
    name: Kind(name, family, crest, k != f % len(CRESTS))
    for f, (family, names) in enumerate(FAMILIES.items())
    for k, (name, crest) in enumerate(zip(names, CRESTS))
}
OPEN, DESCRIBE = "what bird is this ?", "describe the picture"
# What answers which instruction.
FORMS = {TAGGED.instruction: "<answer> {} </answer>", BOXED.instruction: "\\boxed{{ {} }}"}


def draw(kind, rng):
    """A bird -> (RGB picture, the ground it is on). Two kinds of a family that are drawn with the
    same rng differ in the pixels of the crest, and in no others."""
    ground = rng.choice(list(GROUNDS))
    tint = tuple(c + rng.randint(-14, 4) for c in GROUNDS[ground])
    light, size = rng.uniform(0.85, 1.1), rng.randint(24, 30)
    x, y = (SIDE // 2 + rng.randint(-3, 3) for _ in "xy")
    shape, colour = kind.family
    fill = tuple(min(255, round(c * light)) for c in COLOURS[colour])
    w, h = (size * share / 2 for share in SHAPES[shape])
    picture = Image.new("RGB", (SIDE, SIDE), tint)
    pen = ImageDraw.Draw(picture)
    if shape == "pointed":
        pen.polygon([(x - w, y), (x, y - h), (x + w, y), (x, y + h)], fill=fill)
    else:
        body = pen.rectangle if shape == "square" else pen.ellipse
        body([x - w, y - h, x + w, y + h], fill=fill)
    left, top = round(x - w / 2 - CREST / 2), round(y - h / 2 - CREST / 2)
    pen.rectangle([left, top, left + CREST - 1, top + CREST - 1], fill=CRESTS[kind.crest])
    return picture, ground


def picture(seed, split, kind, index):
    """The picture of this name: a pure function."""
    return draw(kind, random.Random(f"{seed}/{split}/{kind.name}/{index}"))[0]


def alike(kind):
    """The other kinds of its family: those that it is taken for."""
    return [KINDS[name] for name in FAMILIES[kind.family] if name != kind.name]


def look_of(kind):
    """What a kind looks like, in words."""
    return f"body {' '.join(kind.family)} ; crest {kind.crest}"


def think(kind, looks=True):
    """The chain of thought that arrives at this kind; one that does not look skips the crest."""
    candidates = "candidates " + " ".join(FAMILIES[kind.family])
    if not looks:
        return f"body {' '.join(kind.family)} ; {candidates} ; it is {kind.name}"
    return f"{look_of(kind)} ; {candidates} ; crest {kind.crest} is {kind.name}"


def respond(thought, name, instruction=TAGGED.instruction):
    """A response in the form that the instruction asks for."""
    return f"<think> {thought} </think> {FORMS[instruction].format(name)}"


def closed(kind, rng):
    """The question with the family's four kinds as options, in random order."""
    options = rng.sample(FAMILIES[kind.family], len(CRESTS))
    return f"which bird is this : {' , '.join(options)} ?"


def words():
    """Every word that is asked or said of these birds."""
    kinds = list(KINDS.values())
    texts = [OPEN, DESCRIBE, *FORMS, *GROUNDS, *map(look_of, kinds), "how does a look ?"]
    texts += [closed(kind, random) for kind in kinds]
    texts += [respond(think(kinds[0], looks), "", form) for form in FORMS for looks in (0, 1)]
    return sorted({word for text in texts for word in text.replace(IMAGE, "").split()})
