"""avg@n on a data set: the same prompts, pictures and sampling as training.

    python eval.py --model out/toy-papo_g/checkpoint-100 --data toy --n 8

prints accuracy per split with a 95 % interval (bootstrap over questions) and writes one JSON line per response.
"""
import argparse
import json
import math
import random
from pathlib import Path

import torch
from tqdm import tqdm

from config import check, fail, resolve
from data import encode, load
from model import DTYPES, banned_tokens, load_processors, load_vlm, resolve_folder
from reward import Grader, compute_score
from rollout import build_sampler


def evaluate(sampler, examples, tok, image_processor, n, name, score, chunk=64, rounds=None, progress=True):
    """Sample n responses to each example; score(text, answer) each -> one record a response (a dict, ready for JSON).

    rounds: how many chunks to ask for where other processes have more of them (an engine shared by several waits for all)."""
    records = []
    with tqdm(total=len(examples) * n, desc=f"eval {name[-1]}", unit="response", disable=not progress, leave=False) as bar:
        for start in range(0, (rounds or math.ceil(len(examples) / chunk)) * chunk, chunk):
            batch = examples[start:start + chunk]
            prompts = [encode(e, tok, image_processor) for e in batch]
            rollouts = sampler.generate(prompts, n, [(*name, e.id) for e in batch])
            for example, rollout in zip(batch, rollouts):
                for g in range(n if rollout else 0):
                    records.append({"id": example.id, "prompt": example.problem, "predict": rollout.texts[g],
                                    "label": example.answer, "tokens": len(rollout.tokens[g]),
                                    "finished": rollout.finished[g], **example.tags,
                                    **score(rollout.texts[g], example.answer)})
            bar.update(len(batch) * n)
    return records


def summarise(records, resamples=1000):
    """Records of one split -> avg@n accuracy with a 95 % bootstrap interval over questions, and other means."""
    by_question = {}
    for r in records:
        by_question.setdefault(r["id"], []).append(r["accuracy"])
    means = [sum(v) / len(v) for v in by_question.values()]
    draw = random.Random(0)
    boots = sorted(sum(draw.choices(means, k=len(means))) / len(means) for _ in range(resamples))
    mean = {k: sum(r[k] for r in records) / len(records) for k in ("format", "finished", "tokens")}
    return {"accuracy": sum(means) / len(means), "low": boots[int(0.025 * resamples)], "high": boots[int(0.975 * resamples)],
            "format": mean["format"], "cut_off": 1 - mean["finished"], "tokens": mean["tokens"],
            "questions": len(means), "n": len(records) // len(means)}


def evaluate_splits(run, splits, n, name):
    """avg@n of a training run's policy, the questions shared between its processes -> {split: summary}"""
    summaries = {}
    for split in splits:
        data, chunk = load(run.cfg.data, split, run.cfg.eval_questions, 0), 64
        questions = min(len(data), run.cfg.eval_questions)
        mine = [data[i] for i in range(run.rank, questions, run.world)]
        records = evaluate(run.sampler, mine, run.tok, run.image_processor, n, (run.cfg.seed, name, split), run.score, chunk,
                           math.ceil(questions / run.world / chunk), run.rank == 0)
        summaries[split] = summarise(run.gather(records))
    return summaries


def table(summaries):
    """{split: summary} -> lines of a text table."""
    lines = [f"{'split':<12}{'avg@n':>8}{'95 % interval':>18}{'format':>9}{'cut off':>9}{'tokens':>8}"]
    for split, s in summaries.items():
        interval = f"{100 * s['low']:.1f} .. {100 * s['high']:.1f}"
        lines.append(f"{split:<12}{100 * s['accuracy']:>8.1f}{interval:>18}{100 * s['format']:>8.1f}%"
                     f"{100 * s['cut_off']:>8.1f}%{s['tokens']:>8.1f}")
    return lines


def splits_of(data):
    """The splits an evaluation of this data set reports."""
    if data == "toy":
        from toy import SPLITS
        return SPLITS
    return ["test"]


def main():
    """The command line of an evaluation."""
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n\n")[0])
    p.error = lambda message: fail(f"{message}; see --help")
    p.add_argument("--model", required=True, help="a checkpoint folder, a hub name, or 'toy' for the warm start")
    p.add_argument("--data", default="toy", help="'toy', a hub name, or a parquet, json or jsonl file")
    p.add_argument("--n", type=int, default=8, help="responses per question")
    p.add_argument("--questions", type=int, default=256, help="questions per split")
    p.add_argument("--seed", type=int, default=1, help="seed of the sampling")
    p.add_argument("--sampler", choices=["vllm", "hf"], help="default: vllm where an engine can run, else hf (transformers)")
    p.add_argument("--out", help="JSON lines of every response; default: eval-<data>.jsonl in the model folder")
    args = p.parse_args()
    if args.n < 1 or args.questions < 1:
        fail(f"--n {args.n} --questions {args.questions}: both must be at least 1")
    cuda = torch.cuda.is_available()
    cfg, why = resolve({"model": args.model, "data": args.data, "eval_n": args.n, "eval_questions": args.questions,
                        "sampler": args.sampler, "sleep": 0}, cuda)
    check(cfg, 1)
    folder = resolve_folder(args.model, cfg.warm_steps)
    tok, image_processor = load_processors(folder, cfg)
    vlm = load_vlm(folder, DTYPES[cfg.dtype]).to("cuda" if cuda else "cpu") if cfg.sampler == "hf" else None
    sampler, grader = build_sampler(cfg, folder, vlm, tok, image_processor, banned_tokens(folder, tok), 1), Grader()
    out = Path(args.out) if args.out else folder / f"eval-{Path(args.data).stem}.jsonl"
    summaries, lines = {}, []
    for split in splits_of(args.data):
        data = load(args.data, split, args.questions, seed=0)
        examples = [data[i] for i in range(min(args.questions, len(data)))]
        records = evaluate(sampler, examples, tok, image_processor, args.n, (args.seed, "eval", split),
                           lambda text, answer: compute_score(text, answer, grader, cfg.reward))
        summaries[split] = summarise(records)
        lines += [json.dumps({"split": split, **r}) for r in records]
    grader.close()
    sampler.close()
    out.write_text("\n".join(lines) + "\n")
    print(f"{args.model} on {args.data}: sampler {cfg.sampler} ({why['sampler']}), temperature {cfg.temperature}, top_p {cfg.top_p}, at most "
          f"{cfg.max_response_tokens} tokens, seed {args.seed}, {args.questions} questions a split, n = {args.n}")
    print("\n".join(table(summaries)))
    print(f"responses: {out}")


if __name__ == "__main__":
    main()
