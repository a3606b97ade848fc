"""Examples: from a name on the command line to a prompt the model can read.

    Example  what a data set holds: a problem in words with <image> placeholders, pictures, an answer
    Prompt   the same, ready for the model: token ids with image placeholders expanded, patch rows, grids

Qwen-VL turns a picture into rows of 14 x 14 patches; every 2 x 2 block of patches becomes one token of the language
model, so a picture of grid (t, h, w) occupies t * h * w / 4 placeholder tokens. We expand the placeholder here, with the
tokenizer and the image processor only, so that prompts need neither torchvision nor a video processor.
"""
import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from config import fail

IMAGE = "<image>"
# The released template (examples/format_prompt/math_perception.jinja), its meaning in our words.
INSTRUCTION = ("\n\nThink before you answer: write your reasoning as an inner monologue between <think> and </think>, "
               "then give the final answer inside \\boxed{}.")


@dataclass
class Example:
    id: str
    problem: str                             # with one <image> per picture
    answer: str
    images: list = field(default_factory=list)
    contrast: list = field(default_factory=list)      # second pictures, one for each: what --mask contrast shows instead
    tags: dict = field(default_factory=dict)  # whatever the data set knows besides, for tables


@dataclass
class Prompt:
    """One prompt as tensors. P tokens, N patches over all pictures, K pictures."""
    example: Example
    ids: torch.Tensor                        # (P,) int64, image placeholders expanded
    pixel_values: torch.Tensor | None        # (N, 3 * 2 * 14 * 14), rows in merge-block order; None without a picture
    grid: torch.Tensor | None                # (K, 3) patches along t, h, w


def generator(*name):
    """A random generator with a name: every draw of a run is derived from (seed, purpose, step, prompt), so that it
    repeats, survives a resume without any saved state, and does not depend on the number of processes."""
    digest = hashlib.sha256(repr(name).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def rgb(picture):
    """Any picture as RGB: bytes and {"bytes": ...} (as parquet files hold them), paths and PIL pictures of every mode.

    Turned upright if its camera said so. What is transparent becomes white, as on the page it was drawn for (dropping the alpha
    channel makes a black drawing on nothing black on black), and 16-bit grey is scaled to 8 (PIL would cut it off at 255).
    """
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture["path"]
    if isinstance(picture, bytes):
        picture = io.BytesIO(picture)
    if not isinstance(picture, Image.Image):
        picture = Image.open(picture)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):                                             # I;16, or I, in which 8 bits may hide
        grey = np.asarray(picture).astype(np.float64)                            # (H, W)
        scale = 257 if picture.mode != "I" or grey.max() > 255 else 1
        picture = Image.fromarray((grey / scale).clip(0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def encode(example, tok, image_processor):
    """Example -> Prompt. Raises ValueError when placeholders and pictures disagree in number, or a picture is broken."""
    parts = example.problem.split(IMAGE)
    if len(parts) - 1 != len(example.images):
        raise ValueError(f"example {example.id}: {len(parts) - 1} {IMAGE} placeholders but {len(example.images)} pictures; "
                         "the text needs one placeholder for each picture")
    content = [{"type": "text", "text": parts[0].strip()}] if parts[0].strip() else []
    for part in parts[1:]:
        content += [{"type": "image"}] + ([{"type": "text", "text": part.strip()}] if part.strip() else [])
    text = tok.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    pixel_values = grid = None
    if example.images:
        try:
            out = image_processor([rgb(p) for p in example.images], return_tensors="pt")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"example {example.id}: a picture cannot be read ({str(error).splitlines()[0]})") from error
        pixel_values, grid = out["pixel_values"], out["image_grid_thw"]
        pieces = text.split("<|image_pad|>")
        text = pieces[0]
        for thw, piece in zip(grid, pieces[1:]):
            text += "<|image_pad|>" * int(thw.prod() // image_processor.merge_size**2) + piece
    ids = torch.tensor(tok(text, add_special_tokens=False)["input_ids"])
    return Prompt(example, ids, pixel_values, grid)


class HubData:
    """A data set with `problem`, `answer`, `images` and perhaps `contrast` columns, read row by row; pictures are decoded when asked for."""

    def __init__(self, name, split):
        from datasets import load_dataset
        path = Path(name)
        if path.suffix in (".parquet", ".json", ".jsonl"):
            rows = load_dataset("parquet" if path.suffix == ".parquet" else "json", data_files=str(path), split="train")
        else:
            rows = load_dataset(name, split=split)
        missing = {"problem", "answer", "images"} - set(rows.column_names)
        if missing:
            fail(f"{name} has no column {', '.join(sorted(missing))}; it has {', '.join(rows.column_names)}")
        self.rows, self.name = rows, name

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return Example(f"{self.name}-{index}", row["problem"] + INSTRUCTION, str(row["answer"]), list(row["images"] or []),
                       list(row.get("contrast") or []))


def load(name, split, size, seed):
    """A data set by name: anything with len() and [index] -> Example. split: train, val, or one that the data set knows."""
    if name == "toy":
        from toy import ToyData
        return ToyData(split, size, seed)
    try:
        return HubData(name, split)
    except (FileNotFoundError, ValueError, ConnectionError, OSError) as error:
        fail(f"data {name!r} cannot be read ({str(error).splitlines()[0]}); give a hub name, a parquet, json or jsonl file")


class Stream:
    """The endless stream of training prompts: stream[position] -> Prompt. Epochs are shuffles named by (seed, epoch)."""

    def __init__(self, examples, cfg, tok, image_processor):
        self.examples, self.cfg, self.tok, self.image_processor = examples, cfg, tok, image_processor
        self.epoch, self.order = None, None

    def __getitem__(self, position):
        epoch, i = divmod(position, len(self.examples))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, torch.randperm(len(self.examples), generator=generator(self.cfg.seed, "shuffle", epoch))
        return encode(self.examples[int(self.order[i])], self.tok, self.image_processor)
