"""The warm start: the short supervised learning that brings the toy policy to where reinforcement
learning has something to do."""

import ast
import hashlib
import inspect
import json
import os
import random
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import sft
from loss import policy_logits, token_logprobs
from masking import black_row, choose_patches, mask_patches
from plumbing import packing
from plumbing.common import fail, generator
from plumbing.console import Bar, say
from plumbing.data import Example, encode
from plumbing.optimiser import Optimiser, constant
from plumbing.policy import Policy, in_place
from plumbing.processes import Processes
from plumbing.supervised import SftConfig
from toy.model import keep, new_policy, processor, tokenizer
from toy.task import FAMILIES, ask, describe, draw, random_board, respond

HINT_RIGHT = 0.5  # how often a hint of a lesson is right, whatever it will be in training
# The code by which a lesson is learned; what it computes is part of the policy that comes out.
SUPERVISED_STEP = (
    *(sft.update, Optimiser, constant, Policy, in_place, policy_logits, token_logprobs),
    *(packing.pack, packing.attention_mask, packing.may_attend),
)
FILES = ("task.py", "model.py", "lessons.py")  # where the lessons are
THREADS = 2  # rounding depends on their number, and a whole run then depends on the rounding


class Teacher(NamedTuple):
    """Who answers the questions of a lesson."""

    careless: float  # how often a fact is misread: a random one is written
    trusts: float  # how often the hint is repeated without a look at the picture
    masked: int  # one picture in so many is partly or wholly masked,
    least: float  # from this share of it to all of it


CAREFUL = Teacher(careless=0.0, trusts=0.0, masked=8, least=0.3)
# The two that can be last: what they do wrong is what reinforcement learning finds to mend.
CARELESS = Teacher(careless=0.5, trusts=0.0, masked=8, least=0.3)
TRUSTING = Teacher(careless=0.35, trusts=0.25, masked=4, least=0.5)


def lesson(index, questions, teacher=CAREFUL):
    """One picture of the warm start -> (Example up to the picture, [(question, answer), ...]), the
    last pair being a description of the picture."""
    rng = random.Random(f"warm/{index}")
    board, texts = random_board(rng, False), []

    def reader(truth, possible):
        return rng.choice(list(possible)) if rng.random() < teacher.careless else truth

    def trusts():
        # Who sees little falls back on the text: it makes the masked policy what the perception
        # loss is made for, one that still writes sense.
        return teacher.trusts and (is_masked(index, teacher) or rng.random() < teacher.trusts)

    while len(texts) < questions:
        question, solve = ask(FAMILIES[(index + len(texts)) % len(FAMILIES)], rng)
        solved, other = solve(board), solve(random_board(rng, False))
        if solved and other and solved[1] != other[1]:
            hint = solved[1] if rng.random() < HINT_RIGHT else other[1]
            told = f"a friend says {hint}"
            answer = respond(told, hint) if trusts() else respond(*solve(board, reader))
            texts.append((f"{told} . {question}", answer))
    texts.append(("describe the picture", describe(board)))
    return Example(f"warm-{index}", "<image>", "", [draw(board, rng)]), texts


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


def warm_start(vlm, processors, steps, last, pictures=16):
    """Supervised learning of chains of thought and dense descriptions, from three teachers in turn.

    The first (3/16 of the steps) only describes pictures: answers alone teach the language prior
    long before the vision tower learns to see. The second also answers four questions a picture.
    The third, `last`, has the last 1/7: it is careless or trusting, so that the policy knows more
    than it shows, as a pretrained model does: there is something for RL to bring out.

    The learning is sft.py's; here are its data and its schedule.
    """
    policy = Policy(vlm, torch.zeros(len(processors[0]), dtype=torch.bool))
    third, alone = steps * 6 // 7, Processes(alone=True)
    cfg = SftConfig(lr=2e-3, weight_decay=0.01)
    optimiser = Optimiser(policy, cfg, schedule(steps, third), betas=(0.9, 0.98))
    with Bar("toy warm start", steps, "steps") as bar:
        for step in range(steps):
            questions = 0 if step < steps * 3 // 16 else 4
            teacher = last if step >= third else CAREFUL
            indices = range(step * pictures, (step + 1) * pictures)
            rows = lesson_rows(indices, questions, teacher, policy, processors)
            loss, _, _ = sft.update([rows], rows.scored.sum().item(), policy, optimiser, alone)
            bar.update(note=f"loss {loss:.3f}")


def code_of(source):
    """Python source without what changes nothing: comments, docstrings, white space."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant):
                body[0].value.value = ""
    return ast.dump(tree)


def recipe(files, settings, config, image_processor, more=()):
    """A name for all that a warm-started policy depends on: its lessons, the model, the supervised
    step and the libraries that compute it. Comments are not part of it.

    files: those of toy/ that hold the lessons; settings: what they were called with; more: what has
    a part in it beside SUPERVISED_STEP.
    """
    import transformers

    here = Path(__file__).parent
    code = [code_of((here / name).read_text()) for name in files]
    code += [code_of(inspect.getsource(part)) for part in (*SUPERVISED_STEP, *more)]
    sizes = [json.dumps(x.to_dict(), sort_keys=True) for x in (config, image_processor)]
    everything = [*code, *sizes, *settings, torch.__version__, transformers.__version__]
    return hashlib.sha256(repr(everything).encode()).hexdigest()[:12]


def cached(name, parts, learn):
    """The folder of this name in the cache. If it is not there: learn(), which changes the first of
    parts, the model; then they are saved. The others are its tokenizer and image processor."""
    cache = Path(os.environ.get("PAPO_CACHE", Path.home() / ".cache" / "papo"))
    folder = cache / name
    if folder.is_dir():
        return folder
    once = f"the toy's policy first learns to read pictures: a few minutes, once, kept in {cache}"
    say(once, file=sys.stderr)
    threads = torch.get_num_threads()
    torch.set_num_threads(min(THREADS, os.cpu_count()))
    try:
        learn()
    except KeyboardInterrupt:
        fail("stopped while the toy's policy was learning to read; nothing of that is kept")
    torch.set_num_threads(threads)
    return keep(parts, folder)


def build(steps, name="toy", trust=True):
    """The warm-started toy policy as a Hugging Face folder, made once and kept in a cache.

    trust: whether its last teacher trusts hints; if not, it is careless only.
    """
    last = TRUSTING if trust else CARELESS
    tok, image_processor = tokenizer(), processor(name)
    vlm = new_policy(tok, name)
    key = recipe(FILES, (steps, last), vlm.config, image_processor)
    learn = partial(warm_start, vlm, (tok, image_processor), steps, last)
    return cached(f"{name}-{key}", (vlm, tok, image_processor), learn)
