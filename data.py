"""Examples: from a name on the command line to a prompt the model can read.

    Example  what a data set holds: a problem in words with <image> placeholders, pictures, an answer
    Prompt   the same, ready for the model: token ids with image placeholders expanded, patch rows, grids

Qwen-VL turns a picture into rows of 14 x 14 patches; every 2 x 2 block of patches becomes one token of the language
model, so a picture of grid (t, h, w) occupies t * h * w / 4 placeholder tokens. We expand the placeholder here, with the
tokenizer and the image processor only, so that prompts need neither torchvision nor a video processor.
"""
import hashlib
import io
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from config import MMK12, fail

IMAGE = "<image>"
# The released template (examples/format_prompt/math_perception.jinja), its meaning in our words.
INSTRUCTION = ("\n\nThink before you answer: write your reasoning as an inner monologue between <think> and </think>, "
               "then give the final answer inside \\boxed{}.")
# The paper's nine evaluation sets: (split of PAPOGalaxy/PAPO_eval, questions, column of Table 1 that it is averaged in)
BENCHMARKS = {
    "geo3k": ("hiyouga_geometry3k", 601, "general"), "mathvista": ("AI4Math_MathVista", 1000, "general"),
    "wemath": ("We_Math", 1740, "general"), "mmk12": (None, 2000, "general"), "mathverse": ("AI4Math_MathVerse", 2180, "general"),
    "logicvista": ("lscpku_LogicVista", 447, "vision"), "counting": ("BUAADreamer_clevr_count_70k", 200, "vision"),
    "mmmu_pro": ("MMMU_MMMU_Pro", 1730, "vision"), "mathverse_v": ("AI4Math_MathVerse_vision_dependent", 1308, "vision"),
}
EVAL_HUB = "PAPOGalaxy/PAPO_eval"        # one split a set; its pictures are paths into one zip file a set


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


def open_picture(picture):
    """Bytes, {"bytes", "path"} (as parquet files hold them), a path or a PIL picture -> PIL picture, not decoded yet."""
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path")
    if not picture:
        raise OSError("there is neither bytes nor a path")
    if isinstance(picture, bytes):
        picture = io.BytesIO(picture)
    return picture if isinstance(picture, Image.Image) else Image.open(picture)


