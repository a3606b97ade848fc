"""Data sets by name: those that are made, files on disk, the hub, the paper's benchmarks. A row on
disk that belongs to another split is never read."""

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Subset

from plumbing.base.common import fail, make_once, write_atomically
from plumbing.base.console import doing, fetching, say, track
from plumbing.data import schemas
from plumbing.data.pictures import original_bytes, tokens_from_header
from plumbing.data.prompts import IMAGE, Example, prompt_text, second_pictures

VIRL39K, MMK12 = "PAPOGalaxy/PAPO_ViRL39K_train", "PAPOGalaxy/PAPO_MMK12_test"
EVAL_HUB = "PAPOGalaxy/PAPO_eval"  # one split a set; its pictures are paths into one zip file a set
# The paper's nine evaluation sets: the split of EVAL_HUB, the number of questions, and the column
# of Table 1 that the set is averaged in.
BENCHMARKS = {
    "geo3k": ("hiyouga_geometry3k", 601, "general"),
    "mathvista": ("AI4Math_MathVista", 1000, "general"),
    "wemath": ("We_Math", 1740, "general"),
    "mmk12": (None, 2000, "general"),
    "mathverse": ("AI4Math_MathVerse", 2180, "general"),
    "logicvista": ("lscpku_LogicVista", 447, "vision"),
    "counting": ("BUAADreamer_clevr_count_70k", 200, "vision"),
    "mmmu_pro": ("MMMU_MMMU_Pro", 1730, "vision"),
    "mathverse_v": ("AI4Math_MathVerse_vision_dependent", 1308, "vision"),
}
READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
COLUMNS = ("problem", "answer", "images")
LINE_END = re.compile(r"\s*\n\s*")  # in a JSON line, a text has none
SECOND = {}  # {name in Example.seconds: columns that may hold it}; whoever uses some enters them


class DataSet(NamedTuple):
    """A data set that is made, not read."""

    open: Callable  # open(split, size, seed, cfg) -> anything with len() and [index] -> Example
    splits: dict  # {split that an evaluation reports: what is asked there}
    validation: str  # the split that a run watches, and that settings are chosen on


DATA_SETS = {}  # {name: DataSet}; toy/task.py enters the toy


def splits_of(name):
    """The splits of a data set that an evaluation reports."""
    return list(DATA_SETS[name].splits) if name in DATA_SETS else ["test"]


def validation_split(name):
    """The split of a data set that a run watches while it trains."""
    return DATA_SETS[name].validation if name in DATA_SETS else "test"


def name_and_split(given):
    """name@split -> (name, split); split is "" where none is given."""
    name, _, split = given.rpartition("@")
    return (name, split) if name and not Path(given).exists() else (given, "")  # of any name


def check_name(given, what):
    """End with a sentence if nothing can be opened by this name: it looks like a path to nothing,
    or, as no name on the hub does, it is nearly one of those known here. what: the flag"""
    name, _ = name_and_split(given)
    if name in DATA_SETS or name in BENCHMARKS or Path(name).exists():
        return
    if name.startswith((".", "/")) or name.endswith(tuple(READERS)):
        fail(f"{what} {given}: there is no such file or folder, seen from {Path.cwd()}")
    near = [] if "/" in name else get_close_matches(name, [*DATA_SETS, *BENCHMARKS], 1, 0.75)
    if near:
        fail(f"{what} {given}: there is no data set or file of that name; {near[0]} may be meant")


def open_rows(name, split, given=""):
    """The rows of one split of a hub name, a file or a folder. given: a split asked for by name.
    Raises ValueError for a path that holds no such rows."""
    from datasets import load_dataset, load_from_disk

    path = Path(name)
    if not path.exists():
        return load_dataset(name, split=given or split)
    if path.is_file() and path.suffix not in READERS:
        raise ValueError("it is no parquet, json or jsonl file")
    if any((path / file).exists() for file in ("dataset_dict.json", "state.json")):
        saved = load_from_disk(str(path))
        return pick_split(saved if isinstance(saved, dict) else {"": saved}, split, given)
    splits = splits_of_files(path) if path.is_dir() else {"": [path]}
    files = pick_split(splits, split, given)
    readers = {READERS[file.suffix] for file in files}
    if len(readers) > 1:
        raise ValueError(f"it holds {' and '.join(sorted(readers))} files; give one of them")
    rows = load_dataset(*readers, data_files=[str(file) for file in files], split="train")
    return with_dates_as_text(rows, files) if readers == {"json"} else rows


