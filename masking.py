"""How to mask the picture: I -> I_mask.

The paper walks the picture in cells of 14 x 14 pixels and blackens each with probability p = 0.6
(appendix G). Qwen-VL's image processor hands the vision tower one row of numbers a patch of 14 x 14
pixels (16 x 16 for Qwen3-VL) of the resized picture. Here the same draw is made on these rows, one
for each: aligned with what the vision tower sees, and without a second preprocessing. --mask raw
makes it on the raw picture, as released.

Rows come in merge blocks: the 4 patches that become one token of the language model stand next to
each other, so masking whole tokens (unit = merge_size ** 2 = 4) is one draw for every four rows.
Row k shows patch row_order(grid, merge)[k] (plumbing/models/families.py), counted left to right,
top to bottom. A mask that means places goes through it; report.html shows what a mask does.

A kind of mask is one function below under @kind("name"), and --mask offers every name. It gets the
prompt, the Masker that holds the settings, and a generator, and returns new pixels for all pictures
of the prompt, (N, D) with the rows of prompt.pixels, or None for no picture at all (Policy.outputs
says how). It never changes its input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Generator, Tensor

from plumbing.base.common import fail, generator, register
from plumbing.data.pictures import rgb
from plumbing.data.prompts import Prompt
from plumbing.models.families import encode_pictures
from plumbing.models.packing import join
from plumbing.models.saliency import Saliency

if TYPE_CHECKING:
    from plumbing.run.config import Config

RAW_CELL = 14  # pixels of the original picture (verl/trainer/papo_utils.py:17 of the released code)
NOISE_STD = 0.6  # of --mask noise; 1 is the distance from black to white
MASKS: dict[str, Callable] = {}  # what --mask can be


def kind(name: str) -> Callable:
    """Register a kind of mask: f(prompt, masker, generator) -> pixels (N, D)"""
    return register(MASKS, name)


class Masker:
    """I_mask as the settings want it: masker(prompt, generator), once a prompt, for all its G
    responses. What a kind of mask needs beside the prompt is here:

    cfg, image_processor    the settings, and the processor that made prompt.pixels
    black                   (D,) a black patch
    unit                    rows that are masked as one: a patch (1), or a token (merge_size ** 2)
    saliency                for --mask semantic: what DINOv2 attends to
    """

    def __init__(self, cfg: Config, image_processor, device="cpu"):
        self.cfg, self.image_processor = cfg, image_processor
        self.black = black_row(image_processor)
        self.unit = image_processor.merge_size**2 if cfg.mask_unit == "token" else 1
        semantic = cfg.mask == "semantic"
        self.saliency = Saliency(cfg.semantic_model, image_processor, device) if semantic else None

    def __call__(self, prompt: Prompt, generator: Generator) -> Tensor | None:
        """-> pixels (N, D) of the prompt's masked pictures; None without a picture

        Raises ValueError if this prompt cannot be masked.
        """
        if prompt.pixels is None:
            return None
        return MASKS[self.cfg.mask](prompt, self, generator)

    def of_all(self, prompts: list[Prompt], seeds: list[tuple]) -> Tensor | None:
        """The masked pictures of many prompts, one draw each -> pixels (N, D), or None

        seeds[i]: the tuple that seeds prompt i's draw. Ends with a sentence if one of the prompts
        cannot be masked.
        """
        try:
            return join([self(p, generator(*seed)) for p, seed in zip(prompts, seeds)])
        except ValueError as error:
            fail(str(error), every_rank=True)


def black_row(image_processor) -> Tensor:
    """A black patch as the vision tower sees it: (0 - mean) / std in each channel, which is not 0.

    -> (D,) with D = 3 channels x frames x patch x patch, channel the slowest axis
    """
    mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
    values = image_processor.temporal_patch_size * image_processor.patch_size**2
    return (-mean / std).repeat_interleave(values)


def choose_patches(n: int, ratio: float, generator: Generator, unit: int = 1) -> Tensor:
    """Which of n rows to black out: each `unit` consecutive rows together, with probability ratio.

    -> (n,) bool. Raises ValueError for a ratio that is no probability.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"mask ratio {ratio} is not between 0 and 1")
    return (torch.rand(n // unit, generator=generator) < ratio).repeat_interleave(unit)


def mask_patches(pixels: Tensor, chosen: Tensor, black: Tensor) -> Tensor:
    """Black out the chosen rows: pixels (N, D), chosen (N,) bool, black (D,) -> a new (N, D)"""
    if pixels.ndim != 2:
        raise ValueError(f"expected one row per patch, got a tensor of shape {tuple(pixels.shape)}")
    return torch.where(chosen[:, None], black.to(pixels), pixels)


# -------------------------------------------------------------------------- the kinds of mask


@kind("random")
def random_patches(prompt: Prompt, masker: Masker, generator: Generator) -> Tensor:
    """The paper's default: each patch (or, with --mask_unit token, each token of 2 x 2 patches) is
    blackened independently of the others."""
    n, ratio = len(prompt.pixels), masker.cfg.mask_ratio
    chosen = choose_patches(n, ratio, generator, masker.unit)
    return mask_patches(prompt.pixels, chosen, masker.black)


@kind("raw")
def raw_cells(prompt: Prompt, masker: Masker, generator: Generator) -> Tensor:
    """The released code's geometry: cells of the original picture, before it is resized.

    The cells are stretched or shrunk with the picture and do not fall on the patches.
    """
    ratio = masker.cfg.mask_ratio
    pictures = [blacken_cells(rgb(p), ratio, generator) for p in prompt.example.images]
    return processed(pictures, prompt, masker.image_processor)


@kind("semantic")
def salient_patches(prompt: Prompt, masker: Masker, generator: Generator) -> Tensor:
    """The patches that DINOv2 attends to most (appendix G); the choice is not random."""
    parts = prompt.pixels.split(prompt.grid.prod(-1).tolist())
    salient, ratio = masker.saliency.most_salient, masker.cfg.mask_ratio
    chosen = [salient(rows, grid, ratio, masker.unit) for rows, grid in zip(parts, prompt.grid)]
    return mask_patches(prompt.pixels, torch.cat(chosen), masker.black)


@kind("noise")
def noise(prompt: Prompt, masker: Masker, generator: Generator) -> Tensor:
    """Gaussian noise on every pixel. The paper rejects it: one can still read it (figure 3)."""
    return add_noise(prompt.pixels, NOISE_STD, generator, masker.image_processor)


def processed(pictures: list[Image.Image], prompt: Prompt, image_processor) -> Tensor:
    """Pictures that stand in for the prompt's -> their pixels; their grid must be the same."""
    pixels, grid = encode_pictures(pictures, image_processor)
    assert torch.equal(grid, prompt.grid), "the other picture must have the grid of the first"
    return pixels


def blacken_cells(
    picture: Image.Image, ratio: float, generator: Generator, cell: int = RAW_CELL
) -> Image.Image:
    """Blacken each cell x cell square of a picture with probability ratio, the cut ones at the
    right and lower edge included. RGB picture -> a new one"""
    across, down = -(-picture.width // cell), -(-picture.height // cell)
    chosen = torch.rand(down, across, generator=generator) < ratio
    stencil = Image.fromarray((chosen * 255).to(torch.uint8).numpy())
    stencil = stencil.resize((across * cell, down * cell), Image.Resampling.NEAREST)
    picture = picture.copy()
    picture.paste((0, 0, 0), (0, 0), stencil.crop((0, 0, picture.width, picture.height)))
    return picture


def add_noise(
    pixels: Tensor, std: float, generator: Generator, image_processor, kept: float = 1.0
) -> Tensor:
    """kept x + std e for every pixel x, with e from N(0, 1), cut to what a picture can hold; x is 0
    for black and 1 for white. (N, D) -> a new (N, D)"""
    frames, p = image_processor.temporal_patch_size, image_processor.patch_size
    statistics = image_processor.image_mean, image_processor.image_std
    mean, scale = (torch.tensor(x)[:, None, None, None] for x in statistics)
    # One draw for all frames of a patch: they are one picture.
    drawn = std * torch.randn(len(pixels), 3, 1, p, p, generator=generator)
    x = kept * (pixels.view(-1, 3, frames, p, p) * scale + mean) + drawn
    return ((x.clamp(0, 1) - mean) / scale).view_as(pixels)
