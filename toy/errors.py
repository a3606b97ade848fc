"""What kind of mistake? The toy knows every fact, so what the paper's Figures 1 and 15 count by
hand is exact here; and so is what they lack, what a method newly gets wrong.

    python eval.py --model CHECKPOINT --out out/errors/START/POLICY.jsonl
    python -m toy.errors out/errors/*/*.jsonl --out out/errors.json

habit: the hint is repeated, and is wrong; perception: what is said to be seen is not on the board;
calculation: what is seen is there, and the rest does not follow; question: what was not asked about
is looked at; form: anything else, such as a response that was cut off.
"""

import json
import re
from collections import Counter, defaultdict
from itertools import permutations
from pathlib import Path

from plumbing.base.common import Parser, write_atomically
from plumbing.report.responses import aligned, by_question, percent, read
from toy.task import CELL_NAMES, COLOURS, SHAPES, make

KINDS = ["right", "habit", "perception", "calculation", "question", "form"]
RESPONSE = re.compile(r"<think> (.*) </think> \\boxed\{ (\S+) \}")
WORDS = re.compile(rf"\b({'|'.join([*COLOURS, *SHAPES, *CELL_NAMES])}|same|\d+)\b|[<>]")
# What is read off the picture: red : 1 + 2, a1 : red square.
STATED = re.compile(r"(\w+) : (\w+)(?: \+)? (\w+)")


def kind_of(text, example, perfect):
    """A response -> one of KINDS. perfect: the response of a perfect policy (toy.task.make)"""
    if not (found := RESPONSE.fullmatch(text.strip())):
        return "form"
    thought, answer = found.groups()
    if answer == example.answer:
        return "right"
    if thought == f"a friend says {example.tags['hint']}" and answer == example.tags["hint"]:
        return "habit"
    wanted = RESPONSE.fullmatch(perfect)[1]
    if WORDS.sub("_", thought) != WORDS.sub("_", wanted):
        return "form"
    said, there = STATED.findall(thought), STATED.findall(wanted)
    if [name for name, *_ in said] != [name for name, *_ in there]:
        return "question"
    return "perception" if said != there else "calculation"


def kinds_of(path, split="vision"):
    """A file of responses that eval.py wrote -> {question: what most of its responses are}, and
    {kind: share of all responses}"""
    mostly, total = {}, Counter()
    for name, texts in by_question(read(path)[split], "predict").items():
        example, perfect, _ = make(0, split, int(name.rpartition("-")[2]))
        counts = Counter(kind_of(text, example, perfect) for text in texts)
        mostly[name], total = counts.most_common(1)[0][0], total + counts
    return mostly, {k: round(total[k] / total.total(), 4) for k in KINDS}


def main():
    """Count, print and perhaps keep the counts: {policy: {start: {kind: share}}}; and of two, where
    one of them is right, {"a > b": {start: {"kind of a > kind of b": share of questions}}}."""
    p = Parser(__doc__)
    p.add_argument("files", nargs="+", type=Path, metavar="FILE", help="START/POLICY.jsonl")
    p.add_argument("--out", type=Path, help="the counts as JSON")
    args, mostly, shares = p.parse_args(), defaultdict(dict), defaultdict(dict)
    for path in args.files:
        name, start = path.stem, path.parent.name
        mostly[name][start], shares[name][start] = kinds_of(path)
    rows = [["policy", *(f"{kind} %" for kind in KINDS), "starts"]]
    for name, starts in shares.items():
        means = [sum(s[k] for s in starts.values()) / len(starts) for k in KINDS]
        rows.append([name, *map(percent, means), str(len(starts))])
    print("\n".join(aligned(rows)))
    for a, b in permutations(mostly, 2):
        for s in sorted({*mostly[a]} & {*mostly[b]}):
            pairs = Counter((x, mostly[b][s].get(q)) for q, x in mostly[a][s].items())
            some = {f"{x} > {y}": n for (x, y), n in pairs.items() if "right" in (x, y) and x != y}
            shares[f"{a} > {b}"][s] = {k: round(n / pairs.total(), 4) for k, n in some.items()}
    if args.out:
        write_atomically(args.out, json.dumps(shares, indent=1))


if __name__ == "__main__":
    main()
