"""How to hide the picture: I -> I_mask.

Qwen-VL's image processor hands the vision tower one row per 14 x 14 pixel patch (3 channels x 2 equal frames x 14 x 14
values). The paper walks the picture in cells of 14 x 14 pixels and blackens each with probability p = 0.6 (appendix G):
on these rows that is one Bernoulli draw a row, aligned with what the vision tower sees, with no second preprocessing.

Rows come in merge blocks: the 4 patches that become one token of the language model stand next to each other, so
masking whole tokens (unit = merge_size ** 2 = 4) is one draw for every four rows.
"""
import torch


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


def picture(pixel_values, grid, image_processor):
    """Patch rows of one picture back to uint8 pixels, to look at: (N, D) and (t, h, w) -> (H, W, 3)."""
    t, h, w = grid.tolist()
    m, p, frames = image_processor.merge_size, image_processor.patch_size, image_processor.temporal_patch_size
    x = pixel_values.view(h // m, w // m, m, m, 3, frames, p, p)[..., 0, :, :]   # (h/m, w/m, m, m, 3, p, p)
    x = x.permute(0, 2, 5, 1, 3, 6, 4).reshape(h * p, w * p, 3)                  # rows, columns, channels
    x = x * torch.tensor(image_processor.image_std) + torch.tensor(image_processor.image_mean)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)
