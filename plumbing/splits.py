"""Which rows on disk belong to which split. A row of another split is never read."""

import re
from pathlib import Path

KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}


def asked_for(name):
    """What name@split means -> (name, split or ""); a path that exists is a path, with any name."""
    before, at, split = name.rpartition("@")
    return (before, split) if at and not Path(name).exists() else (name, "")


def open_rows(name, split, given=""):
    """The rows of one split of a hub name, a file or a folder. given: a split asked for by name

    Raises ValueError for a path that holds no such rows.
    """
    from datasets import load_dataset, load_from_disk

    path = Path(name)
    if not path.exists():
        return load_dataset(name, split=given or split)
    if path.is_file() and path.suffix not in KINDS:
        raise ValueError("it is no parquet, json or jsonl file")
    saved = [path / file for file in ("dataset_dict.json", "state.json")]
    if any(file.exists() for file in saved):  # what save_to_disk leaves
        found = load_from_disk(str(path))
        return choose(found if saved[0].exists() else {"": found}, split, given)
    files = choose(splits_of_files(path) if path.is_dir() else {"": [path]}, split, given)
    kinds = {KINDS[file.suffix] for file in files}
    if len(kinds) > 1:
        raise ValueError(f"it holds {' and '.join(sorted(kinds))} files; give one of them")
    return load_dataset(*kinds, data_files=[str(file) for file in files], split="train")


def choose(splits, split, given):
    """The rows or files of one split, of {split: rows or files}.

    Those of "" belong to no split, and are read whatever is wanted. given: the split that a user
    asked for by name, or "". Raises ValueError if there is none of that name.
    """
    from datasets.data_files import SPLIT_KEYWORDS

    if "" in splits and not given:
        return splits[""]
    wanted = given or split
    for known, words in SPLIT_KEYWORDS.items():  # val and dev are validation
        wanted = str(known) if wanted in words and wanted not in splits else wanted
    if wanted in splits:
        return splits[wanted]
    names = ", ".join(filter(None, splits))
    if not names:
        raise ValueError(f"nothing in it is called {given}")
    raise ValueError(f"it has {names} and not {wanted}; @{next(iter(splits))} at the end picks one")


def splits_of_files(folder):
    """{split: files} of a folder, as `datasets` infers it from the names of folders, else of files;
    {"": all files} where no name speaks of a split.

    Raises ValueError for a folder without files, and for a file that belongs to two splits.
    """
    from datasets.data_files import FILES_TO_IGNORE, SPLIT_KEYWORDS

    paths = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.suffix in KINDS]
    paths = [p for p in paths if p.name not in FILES_TO_IGNORE and not is_hidden(p)]
    if not paths:
        raise ValueError("it holds no parquet, json or jsonl file")
    splits = {}
    for path in paths:  # the hub's own name for one, which can be any word
        if m := re.fullmatch(r"data/(\w+)-\d{5}-of-\d{5}.*", path.as_posix()):
            splits.setdefault(m[1], []).append(folder / path)
    sep = "[-._ 0-9]"
    for parts in (lambda path: path.parts[:-1], lambda path: [path.name]):
        for path in paths if not splits else ():
            names = [
                str(split)
                for split, words in SPLIT_KEYWORDS.items()
                if any(
                    re.search(rf"(?:^|{sep})(?:{'|'.join(words)})(?:$|{sep})", part)
                    for part in parts(path)
                )
            ]
            if len(names) > 1:
                raise ValueError(f"{path} could be {' or '.join(names)}")
            for split in names:
                splits.setdefault(split, []).append(folder / path)
    return splits or {"": [folder / path for path in paths]}


def is_hidden(path):
    """As ls and `datasets` see it: a name that begins with a dot, or __pycache__ and its likes."""
    return any(part.startswith((".", "__")) for part in path.parts)