def with_dates_as_text(rows, files):
    """Rows of JSON files, in which a column of nothing but dates was read as points in time: its
    texts are what the files say."""
    for name in [name for name, kind in rows.features.items() if "timestamp" in str(kind)]:
        found = []
        for text in (file.read_text("utf-8-sig").strip() for file in files):
            found += json.loads(text if text[0] == "[" else f"[{LINE_END.sub(',', text)}]")
        rows = rows.remove_columns(name).add_column(name, [row.get(name) for row in found])
    return rows


def pick_split(splits, split, given):
    """The rows or files of one split, of {split: rows or files}. Those of "" belong to no split,
    and are read whatever is wanted, unless a user has `given` a name. Raises ValueError if there is
    none of that name."""
    from datasets.data_files import SPLIT_KEYWORDS

    if "" in splits and not given:
        return splits[""]
    wanted = given or split
    known = {word: str(name) for name, words in SPLIT_KEYWORDS.items() for word in words}
    for name in (wanted, known.get(wanted)):  # val and dev are validation
        if name in splits:
            return splits[name]
    if "" in splits:
        raise ValueError(f"nothing in it is called {wanted}")
    names = ", ".join(splits)
    raise ValueError(f"it has {names} and not {wanted}; @{next(iter(splits))} at the end picks one")


def splits_of_files(folder):
    """{split: files} of a folder; {"": all files} where no name speaks of a split, and where some
    do, the others are left out. Raises ValueError for a folder without files."""
    from datasets.data_files import FILES_TO_IGNORE

    splits = defaultdict(list)
    for file in sorted(f for f in folder.rglob("*") if f.suffix in READERS):
        path = file.relative_to(folder)
        hidden = any(part.startswith((".", "__")) for part in path.parts)
        if not hidden and path.name not in FILES_TO_IGNORE:
            splits[split_of_file(path)].append(file)
    if not splits:
        raise ValueError("it holds no parquet, json or jsonl file")
    if len(splits) > 1:
        splits.pop("", None)
    return splits


def split_of_file(path):
    """The split of which a file's folders speak, else its own name; "" where none does. They speak
    as for `datasets`, whose own inference looks at pictures beside these files too. Raises
    ValueError for two splits."""
    from datasets.data_files import SPLIT_KEYWORDS

    if on_hub := re.match(r"data/(\w+)-\d{5}-of-\d{5}", path.as_posix()):
        return on_hub[1]  # which can be any word
    for names in (path.parent, path.name):
        words = set(re.split("[-._ 0-9/]", str(names)))
        found = [str(split) for split, known in SPLIT_KEYWORDS.items() if words & set(known)]
        if len(found) > 1:
            raise ValueError(f"{path} could be {' or '.join(found)}")
        if found:
            return found[0]
    return ""


