"""The toy task: pictures drawn here, and questions about them.

A picture is a GRID x GRID board of coloured shapes, one board cell a merged vision token (28 x 28
pixels). A question comes with a hint in words ("a friend says 3"). In training the hint is right
with probability --hint_right: a shortcut that earns reward without looking. That is the disease
PAPO treats, in a size that fits a laptop.

    split     pictures    hint
    train     train       right with probability --hint_right, otherwise a plausible wrong answer
    val       held out    as `vision`, other pictures; the only split that settings are chosen on

and those of SPLITS.

Every example is a pure function of (seed, split, index, --hint_right). A hash of the board decides
which pictures may be trained on, so train and test pictures never coincide.

    python -m toy.task 5        # look at five examples
"""

import hashlib
import random

from PIL import Image, ImageDraw

from plumbing.base.common import Parser
from plumbing.data.prompts import Example
from plumbing.data.sources import DATA_SETS, DataSet

GRID, CELL = 2, 28  # cells a side; pixels a cell, which is one merged vision token
CELL_NAMES = [f"{'abcdefgh'[i % GRID]}{i // GRID + 1}" for i in range(GRID**2)]  # a1 b1, a2 b2
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 200, 40),
}
SHAPES = ["circle", "square", "triangle"]
QUESTIONS = ["count", "where", "compare", "add"]
# What an evaluation reports, all on held-out pictures.
SPLITS = {
    "general": "hints are right as often as in training",
    "vision": "a hint is the answer to the same question about another picture, and says nothing",
    "blind": "the questions of vision with a black picture: what can be had without looking",
}


# ----------------------------------------------------------------------- pictures and questions


