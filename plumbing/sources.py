"""Data sets by name: the toy, files on disk, the hub, the paper's benchmarks."""

import collections
import json
import re
from functools import partial
from pathlib import Path

from plumbing.common import fail, first_line, make_once, write_atomically
from plumbing.console import fetching, say, track
from plumbing.data import IMAGE, Example, prompt_text, seconds
from plumbing.pictures import original_bytes, tokens_from_header
from plumbing.schemas import CHATS, answer_of, pictures_of, problem_of, question_of
from plumbing.splits import asked_for, open_rows
from reward import BOXED, FORMS
from toy.task import ToyData

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
COLUMNS = ("problem", "answer", "images")
# Fields of an Example for second pictures, and the columns that may hold them; the last ones are
# those of the files released with Fine-R1.
SECOND = {
    "contrast": ("contrast", "negative", "image_aug"),
    "positive": ("positive", "image_noisy"),
}
AT_ONCE = 256  # rows that are checked together


class Rows:
    """A data set on disk or from the hub, read row by row.

    It has columns for the problem, the answer and the pictures, and perhaps for second pictures; or
    a chat in the place of the first two. plumbing/schemas.py reads each of them.
    Pictures are decoded when they are asked for. plumbing/conversations.py reads the same rows for
    sft.py.

    name: a hub name, a parquet, JSON or JSONL file, or a folder of them; name@split overrides split
    root: where relative picture paths start; default: the file's own folder
    called: what the set is called in ids and messages
    instruction: what every problem ends with
    """

    column_flags = "--problem_column, --answer_column and --images_column"
    limit = "prompt tokens are more than --max_prompt_tokens"

    def __init__(
        self, name, split, columns=COLUMNS, root=None, called=None, instruction=BOXED.instruction
    ):
        name, given = asked_for(str(name))
        rows, path = open_rows(name, split, given), Path(name)
        self.name, self.columns, self.split = called or path.stem, columns, given or split
        self.root = Path(root) if root else path if path.is_dir() else path.parent
        self.chat = next((c for c in CHATS if c in rows.column_names), None)
        missing = {columns[2], *(() if self.chat else columns[:2])} - set(rows.column_names)
        if missing:
            fail(
                f"{name} has no column {', '.join(sorted(missing))}; it has "
                f"{', '.join(rows.column_names)} ({self.column_flags} say which is which)"
            )
        self.instruction = instruction
        self.words = {}  # {word of a problem or an answer: does the tokenizer know it?}
        self.pictures = {"images": columns[2]}  # {field of an Example: column}
        for name, known in SECOND.items():
            if found := [column for column in known if column in rows.column_names]:
                self.pictures[name] = found[0]
        self.rows = undecoded(rows, self.pictures.values())
        ids = rows["id"] if "id" in rows.column_names else [None]
        self.by_id = None not in ids[:] and len(set(ids[:])) == len(rows)
        feature = rows.features.get(columns[1])
        self.answers = getattr(feature, "dtype", None), getattr(feature, "names", None)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.example(index, self.rows[index])

    def example(self, index, row):
        """A row of the file -> Example. Raises ValueError for one that cannot be read as one."""
        said = self.said(row)
        columns = {name: pictures_of(row.get(c)) for name, c in self.pictures.items()}
        pictures = {name: [self.locate(p) for p in found] for name, found in columns.items()}
        # Two rows of one id are two questions.
        name = f"{self.name}-{row['id'] if self.by_id else index}"
        return Example(name, **pictures, **said)

    def said(self, row):
        """What the row says, as fields of an Example."""
        if self.chat:
            problem, answer = question_of(row[self.chat] or [])
        else:
            problem, answer = row[self.columns[0]], answer_of(row[self.columns[1]], *self.answers)
            problem = problem_of(problem)
        return {"problem": problem + self.instruction, "answer": answer}

    def written(self, example, tok):
        """The text that becomes token ids, one token a picture. Raises ValueError for an example
        that cannot be used."""
        text = prompt_text(example, tok, [1] * len(example.images))
        if not example.answer.strip():
            raise ValueError("the answer is empty")
        return text

    def texts(self):
        """(problem, answer) of every row; its pictures are not read."""
        rows, found = enumerate(self.rows.remove_columns([*self.pictures.values()])), []
        for index, row in rows:
            try:
                example = self.example(index, row)
                found.append((example.problem, example.answer))
            except ValueError:  # such a row is left out anyway
                found.append(None)
        return found

    def locate(self, picture):
        """A relative path becomes one from root, if the file is there."""
        path = picture
        if isinstance(picture, dict) and not picture.get("bytes"):
            path = picture.get("path")
        try:
            found = isinstance(path, str) and path and (self.root / path).exists()
        except OSError:  # base64 text, too long for a path
            found = False
        return str(self.root / path) if found else picture

    def faults(self, tok, image_processor, longest, part=slice(None), second=()):
        """{index: why a row cannot be used}, of the rows in `part`, from headers alone.

        No picture is decoded: sizes come from its header and from the processor's own resizing
        arithmetic, so the number of prompt tokens is exact. second: names in SECOND; every picture
        needs one of each of these.
        """
        found, indices = {}, range(len(self.rows))[part]
        batches = [indices[start : start + AT_ONCE] for start in range(0, len(indices), AT_ONCE)]
        for batch in track(batches, f"checking {self.name}", f"x {AT_ONCE} rows"):
            columns, texts, known, words = self.rows[list(batch)], [], [], {}
            for k, index in enumerate(batch):
                try:
                    row = {c: values[k] for c, values in columns.items()}
                    example = self.example(index, row)
                    text = self.written(example, tok)
                    said = f"{example.problem.removesuffix(self.instruction)} {example.answer}"
                    words |= dict.fromkeys(said.replace(IMAGE, " ").split())
                    sizes = [tokens_from_header(p, image_processor) for p in example.images]
                    for picture in seconds(example, second):
                        tokens_from_header(picture, image_processor)
                    known.append((index, len(texts), sum(sizes) - len(sizes)))
                    texts.append(text)
                except ValueError as error:
                    found[index] = re.sub(r"^example .*?: ", "", str(error))
            self.words |= which_are_known([w for w in words if w not in self.words], tok)
            ids = tok(texts, add_special_tokens=False)["input_ids"] if texts else []
            for index, k, more in known:
                n = len(ids[k]) + more
                if n > longest:
                    found[index] = f"{n} {self.limit} {longest}"
        return found


