"""Triplets for one's own data: the columns `positive` and `negative` for --algo tapo.

    python -m plumbing.triplets birds.parquet --out birds_tapo.parquet
    python -m plumbing.triplets birds@train --out birds_4.parquet --options 4 --encoder MODEL
    python -m plumbing.triplets birds@train --out birds_tapo.parquet --unseen 10

DATA is a fine-grained classification set: one picture a row, the answer is its class. A row gets

    positive   another picture of its own class, drawn at random
    negative   a picture, drawn at random, of the class that is most easily taken for its own

(Fine-R1, arXiv 2602.07605). Which class is taken for class a is what an encoder says:

    argmax over b != a of cos(m_a, m_b),   m_c = mean of the features of the pictures of class c

The paper does not say which encoder was used, and its code for this was not released. So both the
encoder and the mean over a class are choices of this project.

With --unseen N the rows of N classes go to a second file, birds_tapo_unseen.parquet, and the first
shows nothing of them. Each of the two is made as if its classes were all that there are.
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from string import ascii_uppercase

import torch

from plumbing.common import Parser, fail, generator, may_write, write_atomically
from plumbing.console import track
from plumbing.encoders import encoder_of
from plumbing.pictures import original_bytes, rgb
from plumbing.schemas import problem_of
from plumbing.sources import COLUMNS, Rows, left_out, opened

AT_ONCE = 32  # pictures that are encoded, and rows that are written, together
ASK = "\n\nIt is one of these; answer with its name:"


def labelled(example):
    """An Example -> (class, picture). Raises ValueError if it has not one of each."""
    if not example.answer.strip():
        raise ValueError("the answer is empty")
    if len(example.images) != 1:
        raise ValueError(f"{len(example.images)} pictures; a row of triplets has one")
    return example.answer.strip(), example.images[0]


@torch.no_grad()
def look(data, encoder):
    """Read every row once -> (rows, pools, means, faults)

    rows {row: (class, digest of its picture)}; pools {class: {digest: row}}, a row for each picture
    that differs; means {class: (D,)} of these; faults {row: why it cannot be used}
    """
    rows, pools, sums, faults = {}, {}, {}, {}
    title, unit = f"encoding {data.name}", f"x {AT_ONCE} rows"
    for start in track(range(0, len(data), AT_ONCE), title, unit):
        new = []
        for row in range(start, min(start + AT_ONCE, len(data))):
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
        features = encoder([read for _, read in new]).float().cpu() if new else ()
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


def draw(pool, digest, *name):
    """A row of a pool, drawn under a name, whose picture is not that of `digest`; None if there is
    none."""
    others = [row for other, row in pool.items() if other != digest]
    return others[torch.randint(len(others), (), generator=generator(*name))] if others else None


def unseen_of(classes, args):
    """--unseen N classes, a set: those with the smallest of the numbers that are drawn for each
    class under its name. So two splits with the same classes have the same unseen ones."""

    def number(name):
        draw = generator(args.seed, "unseen", name)
        return torch.rand((), generator=draw, dtype=torch.float64).item()

    return set(sorted(classes, key=number)[: args.unseen])


def with_options(problem, classes, *name):
    """The problem with these classes to choose from, in an order drawn under a name.

    In the files released with Fine-R1 the truth is always the first of them, so that a policy that
    has learned to answer A looks like an expert.
    """
    order = torch.randperm(len(classes), generator=generator(*name)).tolist()
    lines = [f"{letter}. {classes[i]}" for letter, i in zip(ascii_uppercase, order)]
    return "\n".join([problem + ASK, *lines])


def triplet(data, row, found, args):
    """The columns of a row that are new. found: (rows, pools, near) of look and look_alikes

    The row's own picture is among them, as bytes too, so that the file can be moved.
    """
    rows, pools, near = found
    name, digest = rows[row]
    others, (problem, _, images) = [other for other, _ in near[name]], data.columns

    def picture(row):
        if row is not None:
            _, picture = labelled(data[row])
            path = picture.get("path") if isinstance(picture, dict) else None
            return {"bytes": original_bytes(picture), "path": path}

    new = {images: [picture(row)]}
    new["positive"] = picture(draw(pools[name], digest, args.seed, "positive", row))
    new["negative"] = picture(draw(pools[others[0]], digest, args.seed, "negative", row))
    if args.options:
        text = problem_of(data.rows[row][problem])
        new[problem] = with_options(text, [name, *others], args.seed, "options", row)
    return new


def write(data, found, out, args):
    """Write all rows of `found` to the file `out`, with their other columns as they are, or no
    file."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image, List, Value

    features = Features(data.rows.features | {"positive": Image(), "negative": Image()})
    features[data.columns[2]] = List(Image())
    if args.options:
        features[data.columns[0]] = Value("string")
    table, beside = data.rows.with_format("arrow"), out.with_name(f".{out.name}")
    schema, kept = features.arrow_schema, list(found[0])
    with pq.ParquetWriter(beside, schema) as file:
        for start in track(range(0, len(kept), AT_ONCE), "writing", f"x {AT_ONCE} rows"):
            part = kept[start : start + AT_ONCE]
            new = [triplet(data, row, found, args) for row in part]
            old = table[part]
            columns = {c: old[c] for c in old.column_names}
            columns |= {c: [x[c] for x in new] for c in new[0]}
            file.write_table(pa.table(columns, schema=schema))
    beside.rename(out)