def draw_board(board, rng):
    """A board, a list of GRID * GRID cells (colour, shape) or None, as an RGB picture.

    The background is tinted by row and column, as graph paper has a ruler: a tiny vision tower must
    be able to tell where it looks.
    """
    picture = Image.new("RGB", (GRID * CELL, GRID * CELL))
    pen = ImageDraw.Draw(picture)
    for i, cell in enumerate(board):
        row, column = divmod(i, GRID)
        left, top = column * CELL, row * CELL
        square = [left, top, left + CELL - 1, top + CELL - 1]
        tint = (255 - 50 * row, 240, 255 - 50 * column)
        pen.rectangle(square, outline=(200, 200, 200), fill=tint)
        if cell is None:
            continue
        colour, shape = cell
        size = rng.randint(16, 20)
        x, y = left + rng.randint(3, CELL - 4 - size), top + rng.randint(3, CELL - 4 - size)
        corners = [x, y, x + size, y + size]
        if shape == "circle":
            pen.ellipse(corners, fill=COLOURS[colour])
        elif shape == "square":
            pen.rectangle(corners, fill=COLOURS[colour])
        else:
            points = [(x + size // 2, y), (x, y + size), (x + size, y + size)]
            pen.polygon(points, fill=COLOURS[colour])
    return picture


def held_out(board):
    """One board in eight is never trained on; its content decides, so none is on both sides."""
    return hashlib.sha256(repr(board).encode()).digest()[0] % 8 == 0


def random_board(rng, test):
    """Draw boards until one falls on the wanted side of the train/test divide."""

    def cell():
        return None if rng.random() < 0.2 else (rng.choice(list(COLOURS)), rng.choice(SHAPES))

    while True:
        board = [cell() for _ in range(GRID**2)]
        if held_out(board) == test:
            return board


def count_objects(board, word, reader):
    """How many objects of a colour or shape, row by row: ("red : 1 + 2 = 3", 3)"""
    rows = []
    for i in range(0, GRID**2, GRID):
        truth = sum(c is not None and word in c for c in board[i : i + GRID])
        rows.append(reader(truth, range(GRID + 1)))
    return f"{word} : {' + '.join(map(str, rows))} = {sum(rows)}", sum(rows)


def careful(truth, _):
    """What a perfect reader reads."""
    return truth


def make_question(family, rng):
    """A question of one family -> (question, solve)

    solve(board, reader) -> (chain of thought, answer), or None where the board has no answer. The
    reader is asked for every fact that is read off the picture, reader(truth, possible values);
    arithmetic is always right.
    """
    if family == "count":
        word = rng.choice([*COLOURS, *SHAPES])
        plural = word + "s" if word in SHAPES else f"{word} objects"

        def solve(board, reader=careful):
            thought, total = count_objects(board, word, reader)
            return thought, str(total)

        return f"how many {plural} are there ?", solve
    if family == "where":
        i, what = rng.randrange(GRID**2), rng.choice(["colour", "shape"])

        def solve(board, reader=careful):
            if board[i]:
                cell = reader(board[i][0], list(COLOURS)), reader(board[i][1], SHAPES)
                return f"{CELL_NAMES[i]} : {' '.join(cell)}", cell[what == "shape"]

        return f"what {what} is at {CELL_NAMES[i]} ?", solve
    a, b = rng.sample(list(COLOURS), 2)
    if family == "compare":

        def solve(board, reader=careful):
            (left, x), (right, y) = count_objects(board, a, reader), count_objects(board, b, reader)
            sign = ">" if x > y else "<" if x < y else "same"
            return f"{left} ; {right} ; {x} {sign} {y}", a if x > y else b if x < y else "same"

        return f"are there more {a} or more {b} objects ?", solve

    def solve(board, reader=careful):
        (left, x), (right, y) = count_objects(board, a, reader), count_objects(board, b, reader)
        return f"{left} ; {right} ; {x} + {y} = {x + y}", str(x + y)

    return f"how many {a} and {b} objects are there together ?", solve


def describe(board):
    """Every cell in reading order: the dense supervision that teaches a small tower to see."""
    cells = zip(CELL_NAMES, board)
    return " , ".join(f"{name} : {' '.join(cell) if cell else 'none'}" for name, cell in cells)


def respond(thought, answer):
    """A response in the form that the reward wants."""
    return f"<think> {thought} </think> \\boxed{{ {answer} }}"


# ------------------------------------------------------------------------------------- examples


def make(seed, split, index, hint_right=0.5):
    """-> (Example, the response of a perfect policy, the board): a pure function."""
    rng = random.Random(f"{seed}/{'vision' if split == 'blind' else split}/{index}")
    test = split != "train"
    family = QUESTIONS[index % len(QUESTIONS)]
    while True:
        question, solve = make_question(family, rng)
        board, others = random_board(rng, test), [random_board(rng, test) for _ in range(8)]
        # Hints come from other pictures, so that they follow the answer's own distribution.
        solved, hints = solve(board), [s[1] for s in map(solve, others) if s]
        wrong = [h for h in hints if solved and h != solved[1]]
        if solved and wrong:
            break
    thought, answer = solved
    if split in ("train", "general"):
        hint = answer if rng.random() < hint_right else wrong[0]
    else:
        hint = hints[0]
    picture = draw_board(board, rng)
    if split == "blind":
        picture = Image.new("RGB", picture.size)
    example = Example(
        id=f"{split}-{index}",
        problem=f"<image> a friend says {hint} . {question}",
        answer=answer,
        images=[picture],
        seconds={"contrast": [draw_board(others[0], rng)]},
        tags={"family": family, "hint": hint, "hint_right": hint == answer},
    )
    response = respond(thought, answer)
    example.turns = [("user", example.problem), ("assistant", response)]
    return example, response, board


class ToyData:
    """`size` examples of one split, made on demand."""

    def __init__(self, split, size, seed=0, hint_right=0.5):
        self.split, self.size, self.seed, self.hint_right = split, size, seed, hint_right

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return make(self.seed, self.split, index, self.hint_right)[0]


def open_toy(split, size, seed, cfg):
    """The toy as plumbing.data.sources.load opens it."""
    return ToyData(split, size, seed, cfg.hint_right)


DATA_SETS["toy"] = DataSet(open_toy, SPLITS, validation="val")


if __name__ == "__main__":
    p = Parser(__doc__)
    p.add_argument("n", nargs="?", default=4, type=int, help="so many questions are printed")
    for i in range(p.parse_args().n):
        example, response, _ = make(0, "train", i)
        print(f"{example.problem}\n    {response}")
