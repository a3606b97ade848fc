"""What DINOv2 looks at, for semantic-aware masking (appendix G of the paper, Eq. 4 to 6)."""

import math
from pathlib import Path

import torch

from plumbing.base.common import fail, first_line
from plumbing.models.families import row_order, to_picture

DINO_LAYERS = range(6, 10)  # layers 6 to 9 (appendix G), counted from 0
DINO_MEAN, DINO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # DINOv2 is trained on these


def normalised(x):
    """Pictures as DINOv2 is trained on them: (..., 3, H, W) from 0 to 1 -> the same shape."""
    return (x - torch.tensor(DINO_MEAN)[:, None, None]) / torch.tensor(DINO_STD)[:, None, None]


class Saliency:
    """How much DINOv2 looks at each patch: the attention that it receives.

    Eq. (4): the attention weights of a layer, averaged over its heads.
    Eq. (5): what a patch receives, summed over all patches that look at it; CLS is left out.
    Eq. (6): averaged over DINO_LAYERS.

    It sees the picture of the policy's vision tower, resized to the same grid of patches.
    """

    def __init__(self, name, image_processor, device="cpu"):
        from transformers import AutoModel

        self.image_processor = image_processor
        try:
            dino = AutoModel.from_pretrained(name, attn_implementation="eager")
            self.dino = dino.eval().requires_grad_(False).to(device)
            self.layers = [dino.encoder.layer[i].attention for i in DINO_LAYERS]
        except (OSError, ValueError, AttributeError, IndexError) as error:
            if isinstance(error, OSError) and not Path(name).is_dir():
                fail(f"--semantic_model {name} is neither a folder here nor reachable on the hub")
            lacks = f"is not a DINOv2 with layers {DINO_LAYERS[0]} to {DINO_LAYERS[-1]}"
            fail(f"--semantic_model {name} {lacks} ({first_line(error)})")

    @torch.no_grad()
    def __call__(self, picture, grid):
        """picture (H, W, 3) uint8, grid (3,) -> (h * w,) scores, left to right, top to bottom"""
        size = [int(n) * self.dino.config.patch_size for n in grid[1:]]
        x = picture.permute(2, 0, 1)[None].float() / 255  # (1, 3, H, W)
        x = torch.nn.functional.interpolate(x, size=size, mode="bilinear", antialias=True)
        x, patches, received = normalised(x), int(grid.prod()), []

        def reduce(module, args, out):
            # (1, heads, tokens, tokens) with CLS and registers first, reduced layer by layer: the
            # weights of all layers at once would not fit. Eq. (4), then Eq. (5).
            received.append(out[1][0].mean(0)[-patches:, -patches:].sum(0))

        hooks = [layer.register_forward_hook(reduce) for layer in self.layers]
        try:
            self.dino(x.to(self.dino.device))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(received).mean(0).float().cpu()  # Eq. (6)

    def most_salient(self, pixels, grid, ratio, unit):
        """The floor(ratio n) most salient of one picture's n patches or tokens, in row order.
        pixels (N, D), grid (3,), unit: rows that are masked as one -> (N,) bool"""
        scores = self(to_picture(pixels, grid, self.image_processor), grid)
        scores = scores[row_order(grid, self.image_processor.merge_size)].view(-1, unit).mean(-1)
        chosen = torch.zeros(len(scores), dtype=torch.bool)
        # The small number is for products like .29 * 100, which is 28.999... in floating point.
        chosen[scores.topk(math.floor(ratio * len(scores) + 1e-9)).indices] = True
        return chosen.repeat_interleave(unit)
