"""Triplets for one's own data: the columns `positive` and `negative` for fine_r1/tapo.py.

    python -m fine_r1.triplets birds@train --out birds_tapo.parquet
    python -m fine_r1.triplets birds@test --out birds_4.parquet --unseen 10 --options 4

DATA is a fine-grained classification set: one picture a row, the answer is its class. A row gets

    positive   another picture of its own class, drawn at random
    negative   a picture, drawn at random, of the class that is most easily taken for its own

Which class is taken for class a is what a DINOv2 says. The paper (arXiv 2602.07605) names no
encoder and comes without code for this; the mean over a class is this project's choice too:

    argmax over b != a of cos(m_a, m_b),   m_c = mean of the features of the pictures of class c
"""

import hashlib
from functools import partial
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import torch
from PIL import Image

from plumbing.base.common import Parser, fail, first_line, generator, may_write
from plumbing.base.console import track
from plumbing.data.pictures import original_bytes, rgb
from plumbing.data.schemas import lettered, problem_of
from plumbing.data.sources import COLUMNS, Rows, left_out, opened
from plumbing.models.saliency import normalised

TOGETHER = 32  # pictures that are encoded, and rows that are written, at once
ASK = "\n\nIt is one of these; answer with its name:"


def load_encoder(name, device, kind=""):
    """An encoder of transformers, for inference. Ends with a sentence if it cannot be loaded, or is
    not of this kind."""
    from transformers import AutoConfig, AutoModel

    load, about = AutoModel.from_pretrained, dict(output_loading_info=True)
    try:
        if not (found := AutoConfig.from_pretrained(name).model_type).startswith(kind.lower()):
            raise ValueError(f"it is a {found}, and no {kind}")
        model, found = load(name, dtype=torch.float32, **about)
        if found["missing_keys"]:  # transformers would draw them at random
            raise ValueError(f"it lacks {len(found['missing_keys'])} weights")
    except Exception as error:  # of many kinds, depending on what is wrong with which file
        fail(f"--encoder {name} cannot be loaded ({first_line(error)})")
    return model.eval().to(device)


class Dino:
    """Features of DINOv2: its output for CLS. The whole picture is resized to a square of 16 x 16
    patches, and nothing is cropped, since what tells two classes apart may stand at the edge."""

    def __init__(self, name, device):
        self.model = load_encoder(name, device, "DINOv2")
        self.size = (16 * self.model.config.patch_size,) * 2

    def read(self, picture):
        """An RGB picture -> (3, S, S)"""
        x = np.array(picture.resize(self.size, Image.Resampling.BICUBIC))  # (S, S, 3)
        return normalised(torch.from_numpy(x).permute(2, 0, 1) / 255)

    @torch.no_grad()
    def __call__(self, batch):
        """What `read` has read, n of them -> (n, D)"""
        return self.model(torch.stack(batch).to(self.model.device)).last_hidden_state[:, 0].cpu()


def labelled(example):
    """An Example -> (class, picture). Raises ValueError if it has not one of each."""
    if not example.answer.strip():
        raise ValueError("the answer is empty")
    if len(example.images) != 1:
        raise ValueError(f"{len(example.images)} pictures; a row of triplets has one")
    return example.answer.strip(), example.images[0]


def survey(data, encoder):
    """Read every row once -> (rows, pools, means, faults)

    rows {row: (class, digest of its picture)}; pools {class: {digest: row}}, a row for each picture
    that differs; means {class: (D,)} of these; faults {row: why it cannot be used}
    """
    rows, pools, sums, faults = {}, {}, {}, {}
    title, unit = f"encoding {data.name}", f"x {TOGETHER} rows"
    for start in track(range(0, len(data), TOGETHER), title, unit):
        new = []
        for row in range(start, min(start + TOGETHER, len(data))):
            try:
                name, picture = labelled(data[row])
                read = encoder.read(rgb(picture))
            except ValueError as error:
                faults[row] = str(error)
                continue
            digest = hashlib.sha256(original_bytes(picture)).hexdigest()
            rows[row] = name, digest
            if digest not in pools.setdefault(name, {}):
                pools[name][digest] = row
                new.append((name, read))
        features = encoder([read for _, read in new]) if new else ()
        for (name, _), feature in zip(new, features):
            sums[name] = sums.get(name, 0) + feature
    return rows, pools, {name: x / len(pools[name]) for name, x in sums.items()}, faults


def look_alikes(means, k):
    """{class: mean feature} -> {class: [(another class, cosine)], the k most alike, best first}"""
    names = list(means)
    m = torch.nn.functional.normalize(torch.stack(list(means.values())), dim=-1)  # (C, D)
    values, places = (m @ m.T).fill_diagonal_(-2).topk(k)  # -2: no class is its own look-alike
    pairs = zip(names, places.tolist(), values.tolist())
    return {name: [(names[j], v) for j, v in zip(js, vs)] for name, js, vs in pairs}


def another(pool, digest, *seeds):
    """A random row of a pool whose picture is not that of `digest`; None if there is none."""
    others = [row for other, row in pool.items() if other != digest]
    return others[torch.randint(len(others), (), generator=generator(*seeds))] if others else None


def with_options(problem, classes, *seeds):
    """The problem with these classes to choose from, in a random order. In the files released with
    Fine-R1 the truth is always the first: a policy that answers A looks like an expert."""
    order = torch.randperm(len(classes), generator=generator(*seeds)).tolist()
    return "\n".join([problem + ASK, *lettered(classes[i] for i in order)])