class Selection:
    """The rows of a data set that can be used."""

    def __init__(self, rows, faults):
        self.rows, self.kept = rows, [i for i in range(len(rows)) if i not in faults]

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, index):
        return self.rows[self.kept[index]]


def load(name, split, size, seed, cfg=None, root=None):
    """A data set by name: anything with len() and [index] -> Example.

    name: toy; one of BENCHMARKS, from the hub or from the folder `root` that the released
    downloader fills; or what Rows takes. split: train, val, or one that the data set knows.
    size, seed: of the toy; cfg: names the columns, and says how often the toy's hints are right.
    Ends with a sentence if it cannot be read.
    """
    if name == "toy":
        return ToyData(split, size, seed, cfg.hint_right)
    if name == "mmk12":
        return opened(name, partial(Rows, MMK12, "test", called=name))
    if name in BENCHMARKS:
        return opened(name, partial(benchmark, name, root))
    if cfg is None:
        return opened(name, partial(Rows, name, split, root=root))
    columns, form = (cfg.problem_column, cfg.answer_column, cfg.images_column), FORMS[cfg.reward]
    read = partial(Rows, name, split, columns, root, instruction=form.instruction)
    return opened(name, read)


def opened(name, read):
    """read() -> the data set of this name. Ends with a sentence if it cannot be read."""
    try:
        with fetching(f"opening {name}"):
            return read()
    except Exception as error:  # of many kinds, depending on what is wrong with the file or the hub
        fail(
            f"data {name!r} cannot be read ({reason(error)}); give a hub name, a parquet, json "
            "or jsonl file or a folder of them"
        )


def reason(error):
    """What went wrong while data were read, in one line. Of files whose columns differ `datasets`
    says so in the last line of what the error came from, and lists the columns before it."""
    lines = str(error.__cause__ or error).splitlines()
    return " ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else first_line(error)


def benchmark(name, root):
    """One of the paper's evaluation sets."""
    part = BENCHMARKS[name][0]
    if root:
        file = Path(root) / "papo" / f"{part}.json"
        return Rows(file, "train", root=Path(root) / "images", called=name)
    archive = "We-Math_We-Math" if part == "We_Math" else part
    return Rows(EVAL_HUB, part, root=unzipped(f"{archive}_images.zip"), called=name)


def unzipped(file):
    """Download a set's pictures from the hub and unpack them beside the download, once."""
    import zipfile

    from huggingface_hub import hf_hub_download

    archive = Path(hf_hub_download(EVAL_HUB, file, repo_type="dataset"))
    return make_once(archive.parent / archive.stem, zipfile.ZipFile(archive).extractall)