class Rows:
    """A data set on disk or from the hub, read row by row. It has columns for the problem, the
    answer and the pictures, and perhaps for second pictures; or a chat in the place of the first
    two: plumbing/data/schemas.py.

    name: a hub name, a parquet, JSON or JSONL file, or a folder of them; name@split overrides split
    root: where relative picture paths start; default: the file's own folder
    called: what the set is called in ids and messages
    instruction: what every problem ends with
    """

    limit = "prompt tokens are more than --max_prompt_tokens"

    def __init__(self, name, split, columns=COLUMNS, root=None, called=None, instruction=""):
        name, given = name_and_split(str(name))
        rows, path = open_rows(name, split, given), Path(name)
        if not len(rows):
            raise ValueError("it holds no rows")
        self.name, self.columns, self.split = called or path.stem, columns, given or split
        self.root = Path(root) if root else path if path.is_dir() else path.parent
        self.instruction = instruction
        self.chat = next((c for c in schemas.CHATS if c in rows.column_names), None)
        there, images = rows.column_names, columns[2]
        numbered = [c for c in (f"{images}_{k}" for k in range(1, 10)) if c in there]  # as MMMU's
        self.pictures = {"images": numbered if numbered and images not in there else [images]}
        needed = [*self.pictures["images"], *([] if self.chat else columns[:2])]
        if missing := ", ".join(sorted({*needed} - {*there})):
            has = f"it has {', '.join(there)} (--columns says which is which, for all files)"
            fail(f"{name} has no column {missing}; {has}")
        self.options = next((c for c in schemas.OPTIONS if c in there and c not in columns), None)
        for second, known in SECOND.items():
            if found := [column for column in known if column in rows.column_names]:
                self.pictures[second] = found[:1]
        # Decoded or not, a column is the same in Arrow. So only its feature is exchanged, where
        # `cast_column` would write lists, with every picture in them, to the disk again.
        for column in sum(self.pictures.values(), []):
            rows.info.features[column] = undecoded(rows.features[column])
        self.rows = rows
        ids = [str(i) for i in rows["id"]] if "id" in rows.column_names else []
        self.by_id = len(set(ids)) == len(rows) and "None" not in ids  # two of one id are two
        feature = rows.features.get(columns[1])
        self.answers = getattr(feature, "dtype", None), getattr(feature, "names", None)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.example(index, self.rows[index])

    def example(self, index, row):
        """A row of the file -> Example. Raises ValueError for one that cannot be read as one."""
        said = self.said(row)
        values = {name: [row.get(c) for c in columns] for name, columns in self.pictures.items()}
        pictures = {n: [self.locate(p) for p in schemas.pictures_of(v)] for n, v in values.items()}
        said["problem"], images = schemas.in_order(said["problem"], pictures.pop("images"))
        name = f"{self.name}-{row['id'] if self.by_id else index}"
        return Example(name, images=images, seconds=pictures, **said)

    def said(self, row):
        """What the row says, as fields of an Example."""
        if self.chat:
            problem, answer = schemas.question_of(row[self.chat] or [])
        else:
            problem, value = schemas.problem_of(row[self.columns[0]]), row[self.columns[1]]
            answer = schemas.answer_of(value, *self.answers)
            if options := schemas.options_of(row.get(self.options)):
                place = value if type(value) is int and not self.answers[1] else None
                problem, answer = schemas.with_options(problem, answer, options, place)
        return {"problem": problem + self.instruction, "answer": answer}

    def written(self, example, tok):
        """The text that becomes token ids, one token a picture. Raises ValueError for an example
        that cannot be used."""
        text = prompt_text(example, tok, [1] * len(example.images))
        if not example.answer.strip():
            raise ValueError("the answer is empty")
        return text

    def texts(self):
        """(problem, answer) of every row; its pictures are not read. None for a row without."""
        found = []
        for row in self.rows.remove_columns(sum(self.pictures.values(), [])):
            try:
                said = self.said(row)
                found.append((said["problem"], said["answer"]))
            except ValueError:  # such a row is left out anyway
                found.append(None)
        return found

    def locate(self, picture):
        """A relative path becomes one from root, if the file is there."""
        path = picture
        if isinstance(picture, dict) and not picture.get("bytes"):
            path = picture.get("path")
        found = isinstance(path, str) and path and os.path.exists(self.root / path)
        return str(self.root / path) if found else picture

    def faults(self, tok, image_processor, longest, part=slice(None), second=()):
        """{index: why a row cannot be used}, of the rows in `part`. No picture is decoded: sizes
        come from headers and the processor's own resizing arithmetic, so the number of tokens is
        exact. second: names in SECOND, needed by every row"""
        found, indices = {}, range(len(self))[part]
        told = track(indices, f"checking {self.name}", "rows")
        for index, row in zip(told, self.rows.select(indices)):
            try:
                example = self.example(index, row)
                for picture in second_pictures(example, second):
                    tokens_from_header(picture, image_processor)
                sizes = [tokens_from_header(p, image_processor) for p in example.images]
                ids = tok(self.written(example, tok), add_special_tokens=False)["input_ids"]
                if (n := len(ids) + sum(sizes) - len(sizes)) > longest:
                    raise ValueError(f"{n} {self.limit} {longest}")
            except ValueError as error:
                found[index] = str(error)
        return found


