"""Models of real shapes with random weights, for measurements: nothing is downloaded, and speed
does not depend on the values.

    random_model("qwen2.5-vl-3b", folder)  ->  a Hugging Face folder: config, weights, the toy's
                                               tokenizer, Qwen's image processor
"""

import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plumbing.data.prompts import Example  # noqa: E402
from plumbing.models.families import family_of, image_processor_class  # noqa: E402
from plumbing.models.shapes import PUBLISHED  # noqa: E402
from toy.model import new_policy, tokenizer, visual_token_ids  # noqa: E402

SHAPES = {"toy": None, **PUBLISHED}


def settings_of(shape, depth=None):
    """A published config.json. depth: (decoder layers, vision blocks), where it is to have fewer"""
    settings = SHAPES[shape]
    layers, blocks = ({"num_hidden_layers": depth[0]}, {"depth": depth[1]}) if depth else ({}, {})
    text, vision = settings["text_config"] | layers, settings["vision_config"] | blocks
    return settings | {"text_config": text, "vision_config": vision}


def random_model(shape, folder, device="cpu", depth=None):
    """Write the model folder, unless it is there already -> the folder"""
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder, tok = Path(folder), tokenizer()
    if (folder / "config.json").exists():
        return folder
    if shape == "toy":
        vlm, looks = new_policy(tok), {}
    else:
        settings = settings_of(shape, depth) | visual_token_ids(tok)
        ends = dict(bos_token_id=None, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
        settings["text_config"] |= ends
        config = AutoConfig.for_model(**settings)
        looks = family_of(config).toy_processor
        with torch.device(device):
            vlm = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    limits = dict(min_pixels=28 * 28, max_pixels=1280 * 28 * 28)
    for part in (vlm, tok, image_processor_class()(**limits, **looks)):
        part.save_pretrained(folder)
    return folder


def noise(count, pixels, words):
    """Examples with one square picture of about `pixels` pixels of noise and `words` words each."""
    side, text = max(1, round(pixels**0.5 / 28)) * 28, "how many red objects are there ? "
    pictures = (Image.effect_noise((side, side), 90).convert("RGB") for _ in range(count))
    problem = "<image> " + text * (words // 7 + 1)
    return [Example(f"noise-{i}", problem, "1", [p]) for i, p in enumerate(pictures)]
