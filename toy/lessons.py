"""The warm start: the short supervised learning that brings the toy policy to where reinforcement
learning has something to do.

    python -m toy.lessons out/warm                      # toy/warm/toy again, in minutes
    python -m toy.lessons out/warm --model toy-qwen3    # toy/warm/toy-qwen3
    python -m toy.lessons out/warm --seed 1             # another policy of the same kind
    python -m toy.lessons out/warm --coupled 0          # a masked picture leads to no hint

toy/warm/ holds what the first two made, so that every machine starts from the same weights;
toy/warm/README.md names the versions and the checksums.
"""

import os
import random
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from masking import black_row, choose_patches, mask_patches
from plumbing.base.common import Parser, fail, generator, may_write
from plumbing.base.console import Bar
from plumbing.base.optimizer import Optimizer, constant
from plumbing.data.prompts import Example, encode
from plumbing.models.families import TOYS
from policy import Policy
from toy.model import new_policy, processor, save_once, tokenizer
from toy.task import QUESTIONS, describe, draw_board, make_question, random_board, respond

HINT_RIGHT = 0.5  # how often a hint of a lesson is right, whatever it will be in training
THREADS = 2  # rounding depends on their number
STEPS, PICTURES = 480, 16  # updates, and pictures of each


class Teacher(NamedTuple):
    """Who answers the questions of a lesson."""

    careless: float  # how often a fact is misread: a random one is written
    trusts: float  # how often the hint is repeated without a look at the picture
    coupled: float  # how often a masked picture makes sure of that
    masked: int  # one picture in so many is partly or wholly masked,
    least: float  # from this share of it to all of it


CAREFUL = Teacher(careless=0.0, trusts=0.0, coupled=0.0, masked=8, least=0.3)
# The last one: what it does wrong is what reinforcement learning finds to mend.
TRUSTING = Teacher(careless=0.35, trusts=0.25, coupled=1.0, masked=4, least=0.5)


def lesson(index, questions, teacher=CAREFUL):
    """One picture of the warm start -> (Example up to the picture, [(question, answer), ...]), the
    last pair being a description of the picture."""
    rng = random.Random(f"warm/{index}")
    board, texts = random_board(rng, False), []

    def reader(truth, possible):
        return rng.choice(list(possible)) if rng.random() < teacher.careless else truth

    def trusts():
        # Who sees little falls back on the text, if coupled. It makes the masked policy what the
        # perception loss is made for, and decides how much that loss gains (docs/findings.md).
        led = is_masked(index, teacher) and 0 < teacher.coupled
        if led and (teacher.coupled == 1 or rng.random() < teacher.coupled):
            return True
        return teacher.trusts > 0 and rng.random() < teacher.trusts

    while len(texts) < questions:
        question, solve = make_question(QUESTIONS[(index + len(texts)) % len(QUESTIONS)], rng)
        solved, other = solve(board), solve(random_board(rng, False))
        if solved and other and solved[1] != other[1]:
            hint = solved[1] if rng.random() < HINT_RIGHT else other[1]
            told = f"a friend says {hint}"
            answer = respond(told, hint) if trusts() else respond(*solve(board, reader))
            texts.append((f"{told} . {question}", answer))
    texts.append(("describe the picture", describe(board)))
    return Example(f"warm-{index}", "<image>", "", [draw_board(board, rng)]), texts


def is_masked(index, teacher):
    """Is the picture of this lesson partly or wholly masked?"""
    return index % teacher.masked == teacher.masked - 1


def lesson_prompt(index, example, teacher, tok, image_processor):
    """The prompt of a lesson, cut off after its picture, which may be masked: so pi_mask is what it
    is in a large model, a policy that still writes sense, and guesses."""
    prompt = encode(example, tok, image_processor)
    end = (prompt.ids == tok.convert_tokens_to_ids("<|vision_end|>")).nonzero().item() + 1
    prompt.ids = prompt.ids[:end]
    if is_masked(index, teacher):
        share = random.Random(f"warm mask/{index}").random()
        ratio = teacher.least + (1 - teacher.least) * share
        named, unit = generator("warm mask", index), image_processor.merge_size**2
        chosen = choose_patches(len(prompt.pixels), ratio, named, unit)
        prompt.pixels = mask_patches(prompt.pixels, chosen, black_row(image_processor))
    return prompt