def load(name, split, size, seed, cfg=None, instruction=""):
    """A data set by name, one of DATA_SETS or BENCHMARKS or what Rows takes: anything with len()
    and [index] -> Example. Ends with a sentence if it cannot be read. size, seed: of what is made;
    cfg: names the columns; instruction: of what is read"""
    if name in DATA_SETS:
        return DATA_SETS[name].open(split, size, seed, cfg)
    if name in BENCHMARKS:
        return benchmark(name, instruction)
    columns = cfg.columns.split(",") if cfg else COLUMNS
    return opened(name, partial(Rows, name, split, columns, instruction=instruction))


def benchmark(name, instruction="", root=None):
    """One of BENCHMARKS, from the hub, or from the folder `root` that the released downloader
    fills. Ends with a sentence if it cannot be read."""
    part, rows = BENCHMARKS[name][0], partial(Rows, called=name, instruction=instruction)

    def read():
        if part is None:
            return rows(MMK12, "test")
        if root:
            return rows(Path(root) / "papo" / f"{part}.json", "train", root=Path(root) / "images")
        archive = "We-Math_We-Math" if part == "We_Math" else part
        return rows(EVAL_HUB, part, root=unzipped(f"{archive}_images.zip"))

    return opened(name, read)


def named_sets(data):
    """The data sets of eval.py's --data, a list. Ends with a sentence on one that cannot be."""
    if data == "all":
        return list(BENCHMARKS)
    names = [data] if Path(data).exists() else data.split(",")
    for name in names:
        check_name(name, "--data")
    return names


def open_sets(names, size, cfg, instruction, root):
    """{what a set is called: its examples} of names as of named_sets, opened as by load, no row
    looked at yet; root: as of benchmark"""
    sets = {}
    for name, split in [(one, split) for one in names for split in splits_of(one)]:
        path, given = name_and_split(name)
        key = split if name in DATA_SETS else f"{Path(path).stem}@{given}".removesuffix("@")
        if key in sets:
            fail(f"two sets are called {key}; evaluate them one at a time")
        if name not in BENCHMARKS:
            sets[key] = load(name, split, size, 0, cfg, instruction)
            continue
        sets[key], paper = benchmark(name, instruction, root), BENCHMARKS[name][1]
        if (n := len(sets[key])) != paper:
            say(f"note: {name} has {n} questions, {paper} in the paper")
    return sets


def unzipped(file):
    """Download a set's pictures from the hub and unpack them beside the download, once."""
    import zipfile

    from huggingface_hub import hf_hub_download

    archive = Path(hf_hub_download(EVAL_HUB, file, repo_type="dataset"))
    return make_once(archive.parent / archive.stem, zipfile.ZipFile(archive).extractall)


def opened(name, read):
    """read() -> the data set of this name. Ends with a sentence if it cannot be read."""
    check_name(name, "data")
    try:
        with fetching(f"opening {name}"):
            return read()
    except ModuleNotFoundError as error:
        fail(f"data {name}: {error.name} is not installed; `pip install {error.name}` brings it")
    except Exception as error:  # of many kinds, depending on what is wrong with the file or the hub
        why = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        if isinstance(error, StopIteration) or "corresponds to no data" in why:  # of empty files
            why = "it holds no rows"
        if Path(name_and_split(name)[0]).exists():
            fail(f"data {name!r} cannot be read ({why}); mend it, or give another")
        files = "a parquet, json or jsonl file or a folder of them"
        fail(f"data {name!r} is no file or folder here, nor on the hub ({why}); give {files}")


def undecoded(feature):
    """A feature of `datasets` that leaves pictures as bytes, however deep they lie."""
    from datasets import Image

    if isinstance(feature, Image):
        return Image(decode=False)
    inner = getattr(feature, "feature", None)
    return feature if inner is None else replace(feature, feature=undecoded(inner))


