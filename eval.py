"""avg@n on data sets: the same prompts, pictures and sampling as training.

    python eval.py --model out/toy-papo_g/checkpoint-100 --data toy --n 8          # or --data geo3k,mathvista | all | file.jsonl
    python eval.py --compare grpo.jsonl papo.jsonl                                 # the same questions answered twice: a paired test, a chart
    python eval.py --rescore papo.jsonl                                            # grade saved responses again, without a model

Writes one JSON line a response (id, prompt, predict and label as the released evaluation's scorer reads them), and goes on where it
stopped when it is called again. Averages over sets are the paper's: every set weighs the same (Table 1).
"""
import argparse
import json
import math
import random
from pathlib import Path

import torch
from tqdm import tqdm

from config import check, fail, resolve
from data import BENCHMARKS, Rows, Selection, encode_all, load
from model import DTYPES, banned_tokens, load_processors, load_vlm, resolve_folder
from report import left_out, write_atomically
from reward import Grader, compute_score
from rollout import build_sampler

CHUNK = 64                               # questions that are sampled together


def evaluate(sampler, examples, tok, image_processor, n, name, score, rounds=None, progress=True, blind=False):
    """Sample n responses to each example; yield a list of records (dicts ready for JSON, one a response) for each CHUNK examples.

    score(text, answer) -> dict. blind: every picture is black. rounds: how many chunks to ask for where other processes have more
    of them (an engine shared by several waits for all)."""
    with tqdm(total=len(examples) * n, desc=f"eval {name[-1]}", unit="response", disable=not progress, leave=False) as bar:
        for start in range(0, (rounds or math.ceil(len(examples) / CHUNK)) * CHUNK, CHUNK):
            batch = examples[start:start + CHUNK]
            prompts = encode_all(batch, tok, image_processor, blind)
            rollouts = sampler.generate(prompts, n, [(*name, p.example.id) for p in prompts])
            yield [{"id": p.example.id, "prompt": p.example.problem, "predict": r.texts[g], "label": p.example.answer, "tokens": len(r.tokens[g]),
                    "finished": r.finished[g], **p.example.tags, **score(r.texts[g], p.example.answer)}
                   for p, r in zip(prompts, rollouts) if r for g in range(n)]
            bar.update(len(batch) * n)


def by_question(records):
    """Records -> {question: [accuracy of each response]}"""
    questions = {}
    for r in records:
        questions.setdefault(r["id"], []).append(r["accuracy"])
    return questions


