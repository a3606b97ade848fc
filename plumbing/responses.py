"""Files of responses: one JSON line each, with id, prompt, predict and label as the released
evaluation's scorer reads them."""

import json
from pathlib import Path

from plumbing.common import fail, first_line, write_atomically
from plumbing.console import say


def as_lines(records):
    """Records -> text, one JSON line each."""
    return "".join(json.dumps(r) + "\n" for r in records)


def by_question(records):
    """Records -> {question: [accuracy of each response]}"""
    questions = {}
    for r in records:
        questions.setdefault(r["id"], []).append(r["accuracy"])
    return questions


def read(path):
    """A file of responses -> {set: records}; a file without sets, as the released evaluation writes
    it, is one set that is called after the file.

    Lines that cannot be read are counted in a warning, but for a last one that a crash cut short.
    Ends with a sentence if the file, or every line of it, cannot be read.
    """
    sets, unread = {}, []
    try:
        # Not splitlines: other characters than a line feed, such as U+2028, are part of a text.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read ({first_line(error)})")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            wanted = {key: record[key] for key in ("id", "predict", "label")}
        except (json.JSONDecodeError, TypeError, KeyError):
            unread += [number] if number < len(lines) else []
            continue
        record |= {"predict": wanted["predict"] or "", "label": str(wanted["label"])}
        sets.setdefault(record.get("split") or Path(path).stem, []).append(record)
    if unread and not sets:
        fail(f"{path} holds no line with id, predict and label")
    if unread:
        count = f"{len(unread)} of {len(lines)} lines of {path} cannot be read"
        say(f"warning: {count}, the first is line {unread[0]}")
    return sets


def answered(out, settings):
    """What a stopped evaluation left in its file: {set: records} of the questions that are whole.

    Ends with a sentence if the file is another evaluation's.
    """
    sets, about = {}, out.with_name(f"{out.stem}.settings.json")
    if out.exists() and about.exists():
        before = json.loads(about.read_text())
        if before != settings:
            changed = [
                f"{k} ({before.get(k)!r} then, {settings[k]!r} now)"
                for k in settings
                if before.get(k) != settings[k]
            ]
            fail(f"{out} holds another evaluation: {', '.join(changed)}; give another --out")
        sets = read(out)
    elif out.exists():
        fail(
            f"{out} exists, but {about.name}, which says what it holds, does not; give another "
            "--out"
        )
    for s, records in sets.items():
        questions = by_question(records)
        sets[s] = [r for r in records if len(questions[r["id"]]) == settings["n"]]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(about, json.dumps(settings, indent=1))
    write_atomically(out, as_lines(r for records in sets.values() for r in records))
    return sets


def as_trained(folder):
    """Sampling, limits and columns of the run that a checkpoint folder belongs to; {} for any other
    model."""
    checkpoint = Path(folder).parent if Path(folder).name == "merged" else Path(folder)
    about = checkpoint.parent / "config.json"
    if not checkpoint.name.startswith("checkpoint-") or not about.exists():
        return {}
    cfg = json.loads(about.read_text())["config"]
    names = (
        "temperature top_p max_prompt_tokens max_response_tokens min_pixels max_pixels dtype "
        "reward problem_column answer_column images_column hint_right"
    )
    return {k: cfg[k] for k in names.split() if k in cfg}