def usable(data, processors, longest, cfg, processes, second=()):
    """The rows of a data set that can be used, of at most `longest` tokens, with the pictures of
    `second` (names in SECOND). Every process checks a share; the others are named in a file."""
    if not isinstance(data, Rows):
        return data
    share = slice(processes.rank, None, processes.world)
    mine = data.faults(*processors, longest, share, second)
    faults = dict(processes.gather(list(mine.items())))
    if processes.first:
        left_out(Path(cfg.out), data, faults)
        texts = filter(None, data.texts())
        said = " ".join(f"{p.removesuffix(data.instruction)} {a}" for p, a in texts)
        asked = "the instruction behind every problem (--reward bare has none)"
        warn_of_unknown_words({data.name: said, asked: data.instruction}, processors[0])
    return without(data, faults)


def fingerprint(examples):
    """What the rows of a run say: their number, and a checksum of all problems and answers in order
    (not of pictures). None for a data set that is made, which its settings tell."""
    rows = getattr(examples, "dataset", None)
    if not isinstance(rows, Rows):
        return None
    with doing(f"reading the texts of {rows.name}"):
        texts = rows.texts()
    digest = hashlib.sha256(repr([texts[i] for i in examples.indices]).encode()).hexdigest()
    return f"{len(examples)} rows {digest[:12]}"


def without(rows, faults):
    """The rows of a data set that have no fault, read when they are asked for."""
    return Subset(rows, [i for i in range(len(rows)) if i not in faults])


def left_out(out, data, faults):
    """Name the rows that cannot be used in a file, and say how many there are of which kind.
    faults: {index: why}. Ends with a sentence if that is all rows."""
    if not faults:
        return
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"left_out-{data.name}-{data.split}.jsonl"
    lines = [json.dumps({"row": i, "why": faults[i]}) + "\n" for i in sorted(faults)]
    write_atomically(file, "".join(lines))
    first = "row {}: {}".format(*min(faults.items()))
    if len(faults) == len(data):
        fail(f"none of the {len(data)} rows of {data.name} can be used ({first}); {file} says why")
    alike = Counter(re.sub(r"[\d.]+|\(.*\)", "N", why) for why in faults.values())
    counted = "; ".join(f"{n} x {why}" for why, n in alike.most_common())
    left = f"{len(faults)} of {len(data)} rows of {data.name} are left out"
    say(f"{left}: {counted}; {first}; see {file}")


def warn_of_unknown_words(texts, tok):
    """Say for which words of texts {what it is: text} a tokenizer, such as the toy's, has one token
    for all."""
    for what, text in texts.items() if tok.unk_token_id is not None else ():
        words = dict.fromkeys(text.replace(IMAGE, " ").split())
        if unknown := [word for word in words if tok.unk_token_id in tok(word)["input_ids"]]:
            words = f"{len(unknown)} words of {what}, such as {', '.join(unknown[:5])}"
            say(f"warning: the model's tokenizer does not know {words}: all are the same to it")


def warn_of_shared_rows(train, held_out):
    """Say which rows to validate on are trained on as well: they have the same problem, answer and
    pictures. Of files and hub names; the splits of what is made share no picture."""
    if not (isinstance(train, Subset) and isinstance(held_out, Subset)):
        return
    texts = {part: part.dataset.texts() for part in (train, held_out)}
    both = set.intersection(*({found[i] for i in part.indices} for part, found in texts.items()))

    def contents(part):  # pictures are read where the text is in both
        for index in part.indices:
            if (text := texts[part][index]) in both:
                pictures = [original_bytes(p) for p in part.dataset[index].images]
                yield index, (text, *(hashlib.sha256(p).digest() for p in pictures))

    known = {found for _, found in contents(train)}
    if same := [index for index, found in contents(held_out) if found in known]:
        one, other = train.dataset, held_out.dataset
        known, asked = (f"{data.name} ({data.split})" for data in (one, other))
        shared = f"{len(same)} of {len(other)} rows of {asked} are in {known} too"
        trained = "the policy is trained on what it is validated on"
        say(f"warning: {shared}, the first is row {same[0]}: {trained}")
