"""Which visual features a chain of thought is told of: image-level concept selection (arXiv
2602.07605, section 4.2, after arXiv 2502.14044, whose released code is followed).

A teacher lists the features of a class, and describes a picture of it in several samples. Features
are kept that these descriptions bear out, and those of other pictures do not:

    a {wren}'s features    body round red ; crest black ; tail long
    of this picture        a round red body | black crest, round | ...
    kept                   body round red ; crest black
"""

import re
from dataclasses import replace

import torch

from eval import CHUNK
from plumbing.data.prompts import IMAGE

# The prompts of the source, their meaning in our words. What is filled in stands between spaces,
# for tokenizers of whole words.
FEATURES = "List the visual features that tell a {label} from what looks like it, one a line."
VIEWS = "shape and size", "colours and markings", "parts and their details"
DESCRIBE = (
    "Describe the main object of the picture, above all its {view} : what is to be seen there, and "
    "nothing of the background."
)
TAU, LEAST = 0.1, 3  # a temperature, and how many features are kept at the least


def select(concepts, descriptions, others):
    """(Z, D), (n, D) and (m, D), features of length 1 of a class's concepts, of the descriptions of
    a picture and of those of other pictures -> which concepts are kept, best first.

    The information that concept z has about the picture is bounded from below (InfoNCE) by

        sum_d log(exp(d z / TAU) / (exp(d z / TAU) + sum_o exp(o z / TAU)))

    Kept are those above the mean by .4 standard deviations, but no fewer than LEAST.
    """
    positive, negative = concepts @ descriptions.T / TAU, concepts @ others.T / TAU
    score = (positive - positive.logaddexp(negative.logsumexp(1, keepdim=True))).sum(1)
    n = int((score > score.mean() + 0.4 * score.std(correction=min(1, len(score) - 1))).sum())
    return score.argsort(descending=True, stable=True)[: max(n, LEAST)].tolist()


def describe(examples, ask, n):
    """Yield what is said of each picture's class, and n times from each of VIEWS of the picture, as
    rows. ask(examples, n, name of the draws): yields records"""
    for start in range(0, len(examples), CHUNK):
        part = examples[start : start + CHUNK]
        rows = {e.id: {"id": e.id, "features": "", "said": []} for e in part}
        asked = [replace(e, problem=FEATURES.format(label=e.answer), images=[]) for e in part]
        for r in ask(asked, 1, "features"):
            rows[r["id"]]["features"] = r["predict"]
        for view in VIEWS:
            text = DESCRIBE.format(view=view)
            asked = [replace(e, problem=IMAGE * len(e.images) + text) for e in part]
            for r in ask(asked, n, view):
                rows[r["id"]]["said"].append(r["predict"])
        yield from rows.values()


def listed(text):
    """A list as models write one, by lines or semicolons -> its items, without what leads them"""
    items = (re.sub(r"^(\W|\d+[.)])+", "", item).strip() for item in re.split("[\n;]", text))
    return list(dict.fromkeys(filter(None, items)))


def choose(rows, encode):
    """Rows of `describe` -> {id: the features that are kept, as text}. encode([text]) -> (n, D), of
    length 1"""
    said = [(row["id"], text) for row in rows for text in row["said"]]
    classes = {row["id"]: listed(row["features"]) for row in rows}
    texts = list(dict.fromkeys([*sum(classes.values(), []), *(text for _, text in said)]))
    features, place = encode(texts), {text: k for k, text in enumerate(texts)}
    shown, chosen = features[[place[text] for _, text in said]], {}  # (descriptions of all, D)
    for name, own in classes.items():
        if own:
            mine = torch.tensor([owner == name for owner, _ in said])
            best = select(features[[place[text] for text in own]], shown[mine], shown[~mine])
            own = [own[k] for k in best]
        chosen[name] = " ; ".join(own)
    return chosen
