"""From pictures to features that can be compared: DINOv2's, or those of a policy's own tower.

An encoder has `read`, from an RGB picture to a tensor or two, and is called with a list of those.
"""

import numpy as np
import torch
from PIL import Image

from plumbing.common import fail, first_line
from plumbing.config import Config
from plumbing.families import FAMILIES, encode_pictures, load_image_processor
from plumbing.policy import find_model, load_vlm
from plumbing.saliency import normalised

DINOS = ("dinov2", "dinov2_with_registers")
SIDE = 16  # patches a side of what DINOv2 sees: 224 pixels for patches of 14


class Dino:
    """Features of DINOv2: its output for CLS. The whole picture is resized to a square, and nothing
    is cropped, since what tells two classes apart may stand at the edge."""

    def __init__(self, name, device):
        from transformers import AutoModel

        load = AutoModel.from_pretrained
        model, found = load(name, dtype=torch.float32, output_loading_info=True)
        if found["missing_keys"]:  # transformers would draw them at random
            raise ValueError(f"it lacks {len(found['missing_keys'])} weights")
        self.model = model.eval().to(device)
        self.size = (SIDE * self.model.config.patch_size,) * 2

    def read(self, picture):
        """An RGB picture -> (3, S, S)"""
        x = np.array(picture.resize(self.size, Image.Resampling.BICUBIC))  # (S, S, 3)
        return normalised(torch.from_numpy(x).permute(2, 0, 1) / 255)

    def __call__(self, batch):
        """-> (n, D)"""
        return self.model(torch.stack(batch).to(self.model.device)).last_hidden_state[:, 0]


class Tower:
    """Features of a Qwen-VL's own vision tower: the mean of a picture's tokens, as the language
    model gets them."""

    def __init__(self, folder, device):
        limits = Config.min_pixels, Config.max_pixels
        self.image_processor = load_image_processor(folder, *limits)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model, self.device = load_vlm(folder, dtype).model, device
        self.model.visual.to(device)  # the language model is not used

    def read(self, picture):
        """An RGB picture -> (pixels (N, D), grid (1, 3))"""
        return encode_pictures([picture], self.image_processor)

    def __call__(self, batch):
        """-> (n, D)"""
        pixels, grid = (torch.cat(x).to(self.device) for x in zip(*batch))
        tokens = self.model.get_image_features(pixels, grid).pooler_output  # a (tokens, D) each
        return torch.stack([x.mean(0) for x in tokens])


def encoder_of(name, device):
    """What --encoder names. Ends with a sentence for what is neither of the kinds above."""
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind in FAMILIES:
            return Tower(find_model(name), device)
        if kind in DINOS:
            return Dino(name, device)
    except Exception as error:  # of many kinds, depending on what is wrong with which file
        fail(f"--encoder {name} cannot be loaded ({first_line(error)})")
    fail(f"--encoder {name} is a {kind}; give one of {', '.join([*DINOS, *FAMILIES])}")