def rgb(picture):
    """Any picture that open_picture opens as RGB, of every mode.

    Turned upright if its camera said so. What is transparent becomes white, as on the page it was drawn for (dropping the alpha
    channel makes a black drawing on nothing black on black), and 16-bit grey is scaled to 8 (PIL would cut it off at 255).
    """
    picture = ImageOps.exif_transpose(open_picture(picture))
    if picture.mode.startswith("I"):                                             # I;16, or I, in which 8 bits may hide
        grey = np.asarray(picture).astype(np.float64)                            # (H, W)
        scale = 257 if picture.mode != "I" or grey.max() > 255 else 1
        picture = Image.fromarray((grey / scale).clip(0, 255).round().astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def prompt_text(example, tok, tokens):
    """The chat in which the problem is the user's turn, each picture's placeholder repeated tokens[k] times. Raises ValueError when
    placeholders and pictures disagree in number."""
    parts = example.problem.split(IMAGE)
    if len(parts) - 1 != len(example.images):
        raise ValueError(f"example {example.id}: {len(parts) - 1} {IMAGE} placeholders but {len(example.images)} pictures; "
                         "the text needs one placeholder for each picture")
    content = [{"type": "text", "text": parts[0].strip()}] if parts[0].strip() else []
    for part in parts[1:]:
        content += [{"type": "image"}] + ([{"type": "text", "text": part.strip()}] if part.strip() else [])
    text = tok.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    pieces = text.split("<|image_pad|>")
    return pieces[0] + "".join("<|image_pad|>" * n + piece for n, piece in zip(tokens, pieces[1:]))


def encode(example, tok, image_processor):
    """Example -> Prompt. Raises ValueError when placeholders and pictures disagree in number, or a picture is broken."""
    pixel_values = grid = None
    if example.images:
        try:
            out = image_processor([rgb(p) for p in example.images], return_tensors="pt")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"example {example.id}: a picture cannot be read ({str(error).splitlines()[0]})") from error
        pixel_values, grid = out["pixel_values"], out["image_grid_thw"]
    tokens = [] if grid is None else (grid.prod(-1) // image_processor.merge_size**2).tolist()
    ids = torch.tensor(tok(prompt_text(example, tok, tokens), add_special_tokens=False)["input_ids"])
    return Prompt(example, ids, pixel_values, grid)


def encode_all(examples, tok, image_processor, blind=False):
    """[Example] -> [Prompt] of those that can be read; the others are named on the console. blind: every picture is black."""
    prompts = []
    for e in examples:
        try:
            prompt = encode(e, tok, image_processor)
            prompts.append(encode(replace(e, images=[Image.new("RGB", rgb(p).size) for p in e.images]), tok, image_processor) if blind else prompt)
        except ValueError as error:
            tqdm.write(f"warning: left out: {error}")
    return prompts


class Rows:
    """A data set in the released sets' schema, read row by row from disk: columns for the problem, the answer and the pictures (as bytes,
    dicts, paths or decoded) and perhaps `contrast`; or `messages`, a user's turn and the answer. Pictures are decoded when asked for.

    name: a hub name, a parquet, JSON or JSONL file, or a folder of them; name@split overrides the split.
    root: where relative picture paths start; default: the file's own folder. called: what the set is called in ids and messages.
    """

    def __init__(self, name, split, columns=("problem", "answer", "images"), root=None, called=None):
        from datasets import Image as ImageFeature, List, load_dataset
        name, _, given = str(name).partition("@")
        path, self.name, self.columns = Path(name), called or Path(name).stem, columns
        kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in kinds) if path.is_dir() else []
        chosen = [f for f in files if f.name.startswith(given or split)]
        if given and not chosen:
            raise ValueError(f"it holds no file whose name begins with {given}")
        files = chosen or files
        if files:
            rows = load_dataset(kinds[files[0].suffix], data_files=[str(f) for f in files], split="train")
        elif path.exists():
            raise ValueError("it holds no parquet, json or jsonl file")
        else:
            rows = load_dataset(name, split=given or split)
        self.root, self.chat = Path(root) if root else path if path.is_dir() else path.parent, "messages" in rows.column_names
        missing = {columns[2], *(() if self.chat else columns[:2])} - set(rows.column_names)
        if missing:
            fail(f"{name} has no column {', '.join(sorted(missing))}; it has {', '.join(rows.column_names)} (--problem_column, "
                 "--answer_column and --images_column say which is which)")
        for column in {columns[2], "contrast"} & set(rows.column_names):
            if isinstance(getattr(rows.features[column], "feature", None), ImageFeature):
                rows = rows.cast_column(column, List(ImageFeature(decode=False)))         # the bytes as they are
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.example(index, self.rows[index])

    def example(self, index, row):
        problem, answer = (row["messages"][0]["content"], row["messages"][1]["content"]) if self.chat else (row[c] for c in self.columns[:2])
        images, contrast = (row.get(c) or [] for c in (self.columns[2], "contrast"))
        images, contrast = ([self.locate(p) for p in (x if isinstance(x, list) else [x])] for x in (images, contrast))
        return Example(f"{self.name}-{index if row.get('id') is None else row['id']}", (problem or "") + INSTRUCTION, "" if answer is None else str(answer), images, contrast)

    def locate(self, picture):
        """A relative path becomes one from root, if the file is there."""
        path = picture if isinstance(picture, str) else picture.get("path") if isinstance(picture, dict) and not picture.get("bytes") else None
        return str(self.root / path) if path and (self.root / path).exists() else picture

    def faults(self, tok, image_processor, longest, part=slice(None), progress=True):
        """{index: why a row cannot be used}, of the rows in `part`, from headers alone: no picture is decoded.

        Sizes come from the picture's header and the processor's own resizing arithmetic, so the number of prompt tokens is exact.
        """
        found, indices = {}, range(len(self.rows))[part]
        for start in tqdm(range(0, len(indices), 256), desc=f"checking {self.name}", unit="x 256 rows", disable=not progress, leave=False):
            batch, texts, known = indices[start:start + 256], [], []
            rows = self.rows[list(batch)]
            for k, index in enumerate(batch):
                example = self.example(index, {c: values[k] for c, values in rows.items()})
                try:
                    texts.append(prompt_text(example, tok, [1] * len(example.images)))
                    if not example.answer.strip():
                        raise ValueError("the answer is empty")
                    known.append((index, len(texts) - 1, sum(picture_tokens(p, image_processor) - 1 for p in example.images)))
                except ValueError as error:
                    found[index] = str(error).removeprefix(f"example {example.id}: ")
            lengths = [len(ids) for ids in tok(texts, add_special_tokens=False)["input_ids"]] if texts else []
            for index, k, more in known:
                if lengths[k] + more > longest:
                    found[index] = f"{lengths[k] + more} prompt tokens are more than --max_prompt_tokens {longest}"
        return found