def lesson_rows(indices, questions, teacher, policy, processors):
    """The lessons of these indices as one batch of packed rows.

    Each picture is the shared prompt of a row whose "responses" are the questions with their
    answers, and the description; the answers are scored, the questions are not.
    """
    prompts, groups, scored, tok = [], [], [], processors[0]
    for index in indices:
        example, texts = lesson(index, questions, teacher)
        prompts.append(lesson_prompt(index, example, teacher, *processors))
        asked = [tok(f"{q} <|im_end|> <|im_start|> assistant")["input_ids"] for q, _ in texts]
        answered = [tok(f"{a} <|im_end|>")["input_ids"] for _, a in texts]
        pairs = list(zip(asked, answered))
        groups.append([torch.tensor(q + a) for q, a in pairs])
        scored.append([torch.arange(len(q + a)) >= len(q) for q, a in pairs])
    return policy.pack(prompts, groups, scored)


def schedule(steps, third):
    """Share of the learning rate by step: up, 1, and a straight line down to 0 from `third` on."""
    rising = constant(30)

    def share(step):
        return rising(step) if step < third else 0.5 * (steps - step) / (steps - third)

    return share


def learn(policy, rows, optimizer):
    """One supervised update on the answers of packed rows -> L = -1/N sum_t log pi(o_t)"""
    loss = -policy(rows, rows.pixels).logp.sum() / rows.scored.sum()
    loss.backward()
    optimizer.step(policy)
    return loss.item()


def warm_start(vlm, processors, steps=STEPS, lasts=(TRUSTING,), seed=0):
    """Supervised learning of chains of thought and dense descriptions, from three teachers in turn
    -> [a vlm for each of `lasts`]; the given one has seen the first two teachers only.

    The first (3/16 of the steps) only describes pictures: answers alone teach the language prior
    long before the vision tower learns to see. The second also answers four questions a picture.
    The third has the last 1/7: it is careless and trusting, so that the policy knows more than it
    shows, as a pretrained model does: there is something for RL to bring out.
    """
    policy = Policy(vlm, torch.zeros(len(processors[0]), dtype=torch.bool))
    third = steps * 6 // 7
    settings = SimpleNamespace(lr=2e-3, weight_decay=0.01, max_grad_norm=1.0)
    optimizer = Optimizer(policy, settings, schedule(steps, third), betas=(0.9, 0.98))

    def learn_from(teacher, first, end, policy, optimizer):
        for step in range(first, end):
            questions = 0 if step < steps * 3 // 16 else 4
            start = (seed * steps + step) * PICTURES
            indices = range(start, start + PICTURES)
            rows = lesson_rows(indices, questions, teacher, policy, processors)
            bar.update(note=f"loss {learn(policy, rows, optimizer):.3f}")
        return policy.vlm

    with Bar("toy warm start", third + len(lasts) * (steps - third), "steps") as bar:
        learn_from(CAREFUL, 0, third, policy, optimizer)
        pairs = [(last, *deepcopy((policy, optimizer))) for last in lasts]
        return [learn_from(last, third, steps, *pair) for last, *pair in pairs]


def build(folder, name="toy", steps=STEPS, last=TRUSTING, seed=0):
    """Warm-start a toy policy and save it, in half precision, as a Hugging Face folder -> folder"""
    return build_all({folder: last}, name, steps, seed)[0]


def build_all(lasts, name="toy", steps=STEPS, seed=0):
    """{folder: its last teacher}, all else being shared -> the folders, as build makes them"""
    tok, image_processor = tokenizer(), processor(name)
    vlm = new_policy(tok, name, seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(min(THREADS, os.cpu_count()))
    try:
        made = warm_start(vlm, (tok, image_processor), steps, lasts.values(), seed)
    finally:
        torch.set_num_threads(threads)
    parts = tok, image_processor
    return [save_once((vlm.half(), *parts), folder) for vlm, folder in zip(made, lasts)]


def main():
    """Make a warm start, as asked, and say where it is."""
    p = Parser(__doc__)
    p.add_argument("out", type=Path, help="the folder to write")
    p.add_argument("--model", default="toy", choices=TOYS)
    p.add_argument("--steps", default=STEPS, type=int, help="supervised updates")
    p.add_argument("--seed", default=0, type=int, help="of the weights and the lessons")
    shares = "trusts", "coupled"  # of the last teacher
    for name, when in zip(shares, ("without a look", "since the picture is masked")):
        share, says = getattr(TRUSTING, name), f"how often the last teacher repeats a hint {when}"
        p.add_argument(f"--{name}", default=share, type=float, help=f"{says} [{share}]")
    args = p.parse_args()
    last = TRUSTING._replace(**{name: getattr(args, name) for name in shares})
    if not all(0 <= share <= 1 for share in last[1:3]):
        fail(f"--trusts {last.trusts} --coupled {last.coupled}: both must lie between 0 and 1")
    if args.out.exists():
        fail(f"{args.out} is there already; give the new warm start a folder of its own")
    may_write(args.out.parent)
    build(args.out, args.model, args.steps, last, args.seed)
    print(f"written: {args.out}; train.py --data toy --model {args.out} goes on from there")


if __name__ == "__main__":
    main()
