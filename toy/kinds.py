"""Fine-R1's two stages in minutes: a base model that names birds in haste, and files to mend it.

The base was taught by somebody careless, so it does two things. At times it looks for the crest
that tells a bird from those like it (toy/birds.py); at times it sees the family and names one of
its birds. It knows better than it does. That is the disease which Fine-R1 (arXiv 2602.07605)
treats: first a few chains of thought show how to go about it, the details, the candidates, which
one it is; then TAPO asks the same of another picture of the kind, where the answer must stay, and
of one of the kind most easily taken for it, where the answer must go.

    python -m toy.kinds out/kinds                                  # the base model and the files
    torchrun sft.py --model out/kinds/base --data out/kinds/sft.parquet --out out/kinds-sft \\
        --prompts_per_update 8 --lr 3e-5
    torchrun train.py --algo tapo --model out/kinds-sft/checkpoint-20 --out out/kinds-tapo \\
        --data out/kinds/train.parquet --val_data out/kinds/val.parquet
    python eval.py --model out/kinds-tapo/checkpoint-30 --n 4 --data \\
        out/kinds/test_seen_open.parquet,out/kinds/test_unseen_open.parquet

The base is a folder like any downloaded model, so nothing that loads a model has to know of it. One
kind of each family is in the `unseen` files only. The base has met it, as a large model has met
most birds before it is fine-tuned. In the files released with Fine-R1 the right option is always
the first; here options are shuffled.
"""

import io
import random
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import sft
from plumbing.common import Parser, may_write
from plumbing.console import Bar
from plumbing.conversations import by_prompt, encode_conversation, pieces
from plumbing.data import IMAGE, Example
from plumbing.optimiser import Optimiser
from plumbing.policy import Policy
from plumbing.processes import Processes
from plumbing.supervised import SftConfig
from reward import TAGGED
from toy.birds import (
    DESCRIBE,
    FORMS,
    KINDS,
    OPEN,
    alike,
    closed,
    draw,
    look_of,
    picture,
    respond,
    think,
    words,
)
from toy.lessons import cached, recipe, schedule
from toy.model import new_policy, processor, tokenizer

# ---------------------------------------------------------------------------------- the base model

TURNS = ("user", "assistant")


class Teacher(NamedTuple):
    """Who answers in a lesson."""

    skips: float = 0.0  # how often a kind of the family is named at random, without the crest
    misreads: float = 0.0  # how often, otherwise, another crest is written


CARELESS = Teacher(skips=0.4, misreads=0.3)  # what it does wrong is there to be mended
STEPS, PICTURES = 320, 16
# What the base depends on, and is named after in the cache.
FILES = ("kinds.py", "birds.py", "model.py", "lessons.py")
READERS = (sft.pack, by_prompt, pieces, encode_conversation)


def answer(kind, rng, teacher, instruction):
    """How a teacher answers what bird this is."""
    looks = rng.random() >= teacher.skips
    if not looks:
        kind = rng.choice([kind, *alike(kind)])
    elif rng.random() < teacher.misreads:
        kind = rng.choice(alike(kind))
    return respond(think(kind, looks), kind.name, instruction)


def lessons(index, teacher):
    """Lessons on one picture -> [Example with turns]. A teacher of None only describes it, which is
    how a small tower learns to see, and says in words which bird looks how."""
    rng = random.Random(f"lesson/{index}")
    kind = rng.choice(list(KINDS.values()))
    shown, ground = draw(kind, rng)
    said = [
        (f"{IMAGE} {DESCRIBE}", f"{ground} ; {look_of(kind)}"),
        (f"what bird is {look_of(kind)} ?", kind.name),
        (f"how does a {kind.name} look ?", look_of(kind)),
    ]
    del said[1 + index % 2]
    if teacher:
        question, instruction = rng.choice([OPEN, closed(kind, rng)]), rng.choice(list(FORMS))
        asked = f"{IMAGE} {question}{instruction}"
        said = [rng.choice(said), (asked, answer(kind, rng, teacher, instruction))]
    return [
        Example(f"lesson-{index}", q, a, [shown] * (IMAGE in q), turns=list(zip(TURNS, (q, a))))
        for q, a in said
    ]


