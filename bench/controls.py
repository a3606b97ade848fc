"""What a reviewer asks paper_on_a_laptop.py to rule out, as a fork of train.py: other training
data, other perception terms, other credit, and details of docs/details.md done another way. None of
it is meant for use.

    python bench/controls.py --algo papo_g --pictures black     # every flag of train.py, and more

Signs, and masks of single responses, are drawn anew in each process, so a run that uses them
repeats only as a whole.
"""

import math
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import plumbing  # noqa: F401  before torch: how its threads wait

import torch
from PIL import Image

import loss
import masking
import papo
import train
from fine_r1.tapo import part_of
from plumbing.base import optimizer
from plumbing.data.sources import DATA_SETS
from plumbing.models.packing import join
from plumbing.run import hooks
from plumbing.run.config import Config, borrow, knob
from toy.task import ToyData
from variants.vppo import Vppo

CHANGED = 0.3  # share of the training questions that "part", "dropped" and "shuffled" change
HELD = 0.1  # nats a token, the mean KL_prcp of a sound run's second half
DRAW = torch.Generator().manual_seed(0)


def signs(x):
    """+1 or -1 for each token, at random."""
    return 2.0 * torch.randint(0, 2, x.shape, generator=DRAW) - 1


def perceived(name):
    """Register a function of (logp, masked, clamp) -> value as a --perception."""

    def keep(function):
        def estimate(logp, masked, clamp):
            return function(logp, masked, clamp), torch.zeros_like(logp, dtype=torch.bool)

        loss.PERCEPTION[name] = estimate
        return function

    return keep


@perceived("signed")
def signed(logp, masked, clamp):
    """Each token's push is as large as ever, and its direction is left to chance."""
    return signs(logp) * loss.k3(logp, masked, clamp)[0]


@perceived("branch")
def branch(logp, masked, clamp):
    """Only where the toy's policy chooses its way to an answer: `<think>` and the word after it."""
    return loss.k3(logp, masked, clamp)[0] * (torch.arange(logp.shape[-1]) < 2)


@perceived("inside")
def inside(logp, masked, clamp):
    """Only after that: the facts, the sums, the answer."""
    return loss.k3(logp, masked, clamp)[0] * (torch.arange(logp.shape[-1]) >= 2)


@perceived("jensen_shannon")
def jensen_shannon(logp, masked, clamp):
    """JS(pi || pi_mask) from tokens of pi, at most ln 2: with d = log pi_mask - log pi and
    m = log((1 + e^d) / 2), its two halves are -m and e^d (d - m)."""
    d = (masked - logp).clamp(-loss.LOG_RATIO_CLAMP, loss.LOG_RATIO_CLAMP)
    m = torch.nn.functional.softplus(d) - math.log(2)
    return 0.5 * (d.exp() * (d - m) - m)


@perceived("held")
def held(logp, masked, clamp):
    """k3, weaker the nearer its mean is to HELD, and turned round beyond it: a controller that
    knows its target."""
    value = loss.k3(logp, masked, clamp)[0]
    mean = value.detach().sum() / (logp != 0).sum()  # a log-prob is 0 where no token counts
    return value * (1 - mean / HELD).clamp(-1, 1)


def signed_reference(logp, ref, clamp):
    """KL_ref with its directions left to chance: what a large beta does by taking up the clipped
    norm alone."""
    value, clamped = loss.k3(logp, ref, clamp)
    return signs(value) * value, clamped


def hold_pi_mask():
    """A trust region on the other side: beta weighs KL(pi_mask || pi_mask before training), and
    with --masked_branch grad it holds what the perception loss pushes away."""
    of, score = papo.terms_of, train.score_only

    def terms_of(logprobs, *rest):
        kept = loss.k3(logprobs.masked.logp, logprobs.ref)[0]
        return of(logprobs, *rest)._replace(KL_ref=kept)

    def score_only(policy, rows, pixels, exact=False):
        trained = any(p.requires_grad for p in policy.parameters())
        return score(policy, rows, pixels if trained else rows.masked_pixels, exact)

    papo.terms_of, train.score_only = terms_of, score_only


def average_passes():
    """The mean over tokens of each forward pass, then the mean over an update's passes."""
    update, objective = train.update, papo.objective

    def in_passes(pairs, N, parts):
        def averaged(terms, scored, N, cfg):
            return objective(terms, scored, N._replace(tokens=len(pairs) * scored.sum()), cfg)

        papo.objective = averaged
        return update(pairs, N, parts)

    train.update = in_passes


