"""TAPO, Fine-R1's second stage (arXiv 2602.07605): PAPO_D with two other second pictures.

    torchrun fine_r1/tapo.py --model out/kinds-sft/checkpoint-20 --data out/kinds/train.parquet

It has every flag of train.py, and two more. What changes, beside G = 10 and a reward for names:

  1. The last n2 of a group's G responses are sampled on a positive, another picture of the same
     class, where the answer must stay. All G rewards form one pool for the advantages.
  2. The masked picture is a negative, a picture of the class most easily taken for this one, where
     the answer must go: gamma KL(pi(. | I) || pi(. | I_neg)). No pixel is blackened.
  3. In the released code each response is trained on the picture that it was sampled on
     (ray_trainer.py:586-632); in the paper on the prompt's own. --update_on is either.
"""

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

import train
from masking import kind, processed
from papo import ALGORITHMS, row
from plumbing.base.common import fail
from plumbing.data.pictures import rgb
from plumbing.data.prompts import second_pictures
from plumbing.data.sources import SECOND
from plumbing.run.config import Config, borrow, check_bounds, knob
from rollout import Rollout

# Columns of second pictures (fine_r1/triplets.py); the last ones are those of Fine-R1's own files.
SECOND["contrast"] = ("contrast", "negative", "image_aug")
SECOND["positive"] = ("positive", "image_noisy")

AS_PRINTED = dict(reward="tagged", update_on="anchor")
SETTINGS = dict(mask="contrast", reward="tagged", group_size=10, as_printed=AS_PRINTED)
ALGORITHMS["tapo"] = row(0.28, 0.00, 0.01, 0.03, 0.03, True, **SETTINGS)
SETTINGS |= dict(prompts_per_step=192, prompts_per_update=64)
ALGORITHMS["tapo/qwen2.5-vl-7b"] = row(0.28, 0.00, 0.01, 0.03, 0.03, True, **SETTINGS)


@dataclass
class Tapo(Config):
    """The settings of train.py, and TAPO's own."""

    algo: str = borrow("algo", default="tapo")
    second_rollouts: int = knob(0, "n2, sampled on the positive; 0: half, -1: none", part="TAPO")
    update_on: str = knob("own", "train responses to a positive on it, or not", ["own", "anchor"])

    @property
    def second_size(self):
        """n2 of the G responses of a group"""
        return max(0, self.second_rollouts or self.group_size // 2)

    @property
    def second_pictures(self):
        """What every row must have."""
        negative = self.mask == "contrast" and self.needs_masked
        return ["contrast"] * negative + ["positive"] * (self.second_size > 0)

    def second_prompt(self, prompt, image_processor, generator):
        """The prompt with its positives in the place of its pictures -> Prompt"""
        if prompt.pixels is None:
            return prompt
        return replace(prompt, pixels=stand_ins("positive", prompt, image_processor))

    def regroup(self, groups):
        """Each group as two: what was sampled on the prompt's own picture, and on its positive."""
        if self.update_on == "anchor" or not self.second_size:
            return groups
        n1 = self.group_size - self.second_size
        parts = (slice(n1), False), (slice(n1, None), True)
        return [part_of(group, part, second) for group in groups for part, second in parts]

    def check(self, world_size, cuda):
        """As Config's, and what the parts of a group need."""
        super().check(world_size, cuda)
        own = {"low": -1, "high": self.group_size - 1}  # one is on the prompt's own picture
        check_bounds("second_rollouts", self.second_rollouts, own)
        if self.data == "toy":
            fail(
                "--data toy: its pictures have no classes; give a file with columns positive and "
                "negative, such as what `python -m fine_r1.kinds` writes"
            )


def part_of(group, part, second):
    """These responses of a group, whose advantages are known, as a group. part: a slice"""
    rollout = Rollout(*(getattr(group.rollout, f.name)[part] for f in fields(Rollout)))
    lists = dict(scores=group.scores[part], advantages=group.advantages[part])
    return replace(group, rollout=rollout, second=second, **lists)


@kind("contrast")
def contrast(prompt, masker, generator):
    """The negative."""
    return stand_ins("contrast", prompt, masker.image_processor)


def stand_ins(name, prompt, image_processor):
    """The second pictures of this name, at the sizes at which the vision tower sees the first ones
    -> pixels (N, D). Raises ValueError if they are not one for each."""
    p = image_processor.patch_size
    sizes = [(int(w) * p, int(h) * p) for _, h, w in prompt.grid]
    pairs = zip(second_pictures(prompt.example, [name]), sizes)
    pictures = [rgb(c).resize(size, Image.Resampling.BICUBIC) for c, size in pairs]
    return processed(pictures, prompt, image_processor)


if __name__ == "__main__":
    train.main(Tapo)