def report(found, out, args):
    """Say which class is taken for which: the first lines as a table, all in a JSON file."""
    (rows, pools, near), file = found, out.with_suffix(".json")
    counts = dict.fromkeys(pools, 0)
    for name, _ in rows.values():
        counts[name] += 1
    classes = [
        {"class": name, "rows": counts[name], "look_alike": other, "cosine": cosine}
        for name, [(other, cosine), *_] in sorted(near.items(), key=lambda x: -x[1][0][1])
    ]
    told = {k: getattr(args, k) for k in ("data", "encoder", "options", "unseen", "seed")}
    told["classes"] = classes
    write_atomically(file, json.dumps(told, indent=1, ensure_ascii=False))
    print(f"{'class':<30}{'rows':>6}  {'most easily taken for':<30}{'cosine':>8}")
    for c in classes[:20]:
        print(f"{c['class']:<30}{c['rows']:>6}  {c['look_alike']:<30}{c['cosine']:>8.4f}")
    if alone := [name for name, pool in pools.items() if len(pool) == 1]:
        n = sum(counts[name] for name in alone)
        print(f"rows without a positive, their class having one picture: {n} ({', '.join(alone)})")
    print(f"written: {out}, and all {len(classes)} classes as above in {file}")


def enough(classes, args):
    """Ends with a sentence if there are too few classes."""
    if len(classes) < 2:
        fail(f"{args.data} has one class only, {next(iter(classes), '')}: it has no negatives")
    n, unseen = len(classes), args.unseen
    if unseen and not 2 <= unseen <= n - 2:
        fail(f"--unseen {unseen} of {n} classes: 2 or more have to be unseen, and 2 or more seen")
    fewest = min(unseen or n, n - unseen)  # in one of the files
    most = min(fewest, len(ascii_uppercase))
    if args.options is not None and not 2 <= args.options <= most:
        fail(f"--options {args.options}: from 2 to {most}, for {fewest} classes and 26 letters")


def check(data, args):
    """Ends with a sentence for what cannot be done, before an encoder is loaded."""
    if args.out.suffix != ".parquet":
        fail(f"--out {args.out}: give a name that ends in .parquet")
    may_write(args.out.parent)
    if args.options is not None and data.chat:
        fail(f"--options adds to a column of problems; {args.data} has {data.chat} instead")
    enough({text[1].strip() for text in data.texts() if text} - {""}, args)


def parser():
    """The command line."""
    p = Parser(__doc__)
    add = p.add_argument
    add("data", metavar="DATA", help="a hub name, a file or a folder; @split at its end")
    add("--out", required=True, type=Path, help="the parquet file to write")
    add("--encoder", default="facebook/dinov2-base", help="a DINOv2 or Qwen-VL: folder or hub name")
    add("--options", type=int, help="add so many classes to choose from to the problem")
    add("--unseen", type=int, default=0, help="keep so many classes for a file of their own")
    add("--seed", type=int, default=1, help="seed of every random draw")
    for name in COLUMNS:
        add(f"--{name}_column", default=name, help=f"the column of DATA with the {name}")
    return p


def main():
    """Look at every picture, draw, write, and say which class is taken for which."""
    args = parser().parse_args()
    columns = tuple(getattr(args, f"{name}_column") for name in COLUMNS)
    data = opened(args.data, partial(Rows, args.data, "train", columns))
    check(data, args)
    encoder = encoder_of(args.encoder, "cuda" if torch.cuda.is_available() else "cpu")
    rows, pools, means, faults = look(data, encoder)
    left_out(args.out.parent, data, faults, False)
    enough(pools, args)
    unseen = unseen_of(pools, args)
    files = {args.out: [name for name in pools if name not in unseen]}
    if unseen:
        files[args.out.with_name(f"{args.out.stem}_unseen.parquet")] = sorted(unseen)
    for out, classes in files.items():
        near = look_alikes({name: means[name] for name in classes}, (args.options or 2) - 1)
        own = {row: value for row, value in rows.items() if value[0] in near}
        found = own, {name: pools[name] for name in near}, near
        write(data, found, out, args)
        report(found, out, args)


if __name__ == "__main__":
    main()
