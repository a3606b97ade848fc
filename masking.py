"""How to mask the picture: I -> I_mask.

The paper walks the picture in cells of 14 x 14 pixels and blackens each with probability p = 0.6
(appendix G). Qwen-VL's image processor hands the vision tower one row of numbers a patch of 14 x 14
pixels (16 x 16 for Qwen3-VL) of the resized picture. Here the same draw is made on these rows, one
for each: aligned with what the vision tower sees, and without a second preprocessing. --mask raw
makes it on the raw picture, as released.

Rows come in merge blocks: the 4 patches that become one token of the language model stand next to
each other, so masking whole tokens (unit = merge_size ** 2 = 4) is one draw for every four rows.
Row k shows patch row_order(grid, merge)[k] (plumbing/families.py), counted left to right, top to
bottom. A mask that means places goes through it; report.html shows what a mask does.

A kind of mask is one function below under @kind("name"), and --mask offers every name. It gets the
prompt, the Masker that holds the settings, and a generator, and returns new pixels for all pictures
of the prompt, (N, D) with the rows of prompt.pixels, or None for no picture at all (Policy.outputs
says how). It never changes its input.

A second picture can also be one to roll out on (groups.sample_groups). That kind is a function
below under @source("name"), and --rollout_picture offers every name.
"""

import math
from dataclasses import replace

import torch
from PIL import Image

from plumbing.common import fail, generator, register
from plumbing.data import seconds
from plumbing.families import encode_pictures
from plumbing.packing import join
from plumbing.pictures import rgb
from plumbing.saliency import Saliency

RAW_CELL = 14  # pixels of the original picture (verl/trainer/papo_utils.py:17 of the released code)
MASKS = {}  # what --mask can be
SOURCES = {}  # what --rollout_picture can be, beside clean


def kind(name):
    """Register a kind of mask: f(prompt, masker, generator) -> pixels (N, D)"""
    return register(MASKS, name)


def source(name):
    """Register a picture to roll out on: f(prompt, cfg, image_processor, generator) -> Prompt"""
    return register(SOURCES, name)


class Masker:
    """I_mask as the settings want it: masker(prompt, generator), once a prompt, for all its G
    responses. What a kind of mask needs beside the prompt is here:

    cfg, image_processor    the settings, and the processor that made prompt.pixels
    black                   (D,) a black patch
    unit                    rows that are masked as one: a patch (1), or a token (merge_size ** 2)
    saliency                for --mask semantic: what DINOv2 attends to
    """

    def __init__(self, cfg, image_processor, device="cpu"):
        self.cfg, self.image_processor = cfg, image_processor
        self.black = black_row(image_processor)
        self.unit = image_processor.merge_size**2 if cfg.mask_unit == "token" else 1
        semantic = cfg.mask == "semantic"
        self.saliency = Saliency(cfg.semantic_model, image_processor, device) if semantic else None

    def __call__(self, prompt, generator):
        """-> pixels (N, D) of the prompt's masked pictures; None without a picture, as with --mask
        absent

        Raises ValueError if this prompt cannot be masked.
        """
        if prompt.pixels is None:
            return None
        return MASKS[self.cfg.mask](prompt, self, generator)

    def of_all(self, prompts, names):
        """The masked pictures of many prompts, one draw each -> pixels (N, D), or None

        names[i]: the tuple that seeds prompt i's draw. Ends with a sentence if one of the prompts
        cannot be masked.
        """
        try:
            return join([self(p, generator(*name)) for p, name in zip(prompts, names)])
        except ValueError as error:
            fail(str(error), here=True)


def black_row(image_processor):
    """A black patch as the vision tower sees it: (0 - mean) / std in each channel, which is not 0.

    -> (D,) with D = 3 channels x frames x patch x patch, channel the slowest axis
    """
    mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
    values = image_processor.temporal_patch_size * image_processor.patch_size**2
    return (-mean / std).repeat_interleave(values)


