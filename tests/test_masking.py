"""The masked picture: what is black, what is untouched, and which row is which patch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import both_families
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from masking import MASKS, Masker, add_noise, black_row, blacken_cells, choose_patches, mask_patches
from plumbing.base.common import generator
from plumbing.data.prompts import Example, encode
from plumbing.models.families import row_order, to_picture
from plumbing.models.saliency import DINO_LAYERS, Saliency

FAMILIES = {
    "Qwen2.5-VL": dict(patch_size=14),  # and its own mean and std, those of CLIP
    "Qwen3-VL": dict(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3),
}


@pytest.fixture(params=FAMILIES)
def image_processor(request):
    """The real image processor of both families."""
    return Qwen2VLImageProcessorPil(
        min_pixels=28 * 28, max_pixels=1024**2, **FAMILIES[request.param]
    )


def numbered(h, w, patch):
    """A picture of h x w patches; the colour of patch i is (i // 16 * 16, i % 16 * 16, 77)."""
    i = np.arange(h * w).reshape(h, w)
    colours = np.stack([i // 16 * 16, i % 16 * 16, np.full_like(i, 77)], -1).astype(np.uint8)
    return Image.fromarray(colours.repeat(patch, 0).repeat(patch, 1))


def number(pixels):
    """The number that a patch of numbered() bears: (3,) uint8 -> int"""
    assert int(pixels[2]) == 77
    return int(pixels[0]) + int(pixels[1]) // 16


def test_rows_are_the_patches_that_we_say_they_are(image_processor):
    """Patches numbered by colour, through the real processor: row k shows patch row_order[k]."""
    p = image_processor.patch_size
    out = image_processor([numbered(6, 10, p)], return_tensors="pt")
    rows, grid = out["pixel_values"], out["image_grid_thw"][0]
    assert grid.tolist() == [1, 6, 10]
    mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
    colours = (rows.view(60, 3, -1).mean(-1) * std + mean).mul(255).round().to(torch.uint8)
    assert [number(c) for c in colours] == row_order(grid, image_processor.merge_size).tolist()
    for first in range(0, 60, 4):  # four rows in turn are one token: a 2 x 2 block
        i = row_order(grid, 2)[first]
        assert row_order(grid, 2)[first : first + 4].tolist() == [i, i + 1, i + 10, i + 11]
    drawn = torch.from_numpy(np.array(numbered(6, 10, p)))
    assert torch.equal(to_picture(rows, grid, image_processor), drawn)


def test_masked_rows_are_black_where_they_should_be(image_processor):
    """Three patches hidden by their rows: those squares of the picture are black, and no other."""
    p = image_processor.patch_size
    out = image_processor([numbered(4, 6, p)], return_tensors="pt")
    rows, grid = out["pixel_values"], out["image_grid_thw"][0]
    order, hide = row_order(grid, 2), [0, 7, 23]
    hidden = torch.isin(order, torch.tensor(hide))
    seen = to_picture(mask_patches(rows, hidden, black_row(image_processor)), grid, image_processor)
    wanted = np.array(numbered(4, 6, p))
    for i in hide:
        wanted[i // 6 * p : (i // 6 + 1) * p, i % 6 * p : (i % 6 + 1) * p] = 0
    assert torch.equal(seen, torch.from_numpy(wanted))


def test_black_row_is_what_the_processor_makes_of_a_black_picture(image_processor):
    black = image_processor([Image.new("RGB", (128, 128))], return_tensors="pt")["pixel_values"]
    assert torch.allclose(black_row(image_processor).expand_as(black), black, atol=1e-6)
    assert black_row(image_processor).abs().min() > 0.9  # normalised black is far from 0


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("unit", [1, 4])
def test_share_of_masked_patches(ratio, unit):
    hidden = choose_patches(40_000, ratio, generator("share"), unit)
    assert hidden.float().mean() == pytest.approx(ratio, abs=0.02)
    assert (hidden.view(-1, unit) == hidden.view(-1, unit)[:, :1]).all()
    if unit == 4 and 0 < ratio < 1:
        assert not (hidden.view(-1, 2) == hidden.view(-1, 2)[:1]).all()


def test_bad_ratio_and_bad_shape():
    with pytest.raises(ValueError, match="between 0 and 1"):
        choose_patches(4, 1.2, generator(0))
    with pytest.raises(ValueError, match="one row per patch"):
        mask_patches(torch.zeros(1, 3, 28, 28), torch.ones(1, dtype=torch.bool), torch.zeros(3))


# ---------------------------------------------------------------------------- kinds of mask


def masker(cfg, processors, **settings):
    return Masker(replace(cfg, **settings), processors[1])


@pytest.fixture(scope="module")
def two_pictures(processors):
    """A prompt with two pictures of different sizes."""
    rng = np.random.default_rng(0)
    sizes = [(112, 84, 3), (56, 168, 3)]
    images = [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in sizes]
    return encode(Example("two", "<image> or <image> ?", "1", images), *processors)


@both_families
@pytest.mark.parametrize("kind", ["random", "raw", "semantic", "noise"])
def test_every_kind_changes_every_picture_and_never_its_input(
    kind, cfg, processors, two_pictures, dino
):
    hide = masker(cfg, processors, mask=kind, mask_unit="patch", semantic_model=str(dino))
    before = two_pictures.pixels.clone()
    masked = hide(two_pictures, generator(1, "mask", 0, 0))
    assert torch.equal(two_pictures.pixels, before)
    assert masked.shape == before.shape and masked.dtype == before.dtype
    first = int(two_pictures.grid[0].prod())
    for part in (slice(None, first), slice(first, None)):
        assert (masked[part] != before[part]).any(-1).float().mean() > 0.3
    # A name, not a state.
    assert torch.equal(masked, hide(two_pictures, generator(1, "mask", 0, 0)))
    if kind != "semantic":
        assert not torch.equal(masked, hide(two_pictures, generator(1, "mask", 1, 0)))
    text = encode(Example("t", "how many red objects are there ?", "3"), *processors)
    assert hide(text, generator(0)) is None  # no picture, no mask


@pytest.mark.parametrize("kind", ["random", "semantic"])
def test_token_granularity_hides_whole_tokens(kind, cfg, processors, two_pictures, dino):
    for unit in ("token", "patch"):
        hide = masker(cfg, processors, mask=kind, mask_unit=unit, semantic_model=str(dino))
        black = (hide(two_pictures, generator(0)) == hide.black).all(-1).view(-1, 4)
        assert (black == black[:, :1]).all() == (unit == "token")
        assert 0 < black.sum() < black.numel()


def test_many_prompts_are_masked_one_draw_each(cfg, processors, prompts, monkeypatch):
    text = encode(Example("t", "how many red objects are there ?", "3"), *processors)
    given, seeds = [prompts[0], text, prompts[1]], [(1, "mask", 0, i) for i in range(3)]
    hide = masker(cfg, processors)
    alone = [hide(prompt, generator(*seed)) for prompt, seed in zip(given, seeds)]
    assert torch.equal(hide.of_all(given, seeds), torch.cat([alone[0], alone[2]]))
    assert hide.of_all([text], seeds[:1]) is None

    def lacking(prompt, masker, generator):
        raise ValueError(f"example {prompt.example.id} has no mask")

    monkeypatch.setitem(MASKS, "lacking", lacking)
    with pytest.raises(SystemExit, match="^error: example .* has no mask$"):
        masker(cfg, processors, mask="lacking").of_all(given, seeds)


def test_raw_masking_is_in_cells_of_the_original_picture():
    """14-pixel cells from the upper left corner, cut at the edges, each black or untouched."""
    image = Image.new("RGB", (100, 75), (10, 200, 30))
    hidden = np.array(blacken_cells(image, 0.5, generator(3)))[:, :, 1] == 0
    assert np.array(image)[:, :, 1].min() == 200  # the input is unchanged
    cells = [hidden[y : y + 14, x : x + 14] for y in range(0, 75, 14) for x in range(0, 100, 14)]
    assert len(cells) == 6 * 8 and all(c.all() or not c.any() for c in cells)
    assert 10 < sum(c.all() for c in cells) < 38
    assert not np.array(blacken_cells(image, 1.0, generator(3))).any()
    assert np.array_equal(np.array(blacken_cells(image, 0.0, generator(3))), np.array(image))
    big = np.array(blacken_cells(Image.new("L", (1400, 1400), 9).convert("RGB"), 0.6, generator(4)))
    assert (big == 0).mean() == pytest.approx(0.6, abs=0.02)


def test_raw_masking_comes_before_the_resize(cfg, processors):
    """A cell of a picture shown at twice its size covers 28 pixels: rows are black 2 x 2."""
    bigger = Qwen2VLImageProcessorPil(min_pixels=168 * 168, max_pixels=168 * 168)
    white = Image.new("RGB", (84, 84), "white")
    prompt = encode(Example("r", "<image> ?", "1", [white]), processors[0], bigger)
    masked = Masker(replace(cfg, mask="raw"), bigger)(prompt, generator(5))
    dark = to_picture(masked, prompt.grid[0], bigger).float().mean(-1) < 128  # (168, 168)
    centres = dark[14::28, 14::28]
    assert 0 < centres.sum() < 36
    assert torch.equal(centres, dark[10::28, 18::28])  # away from the blurred edges


@pytest.mark.parametrize("kept, std", [(1.0, 0.2), (0.5, 0.1), (1.0, 0.0)])
def test_noise_stays_a_picture(kept, std, processors, two_pictures):
    noisy = add_noise(two_pictures.pixels, std, generator(0), processors[1], kept)
    statistics = processors[1].image_mean, processors[1].image_std
    mean, scale = (torch.tensor(x)[:, None, None, None] for x in statistics)
    both = (two_pictures.pixels, noisy)
    before, after = ((x.view(-1, 3, 2, 14, 14) * scale + mean) for x in both)
    assert after.min() > -1e-5 and after.max() < 1 + 1e-5
    assert torch.equal(after[:, :, 0], after[:, :, 1])  # both frames of a patch show one picture
    middle = (kept * before > 0.4) & (kept * before < 0.6)  # where nothing is cut off
    drawn = (after - kept * before)[middle]
    assert drawn.std().item() == pytest.approx(std, rel=0.05, abs=1e-5)
    assert drawn.mean().item() == pytest.approx(0, abs=0.01)


def test_semantic_masking_hides_the_floor_p_n_most_attended_patches(
    cfg, processors, two_pictures, dino
):
    """Eq. 4-6 of the paper, written out with the attention weights that transformers hands out."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(dino, attn_implementation="eager").eval()
    settings = dict(mask="semantic", semantic_model=str(dino), mask_ratio=0.45, mask_unit="patch")
    masked = masker(cfg, processors, **settings)(two_pictures, generator(0))
    black, start = (masked == black_row(processors[1])).all(-1), 0
    dino_mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    dino_std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    for grid in two_pictures.grid:
        n = int(grid.prod())
        pixels = to_picture(two_pictures.pixels[start : start + n], grid, processors[1])
        x = (pixels.permute(2, 0, 1)[None] / 255 - dino_mean) / dino_std
        with torch.no_grad():
            attentions = model(x, output_attentions=True).attentions
        importance = torch.zeros(n)
        for layer in (6, 7, 8, 9):
            for head in range(3):
                for query in range(1, n + 1):
                    importance += attentions[layer][0, head, query, 1:] / 3 / 4
        top = importance.argsort(descending=True)[: int(0.45 * n)]
        hidden = row_order(grid, 2)[black[start : start + n]]
        assert sorted(hidden.tolist()) == sorted(top.tolist())
        start += n


def test_a_model_that_is_no_dinov2_gets_one_sentence(folder, processors):
    lacks, nowhere = "is not a DINOv2 with layers 6 to 9", "is neither a folder here nor reachable"
    for name, why in {"/nowhere": nowhere, str(folder): lacks}.items():
        with pytest.raises(SystemExit, match=f"error: --semantic_model {name} {why}"):
            Saliency(name, processors[1])
    assert list(DINO_LAYERS) == [6, 7, 8, 9]
