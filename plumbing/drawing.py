"""What walkthrough.py and bench/heat_map.py draw with."""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

ORANGE = (1, 0.55, 0)


def show(name, folder=Path("out/walkthrough")):
    """Keep the figure that was drawn last as <folder>/<name>.png, and show it in a notebook."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.savefig(folder / f"{name}.png", dpi=80)
    if "ipykernel" in sys.modules:
        plt.show()
    plt.close()


def board(axis, picture, title="", **style):
    """One picture without axes, and a line of text above it; an empty place for None."""
    if picture is not None:
        axis.imshow(picture)
    axis.set_title(title, fontsize=8, **style)
    axis.axis("off")


def write_words(axis, x, y, words, size=9):
    """A response in a line from (x, y) on, each word as dark as plumbing.samples.words says.

    The axis has one unit for each tenth of an inch, in which a letter of size 9 is 0.92 wide.
    """
    for word, _, shade in words:
        text, box = word.strip(), dict(facecolor=(*ORANGE, shade), edgecolor="none", pad=1.2)
        axis.text(x, y, text, fontsize=size, family="monospace", bbox=box)
        x += 0.92 * size / 9 * (len(text) + 1)
