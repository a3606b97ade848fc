"""How to hide the picture: I -> I_mask.

Qwen-VL's image processor hands the vision tower one row per patch of 14 x 14 pixels (16 x 16 for Qwen3-VL; 3 channels x 2 equal
frames x pixels). The paper walks the picture in cells of 14 x 14 pixels and blackens each with probability p = 0.6 (appendix G):
on these rows that is one Bernoulli draw a row, aligned with what the vision tower sees, with no second preprocessing.

Rows come in merge blocks: the 4 patches that become one token of the language model stand next to each other, so
masking whole tokens (unit = merge_size ** 2 = 4) is one draw for every four rows.

    --mask      what the second picture is
    random      the paper's default: patches (or tokens) blackened independently
    raw         the released code's geometry: 14-pixel cells of the original picture, before it is resized
    semantic    the patches that DINOv2 attends to most, blackened (appendix G, Eq. 4-6)
    noise       Gaussian noise on every pixel; the paper rejects it, since the content stays readable (figure 3)
    contrast    another picture that the data supplies, e.g. one of another class (arXiv 2602.07605)

Every kind hides all pictures of a prompt, never changes its input, and yields the same grid, so the same tokens, as the original.
"""
import math

import torch
from PIL import Image

from config import fail
from data import rgb

RAW_CELL = 14                                # pixels of the original picture (verl/trainer/papo_utils.py:17)
DINO_LAYERS = range(6, 10)                   # layers 6-9 (appendix G), counted from 0
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)       # DINOv2 is trained on these


def black_row(image_processor):
    """A black patch as the vision tower sees it: (0 - mean) / std in each channel, which is not 0. -> (3 * 2 * 14 * 14,)"""
    mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
    values_per_channel = image_processor.temporal_patch_size * image_processor.patch_size**2
    return (-mean / std).repeat_interleave(values_per_channel)                   # channel is the slowest axis of a row


