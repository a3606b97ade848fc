"""All that differs between families of vision-language models, and where a third one is added.

Both families here turn a picture into rows of patches, and 2 x 2 neighbouring patches into one
token of the language model:

                          Qwen2.5-VL                      Qwen3-VL
    patch                 14 x 14 pixels                  16 x 16 pixels
    mean, std of pixels   those of CLIP's data            0.5, 0.5
    where it enters       the token embeddings            and some decoder layers (deepstack)
    M-RoPE                sections side by side           sections interleaved

The sizes are read from the model folder's own files, and positions and deepstack are inside
transformers' forward. To add a family that reads pictures in this way: a subclass of Family and its
line in FAMILIES. If its pictures are not such rows, the functions for pictures below, and black_row
and add_noise of masking.py, need a second form as well.
"""

import torch

IMAGE_TOKEN = "<|image_pad|>"
# A policy must not sample these: the next forward would look for a picture that is not there.
VISUAL_TOKENS = [IMAGE_TOKEN, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


def image_processor_class():
    """The class of both families' image processors; this one needs no torchvision."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil


def load_image_processor(folder, min_pixels, max_pixels):
    """The image processor of a model folder with the run's limits. Raises OSError or ValueError."""
    load = image_processor_class().from_pretrained
    return load(folder, min_pixels=min_pixels, max_pixels=max_pixels)


def encode_pictures(pictures, image_processor):
    """RGB pictures -> (pixels (N, D), one row a patch; grid (K, 3), patches along t, h, w).
    D = 3 channels x 2 equal frames x patch x patch; channel is the slowest axis of a row. Raises
    ValueError for a picture that has no size."""
    sizes, how = [final_size(*p.size, image_processor) for p in pictures], image_processor.resample
    resized = [picture.resize(size, how) for picture, size in zip(pictures, sizes)]
    out = image_processor(resized, return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


def picture_tokens(grid, image_processor):
    """Tokens of the language model that each picture takes. grid (K, 3) -> list of K ints."""
    return (grid.prod(-1) // image_processor.merge_size**2).tolist()


def tokens_of_size(width, height, image_processor):
    """The same from the size in pixels alone. Raises ValueError for a picture that has no size."""
    block = image_processor.patch_size * image_processor.merge_size
    width, height = final_size(width, height, image_processor)
    return width * height // block**2


def final_size(width, height, image_processor):
    """The size (width, height) that resizing a picture arrives at; where rounding to whole tokens
    leaves the limits, once is not enough. Raises ValueError where it never ends, the limits being
    too near each other, and for a picture that is or becomes 200 times as wide as high."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    block, limits = image_processor.patch_size * image_processor.merge_size, image_processor.size
    limits = limits["shortest_edge"], limits["longest_edge"]
    size = height, width
    for _ in range(20):
        before, size = size, smart_resize(*size, block, *limits)
        if size == before:
            return size[::-1]
    limits = "between --min_pixels and --max_pixels"
    raise ValueError(f"a picture of {width} x {height} pixels has no size {limits}")


def row_order(grid, merge):
    """Where each row stands in the picture: row k shows patch row_order[k].

    Patches are counted left to right, top to bottom. Rows come in merge blocks: with merge = 2, the
    first four rows are the patches 0, 1, w and w + 1, which become one token. grid (3,): t, h, w
    patches; merge: patches a side of a merge block -> (h * w,) int64
    """
    _, h, w = grid.tolist()
    blocks = torch.arange(h * w).view(h // merge, merge, w // merge, merge)
    return blocks.transpose(1, 2).reshape(-1)


def to_picture(pixels, grid, image_processor):
    """The rows of one picture back to what can be looked at: (N, D) and (3,) -> (H, W, 3) uint8."""
    _, h, w = grid.tolist()
    p, frames = image_processor.patch_size, image_processor.temporal_patch_size
    patches = torch.empty_like(pixels)
    patches[row_order(grid, image_processor.merge_size)] = pixels  # left to right, top to bottom
    x = patches.view(h, w, 3, frames, p, p)[:, :, :, 0]  # (h, w, 3, p, p)
    x = x.permute(0, 3, 1, 4, 2).reshape(h * p, w * p, 3)  # rows, columns, channels
    x = x * torch.tensor(image_processor.image_std) + torch.tensor(image_processor.image_mean)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


class Family:
    """What the project must know of a model beyond transformers' common interface."""

    toy = ""  # what --model calls the tiny model of this family, if there is one
    toy_processor = {}  # its image processor's settings
    lm_head = "language_model.lm_head"  # where vLLM keeps the head

    def positions(self, vlm, ids, grid):
        """M-RoPE positions of a prompt: ids (P,), grid (K, 3) or None -> (3, P). What follows it
        starts at their maximum + 1."""
        types = (ids == vlm.config.image_token_id).long()[None]
        return vlm.model.get_rope_index(ids[None], types, image_grid_thw=grid)[0][:, 0]

    def outputs(self, vlm, rows, pixels, attend):
        """The last layer's outputs, (rows, S, width). rows: Packed; attend: who sees whom"""
        return vlm.model(
            input_ids=rows.input_ids,
            position_ids=rows.position_ids,
            pixel_values=pixels,
            image_grid_thw=rows.grid,
            attention_mask=attend,
            use_cache=False,
        ).last_hidden_state

    def look_at_nothing(self, vlm, device):
        """The vision tower's outputs for one token's worth of zeros, summed and weighed with 0: a
        sharded tower is gathered by all processes together, also by one whose prompts have no
        picture, and with a gradient for every weight the optimizer's state is always whole."""
        vision = vlm.config.vision_config
        side, frames = vision.spatial_merge_size, vision.temporal_patch_size
        width = 3 * frames * vision.patch_size**2
        grid = torch.tensor([[1, side, side]], device=device)
        looked = vlm.model.get_image_features(torch.zeros(side**2, width, device=device), grid)
        return 0.0 * sum(x.sum() for x in self.features(looked))

    def features(self, looked):
        """Every tensor that the vision tower hands to the language model."""
        return list(looked.pooler_output)

    def blocks(self, vlm):
        """What FSDP2 shards one by one: every vision block and decoder layer."""
        return [*self.tower(vlm).blocks, *vlm.model.language_model.layers]

    def tower(self, vlm):
        """The vision tower, with what joins it to the language model."""
        return vlm.model.visual

    def use_attention(self, vlm, name):
        """Let the language model attend with a registered function; the tower keeps its own."""
        vlm.model.language_model.config._attn_implementation = name

    def use_tower_attention(self, vlm, name):
        """Let the tower attend with a registered function; the language model keeps its own."""
        self.tower(vlm).config._attn_implementation = name


class Qwen25VL(Family):
    toy = "toy"  # with patches of 14 pixels and CLIP's mean, which are the processor's defaults


class Qwen3VL(Family):
    toy = "toy-qwen3"
    toy_processor = dict(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def features(self, looked):
        return [*looked.pooler_output, *(x for level in looked.deepstack_features for x in level)]


# By the model_type that the folder's config.json names.
FAMILIES = {"qwen2_5_vl": Qwen25VL(), "qwen3_vl": Qwen3VL()}
# --model: the embedded policy, as a tiny model of each family (toy/model.py).
TOYS = {family.toy: family for family in FAMILIES.values() if family.toy}


def family_of(config):
    """The family of a loaded model's config. Raises ValueError for a model of no known family."""
    if config.model_type not in FAMILIES:
        known = f"{', '.join(FAMILIES)} (plumbing/models/families.py, where another one is added)"
        raise ValueError(f"its model_type is {config.model_type}; this project knows {known}")
    return FAMILIES[config.model_type]
