"""From picture files to the engine, timed: each picture decoded and processed once, ahead of time,
against the earlier way.

    python bench/pipeline.py                                     # a minute on one core
    python bench/pipeline.py --out results/pipeline.json         # and keep the line of JSON

`before`: a round's pictures are read, turned from pixels back into pictures, and processed again by
the engine's own preprocessing, while a GPU waits. `after`: the next round is read by a thread while
the engine generates; then the pixels are handed over as they are. Generation is taken to last until
the thread is done. What both ways share (the chat template, token ids) is in both figures; what an
engine does with its input afterwards is in neither.

Figures are milliseconds a picture of one thread's CPU time, which a busy machine changes little.
Rounds of both kinds take turns on the same pictures, and a ratio is that of two rounds that follow
each other. Prints a table and one line of JSON.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import time
from concurrent.futures import wait
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plumbing.common import write_atomically  # noqa: E402
from plumbing.config import Config  # noqa: E402
from plumbing.data import Example, Stream  # noqa: E402
from plumbing.engine import name_of_picture  # noqa: E402
from plumbing.families import (  # noqa: E402
    encode_pictures,
    image_processor_class,
    to_picture,
)
from plumbing.policy import DTYPES  # noqa: E402
from toy.model import processor, tokenizer  # noqa: E402
from toy.task import ToyData  # noqa: E402

STEPS = ["read", "back", "again", "hand over"]


class Times:
    """Milliseconds of this thread's CPU time by step: `with times("read"): ...`"""

    def __init__(self):
        self.by_step = dict.fromkeys(STEPS, 0.0)

    @contextlib.contextmanager
    def __call__(self, step):
        began = time.thread_time()
        yield
        self.by_step[step] += 1000 * (time.thread_time() - began)


def photographs(n, width, height):
    """n examples with a smooth picture each, as the bytes of a JPEG file."""
    examples = []
    for i in range(n):
        noise = torch.randint(256, (12, 16, 3), generator=torch.Generator().manual_seed(i))
        picture = Image.fromarray(noise.to(torch.uint8).numpy()).resize((width, height))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        examples.append(Example(str(i), "<image> how many are there ?", "3", [file.getvalue()]))
    return examples


def before(stream, now, times):
    """The earlier way, for one round of positions."""
    with times("read"):
        prompts = stream.read(now)
    image_processor = stream.image_processor
    for prompt in prompts.values():
        with times("back"):
            shown = to_picture(prompt.pixels, prompt.grid[0], image_processor)
            picture = Image.fromarray(shown.numpy())
        with times("again"):
            encode_pictures([picture], image_processor)


def after(stream, now, later, dtype, times):
    """The present way: `now` has been promised, and `later` is what to read meanwhile."""
    with times("read"):
        prompts = stream.read(now, later)
    for prompt in prompts.values():
        with times("hand over"):
            name_of_picture(prompt.pixels.to(dtype), prompt.grid[0].tolist())
    wait(stream.ahead.promised.values())  # the engine generates


def measure(examples, processors, dtype, rounds):
    """-> {step: ms a picture, "waits before", "waits after", and lists of ratios}"""
    n, (tok, image_processor) = len(examples), processors
    streams = [Stream(examples, 1, tok, image_processor) for _ in range(2)]
    old, new = [], []
    for r in range(rounds + 1):  # the first round warms up, and has nothing read ahead
        now, later = (range(i * n, (i + 1) * n) for i in (r, r + 1))
        for known in (old, new):
            known.append(Times())
        before(streams[0], now, old[-1])
        after(streams[1], now, later, dtype, new[-1])
    old, new = old[1:], new[1:]

    def middle(times, step):
        return statistics.median(t.by_step[step] for t in times) / n

    waits = [[sum(t.by_step.values()) for t in times] for times in (old, new)]
    work = [a.by_step["read"] + b.by_step["hand over"] for a, b in zip(old, new)]
    return {
        **{step: middle(old, step) for step in STEPS[:3]},
        "hand over": middle(new, "hand over"),
        "waits before": statistics.median(waits[0]) / n,
        "waits after": statistics.median(waits[1]) / n,
        "ratios of waiting": [a / b for a, b in zip(*waits)],
        "ratios of work": [a / b for a, b in zip(waits[0], work)],
    }


def kinds(pictures):
    """{name: (examples, image processor, type that the engine is given)}"""
    toy = ToyData("train", pictures)
    large = image_processor_class()(min_pixels=Config.min_pixels, max_pixels=Config.max_pixels)
    return {
        "toy, 56 x 56": ([toy[i] for i in range(pictures)], processor(), DTYPES["float32"]),
        "JPEG, 640 x 480": (photographs(pictures, 640, 480), large, DTYPES[Config.dtype]),
    }


def main():
    """Measure both kinds of pictures, and print."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--pictures", type=int, default=8, help="a round")
    p.add_argument("--rounds", type=int, default=7, help="timed rounds of each way")
    p.add_argument("--out", type=Path, help="a file for the line of JSON")
    args = p.parse_args()
    torch.set_num_threads(1)
    tok, report = tokenizer(), {"pictures": args.pictures, "rounds": args.rounds}
    for name, (examples, image_processor, dtype) in kinds(args.pictures).items():
        report[name] = measure(examples, (tok, image_processor), dtype, args.rounds)
    columns = [*STEPS, "waits before", "waits after"]
    print(f"{'ms a picture':<18}" + "".join(f"{c:>14}" for c in columns))
    for name in (k for k in report if isinstance(report[k], dict)):
        print(f"{name:<18}" + "".join(f"{report[name][c]:>14.2f}" for c in columns))
        for what in ("waiting", "work"):
            ratios = report[name][f"ratios of {what}"]
            span = f"{min(ratios):.1f} .. {max(ratios):.1f}"
            print(f"    {what}, before / after: {statistics.median(ratios):.1f} ({span})")
    line = json.dumps(report)
    print(line)
    if args.out:
        write_atomically(args.out, line + "\n")


if __name__ == "__main__":
    main()