def choose_patches(n, ratio, generator, unit=1):
    """Which of n rows to black out: each `unit` consecutive rows together, with probability ratio.

    -> (n,) bool. Raises ValueError for a ratio that is no probability.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"mask ratio {ratio} is not between 0 and 1")
    return (torch.rand(n // unit, generator=generator) < ratio).repeat_interleave(unit)


def mask_patches(pixels, chosen, black):
    """Black out the chosen rows: pixels (N, D), chosen (N,) bool, black (D,) -> a new (N, D)"""
    if pixels.ndim != 2:
        raise ValueError(f"expected one row per patch, got a tensor of shape {tuple(pixels.shape)}")
    return torch.where(chosen[:, None], black.to(pixels), pixels)


# -------------------------------------------------------------------------- the kinds of mask


@kind("random")
def random_patches(prompt, masker, generator):
    """The paper's default: each patch (or, with --mask_unit token, each token of 2 x 2 patches) is
    blackened independently of the others."""
    n, ratio = len(prompt.pixels), masker.cfg.mask_ratio
    chosen = choose_patches(n, ratio, generator, masker.unit)
    return mask_patches(prompt.pixels, chosen, masker.black)


@kind("raw")
def raw_cells(prompt, masker, generator):
    """The released code's geometry: cells of the original picture, before it is resized.

    The cells are stretched or shrunk with the picture and do not fall on the patches.
    """
    ratio = masker.cfg.mask_ratio
    pictures = [blacken_cells(rgb(p), ratio, generator) for p in prompt.example.images]
    return processed(pictures, prompt, masker.image_processor)


@kind("semantic")
def salient_patches(prompt, masker, generator):
    """The patches that DINOv2 attends to most (appendix G); the choice is not random."""
    parts = prompt.pixels.split(prompt.grid.prod(-1).tolist())
    salient, ratio = masker.saliency.most_salient, masker.cfg.mask_ratio
    chosen = [salient(rows, grid, ratio, masker.unit) for rows, grid in zip(parts, prompt.grid)]
    return mask_patches(prompt.pixels, torch.cat(chosen), masker.black)


@kind("noise")
def noise(prompt, masker, generator):
    """Gaussian noise on every pixel. The paper rejects it: one can still read it (figure 3)."""
    return add_noise(prompt.pixels, masker.cfg.noise_std, generator, masker.image_processor)


@kind("contrast")
def contrast(prompt, masker, generator):
    """The data's own second pictures, such as one of another class (arXiv 2602.07605), resized to
    the sizes at which the vision tower sees the first ones."""
    return stand_ins("contrast", prompt, masker.image_processor)


@kind("absent")
def absent(prompt, masker, generator):
    """No picture: nothing attends to its tokens, which keep their places. PGPO's (arXiv 2604.01840,
    appendix A.1)."""
    return None


def stand_ins(name, prompt, image_processor):
    """The second pictures of this name (plumbing.sources.SECOND), at the sizes at which the vision
    tower sees the first ones -> pixels (N, D). Raises ValueError if they are not one for each."""
    p = image_processor.patch_size
    sizes = [(int(w) * p, int(h) * p) for _, h, w in prompt.grid]
    pairs = zip(seconds(prompt.example, [name]), sizes)
    pictures = [rgb(c).resize(size, Image.Resampling.BICUBIC) for c, size in pairs]
    return processed(pictures, prompt, image_processor)


def processed(pictures, prompt, image_processor):
    """Pictures that stand in for the prompt's -> their pixels; their grid must be the same."""
    pixels, grid = encode_pictures(pictures, image_processor)
    assert torch.equal(grid, prompt.grid), "the other picture must have the grid of the first"
    return pixels


def blacken_cells(picture, ratio, generator, cell=RAW_CELL):
    """Blacken each cell x cell square of a picture with probability ratio, the cut ones at the
    right and lower edge included. RGB picture -> a new one"""
    across, down = -(-picture.width // cell), -(-picture.height // cell)
    chosen = torch.rand(down, across, generator=generator) < ratio
    stencil = Image.fromarray((chosen * 255).to(torch.uint8).numpy())
    stencil = stencil.resize((across * cell, down * cell), Image.Resampling.NEAREST)
    picture = picture.copy()
    picture.paste((0, 0, 0), (0, 0), stencil.crop((0, 0, picture.width, picture.height)))
    return picture


def add_noise(pixels, std, generator, image_processor, kept=1.0):
    """kept x + std e for every pixel x, with e from N(0, 1), cut to what a picture can hold; x is 0
    for black and 1 for white. (N, D) -> a new (N, D)"""
    frames, p = image_processor.temporal_patch_size, image_processor.patch_size
    statistics = image_processor.image_mean, image_processor.image_std
    mean, scale = (torch.tensor(x)[:, None, None, None] for x in statistics)
    # One draw for all frames of a patch: they are one picture.
    drawn = std * torch.randn(len(pixels), 3, 1, p, p, generator=generator)
    x = kept * (pixels.view(-1, 3, frames, p, p) * scale + mean) + drawn
    return ((x.clamp(0, 1) - mean) / scale).view_as(pixels)


# ------------------------------------------------------------------- pictures to roll out on


@source("noisy")
def noisy(prompt, cfg, image_processor, generator):
    """NoisyRollout's (arXiv 2504.13055): the picture, noised, by less and less as training goes."""
    return noised(prompt, cfg.noise_steps, generator, image_processor)


@source("positive")
def positive(prompt, cfg, image_processor, generator):
    """TAPO's (arXiv 2602.07605): another picture of the same class, at the size of the first."""
    if prompt.pixels is None:
        return prompt
    return replace(prompt, pixels=stand_ins("positive", prompt, image_processor))


def annealed(alpha_0, t, t_max, slope, middle):
    """How many diffusion steps of noise a step of training has (NoisyRollout, arXiv 2504.13055):

        alpha_t = alpha_0 (1 - 1 / (1 + exp(-lambda (t - gamma) / t_max)))                  Eq. (3)

    rounded down. t counts from 1; slope is lambda, and middle is gamma / t_max. The paper's lambda
    of 30 and gamma of 40 in 60 steps leave 250 of 500 at step 40, 3 at step 50 and none at the end.
    """
    return int(alpha_0 * (1 - 1 / (1 + math.exp(-slope * (t / t_max - middle)))))


def noised(prompt, steps, generator, image_processor):
    """The prompt with its pictures after so many steps of forward diffusion -> a new Prompt

        sqrt(a) x + sqrt(1 - a) e,  a = prod_{j <= steps} (1 - b_j)
        b_j = 1e-5 + 4.99e-3 sigmoid(z_j)

    with z_j in 1,000 even steps from -6 to 6: the schedule of NoisyRollout's released code
    (verl/utils/image_aug.py:63-76). Without a picture, or with 0 steps, it is the prompt itself.
    """
    if prompt.pixels is None or not steps:
        return prompt
    b = 1e-5 + 4.99e-3 * torch.linspace(-6, 6, 1000, dtype=torch.float64).sigmoid()
    a = (1 - b[: steps + 1]).prod().item()
    noise = math.sqrt(1 - a), generator, image_processor, math.sqrt(a)
    return replace(prompt, pixels=add_noise(prompt.pixels, *noise))
