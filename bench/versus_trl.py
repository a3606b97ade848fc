"""TRL's last PAPO trainer and ours, step for step in turn: the same model, questions, response
length, group size and loss terms.

    pip install trl==1.7.1 && python bench/versus_trl.py --out results/versus_trl.json

TRL 1.7.1 is the last release with a PAPO trainer. Both take one optimiser update a step on the same
number of responses, in float32 on the same threads, without checkpointing; EOS cannot be sampled,
so that all responses are of the same length. TRL scores the masked picture with a gradient, so ours
does too (ours, masked_grad, exact entropies with a gradient); the released code, our default, does
not (ours). Each of TRL's steps is followed by one of each of ours; the first three are not counted.
All of it is done once for each size of TRL's passes: its default, and the one that suits it best.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from shapes import build  # puts the project on the path

import train
from plumbing.config import resolve
from plumbing.families import VISUAL_TOKENS
from plumbing.setup import setup
from reward import boxed
from toy.task import FAMILIES, make

TRL = "TRL 1.7.1"


def questions(args):
    """As many as are needed, of the family whose prompts all have the same length: TRL's trainer
    fails on prompts of several lengths, since it pads the types of their tokens on the other side
    than the tokens."""
    examples = [
        make(0, "train", len(FAMILIES) * i + FAMILIES.index("where"))[0]
        for i in range(args.prompts * (args.steps + 3))
    ]
    for e in examples:
        e.images = [p.resize((args.enlarge * p.width, args.enlarge * p.height)) for p in e.images]
    return examples


def ours(folder, args):
    """-> {variant: step(number) -> (seconds, seconds without sampling)}"""
    cfg, _ = resolve(
        {
            "model": str(folder),
            "data": "toy",
            "sampler": "hf",
            "algo": "papo_g",
            "group_size": args.group,
            "lr": 1e-6,
            "beta": 0.01,
            "gamma": 0.02,
            "eta1": 0.03,
            "eta2": 0.03,
            "prompts_per_step": args.prompts,
            "prompts_per_update": args.prompts,
            "max_response_tokens": args.response,
        },
        False,
    )
    parts, progress = setup(cfg), train.Progress()
    parts.stream.examples = questions(args)
    for holder in (parts.policy, parts.reference, parts.sampler):
        holder.banned[parts.processors[0].eos_token_id] = True
    with_grad = replace(cfg, entropy="exact", masked_grad=True, recompute_masked=True)
    variants = {"ours": parts, "ours, masked_grad": replace(parts, cfg=with_grad)}

    def step(name):
        def one(number):
            progress.step = number
            start = time.perf_counter()
            metrics = train.train_step(variants[name], progress)
            seconds = time.perf_counter() - start
            return seconds, seconds - metrics["phases"]["rollout"]

        return one

    return {name: step(name) for name in variants}, len(parts.stream[0].ids)


def theirs(folder, args, batch, between):
    """Train with TRL in passes of `batch` responses, calling between(number) after each step
    -> [(seconds, seconds without sampling)]"""
    from datasets import Dataset
    from transformers import AutoProcessor, TrainerCallback
    from trl.experimental.papo import PAPOConfig, PAPOTrainer

    def rows():
        for example in questions(args):
            yield {
                "prompt": [{"role": "user", "content": example.problem.removeprefix("<image> ")}],
                "image": example.images[0],
                "answer": example.answer,
            }

    def reward(completions, answer, **_):
        return [float(boxed(c[0]["content"]) == a) for c, a in zip(completions, answer)]

    processor, sampling, times = AutoProcessor.from_pretrained(folder), [0.0], []
    # Else it samples one of them, and its next forward fails.
    visual = processor.tokenizer.convert_tokens_to_ids(VISUAL_TOKENS)

    class Timed(PAPOTrainer):
        def _generate(self, *a, **k):
            start = time.perf_counter()
            out = super()._generate(*a, **k)
            sampling[0] += time.perf_counter() - start
            return out

    class InTurn(TrainerCallback):
        def on_step_begin(self, *a, **k):
            self.start, sampling[0] = time.perf_counter(), 0.0

        def on_step_end(self, *a, **k):
            seconds = time.perf_counter() - self.start
            times.append((seconds, seconds - sampling[0]))
            between(len(times) - 1)

    with tempfile.TemporaryDirectory() as scratch:
        settings = PAPOConfig(
            scratch,
            use_cpu=True,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=args.prompts * args.group // batch,
            num_generations=args.group,
            max_completion_length=args.response,
            generation_kwargs={"min_new_tokens": args.response, "suppress_tokens": visual},
            temperature=1.0,
            max_steps=args.steps + 3,
            learning_rate=1e-6,
            beta=0.01,
            perception_loss_weight=0.02,
            mask_ratio=0.6,
            loss_type="dapo",
            gradient_checkpointing=False,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            model_init_kwargs={"dtype": "float32"},
        )
        trainer = Timed(
            str(folder),
            reward,
            settings,
            train_dataset=Dataset.from_generator(rows),
            callbacks=[InTurn()],
            processing_class=processor,
        )
        # on_step_begin comes after the batch is drawn but before it is generated, so a step is all
        # of it.
        trainer.train()
    return times


def in_turn(folder, args, batch):
    """Interleave -> (medians {variant: [seconds of a step, of training]}, tokens of a prompt)"""
    steps, prompt = ours(folder, args)
    times = {name: [] for name in steps}

    def between(number):
        for name in steps:
            times[name].append(steps[name](number))

    times[TRL] = theirs(folder, args, batch, between)
    medians = {
        n: [statistics.median(x[k] for x in t[3:]) for k in (0, 1)] for n, t in times.items()
    }
    return medians, prompt


def main():
    """Compare medians, for each size of TRL's passes."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument(
        "--trl_batch",
        type=int,
        nargs="+",
        default=[8, 128],
        help="responses in a pass of TRL's; 8 is its default, prompts * group its fastest here",
    )
    p.add_argument("--out", type=Path, help="a JSON file for the result")
    for name, default, text in [
        ("prompts", 16, "prompts per step"),
        ("group", 8, "G, responses per prompt"),
        ("response", 24, "tokens per response"),
        ("enlarge", 3, "how many times the width of the toy's pictures"),
        ("steps", 10, "timed steps"),
    ]:
        p.add_argument(f"--{name}", type=int, default=default, help=text)
    args = p.parse_args()
    found = {}
    for batch in args.trl_batch:
        with tempfile.TemporaryDirectory() as scratch:
            medians, prompt = in_turn(build("toy", scratch), args, batch)
        whole, training = medians[TRL]
        found[batch] = {
            name: {"seconds": [a, b], "times_as_fast": [whole / a, training / b]}
            for name, (a, b) in medians.items()
        }
        print(
            f"toy, CPU, {torch.get_num_threads()} threads: {args.prompts} prompts of {prompt} "
            f"tokens, G = {args.group}, responses of {args.response} tokens, one update a step; "
            f"TRL's passes of {batch} responses"
        )
        print(f"{'':<20}{'step':>10}{'training':>10}{'TRL / step':>12}{'TRL / training':>16}")
        for name, values in found[batch].items():
            (a, b), (x, y) = values.values()
            print(f"{name:<20}{a:>8.3f} s{b:>8.3f} s{x:>12.2f}{y:>16.2f}", flush=True)
    if args.out:
        about = {k: v for k, v in vars(args).items() if k != "out"}
        about |= {"prompt": prompt, "threads": torch.get_num_threads()}
        args.out.write_text(json.dumps({"settings": about, "by_trl_batch": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