def warm_start(vlm, processors, steps):
    """Supervised learning on all kinds, by sft.py's own step: half of the steps describe pictures,
    then all questions are answered with care, and in the last 3/10 carelessly."""
    policy = Policy(vlm, torch.zeros(len(processors[0]), dtype=torch.bool))
    careful, careless = steps // 2, steps * 7 // 10
    cfg, alone = SftConfig(lr=2e-3, weight_decay=0.01), Processes(alone=True)
    optimiser = Optimiser(policy, cfg, schedule(steps, careless), betas=(0.9, 0.98))
    with Bar("warm start of the kinds", steps, "steps") as bar:
        for step in range(steps):
            teacher = None if step < careful else Teacher() if step < careless else CARELESS
            indices = range(step * PICTURES, (step + 1) * PICTURES)
            examples = [example for i in indices for example in lessons(i, teacher)]
            learned = [encode_conversation(example, *processors) for example in examples]
            N = sum(c.scored.sum().item() for c in learned)
            loss, _, _ = sft.update([sft.pack(learned, policy)], N, policy, optimiser, alone)
            bar.update(note=f"loss {loss:.3f}")


def new_processors():
    """The tokenizer and the image processor of the base."""
    return tokenizer([*TURNS, "system", *words()]), processor()


def base(steps=STEPS):
    """The base model as a Hugging Face folder, made once and kept in a cache."""
    tok, image_processor = new_processors()
    vlm = new_policy(tok)
    key = recipe(FILES, (steps, *FORMS), vlm.config, image_processor, READERS)
    learn = partial(warm_start, vlm, (tok, image_processor), steps)
    return cached(f"kinds-{key}", (vlm, tok, image_processor), learn)


# ---------------------------------------------------------------------------------------- the files

SHOTS, TESTED = 4, 240  # pictures of a kind to train on; questions in a file to test on


def png(picture):
    """A picture as the bytes of a file."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def row(seed, split, kind, index, question=OPEN):
    """One picture and what is asked about it, as a row of a file."""
    images = [png(picture(seed, split, kind, index))]
    return {"problem": f"{IMAGE} {question}", "answer": kind.name, "images": images}


def sft_row(seed, kind):
    """A conversation to learn from: the right chain of thought for one picture."""
    asked = row(seed, "sft", kind, 0)
    turns = [asked["problem"] + TAGGED.instruction, respond(think(kind), kind.name)]
    messages = [{"role": r, "content": t} for r, t in zip(TURNS, turns)]
    return {"messages": messages, "images": asked["images"]}


def triplet(seed, kind, index):
    """A picture to train on with its two companions, of the pictures to train on: `positive`,
    another one of its kind, and `negative`, one of a kind that it is taken for."""
    other = random.Random(f"{seed}/negative/{kind.name}/{index}")
    negative = other.choice([k for k in alike(kind) if k.seen])
    return row(seed, "train", kind, index) | {
        "positive": png(picture(seed, "train", kind, (index + 1) % SHOTS)),
        "negative": png(picture(seed, "train", negative, index)),
    }


def questions(seed, split, kinds, options):
    """TESTED questions about these kinds in turn, with four options or none."""
    asked = ((i, kinds[i % len(kinds)]) for i in range(TESTED))
    rng = random.Random(f"{seed}/options/{split}")
    return [row(seed, split, k, i, closed(k, rng) if options else OPEN) for i, k in asked]


def files(seed=0):
    """{name of a file: its rows}; settings are to be chosen on `val`."""
    seen, unseen = ([k for k in KINDS.values() if k.seen == wanted] for wanted in (True, False))
    return {
        "sft": [sft_row(seed, kind) for kind in seen],
        "train": [triplet(seed, kind, i) for i in range(SHOTS) for kind in seen],
        "val": questions(seed, "val", seen, options=False),
        "test_seen_open": questions(seed, "seen", seen, options=False),
        "test_seen_closed": questions(seed, "seen", seen, options=True),
        "test_unseen_open": questions(seed, "unseen", unseen, options=False),
        "test_unseen_closed": questions(seed, "unseen", unseen, options=True),
    }


def save(file, rows):
    """Write rows as a parquet file, and say how large it is."""
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    print(f"{file}: {len(rows)} rows, {file.stat().st_size / 1e3:.0f} kB")


def write(out, steps=STEPS):
    """Write the files and the base model to a folder."""
    may_write(out)
    for name, rows in files().items():
        save(out / f"{name}.parquet", rows)
    shutil.copytree(base(steps), out / "base", dirs_exist_ok=True)
    print(f"{out / 'base'}: the model to start from")


if __name__ == "__main__":
    p = Parser(__doc__)
    p.add_argument("out", nargs="?", default="out/kinds", type=Path, help="the folder to write to")
    write(p.parse_args().out)