def picture_tokens(picture, image_processor):
    """How many tokens of the language model a picture will take, from its header. Raises ValueError if it cannot be one."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    try:
        opened = open_picture(picture)
        width, height = opened.size
        if opened.format != "PNG" and opened.getexif().get(0x0112, 1) > 4:       # lies on its side; a PNG would be decoded to tell
            width, height = height, width
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"a picture cannot be read ({str(error).splitlines()[0]})") from error
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"a picture of {width} x {height} pixels is too large")
    block = image_processor.patch_size * image_processor.merge_size
    h, w = smart_resize(height, width, block, image_processor.size["shortest_edge"], image_processor.size["longest_edge"])
    return h * w // block**2


class Selection:
    """The rows of a data set that can be used."""

    def __init__(self, rows, faults):
        self.rows, self.kept = rows, [i for i in range(len(rows)) if i not in faults]

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, index):
        return self.rows[self.kept[index]]


def load(name, split, size, seed, columns=("problem", "answer", "images"), root=None):
    """A data set by name: anything with len() and [index] -> Example. split: train, val, or one that the data set knows.

    name: toy; one of BENCHMARKS, from the hub or from the folder `root` that the released downloader fills; or what Rows takes."""
    if name == "toy":
        from toy import ToyData
        return ToyData(split, size, seed)
    try:
        if name == "mmk12":
            return Rows(MMK12, "test", called=name)
        if name in BENCHMARKS:
            part = BENCHMARKS[name][0]
            return Rows(Path(root) / "papo" / f"{part}.json", "train", root=Path(root) / "images", called=name) if root else \
                Rows(EVAL_HUB, part, root=unzipped(f"{'We-Math_We-Math' if part == 'We_Math' else part}_images.zip"), called=name)
        return Rows(name, split, columns, root)
    except Exception as error:                               # of many kinds, depending on what is wrong with the file or the hub
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fail(f"data {name!r} cannot be read ({reason}); give a hub name, a parquet, json or jsonl file or a folder of them")


def unzipped(file):
    """Download a set's pictures from the hub and unpack them beside the download, once -> the folder."""
    import zipfile

    from huggingface_hub import hf_hub_download
    archive = Path(hf_hub_download(EVAL_HUB, file, repo_type="dataset"))
    folder = archive.parent / archive.stem
    if not folder.exists():
        making = folder.with_name(f".making-{folder.name}-{os.getpid()}")
        zipfile.ZipFile(archive).extractall(making)
        making.rename(folder)
    return folder


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