def shared_rows(train, held_out):
    """Indices of the rows of one data set, both Rows, that are in the other too: the same problem,
    answer and pictures."""
    same, found = collections.defaultdict(list), []
    for index, text in enumerate(train.texts()):
        same[text].append(index)
    for index, text in enumerate(held_out.texts()):
        if text and text in same:
            ours = contents(held_out[index])
            found += [index] if any(contents(train[k]) == ours for k in same[text]) else []
    return found


def which_are_known(words, tok):
    """{word: has a tokenizer tokens for it?}; {} for a tokenizer that has some for everything."""
    if tok.unk_token_id is None or not words:
        return {}
    ids = tok(words, add_special_tokens=False)["input_ids"]
    return {word: tok.unk_token_id not in tokens for word, tokens in zip(words, ids)}


def undecoded(rows, columns):
    """The rows with the pictures of these columns as bytes, however deep they lie.

    Both ways to read a column have one form in Arrow, so the same table gets other features.
    `cast_column` would write a column of lists, with every picture in it, to the disk again.
    """
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    def read_as_bytes(feature):
        if isinstance(feature, ImageFeature):
            return ImageFeature(decode=False)
        inner = getattr(feature, "feature", None)
        return type(feature)(read_as_bytes(inner)) if inner is not None else feature

    info, known = rows.info.copy(), rows.features.items()
    info.features = Features({c: read_as_bytes(f) if c in columns else f for c, f in known})
    return Dataset(rows.data, info, rows.split)


def contents(example):
    """The pictures of an example as bytes; what cannot be opened stands for itself."""
    found = []
    for picture in example.images:
        try:
            found.append(original_bytes(picture))
        except (OSError, ValueError):
            found.append(picture)
    return found


def validation_split(val_data):
    """The split that a run watches while it trains, and that settings are chosen on."""
    return "val" if val_data == "toy" else "test"


def usable(data, processors, longest, cfg, processes, second=()):
    """The rows of a data set that can be used, of at most `longest` tokens, with the second
    pictures that are needed (names in SECOND).

    Every process checks a share of them; those that cannot be used are named in a file.
    """
    if not isinstance(data, Rows):
        return data
    share = slice(processes.rank, None, processes.world)
    mine = data.faults(*processors, longest, share, second)
    faults = dict(processes.gather(list(mine.items())))
    if processes.first:
        left_out(Path(cfg.out), data, faults, cfg.strict)
    if unknown := [word for word, is_known in data.words.items() if not is_known]:
        say(
            f"warning: the model's tokenizer does not know {len(unknown)} words of {data.name}, "
            f"such as {', '.join(unknown[:5])}: it reads each of them as the same "
            f"{processors[0].unk_token}, and cannot write them"
        )
    return Selection(data, faults)


def warn_of_shared_rows(train, held_out):
    """A row that is trained on says nothing as a row to validate on. Of files and hub names; the
    toy's splits share no picture."""
    if isinstance(train, Selection) and isinstance(held_out, Selection):
        if same := shared_rows(train.rows, held_out.rows):
            say(
                f"warning: {len(same)} of {len(held_out.rows)} rows of {held_out.rows.name} are "
                f"in {train.rows.name} too, the first is row {same[0]}: the policy is trained on "
                "what it is validated on"
            )


def left_out(out, data, faults, strict):
    """Name the rows that cannot be used in a file, and say how many there are of which kind.

    faults: {index: why}. Ends with a sentence if that is all rows, or, with strict, if it is any.
    """
    if not faults:
        return
    if strict:
        fail(f"row {min(faults)} of {data.name}: {faults[min(faults)]}")
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"left_out-{data.name}-{data.split}.jsonl"
    lines = [json.dumps({"row": i, "why": faults[i]}) + "\n" for i in sorted(faults)]
    write_atomically(file, "".join(lines))
    if len(faults) == len(data):
        fail(f"none of the {len(data)} rows of {data.name} can be used; {file} says why")
    kinds = collections.defaultdict(list)
    for index in sorted(faults):
        kinds[re.sub(r"[\d.]+|\(.*\)", "N", faults[index])].append(index)
    most = sorted(kinds.values(), key=len, reverse=True)
    counted = "; ".join(f"{len(k)} as row {k[0]}: {faults[k[0]]}" for k in most)
    say(
        f"{len(faults)} of {len(data)} rows of {data.name} are left out ({file} names them): "
        f"{counted}"
    )
