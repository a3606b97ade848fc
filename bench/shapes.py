"""Models of real shapes with random weights, for measurements: nothing is downloaded, and speed
does not depend on the values.

    build("qwen2.5-vl-3b", folder)  ->  a Hugging Face folder: config, weights, the toy's tokenizer,
                                        Qwen's image processor
"""

import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plumbing.data import Example, encode  # noqa: E402
from plumbing.families import family_of, image_processor_class  # noqa: E402
from plumbing.shapes import SHAPES as PUBLISHED  # noqa: E402
from plumbing.simulation import shallow  # noqa: E402
from toy.model import new_policy, tokenizer, visual_token_ids  # noqa: E402

SHAPES = {"toy": None, **PUBLISHED}


def build(shape, folder, device="cpu", depth=None):
    """Write the model folder, unless it is there already -> the folder. depth: (decoder layers,
    vision blocks), where it is to have fewer than the shape."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    tok = tokenizer()
    if SHAPES[shape] is None:
        vlm, looks = new_policy(tok), {}
    else:
        ends = dict(bos_token_id=None, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
        settings = shallow(SHAPES[shape], *depth) if depth else SHAPES[shape]
        settings = settings | visual_token_ids(tok)
        settings["text_config"] = settings["text_config"] | ends
        config = AutoConfig.for_model(**settings)
        looks = family_of(config).toy_processor
        with torch.device(device):
            vlm = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    vlm.save_pretrained(folder)
    tok.save_pretrained(folder)
    limits = dict(min_pixels=28 * 28, max_pixels=1280 * 28 * 28)
    image_processor_class()(**limits, **looks).save_pretrained(folder)
    return folder


def prompts(count, pixels, words, tok, image_processor):
    """Prompts with one square picture of about `pixels` pixels of noise and `words` tokens of text
    each."""
    side, made = max(1, round(pixels**0.5 / 28)) * 28, []
    text = " ".join(["how many red objects are there ?"] * (words // 7 + 1))
    for i in range(count):
        picture = Image.effect_noise((side, side), 90).convert("RGB")
        example = Example(f"bench-{i}", f"<image> {text}", "1", [picture])
        made.append(encode(example, tok, image_processor))
    return made
