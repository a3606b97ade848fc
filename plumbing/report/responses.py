"""Files of responses, one JSON line each, with id, prompt, predict and label as the released
evaluation's scorer reads them; and what they come to: avg@n, averages over sets, a table."""

import json
import math
from itertools import zip_longest
from pathlib import Path

import numpy as np

from plumbing.base.common import fail, first_line, read_json, write_atomically
from plumbing.base.console import say
from plumbing.data.schemas import answer_of
from plumbing.data.sources import BENCHMARKS


def as_lines(records):
    """Records -> text, one JSON line each."""
    return "".join(json.dumps(r) + "\n" for r in records)


def by_question(records, name="accuracy"):
    """Records -> {question: [accuracy, or another number, of each response that has it]}"""
    questions = {}
    for r in records:
        if name in r:
            questions.setdefault(r["id"], []).append(r[name])
    return questions


def read(path):
    """A file of responses -> {set: records}; one without sets, as the released evaluation's, is one
    set called after the file. Lines that cannot be read are counted in a warning, but for a last
    one that a crash cut short. Ends with a sentence if none can be read."""
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
            record |= {key: answer_of(record[key]) for key in ("predict", "label")}
            record["id"], name = str(record["id"]), str(record.get("split") or Path(path).stem)
            if "accuracy" in record:
                record["accuracy"] = float(record["accuracy"])
        except (ValueError, TypeError, KeyError):
            unread += [number] if number < len(lines) else []
            continue
        sets.setdefault(name, []).append(record)
    if unread and not sets:
        fail(f"{path} holds no line with id, predict and label")
    if unread:
        count = f"{len(unread)} of {len(lines)} lines of {path} cannot be read"
        say(f"warning: {count}, the first is line {unread[0]}")
    return sets


