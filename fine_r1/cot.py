"""Chains of thought to learn from: how Fine-R1 made the data of its first stage (arXiv 2602.07605,
section 4.2).

    python -m fine_r1.cot birds@train --out chains.jsonl         # a GPU: Qwen2.5-VL-32B writes them
    python -m fine_r1.cot out/kinds/train.parquet --model out/kinds/teacher --out chains.jsonl

DATA is a classification set: the answer of a row is its class. A teacher is told the label of one
picture of each class and some of its visual features (fine_r1/concepts.py), and is asked for a
chain of thought in four parts until one is sound (`fault`). The rows are for fine_r1/sft.py
--reward tagged, and do not show that the label was told.

A run that was stopped goes on when it is called again, perhaps with more --tries. Beside OUT.jsonl
lie OUT-described.jsonl, what the features were chosen from, and OUT-thrown.jsonl, every chain that
is not kept, with its fault.
"""

import base64
import json
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from eval import Asking, ask
from fine_r1.concepts import choose, describe
from fine_r1.measures import TextEncoder, included
from plumbing.base.common import Parser, fail, generator, hold, may_write, write_atomically
from plumbing.base.console import say
from plumbing.data.pictures import original_bytes
from plumbing.data.sources import COLUMNS, Rows, left_out, opened
from plumbing.models.weights import load_processors
from plumbing.report.responses import as_lines, as_trained, same_settings
from plumbing.run.config import resolve
from plumbing.run.setup import lone_sampler, model_folder
from reward import same_name

TEACHER, ENCODER = "Qwen/Qwen2.5-VL-32B-Instruct", "intfloat/e5-large-v2"
# The paper's prompt (Table 5), its meaning in our words.
CHAIN = (
    "\n\nThis is a picture of a {label} , and its visual features are: {concepts}\nAnswer the "
    "question as if you had to find out. Analyse the features; they lead to at most four "
    "candidates of one family. Compare these, look for what tells them apart, and predict. Write "
    "the analysis between <analysis> and </analysis>, the candidates between <options> and "
    "</options>, the comparison between <comparison> and </comparison>, and the predicted name, "
    "without anything else, between <prediction> and </prediction>."
)
PARTS = "analysis", "options", "comparison", "prediction"
FORM = re.compile(r"\s*".join(rf"<{part}>\s*([^<\s][^<]*)</{part}>" for part in PARTS))
FOREIGN = re.compile("[\u2e80-\ud7ff\uf900-\ufaff]")  # letters of Chinese, Japanese and Korean


def fault(text, label):
    """Why a teacher's response is not kept; "" for a sound one."""
    if not (found := FORM.search(text)):
        return "no form"
    if not same_name(found[4], label):
        return "wrong prediction"
    if not included(found[2], label):
        return "not among its candidates"
    return "mixed languages" if FOREIGN.search(text) and not FOREIGN.search(label) else ""


def row_of(example, text):
    """A row for fine_r1/sft.py; the prediction is spelled as the label is."""
    thought = "\n\n".join(part.strip() for part in FORM.search(text).groups()[:3])
    pictures = [base64.b64encode(original_bytes(picture)).decode() for picture in example.images]
    return {
        "id": example.id,
        "problem": example.problem,
        "response": f"<think> {thought} </think>\n\n<answer> {example.answer} </answer>",
        "images": [f"data:;base64,{picture}" for picture in pictures],
    }


class Journal:
    """Rows in a file of JSON lines, to which others are added. What a killed run has written of a
    line is cut off."""

    def __init__(self, path):
        whole = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
        self.rows = [json.loads(line) for line in whole]
        write_atomically(path, as_lines(self.rows))
        self.file = open(path, "a", encoding="utf-8")

    def add(self, row):
        self.rows.append(row)
        self.file.write(as_lines([row]))
        self.file.flush()


def ask_all(examples, n, *name, teacher, seed):
    """Yield the records of n responses to each example. teacher: (sampler, processors)"""
    grade = lambda texts, labels: [{"fault": fault(*pair)} for pair in zip(texts, labels)]
    for records in ask(examples, Asking(n, (seed, *name)), *teacher, grade):
        yield from records