def divide_by(ddof, eps):
    """Advantages over another standard deviation, whose square divides by G - ddof, plus eps."""
    known = papo.group_advantages

    def group_advantages(rewards):
        G = rewards.shape[-1]
        ratio = ((G - 1) / (G - ddof)) ** 0.5  # of this deviation to the sample one
        return known(rewards, eps / ratio) / ratio

    papo.group_advantages = group_advantages


def idle(updates):
    """A learning rate of 0 in the first updates, which AdamW's moments see all the same."""
    optimizer.constant = lambda warmup: lambda update: float(update >= updates)


def mask_each():
    """A draw for each prompt of a pass, though several are the same one."""
    masking.Masker.of_all = lambda masker, prompts, _: join([masker(p, DRAW) for p in prompts])


class ChangedData(ToyData):
    """The toy's training questions, with other pictures or other hints."""

    def __init__(self, size, seed, cfg):
        super().__init__("train", size, seed, cfg.hint_right)
        self.pictures, self.hints = cfg.pictures, cfg.hints

    def __getitem__(self, index):
        example, chosen = super().__getitem__(index), random.Random(f"{self.seed}/change/{index}")
        changed = chosen.random() < CHANGED
        if self.pictures == "black" or self.pictures == "part" and changed:
            example.images = [Image.new("RGB", p.size) for p in example.images]
        if self.pictures == "exchanged":
            example.images = example.seconds["contrast"]
        told = f" a friend says {example.tags['hint']} ."
        if self.hints == "dropped" and changed:
            example.problem = example.problem.replace(told, "")
        if self.hints == "shuffled" and changed:
            # Every fourth question is of the same family.
            other = super().__getitem__(index + 4).tags["hint"]
            example.problem = example.problem.replace(told, f" a friend says {other} .")
        example.turns = [("user", example.problem), *example.turns[1:]]
        return example


def open_changed(split, size, seed, cfg):
    """Training rows as asked; those that are measured on, as they are."""
    if split == "train":
        return ChangedData(size, seed, cfg)
    return ToyData(split, size, seed, cfg.hint_right)


DATA_SETS["toy"] = DATA_SETS["toy"]._replace(open=open_changed)


@dataclass
class Control(Config):
    """The settings of train.py, and the controls' own."""

    eta1: float = borrow("eta1", low=-1.0)  # below 0 it is a bonus
    pictures: str = knob(
        "own",
        "of the training questions: black, another question's, or black in part of them",
        ["own", "black", "exchanged", "part"],
        part="Controls",
    )
    hints: str = knob("own", "left out, or another's, in part", ["own", "dropped", "shuffled"])
    gamma_from: int = knob(0, "gamma is 0 before this step, and annealed from there", low=0)
    reference: str = knob("kl", "KL_ref as it is, or another", ["kl", "signed", "masked"])
    mean: str = knob("update", "1/N: of an update, or of each pass", ["update", "passes"])
    ddof: int = knob(1, "an advantage's variance divides by G - ddof", low=0, high=1)
    advantage_eps: float = knob(1e-6, "what is added to its standard deviation", above=0)
    idle_step: bool = knob(False, "the first step's updates have a learning rate of 0")
    mask_of: str = knob("group", "a mask a group, or a response", ["group", "response"])

    def regroup(self, groups):
        if self.mask_of == "group":
            return groups
        every = [(g, slice(i, i + 1)) for g in groups for i in range(len(g.advantages))]
        return [part_of(g, one, second=False) for g, one in every]

    def at_step(self, step):
        if step < self.gamma_from:
            return replace(self, gamma=0.0)
        return super().at_step(step - self.gamma_from)

    def check(self, world_size, cuda):
        super().check(world_size, cuda)
        if self.reference == "signed":
            papo.k3 = signed_reference
        if self.reference == "masked":
            hold_pi_mask()
        if self.mean == "passes":
            average_passes()
        if (self.ddof, self.advantage_eps) != (1, 1e-6):
            divide_by(self.ddof, self.advantage_eps)
        if self.idle_step:
            idle(self.prompts_per_step // self.prompts_per_update)
        if self.mask_of == "response":
            mask_each()


@dataclass
class OtherCredit(Control, Vppo):
    """VPPO with its tokens and responses chosen by something else: its paper's own controls."""


CREDIT = {
    "--by_chance": lambda logp, *_: (torch.rand(logp.shape, generator=DRAW), None),
    "--by_entropy": lambda logp, *_: (-logp, None),  # of the sampled token, an estimate of it
}

if __name__ == "__main__":
    by = [CREDIT[word] for word in sys.argv if word in CREDIT]
    sys.argv = [word for word in sys.argv if word not in CREDIT]
    hooks.k3 = by[0] if by else hooks.k3
    train.main(OtherCredit if by else Control)