def choose_patches(n, ratio, generator, unit=1):
    """Which of n patch rows to hide: each group of `unit` consecutive rows independently with probability ratio. -> (n,) bool"""
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"mask ratio {ratio} is not between 0 and 1")
    return (torch.rand(n // unit, generator=generator) < ratio).repeat_interleave(unit)


def mask_patches(pixel_values, hidden, black):
    """Black out rows: pixel_values (N, D), hidden (N,) bool, black (D,) -> a new (N, D); the input is left as it was."""
    if pixel_values.ndim != 2:
        raise ValueError(f"expected one row per patch, got a tensor of shape {tuple(pixel_values.shape)}")
    return torch.where(hidden[:, None], black.to(pixel_values), pixel_values)


def row_order(grid, merge):
    """Where each row stands in the picture: row k shows patch row_order[k], patches counted left to right, top to bottom.

    grid (3,): t, h, w patches; merge: patches a side of a merge block -> (h * w,) int64
    """
    _, h, w = grid.tolist()
    return torch.arange(h * w).view(h // merge, merge, w // merge, merge).transpose(1, 2).reshape(-1)


def picture(pixel_values, grid, image_processor):
    """Patch rows of one picture back to uint8 pixels: (N, D) and (t, h, w) -> (H, W, 3)."""
    _, h, w = grid.tolist()
    p = image_processor.patch_size
    patches = torch.empty_like(pixel_values)
    patches[row_order(grid, image_processor.merge_size)] = pixel_values          # left to right, top to bottom
    x = patches.view(h, w, 3, image_processor.temporal_patch_size, p, p)[:, :, :, 0]            # (h, w, 3, p, p)
    x = x.permute(0, 3, 1, 4, 2).reshape(h * p, w * p, 3)                        # rows, columns, channels
    x = x * torch.tensor(image_processor.image_std) + torch.tensor(image_processor.image_mean)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def blacken_cells(image, ratio, generator, cell=RAW_CELL):
    """The released mask: each cell x cell square of the original picture is blackened with probability ratio, the cut ones at
    the right and lower edge included. RGB picture -> a new one."""
    across, down = -(-image.width // cell), -(-image.height // cell)
    hidden = torch.rand(down, across, generator=generator) < ratio
    stencil = Image.fromarray((hidden * 255).to(torch.uint8).numpy()).resize((across * cell, down * cell), Image.Resampling.NEAREST)
    image = image.copy()
    image.paste((0, 0, 0), (0, 0), stencil.crop((0, 0, image.width, image.height)))
    return image


def add_noise(pixel_values, std, generator, image_processor):
    """Gaussian noise of `std` (1 = from black to white) on every pixel, cut to what a picture can hold. (N, D) -> a new (N, D)"""
    frames, p = image_processor.temporal_patch_size, image_processor.patch_size
    mean, scale = (torch.tensor(x)[:, None, None, None] for x in (image_processor.image_mean, image_processor.image_std))
    noise = std * torch.randn(len(pixel_values), 3, 1, p, p, generator=generator)               # the frames are one picture
    x = pixel_values.view(-1, 3, frames, p, p) * scale + mean + noise                           # 0..1
    return ((x.clamp(0, 1) - mean) / scale).view_as(pixel_values)


class Saliency:
    """How much DINOv2 looks at each patch: attention received, for semantic-aware masking (appendix G).

    Eq. (4): the attention weights of a layer, averaged over its heads; Eq. (5): what a patch receives, summed over all patches
    that look at it, CLS left out; Eq. (6): averaged over DINO_LAYERS. DINOv2 sees the picture that the policy's vision tower
    sees, resized so that both have the same grid. Ends with a sentence on a model without those layers.
    """

    def __init__(self, name, device="cpu"):
        from transformers import AutoModel
        try:
            self.dino = AutoModel.from_pretrained(name, attn_implementation="eager").eval().requires_grad_(False).to(device)
            layers = [self.dino.encoder.layer[i].attention for i in DINO_LAYERS]
        except (OSError, ValueError, AttributeError, IndexError) as error:
            fail(f"--semantic_model {name} is not a DINOv2 with layers {DINO_LAYERS[0]} to {DINO_LAYERS[-1]} ({str(error).splitlines()[0]})")
        for layer in layers:                 # reduced layer by layer: the attention weights of all layers at once would not fit
            layer.register_forward_hook(lambda module, args, out: self.received.append(self.attention_received(out[1])))

    def attention_received(self, weights):
        """weights (1, heads, tokens, tokens), CLS (and registers) before the patches -> (patches,)"""
        return weights[0].mean(0)[-self.patches:, -self.patches:].sum(0)                        # Eq. (4), (5)

    @torch.no_grad()
    def __call__(self, pixels, grid):
        """pixels (H, W, 3) uint8 of one picture, grid (3,) -> (h * w,) scores, left to right, top to bottom"""
        size = [int(n) * self.dino.config.patch_size for n in grid[1:]]
        x = pixels.permute(2, 0, 1)[None].float() / 255                                         # (1, 3, H, W)
        x = torch.nn.functional.interpolate(x, size=size, mode="bilinear", antialias=True)
        x = (x - torch.tensor(DINO_MEAN)[:, None, None]) / torch.tensor(DINO_STD)[:, None, None]
        self.received, self.patches = [], int(grid.prod())
        self.dino(x.to(self.dino.device))
        return torch.stack(self.received).mean(0).float().cpu()                                 # Eq. (6)


class Masker:
    """I_mask as the configuration wants it: one a prompt, shared by its G responses."""

    def __init__(self, cfg, image_processor, device="cpu"):
        self.cfg, self.image_processor, self.black = cfg, image_processor, black_row(image_processor)
        self.unit = image_processor.merge_size**2 if cfg.mask_unit == "token" else 1
        self.saliency = Saliency(cfg.semantic_model, device) if cfg.mask == "semantic" else None

    def __call__(self, prompt, generator):
        """Prompt -> pixel_values of its masked pictures (N, D), rows as in prompt.pixel_values; None without a picture."""
        cfg, x = self.cfg, prompt.pixel_values
        if x is None:
            return None
        if cfg.mask == "random":
            return mask_patches(x, choose_patches(len(x), cfg.mask_ratio, generator, self.unit), self.black)
        if cfg.mask == "noise":
            return add_noise(x, cfg.noise_std, generator, self.image_processor)
        if cfg.mask == "semantic":
            parts = x.split(prompt.grid.prod(-1).tolist())
            return mask_patches(x, torch.cat([self.salient(rows, grid) for rows, grid in zip(parts, prompt.grid)]), self.black)
        if cfg.mask == "raw":
            return self.processed([blacken_cells(rgb(p), cfg.mask_ratio, generator) for p in prompt.example.images], prompt)
        return self.contrast(prompt)

    def salient(self, rows, grid):
        """The floor(p n) most salient of n patches (or tokens) of one picture. -> (N,) bool, in row order"""
        scores = self.saliency(picture(rows, grid, self.image_processor), grid)[row_order(grid, self.image_processor.merge_size)]
        scores = scores.view(-1, self.unit).mean(-1)
        hidden = torch.zeros(len(scores), dtype=torch.bool)
        hidden[scores.topk(math.floor(self.cfg.mask_ratio * len(scores) + 1e-9)).indices] = True     # .29 * 100 is 28.999...
        return hidden.repeat_interleave(self.unit)

    def contrast(self, prompt):
        """The data's own second pictures, resized to the sizes at which the vision tower sees the first ones."""
        example, p = prompt.example, self.image_processor.patch_size
        if len(example.contrast) != len(example.images):
            raise ValueError(f"example {example.id} has {len(example.images)} pictures but {len(example.contrast)} in its contrast "
                             "column; --mask contrast needs one for each")
        return self.processed([rgb(c).resize((int(w) * p, int(h) * p), Image.Resampling.BICUBIC)
                               for c, (_, h, w) in zip(example.contrast, prompt.grid)], prompt)

    def processed(self, pictures, prompt):
        out = self.image_processor(pictures, return_tensors="pt")
        assert torch.equal(out["image_grid_thw"], prompt.grid), "the second picture must have the grid of the first"
        return out["pixel_values"]
