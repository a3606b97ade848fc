"""avg@n on data sets: the same prompts, pictures and sampling as training.

    python eval.py --model out/toy-papo_g/checkpoint-30 --data toy --n 8
    python eval.py --model M --data geo3k,mathvista      # or all nine of the paper, or a file
    python eval.py --compare grpo.jsonl papo.jsonl       # a paired test over questions
    python eval.py --rescore papo.jsonl                  # grade saved responses again
    python eval.py --model M --ask a.png "what is it ?"  # words shaded by KL(pi || pi_mask)

Writes one JSON line a response, and goes on where it stopped when it is called again. Averages over
sets are the paper's: every set weighs the same (Table 1).
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import plumbing  # noqa: F401  before torch: how its threads wait

import torch

import toy.task  # noqa: F401  registers the data set "toy"
from plumbing.base.common import Parser, fail, hold, may_write
from plumbing.base.console import Bar
from plumbing.base.processes import Processes
from plumbing.data.prompts import Example, encode_all
from plumbing.data.sources import BENCHMARKS, named_sets, open_sets, usable
from plumbing.grading.workers import Grader
from plumbing.models.families import TOYS
from plumbing.models.weights import load_processors
from plumbing.report.responses import (
    accuracy_table,
    answered,
    as_lines,
    as_trained,
    by_question,
    summarise,
)
from plumbing.run.config import resolve
from plumbing.run.setup import Parts, lone_sampler, model_folder
from reward import FORMS, REWARDS, boxed, score
from rollout import Rollout, Sampler

CHUNK = 64  # questions that are sampled together


@dataclass
class Asking:
    """How a set is asked."""

    n: int  # responses a question
    name: tuple  # of its random draws, such as (seed, "eval", set)
    blind: bool = False  # every picture is black


def ask(
    examples: list[Example], plan: Asking, sampler: Sampler, processors: tuple, grade: Callable
) -> Iterator[list[dict]]:
    """Sample plan.n responses to each example; yield a list of records, dicts ready for JSON and
    one a response, for each CHUNK of them.

    grade(texts, truths) -> a list of dicts
    """
    tok, image_processor = processors
    with Bar(f"evaluating {plan.name[-1]}", len(examples) * plan.n, "responses") as bar:
        for start in range(0, len(examples), CHUNK):
            batch = examples[start : start + CHUNK]
            prompts = encode_all(batch, tok, image_processor, plan.blind)
            seeds = [(*plan.name, p.example.id) for p in prompts]
            rollouts = sampler.generate(prompts, plan.n, seeds)
            done = [(p.example, r) for p, r in zip(prompts, rollouts) if r is not None]
            texts = [text for _, rollout in done for text in rollout.texts]
            scores = iter(grade(texts, [e.answer for e, _ in done for _ in range(plan.n)]))
            yield [record(e, r, g, next(scores)) for e, r in done for g in range(plan.n)]
            bar.update(len(batch) * plan.n)


def record(example: Example, rollout: Rollout, g: int, scores: dict) -> dict:
    """Response g of a rollout as a line of the file."""
    tags = dict(example.tags)
    if tags.get("hint_right") is False:  # of the toy: does the answer repeat a wrong hint?
        tags["followed"] = float(boxed(rollout.texts[g]) == tags["hint"])
    return {
        "id": example.id,
        "prompt": example.problem,
        "predict": rollout.texts[g],
        "label": example.answer,
        "tokens": len(rollout.tokens[g]),
        "finished": rollout.finished[g],
        **tags,
        **scores,
    }


def evaluate_splits(parts: Parts, splits: list[str], n: int, name: str) -> dict[str, dict]:
    """avg@n of a training run's policy, the questions shared between its processes.

    parts: plumbing.run.setup.Parts -> {split: summary}. Collective.
    """
    cfg, processes, summaries = parts.cfg, parts.processes, {}
    grade = partial(score, grader=parts.grader, kind=cfg.reward)
    for split in splits:
        data = parts.validation[split]
        questions = min(len(data), cfg.eval_questions)
        mine = [data[i] for i in range(processes.rank, questions, processes.world)]
        plan = Asking(n, (cfg.seed, name, split))
        answers = ask(mine, plan, parts.sampler, parts.processors, grade)
        records = processes.gather([r for records in answers for r in records])
        if not records:
            fail(f"{cfg.val_data}: no question of {split} can be asked; the warnings above say why")
        summaries[split] = summarise(records)
    return summaries


def eval_parser() -> Parser:
    """The command line."""
    p = Parser(__doc__)
    add = p.add_argument
    add("--model", help="a checkpoint folder, a hub name, or 'toy' for the warm start")
    sets = ", ".join(BENCHMARKS)
    add("--data", default="toy", help=f"toy, all, a hub name, a file, a folder, or some of {sets}")
    add("--data_root", help="where the released downloader put its files; default: the hub")
    add("--n", type=int, default=8, help="responses per question")
    add("--questions", type=int, help="questions per set; default: all, and 256 of the toy's")
    add("--seed", type=int, default=1, help="seed of the sampling")
    add("--sampler", choices=["vllm", "hf"], help="default: vllm where it can run, else hf")
    add("--max_response_tokens", type=int, help="responses are cut off here; default: as trained")
    add("--blind", action="store_true", help="every picture is black: what needs no picture")
    add(
        "--reward",
        choices=REWARDS,
        help="how answers are asked for and graded; default: as trained",
    )
    add("--columns", help="of rows: problem, answer and pictures; default: as trained")
    add("--out", help="JSON lines of every response; default: eval-<data>.jsonl beside the model")
    add("--compare", nargs=2, metavar="FILE", help="compare two files of responses; no model")
    add("--rescore", metavar="FILE", help="grade a file of responses again; no model")
    shaded = "n responses, their words shaded by how much they depend on the picture"
    add("--ask", nargs=2, metavar=("PICTURE", "QUESTION"), help=shaded)
    return p


def evaluate(args: Namespace) -> None:
    """Answer what is still to be answered, and print the table."""
    cuda, names = torch.cuda.is_available(), named_sets(args.data)
    asked = ("max_response_tokens", "reward", "columns")
    given = {k: getattr(args, k) for k in asked if getattr(args, k)}
    flags = {"model": args.model, "data": names[0], "sampler": args.sampler, "sleep": False}
    cfg, why = resolve({**flags, **as_trained(args.model), **given}, cuda)
    cfg.check(1, cuda)
    instruction, size = FORMS[cfg.reward].instruction, args.questions or 256
    sets = open_sets(names, size, cfg, instruction, args.data_root)
    folder = model_folder(args.model)
    processors = load_processors(folder, cfg)
    blind = "-blind" if args.blind else ""
    beside = Path("out") if args.model in TOYS else folder
    out = Path(args.out or beside / f"eval-{Path(args.data).stem}{blind}.jsonl")
    settings = {k: getattr(args, k) for k in "model data n questions seed blind".split()}
    same = "sampler temperature top_p max_prompt_tokens max_response_tokens min_pixels max_pixels"
    same += " hint_right reward"
    settings |= {"model": str(args.model)} | {k: getattr(cfg, k) for k in same.split()}
    may_write(out.parent)
    hold(out)
    done, cfg = answered(out, settings), replace(cfg, out=str(out.parent))
    alone, grader, sampler = Processes(alone=True), Grader(), None
    for key, data in sets.items():
        data = usable(data, processors, cfg.max_prompt_tokens, cfg, alone)
        known, whole = by_question(done.get(key, [])), range(len(data))[: args.questions]
        sets[key] = [e for e in map(data.__getitem__, whole) if e.id not in known]
    if any(sets.values()):
        sampler = lone_sampler(cfg, folder, processors)
    with open(out, "a", encoding="utf-8") as file:
        for key, examples in sets.items():
            plan = Asking(args.n, (args.seed, "eval", key), args.blind)
            grade = partial(score, grader=grader, kind=cfg.reward)
            for records in ask(examples, plan, sampler, processors, grade):
                records = [{"split": key, **r} for r in records]
                done.setdefault(key, []).extend(records)
                file.write(as_lines(records))
                file.flush()
    grader.close()
    if sampler:
        sampler.close()
    print(
        f"{args.model} on {args.data}: sampler {cfg.sampler} ({why['sampler']}), temperature "
        f"{cfg.temperature}, top_p {cfg.top_p}, at most {cfg.max_response_tokens} tokens, seed "
        f"{args.seed}, n = {args.n}" + (", every picture black" if args.blind else "")
    )
    print("\n".join(accuracy_table({key: summarise(done[key]) for key in sets if done.get(key)})))
    if empty := [key for key in sets if not done.get(key)]:
        fail(f"{', '.join(empty)}: no question can be asked; the warnings above say why")
    print(f"responses: {out}")


def main():
    """Evaluate, compare or rescore, as asked."""
    args = eval_parser().parse_args()
    if args.compare or args.rescore:
        from plumbing.report.compare import compare, rescore
    if args.compare:
        return print("\n".join(compare(*args.compare)))
    if args.rescore:
        again = args.out or f"{args.rescore.removesuffix('.jsonl')}-rescored.jsonl"
        return print("\n".join(rescore(args.rescore, again, args.reward or "official")))
    if not args.model:
        fail("--model is needed, or --compare or --rescore; see --help")
    if args.n < 1 or args.questions is not None and args.questions < 1:
        fail(f"--n {args.n} --questions {args.questions}: both must be at least 1")
    if args.ask:
        from plumbing.report.ask import show

        return show(args.model, args.ask, args.n, args.out)
    evaluate(args)


if __name__ == "__main__":
    main()