def new_columns(data, row, found, args):
    """The columns of a row that are new, its own picture as bytes too, so that the file can be
    moved. found: (rows, pools, near) of survey and look_alikes"""
    rows, pools, near = found
    name, digest = rows[row]
    others, (problem, _, images) = [other for other, _ in near[name]], data.columns

    def cell(row):
        if row is not None:
            _, picture = labelled(data[row])
            path = picture.get("path") if isinstance(picture, dict) else None
            return {"bytes": original_bytes(picture), "path": path}

    new = {images: [cell(row)]}
    new["positive"] = cell(another(pools[name], digest, args.seed, "positive", row))
    new["negative"] = cell(another(pools[others[0]], digest, args.seed, "negative", row))
    if args.options:
        text = problem_of(data.rows[row][problem])
        new[problem] = with_options(text, [name, *others], args.seed, "options", row)
    return new


def write_triplets(data, found, out, args):
    """All rows of `found` to the file `out`, with their other columns as they are, or no file."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, List, Value
    from datasets import Image as Picture

    features = Features(data.rows.features | {"positive": Picture(), "negative": Picture()})
    features[data.columns[2]] = List(Picture())
    if args.options:
        features[data.columns[0]] = Value("string")
    beside, schema, kept = out.with_name(f".{out.name}"), features.arrow_schema, list(found[0])
    table = data.rows.with_format("arrow")  # nothing is decoded
    with pq.ParquetWriter(beside, schema) as file:
        for start in track(range(0, len(kept), TOGETHER), "writing", f"x {TOGETHER} rows"):
            part = kept[start : start + TOGETHER]
            new = [new_columns(data, row, found, args) for row in part]
            old = dict(zip(table.column_names, table[part].columns))
            columns = old | {c: [x[c] for x in new] for c in new[0]}
            file.write_table(pa.table(columns, schema=schema))
    beside.rename(out)


def tell_classes(found, out):
    """Say which class is taken for which, the most alike first, and which have no positive."""
    rows, pools, near = found
    print(f"written: {out}; the cosine of each class with the one most easily taken for it:")
    for name, [(other, cosine), *_] in sorted(near.items(), key=lambda pair: -pair[1][0][1]):
        print(f"{cosine:.4f}  {name} with {other}")
    if alone := [name for name, _ in rows.values() if len(pools[name]) == 1]:
        told = ", ".join(sorted(set(alone)))
        print(f"rows without a positive, their class having one picture: {len(alone)} ({told})")


def check_classes(classes, args):
    """Ends with a sentence if there are too few classes."""
    if len(classes) < 2:
        fail(f"{args.data} has one class only, {next(iter(classes), '')}: it has no negatives")
    n, unseen = len(classes), args.unseen
    if unseen and not 2 <= unseen <= n - 2:
        fail(f"--unseen {unseen} of {n} classes: 2 or more have to be unseen, and 2 or more seen")
    most = min(unseen or n, n - unseen, len(ascii_uppercase))  # classes of a file, and letters
    if args.options is not None and not 2 <= args.options <= most:
        fail(f"--options {args.options}: from 2 to {most}, for so many classes")


def main():
    """Look at every picture, draw, write, and say which class is taken for which."""
    p = Parser(__doc__)
    add = p.add_argument
    add("data", metavar="DATA", help="a hub name, a file or a folder; @split at its end")
    add("--out", required=True, type=Path, help="the parquet file to write")
    add("--encoder", default="facebook/dinov2-base", help="a DINOv2: folder or hub name")
    add("--options", type=int, help="add so many classes to choose from to the problem")
    add("--unseen", type=int, default=0, help="keep so many classes for a file of their own")
    add("--seed", type=int, default=1, help="seed of every random draw")
    add("--columns", default=",".join(COLUMNS), help="of DATA: problem, answer and pictures")
    args = p.parse_args()
    data = opened(args.data, partial(Rows, args.data, "train", args.columns.split(",")))
    if args.out.suffix != ".parquet":
        fail(f"--out {args.out}: give a name that ends in .parquet")
    may_write(args.out.parent)
    if args.options is not None and data.chat:
        fail(f"--options adds to a column of problems; {args.data} has {data.chat} instead")
    check_classes({text[1].strip() for text in data.texts() if text} - {""}, args)
    encoder = Dino(args.encoder, "cuda" if torch.cuda.is_available() else "cpu")
    rows, pools, means, faults = survey(data, encoder)
    left_out(args.out.parent, data, faults)
    check_classes(pools, args)
    # By a number that comes from a class's name: another split has the same unseen ones.
    numbers = {name: generator(args.seed, "unseen", name).initial_seed() for name in pools}
    unseen = set(sorted(pools, key=numbers.get)[: args.unseen])
    files = {args.out: [name for name in pools if name not in unseen]}
    if unseen:
        files[args.out.with_name(f"{args.out.stem}_unseen.parquet")] = sorted(unseen)
    for out, classes in files.items():
        near = look_alikes({name: means[name] for name in classes}, (args.options or 2) - 1)
        own = {row: value for row, value in rows.items() if value[0] in near}
        found = own, {name: pools[name] for name in near}, near
        write_triplets(data, found, out, args)
        tell_classes(found, out)


if __name__ == "__main__":
    main()