def think(examples, concepts, ask, tries, files):
    """Ask for a chain of each picture until one is kept, or so many are thrown away. concepts: {id:
    text}; files: the journals of both"""
    kept, thrown = files
    for k in range(tries):
        failed, done = (Counter(row["id"] for row in file.rows) for file in (thrown, kept))
        waiting = {e.id: e for e in examples if not done[e.id] and failed[e.id] == k}
        hints = {i: CHAIN.format(label=e.answer, concepts=concepts[i]) for i, e in waiting.items()}
        asked = [replace(e, problem=e.problem + hints[i]) for i, e in waiting.items()]
        for r in ask(asked, 1, k, "chains"):
            if r["fault"]:
                thrown.add({"id": r["id"], "fault": r["fault"], "response": r["predict"]})
            else:
                kept.add(row_of(waiting[r["id"]], r["predict"]))


def pictures_of(args, processors, longest):
    """--per_class rows of each class, drawn at random -> [Example]"""
    data = opened(args.data, partial(Rows, args.data, "train", args.columns.split(",")))
    faults, pools = data.faults(*processors, longest), {}
    left_out(args.out.parent, data, faults)
    for i, text in enumerate(data.texts()):
        if i not in faults:
            pools.setdefault(text[1].strip(), []).append(i)
    chosen = []
    for name, pool in pools.items():
        order = torch.randperm(len(pool), generator=generator(args.seed, "pictures", name))
        chosen += [pool[k] for k in order[: args.per_class].tolist()]
    return [replace(data[i], answer=data[i].answer.strip()) for i in sorted(chosen)]


def arguments(cuda):
    """What the command line says, checked."""
    p = Parser(__doc__)
    add, here = p.add_argument, "on a GPU {}, else {}".format
    add("data", metavar="DATA", help="a hub name, a file or a folder; @split at its end")
    add("--out", required=True, type=Path, help="the .jsonl file to write")
    add("--model", default=TEACHER if cuda else "", help=here(TEACHER, "it has to be named"))
    add("--encoder", default=ENCODER if cuda else "", help=here(ENCODER, "the teacher"))
    add("--per_class", type=int, default=1, help="pictures of each class [1]")
    add("--descriptions", type=int, default=10, help="of a picture from each point of view [10]")
    add("--tries", type=int, default=20, help="chains of a picture to throw away at the most [20]")
    add("--seed", type=int, default=1, help="seed of every random draw")
    add("--columns", default=",".join(COLUMNS), help="of DATA: problem, answer and pictures")
    add("--sampler", choices=["vllm", "hf"], help="default: vllm where it can run, else hf")
    args = p.parse_args()
    if not args.model:
        fail("--model: name a teacher; python -m fine_r1.kinds --teacher makes a small one")
    if args.out.suffix != ".jsonl" or min(args.per_class, args.descriptions, args.tries) < 1:
        fail("--out ends in .jsonl, and --per_class, --descriptions and --tries are at least 1")
    if args.columns.count(",") != 2:
        fail(f"--columns {args.columns}: name three, with commas between them")
    may_write(args.out.parent)
    hold(args.out)
    fixed = "data model encoder per_class descriptions seed columns".split()
    same_settings(args.out, {name: str(getattr(args, name)) for name in fixed}, "run's chains")
    return args


def main():
    """Describe, choose, ask for chains, and say what was thrown away."""
    cuda = torch.cuda.is_available()
    args = arguments(cuda)
    flags = dict(model=args.model, data=args.data, sampler=args.sampler, sleep=False)
    cfg, _ = resolve({**flags, "gpu_memory_utilization": 0.9, **as_trained(args.model)}, cuda)
    cfg.check(1, cuda)
    folder, device = model_folder(args.model), "cuda" if cuda else "cpu"
    processors = load_processors(folder, cfg)
    examples = pictures_of(args, processors, cfg.max_prompt_tokens)
    out = args.out
    files = [out, *(out.with_stem(f"{out.stem}-{name}") for name in ("thrown", "described"))]
    kept, thrown, described = map(Journal, files)
    sampler = lone_sampler(cfg, folder, processors)
    ask = partial(ask_all, teacher=(sampler, processors), seed=args.seed)
    known = {row["id"] for row in described.rows}
    for row in describe([e for e in examples if e.id not in known], ask, args.descriptions):
        described.add(row)
    concepts = choose(described.rows, TextEncoder(args.encoder or folder, device))
    think(examples, concepts, ask, args.tries, (kept, thrown))
    sampler.close()
    chains = {row["id"]: row for row in kept.rows}
    write_atomically(out, as_lines(chains[e.id] for e in examples if e.id in chains))
    faults = Counter(row["fault"] for row in thrown.rows).most_common()
    told = ", ".join(f"{n} x {why}" for why, n in faults) or "nothing"
    say(f"{out}: {len(chains)} chains, {len(examples) - len(chains)} pictures given up")
    say(f"thrown away: {told}; each is in {files[1]}")


if __name__ == "__main__":
    main()
