"""TRL's last PAPO trainer and ours, step for step in turn: the same model, questions, response
length, group size and loss terms.

    pip install -r requirements.txt trl==1.7.1 requests && python bench/versus_trl.py

TRL 1.7.1 is the last release with a PAPO trainer. Both take one optimizer update a step on the same
number of responses, in float32 on the same threads, without checkpointing; EOS cannot be sampled,
so that all responses are of the same length. TRL scores the masked picture with a gradient, so ours
does too (ours, masked_grad, exact entropies with a gradient); the released code, our default, does
not (ours). Each of TRL's steps is followed by one of each of ours; the first three are not counted.
All of it is done once for each size of TRL's passes: its default, and the one that suits it best.
Prints a table of medians, and one JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial

import torch
from shapes import random_model  # puts the project on the path

import train
from plumbing.base.common import fail, first_line
from plumbing.models.families import VISUAL_TOKENS
from plumbing.run.config import resolve
from plumbing.run.setup import setup
from reward import boxed
from toy.task import QUESTIONS, make

TRL, WARM_UP = "TRL 1.7.1", 3


def check_installed():
    """End with a sentence where TRL's trainer cannot be imported. It imports requests without
    asking for it, and transformers' processor wants a torchvision that was built for this torch."""
    try:
        import requests  # noqa: F401
        import torchvision  # noqa: F401
        import trl.experimental.papo  # noqa: F401
    except (ImportError, RuntimeError) as error:
        install = "pip install -r requirements.txt trl==1.7.1 requests"
        fail(
            f"this needs TRL 1.7.1 beside all of requirements.txt ({first_line(error)}): {install}"
        )


def questions(args):
    """As many as are needed, of the family whose prompts have one length: TRL's trainer fails on
    others, since it pads the types of their tokens on the other side than the tokens."""
    count, where = args.prompts * (args.steps + WARM_UP), QUESTIONS.index("where")
    examples = [make(0, "train", len(QUESTIONS) * i + where)[0] for i in range(count)]
    for e in examples:
        e.images = [p.resize((args.enlarge * p.width, args.enlarge * p.height)) for p in e.images]
    return examples


def ours(folder, args):
    """-> ({variant: step(number) -> (seconds, seconds without sampling)}, tokens of a prompt)"""
    flags = dict(model=str(folder), data="toy", sampler="hf", algo="papo_g", group_size=args.group)
    flags |= dict(lr=1e-6, beta=0.01, gamma=0.02, eta1=0.03, eta2=0.03)
    flags |= dict(prompts_per_step=args.prompts, prompts_per_update=args.prompts)
    parts = setup(resolve(flags | dict(max_response_tokens=args.response), cuda=False)[0])
    parts.stream.examples, progress = questions(args), train.Progress()
    for holder in (parts.policy, parts.reference, parts.sampler):
        holder.banned[parts.processors[0].eos_token_id] = True
    with_grad = replace(parts.cfg, entropy="exact", masked_branch="grad")
    variants = {"ours": parts, "ours, masked_grad": replace(parts, cfg=with_grad)}

    def step(name, number):
        progress.step, start = number, time.perf_counter()
        metrics = train.train_step(variants[name], progress)
        seconds = time.perf_counter() - start
        return seconds, seconds - metrics["phases"]["rollout"]

    return {name: partial(step, name) for name in variants}, len(parts.stream[0].ids)


def theirs(folder, args, batch, between):
    """Train with TRL in passes of `batch` responses, calling between(number) after each step
    -> [(seconds, seconds without sampling)]"""
    from datasets import Dataset
    from transformers import AutoProcessor, TrainerCallback
    from trl.experimental.papo import PAPOConfig, PAPOTrainer

    def rows():
        for example in questions(args):
            prompt = [{"role": "user", "content": example.problem.removeprefix("<image> ")}]
            yield {"prompt": prompt, "image": example.images[0], "answer": example.answer}

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
        # It is called after the batch is drawn but before it is generated: a step is all of it.
        def on_step_begin(self, *a, **k):
            self.start, sampling[0] = time.perf_counter(), 0.0

        def on_step_end(self, *a, **k):
            seconds = time.perf_counter() - self.start
            times.append((seconds, seconds - sampling[0]))
            between(len(times) - 1)

    settings = dict(beta=0.01, perception_loss_weight=0.02, mask_ratio=0.6, loss_type="dapo")
    settings |= dict(learning_rate=1e-6, max_steps=args.steps + WARM_UP)
    settings |= dict(per_device_train_batch_size=batch, num_generations=args.group)
    settings |= dict(gradient_accumulation_steps=args.prompts * args.group // batch)
    settings |= dict(max_completion_length=args.response, temperature=1.0)
    settings |= dict(generation_kwargs={"min_new_tokens": args.response, "suppress_tokens": visual})
    settings |= dict(use_cpu=True, bf16=False, model_init_kwargs={"dtype": "float32"})
    settings |= dict(gradient_checkpointing=False, report_to=[], disable_tqdm=True)
    settings |= dict(save_strategy="no", logging_strategy="no")
    with tempfile.TemporaryDirectory() as scratch:
        more = dict(train_dataset=Dataset.from_generator(rows), callbacks=[InTurn()])
        more |= dict(processing_class=processor)
        Timed(str(folder), reward, PAPOConfig(scratch, **settings), **more).train()
    return times


def in_turn(folder, args, batch):
    """Interleave -> (medians {variant: [seconds of a step, of training]}, tokens of a prompt)"""
    steps, prompt = ours(folder, args)
    times = {name: [] for name in steps}

    def between(number):
        for name in steps:
            times[name].append(steps[name](number))

    times[TRL] = theirs(folder, args, batch, between)
    counted = {name: zip(*found[WARM_UP:]) for name, found in times.items()}
    return {name: [*map(statistics.median, pair)] for name, pair in counted.items()}, prompt


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    text = "responses in a pass of TRL's; 8 is its default, prompts * group its fastest here"
    p.add_argument("--trl_batch", type=int, nargs="+", default=[8, 128], help=text)
    for name, default, text in [
        ("prompts", 16, "prompts per step"),
        ("group", 8, "G, responses per prompt"),
        ("response", 24, "tokens per response"),
        ("enlarge", 3, "how many times the width of the toy's pictures"),
        ("steps", 10, "timed steps"),
    ]:
        p.add_argument(f"--{name}", type=int, default=default, help=text)
    args = p.parse_args()
    check_installed()
    found = {}
    for batch in args.trl_batch:
        with tempfile.TemporaryDirectory() as scratch:
            medians, prompt = in_turn(random_model("toy", scratch), args, batch)
        whole, training = medians[TRL]
        found[batch] = {
            name: {"seconds": [a, b], "times_as_fast": [whole / a, training / b]}
            for name, (a, b) in medians.items()
        }
        print(f"{f'passes of {batch}':<20}      step  training  TRL / step  TRL / training")
        for name, values in found[batch].items():
            (a, b), (x, y) = values.values()
            print(f"{name:<20}{a:>8.3f} s{b:>8.3f} s{x:>12.2f}{y:>16.2f}", flush=True)
    about = vars(args) | {"prompt": prompt, "threads": torch.get_num_threads()}
    print(json.dumps({"settings": about, "by_trl_batch": found}))


if __name__ == "__main__":
    main()