def summarise(records, resamples=1000):
    """Records of one set -> avg@n accuracy with a 95 % bootstrap interval over questions, pass@n, and other means."""
    questions = by_question(records)
    means = [sum(v) / len(v) for v in questions.values()]
    draw = random.Random(0)
    boots = sorted(sum(draw.choices(means, k=len(means))) / len(means) for _ in range(resamples))
    mean = {k: sum(r[k] for r in records) / len(records) for k in ("format", "finished", "tokens")}
    return {"accuracy": sum(means) / len(means), "low": boots[int(0.025 * resamples)], "high": boots[int(0.975 * resamples)],
            "pass": sum(max(v) == 1 for v in questions.values()) / len(questions), "format": mean["format"], "cut_off": 1 - mean["finished"],
            "tokens": mean["tokens"], "questions": len(means), "n": len(records) // len(means)}


def macro(values):
    """{set: value} -> the paper's averages over sets, {General, Vision, Overall: mean}, of those columns of which all sets are there."""
    columns = {"General": [s for s, (_, _, c) in BENCHMARKS.items() if c == "general"],
               "Vision": [s for s, (_, _, c) in BENCHMARKS.items() if c == "vision"], "Overall": list(BENCHMARKS)}
    return {name: sum(values[s] for s in sets) / len(sets) for name, sets in columns.items() if all(s in values for s in sets)}


def relative_gain(before, after):
    """{set: accuracy} twice -> {set: gain in per cent of `before`}; the paper's Delta_rel is the mean of these over sets."""
    return {s: 100 * (after[s] - before[s]) / before[s] for s in before if s in after and before[s] > 0}


def paired_test(a, b, resamples=10_000):
    """The same questions answered by two models. a, b: {question: mean accuracy} -> (mean difference b - a, low, high, p)

    The interval is a bootstrap over questions; p is the share of random sign flips of the differences with a mean at least as far from 0
    (two-sided). Raises ValueError if they share no question."""
    shared = [q for q in a if q in b]
    if not shared:
        raise ValueError("the two files share no question")
    d = torch.tensor([b[q] - a[q] for q in shared], dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    boots, flips, step = [], [], max(1, 2_000_000 // len(d))
    for start in range(0, resamples, step):                                      # a slice at a time: (resamples, questions) may be large
        k = min(step, resamples - start)
        boots.append(d[torch.randint(len(d), (k, len(d)), generator=g)].mean(1))
        flips.append((d * (2.0 * torch.randint(2, (k, len(d)), generator=g) - 1)).mean(1))
    boots, flips = torch.cat(boots).sort().values, torch.cat(flips)
    p = ((flips.abs() >= d.mean().abs() - 1e-12).sum().item() + 1) / (resamples + 1)
    return d.mean().item(), boots[int(0.025 * resamples)].item(), boots[int(0.975 * resamples)].item(), p


def evaluate_splits(run, splits, n, name):
    """avg@n of a training run's policy, the questions shared between its processes -> {split: summary}"""
    summaries = {}
    for split in splits:
        data = run.validation(split)
        questions = min(len(data), run.cfg.eval_questions)
        mine = [data[i] for i in range(run.rank, questions, run.world)]
        chunks = evaluate(run.sampler, mine, run.tok, run.image_processor, n, (run.cfg.seed, name, split), run.score,
                          math.ceil(questions / run.world / CHUNK), run.rank == 0)
        summaries[split] = summarise(run.gather([r for records in chunks for r in records]))
    return summaries


def table(summaries):
    """{set: summary} -> lines of a text table, with the paper's averages where all their sets are there."""
    lines = [f"{'set':<12}{'avg@n':>8}{'95 % interval':>18}{'pass@n':>9}{'format':>9}{'cut off':>9}{'tokens':>8}{'questions':>11}"]
    for name, s in summaries.items():
        interval = f"{100 * s['low']:.1f} .. {100 * s['high']:.1f}"
        lines.append(f"{name:<12}{100 * s['accuracy']:>8.1f}{interval:>18}{100 * s['pass']:>9.1f}{100 * s['format']:>8.1f}%"
                     f"{100 * s['cut_off']:>8.1f}%{s['tokens']:>8.1f}{s['questions']:>11}")
    return lines + [f"{name:<12}{100 * value:>8.2f}" for name, value in macro({k: s["accuracy"] for k, s in summaries.items()}).items()]


def splits_of(data):
    """The splits an evaluation of this data set reports."""
    if data == "toy":
        from toy import SPLITS
        return SPLITS
    return ["test"]


def as_lines(records):
    """Records -> text, one JSON line each."""
    return "".join(json.dumps(r) + "\n" for r in records)


def read(path):
    """A file of responses -> {set: records}; a line cut short by a crash is ignored."""
    sets = {}
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror})")
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        sets.setdefault(record["split"], []).append(record)
    return sets


def compare(first, second, chart):
    """Two files of responses to the same questions -> lines of a table; draws the bars."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    a, b = ({s: {q: sum(v) / len(v) for q, v in by_question(r).items()} for s, r in read(path).items()} for path in (first, second))
    lines = [f"{'set':<12}{'first':>8}{'second':>8}{'gain':>8}{'95 % interval':>18}{'p':>8}{'relative':>10}"]
    shared, means = [s for s in a if s in b], []
    for s in shared:
        if not set(a[s]) & set(b[s]):
            fail(f"{first} and {second} share no question of {s}")
        difference, low, high, p = paired_test(a[s], b[s])
        both = [q for q in a[s] if q in b[s]]
        means.append([sum(x[s][q] for q in both) / len(both) for x in (a, b)])
        relative = f"{100 * difference / means[-1][0]:+.2f} %" if means[-1][0] else "-"
        lines.append(f"{s:<12}{100 * means[-1][0]:>8.2f}{100 * means[-1][1]:>8.2f}{100 * difference:>+8.2f}"
                     f"{f'{100 * low:+.2f} .. {100 * high:+.2f}':>18}{p:>8.4f}{relative:>10}")
    if not shared:
        fail(f"{first} and {second} share no set")
    before, after = ({s: m[k] for s, m in zip(shared, means)} for k in (0, 1))
    gains = macro(relative_gain(before, after))
    for name, value in macro(before).items():
        lines.append(f"{name:<12}{100 * value:>8.2f}{100 * macro(after)[name]:>8.2f}{100 * (macro(after)[name] - value):>+8.2f}{'':>26}"
                     + (f"{gains[name]:+.2f} %".rjust(10) if name in gains else ""))
    figure, axis = plt.subplots(figsize=(max(4, 1.2 * len(shared)), 3.5), constrained_layout=True)
    for k, path in enumerate((first, second)):
        axis.bar([i + 0.4 * k for i in range(len(shared))], [100 * m[k] for m in means], 0.4, label=Path(path).stem)
    axis.set(xticks=[i + 0.2 for i in range(len(shared))], xticklabels=shared, ylabel="avg@n (%)")
    axis.legend()
    figure.savefig(chart, dpi=100)
    return lines + [f"chart: {chart}"]


def rescore(path, out):
    """Grade the responses of a file again (overall as released) -> lines of a table; writes them to out."""
    sets, grader = read(path), Grader()
    for records in sets.values():
        for r in tqdm(records, desc="grading", unit="response"):
            r |= compute_score(r["predict"], r["label"], grader)
    grader.close()
    write_atomically(Path(out), as_lines(r for records in sets.values() for r in records))
    return [*table({s: summarise(r) for s, r in sets.items()}), f"responses: {out}"]


def answered(out, settings):
    """What a stopped evaluation left in its file: {set: records} of the questions that are whole. Ends with a sentence if it was another one's."""
    sets, about = {}, out.with_name(f"{out.stem}.settings.json")
    if out.exists() and about.exists():
        before = json.loads(about.read_text())
        if before != settings:
            changed = [f"{k} ({before.get(k)!r} then, {settings[k]!r} now)" for k in settings if before.get(k) != settings[k]]
            fail(f"{out} holds another evaluation: {', '.join(changed)}; give another --out")
        sets = read(out)
    elif out.exists():
        fail(f"{out} exists, but {about.name}, which says what it holds, does not; give another --out")
    for s, records in sets.items():
        questions = by_question(records)
        sets[s] = [r for r in records if len(questions[r["id"]]) == settings["n"]]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(about, json.dumps(settings, indent=1))
    write_atomically(out, as_lines(r for records in sets.values() for r in records))
    return sets


def as_trained(folder):
    """Sampling, limits and columns of the run that a checkpoint folder belongs to; {} for any other model."""
    about = Path(folder).parent / "config.json"
    if not Path(folder).name.startswith("checkpoint-") or not about.exists():
        return {}
    cfg = json.loads(about.read_text())["config"]
    return {k: cfg[k] for k in ("temperature", "top_p", "max_prompt_tokens", "max_response_tokens", "min_pixels", "max_pixels", "dtype", "reward",
                                "problem_column", "answer_column", "images_column")}


def parser():
    """The command line."""
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: fail(f"{message}; see --help")
    p.add_argument("--model", help="a checkpoint folder, a hub name, or 'toy' for the warm start")
    p.add_argument("--data", default="toy", help=f"toy, all, or several with commas of {', '.join(BENCHMARKS)}, a hub name, a file or a folder")
    p.add_argument("--data_root", help="folder with papo/<set>.json and images/, as the released downloader fills it; default: the hub")
    p.add_argument("--n", type=int, default=8, help="responses per question")
    p.add_argument("--questions", type=int, help="questions per set; default: all, and 256 of the toy's")
    p.add_argument("--seed", type=int, default=1, help="seed of the sampling")
    p.add_argument("--sampler", choices=["vllm", "hf"], help="default: vllm where an engine can run, else hf (transformers)")
    p.add_argument("--max_response_tokens", type=int, help="responses are cut off here; default: as in training")
    p.add_argument("--blind", action="store_true", help="every picture is black: what is scored without seeing")
    p.add_argument("--strict", action="store_true", help="stop at the first row that cannot be used, instead of leaving such rows out")
    p.add_argument("--out", help="JSON lines of every response; default: eval-<data>.jsonl in the model folder")
    p.add_argument("--compare", nargs=2, metavar="FILE", help="compare two files of responses; needs no model")
    p.add_argument("--rescore", metavar="FILE", help="grade a file of responses again; needs no model")
    return p


def main():
    """Evaluate, compare or rescore, as asked."""
    args = parser().parse_args()
    if args.compare:
        return print("\n".join(compare(*args.compare, args.out or "compare.png")))
    if args.rescore:
        return print("\n".join(rescore(args.rescore, args.out or f"{args.rescore.removesuffix('.jsonl')}-rescored.jsonl")))
    if not args.model:
        fail("--model is needed, or --compare or --rescore; see --help")
    if args.n < 1 or args.questions is not None and args.questions < 1:
        fail(f"--n {args.n} --questions {args.questions}: both must be at least 1")
    cuda, names = torch.cuda.is_available(), list(BENCHMARKS) if args.data == "all" else args.data.split(",")
    limits = {"max_response_tokens": args.max_response_tokens} if args.max_response_tokens else {}
    cfg, why = resolve({"model": args.model, "data": names[0], "sampler": args.sampler, "sleep": 0, **as_trained(args.model), **limits}, cuda)
    check(cfg, 1, cuda)
    folder = resolve_folder(args.model, cfg.warm_steps)
    tok, image_processor = load_processors(folder, cfg)
    out = Path(args.out) if args.out else folder / f"eval-{Path(args.data).stem}{'-blind' if args.blind else ''}.jsonl"
    settings = {"model": str(args.model), "data": args.data, "n": args.n, "questions": args.questions, "seed": args.seed, "blind": args.blind,
                **{k: getattr(cfg, k) for k in ("sampler", "temperature", "top_p", "max_prompt_tokens", "max_response_tokens", "min_pixels", "max_pixels")}}
    done = answered(out, settings)
    sets = {}
    for name in names:
        for split in splits_of(name):
            data = load(name, split, args.questions or 256, 0, (cfg.problem_column, cfg.answer_column, cfg.images_column), args.data_root)
            if isinstance(data, Rows):
                faults = data.faults(tok, image_processor, cfg.max_prompt_tokens)
                left_out(out.parent, data, faults, args.strict)
                if name in BENCHMARKS and len(data) != BENCHMARKS[name][1]:
                    print(f"note: {name} has {len(data)} questions here, and {BENCHMARKS[name][1]} in the paper")
                data = Selection(data, faults)
            key = split if name == "toy" else name if name in BENCHMARKS else Path(name).stem
            if key in sets:
                fail(f"two sets are called {key}; evaluate them one at a time")
            known, whole = by_question(done.get(key, [])), range(min(args.questions or len(data), len(data)))
            sets[key] = [e for e in (data[i] for i in whole) if e.id not in known]
    vlm = load_vlm(folder, DTYPES[cfg.dtype]).to("cuda" if cuda else "cpu") if cfg.sampler == "hf" and any(sets.values()) else None
    sampler = build_sampler(cfg, folder, vlm, tok, image_processor, banned_tokens(folder, tok)) if any(sets.values()) else None
    grader = Grader()
    with open(out, "a") as file:
        for key, examples in sets.items():
            for records in evaluate(sampler, examples, tok, image_processor, args.n, (args.seed, "eval", key),
                                    lambda text, answer: compute_score(text, answer, grader, cfg.reward), blind=args.blind):
                records = [{"split": key, **r} for r in records]
                done.setdefault(key, []).extend(records)
                file.write(as_lines(records))
                file.flush()
    grader.close()
    if sampler:
        sampler.close()
    print(f"{args.model} on {args.data}: sampler {cfg.sampler} ({why['sampler']}), temperature {cfg.temperature}, top_p {cfg.top_p}, at most "
          f"{cfg.max_response_tokens} tokens, seed {args.seed}, n = {args.n}" + (", every picture black" if args.blind else ""))
    print("\n".join(table({key: summarise(done[key]) for key in sets if done.get(key)})))
    print(f"responses: {out}")


if __name__ == "__main__":
    main()
