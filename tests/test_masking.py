"""The masked picture: what is black, what is untouched, and that something is masked at all."""
import pytest
import torch
from PIL import Image

from data import generator
from masking import black_row, choose_patches, mask_patches, picture


def test_black_row_is_what_the_processor_makes_of_a_black_picture(processors):
    black = processors[1]([Image.new("RGB", (84, 84))], return_tensors="pt")["pixel_values"]
    assert torch.allclose(black_row(processors[1]).expand_as(black), black, atol=1e-6)
    assert black_row(processors[1]).abs().min() > 1                 # normalised black is far from 0


def test_masked_rows_are_black_the_others_untouched_and_the_input_unchanged(prompts, processors):
    pixels = prompts[0].pixel_values
    before, black = pixels.clone(), black_row(processors[1])
    hidden = choose_patches(len(pixels), 0.6, generator(0))
    masked = mask_patches(pixels, hidden, black)
    assert pixels.ndim == 2 and 0 < hidden.sum() < len(pixels)      # the case in which others silently masked nothing
    assert torch.equal(pixels, before)
    assert torch.equal(masked[~hidden], pixels[~hidden])
    assert torch.equal(masked[hidden], black.expand(int(hidden.sum()), -1))


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("unit", [1, 4])
def test_share_of_masked_patches(ratio, unit):
    hidden = choose_patches(40_000, ratio, generator("share"), unit)
    assert hidden.float().mean() == pytest.approx(ratio, abs=0.02)
    assert (hidden.view(-1, unit) == hidden.view(-1, unit)[:, :1]).all()


def test_masks_are_named_not_remembered():
    a = choose_patches(100, 0.6, generator(1, "mask", 7, 42))
    torch.rand(1000)
    assert torch.equal(a, choose_patches(100, 0.6, generator(1, "mask", 7, 42)))
    assert not torch.equal(a, choose_patches(100, 0.6, generator(1, "mask", 8, 42)))


def test_bad_ratio_and_bad_shape():
    with pytest.raises(ValueError, match="between 0 and 1"):
        choose_patches(4, 1.2, generator(0))
    with pytest.raises(ValueError, match="one row per patch"):
        mask_patches(torch.zeros(1, 3, 28, 28), torch.ones(1, dtype=torch.bool), torch.zeros(3))


def test_rows_go_back_to_the_picture_they_came_from(prompts, processors):
    """The row order is the processor's merge-block order; a wrong guess would shuffle the patches."""
    original = torch.from_numpy(__import__("numpy").array(prompts[0].example.images[0]))
    again = picture(prompts[0].pixel_values, prompts[0].grid[0], processors[1])
    assert (original.int() - again.int()).abs().max() <= 1
