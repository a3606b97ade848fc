"""NoisyRollout (arXiv 2504.13055): half of each group is sampled on a noised picture.

    torchrun variants/noisy_rollout.py        # every flag of train.py, and five more

On GRPO, without reference KL and dual clip, and clipped at 1.2. Responses to the noised picture are
another source of variety; they are trained on the clean one, pi_old in PAPO's Eq. (1) included and
without a correction, as Eq. (2) of NoisyRollout says. The noise is forward diffusion, by fewer and
fewer steps as training goes (its Eq. 3; its gamma is none of PAPO's):

    alpha_t = alpha_0 (1 - 1 / (1 + exp(-lambda (t - gamma) / t_max)))

rounded down, t counted from 1. The paper's lambda of 30 and gamma of 40 in 60 steps leave 250 of
500 at step 40, 3 at step 50 and none at the end.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import plumbing  # noqa: F401  before torch: how its threads wait

import torch

import train
from masking import add_noise
from papo import ALGORITHMS, row
from plumbing.base.common import fail
from plumbing.run.config import Config, borrow, knob

SETTINGS = dict(top_p=1.0, prompts_per_step=512, group_size=12, dual_clip=0.0)
AS_PRINTED = dict(loss_mean="token")
ALGORITHMS["noisy"] = row(0.20, 0.00, 0.00, 0.00, 0.00, False, as_printed=AS_PRINTED, **SETTINGS)


@dataclass
class Noisy(Config):
    """The settings of train.py, and NoisyRollout's own."""

    algo: str = borrow("algo", default="noisy")
    second_rollouts: int = knob(
        0,
        "n2, how many of a group are sampled on the noised picture; 0: half of them",
        part="NoisyRollout",
        low=0,
    )
    noise_steps: int = knob(500, "alpha_0, in diffusion steps of 1,000", low=0, high=999)
    noise_anneal_steps: int = knob(0, "t_max, over which the noise fades; 0: --steps", low=0)
    noise_slope: float = knob(30.0, "lambda, how abruptly the noise fades", low=0, high=500)
    noise_middle: float = knob(
        40 / 60, "gamma / t_max: when half of the noise is left", low=0, high=1
    )

    @property
    def second_size(self):
        """n2"""
        return self.second_rollouts or self.group_size // 2

    def second_prompt(self, prompt, image_processor, generator):
        """The prompt with its pictures noised -> Prompt"""
        return noised(prompt, self.noise_steps, generator, image_processor)

    def at_step(self, step):
        t_max = self.noise_anneal_steps or self.steps
        schedule = t_max, self.noise_slope, self.noise_middle
        return replace(
            super().at_step(step), noise_steps=fading(self.noise_steps, step + 1, *schedule)
        )

    def scheduled(self):
        return super().scheduled() | {"noise_steps": self.noise_steps}

    def check(self, world_size, cuda):
        super().check(world_size, cuda)
        if self.second_rollouts >= self.group_size:
            fail(
                f"--second_rollouts {self.second_rollouts}: of --group_size {self.group_size} "
                "responses at least one is sampled on the clean picture"
            )


def fading(alpha_0, t, t_max, slope, middle):
    """alpha_t of Eq. (3), a number of diffusion steps. slope: lambda; middle: gamma / t_max"""
    return int(alpha_0 * (1 - 1 / (1 + math.exp(-slope * (t / t_max - middle)))))


def noised(prompt, steps, generator, image_processor):
    """The prompt with its pictures after so many steps of forward diffusion -> a new Prompt

        sqrt(a) x + sqrt(1 - a) e,  a = prod_{j <= steps} (1 - b_j)
        b_j = 1e-5 + 4.99e-3 sigmoid(z_j)

    with z_j in 1,000 even steps from -6 to 6: the schedule of the released code
    (verl/utils/image_aug.py:63-76). Without a picture, or with 0 steps, it is the prompt itself.
    """
    if prompt.pixels is None or not steps:
        return prompt
    b = 1e-5 + 4.99e-3 * torch.linspace(-6, 6, 1000, dtype=torch.float64).sigmoid()
    a = (1 - b[: steps + 1]).prod().item()
    pixels = add_noise(prompt.pixels, math.sqrt(1 - a), generator, image_processor, math.sqrt(a))
    return replace(prompt, pixels=pixels)


if __name__ == "__main__":
    train.main(Noisy)
