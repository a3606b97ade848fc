"""What walkthrough.py and bench/heat_map.py draw with."""

import sys
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt

ORANGE = (1, 0.55, 0)


def show(name, folder=Path("out/walkthrough")):
    """Keep the figure that was drawn last as <folder>/<name>.png, and show it in a notebook."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.savefig(folder / f"{name}.png", dpi=80)
    if "ipykernel" in sys.modules:
        plt.show()
    plt.close()


def board(axis, picture, title, **style):
    """One picture without axes, below lines of text; "no picture" for None."""
    if picture is None:
        axis.set_box_aspect(1)
        axis.text(0.5, 0.5, "no picture", ha="center", fontsize=8)
    else:
        axis.imshow(picture)
    lines = [fill(line, 32) for line in title.splitlines()]
    axis.set_title("\n".join(lines), fontsize=8, **style)
    axis.axis("off")


def write_words(axis, x, y, words, size=9):
    """A response in a line from (x, y) on, each word as dark as plumbing.samples.words says.

    The axis has one unit for each tenth of an inch. A letter is 0.6 of its size wide, and a point
    is 1/72 of an inch, so it takes size / 12 units.
    """
    for word, _, shade in words:
        text, box = word.strip(), dict(facecolor=(*ORANGE, shade), edgecolor="none", pad=1.2)
        axis.text(x, y, text, fontsize=size, family="monospace", bbox=box)
        x += size / 12 * len(text) + 1