def same_settings(out, settings, what):
    """Write beside a file with what settings it is made, or end with a sentence if the file is
    there and was made with others. what: it holds"""
    about = out.with_name(f"{out.stem}.settings.json")
    if out.exists() and not about.exists():
        fail(f"{out} exists, but {about.name}, which describes it, does not; give another --out")
    if out.exists():
        then = read_json(about)
        other = {k: now for k, now in settings.items() if then.get(k) != now}
        if changed := [f"{k} ({then.get(k)!r} then, {now!r} now)" for k, now in other.items()]:
            fail(f"{out} holds another {what}: {', '.join(changed)}; give another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(about, json.dumps(settings, indent=1))


def answered(out, settings):
    """What a stopped evaluation left in its file: {set: records} of the questions that are whole.
    Ends with a sentence if the file is another evaluation's."""
    same_settings(out, settings, "evaluation")
    sets = read(out) if out.exists() else {}
    for s, records in sets.items():
        questions = by_question(records)
        sets[s] = [r for r in records if len(questions[r["id"]]) == settings["n"]]
    write_atomically(out, as_lines(r for records in sets.values() for r in records))
    return sets


def as_trained(folder, more=""):
    """Sampling, limits and columns of the run that a checkpoint folder belongs to; else {}. more:
    names of other settings"""
    if not Path(folder).name.startswith("checkpoint-"):
        return {}
    cfg = read_json(Path(folder).parent / "config.json").get("config", {})
    names = "temperature top_p max_prompt_tokens max_response_tokens min_pixels max_pixels dtype "
    names += f"reward hint_right {more}"
    names += " columns" * ("recipe" not in cfg)  # supervised learning reads responses, not answers
    return {k: cfg[k] for k in names.split() if k in cfg}


def interval(values, resamples=1000):
    """The 95 % bootstrap interval of the mean of values, in whatever order they come."""
    draw, values = np.random.default_rng(0), np.sort(values)
    picks = (draw.integers(len(values), size=(100, len(values))) for _ in range(resamples // 100))
    return np.quantile([values[pick].mean(1) for pick in picks], [0.025, 0.975]).tolist()


def summarise(records):
    """Records of one set -> avg@n accuracy, its interval over questions, pass@n and other means."""
    questions = by_question(records)
    means = [sum(v) / len(v) for v in questions.values()]
    low, high = interval(means)
    followed = [r["followed"] for r in records if "followed" in r]  # of the toy's wrong hints
    each = {name: by_question(records, name).values() for name in ("accuracy", "followed")}
    # Not in every program's file.
    mean = lambda key: sum(r.get(key, math.nan) for r in records) / len(records)
    return {
        "accuracy": sum(means) / len(means),
        "low": low,
        "high": high,
        "pass": sum(max(v) == 1 for v in questions.values()) / len(questions),
        "format": mean("format"),
        "cut_off": 1 - mean("finished"),
        "tokens": mean("tokens"),
        "questions": len(means),
        "n": len(records) // len(means),
        **({"followed": sum(followed) / len(followed)} if followed else {}),
        "each": {name: [sum(v) / len(v) for v in values] for name, values in each.items()},
    }


def macro(values):
    """{set: value} -> {General, Vision, Overall: the paper's mean over sets}, of those columns of
    which all sets are there."""
    columns = {"General": [], "Vision": [], "Overall": list(BENCHMARKS)}
    for name, (_, _, column) in BENCHMARKS.items():
        columns[column.capitalize()].append(name)
    whole = {name: sets for name, sets in columns.items() if all(s in values for s in sets)}
    return {name: sum(values[s] for s in sets) / len(sets) for name, sets in whole.items()}


def percent(*values, form=".1f"):
    """A share, or the two ends of an interval, as text in per cent."""
    return " .. ".join(f"{100 * value:{form}}" for value in values)


def accuracy_table(summaries):
    """{set: summary} -> lines of a table, with the paper's averages where all sets are there."""
    rows = [["set", "avg@n", "95 % interval", "pass@n", "format %", "cut off %", "tokens"]]
    rows[0] += ["questions", "wrong hint followed %"]
    for name, s in summaries.items():
        shares = [percent(s[k]) for k in ("pass", "format", "cut_off")]
        hints = percent(s["followed"]) if "followed" in s else ""
        row = [name, percent(s["accuracy"]), percent(s["low"], s["high"]), *shares]
        rows.append([*row, f"{s['tokens']:.1f}", str(s["questions"]), hints])
    means = macro({k: s["accuracy"] for k, s in summaries.items()})
    return aligned([*rows, *([name, percent(value, form=".2f")] for name, value in means.items())])


def filled(rows):
    """A head and other rows -> the same without the columns that are empty below the head."""
    return list(zip(*(c for c in zip_longest(*rows, fillvalue="") if any(c[1:]))))


def aligned(rows):
    """A head and other rows, of texts -> lines: the first column stands left, the others right, and
    empty ones are left out."""
    rows = filled(rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = ([cell.rjust(width) for cell, width in zip(row, widths)] for row in rows)
    return ["  ".join([row[0].strip().ljust(widths[0]), *row[1:]]) for row in cells]


CHANGE_HEADS = "split,before,after,change,95 % interval after,pass@n,wrong hint followed".split(",")


def changes(evaluation):
    """evaluation.json -> rows of text, CHANGE_HEADS first: accuracy of each split in per cent, or
    the one loss of supervised learning. A change is clear where what was before lies outside of the
    interval after. What is not known is left empty."""
    rows, afters = [CHANGE_HEADS], evaluation.get("after") or {}
    if isinstance(before := evaluation.get("before", {}), float):
        now = [f"{afters:.4f}", f"{afters - before:+.4f}"] if afters else ["", ""]
        return [CHANGE_HEADS, ["validation loss", f"{before:.4f}", *now, "", "", ""]]
    for split, b in before.items():
        both, now = [b], ["", "", ""]
        if a := afters.get(split):
            clear = "" if not a["low"] <= b["accuracy"] <= a["high"] else " (unclear)"
            both, change = [b, a], percent(a["accuracy"] - b["accuracy"], form="+.1f") + clear
            now = [percent(a["accuracy"]), change, percent(a["low"], a["high"])]
        more = [" → ".join(percent(s[k]) for s in both if k in s) for k in ("pass", "followed")]
        rows.append([split, percent(b["accuracy"]), *now, *more])
    return rows
