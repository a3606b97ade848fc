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
from plumbing.families import image_processor_class  # noqa: E402
from toy.model import new_policy, tokenizer, visual_token_ids  # noqa: E402

# The published configurations (huggingface.co/Qwen/<name>/config.json): language model, vision
# tower.
SHAPES = {
    "toy": None,
    "qwen2.5-vl-3b": (
        dict(
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        dict(out_hidden_size=2048, intermediate_size=3420),
    ),
    "qwen2.5-vl-7b": (
        dict(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
            tie_word_embeddings=False,
        ),
        dict(out_hidden_size=3584, intermediate_size=3420),
    ),
}
TOWER = dict(
    depth=32,
    hidden_size=1280,
    num_heads=16,
    patch_size=14,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
)
ROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1_000_000.0}


def build(shape, folder, device="cpu", layers=None):
    """Write the model folder, unless it is there already -> the folder. layers: fewer than the
    shape has, for the decoder."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    tok = tokenizer()
    if SHAPES[shape] is None:
        vlm = new_policy(tok)
    else:
        text, vision = SHAPES[shape]
        text = text | ({"num_hidden_layers": layers} if layers else {})
        config = Qwen2_5_VLConfig(
            text_config={
                **text,
                "max_position_embeddings": 32768,
                "rope_parameters": ROPE,
                "bos_token_id": None,
                "eos_token_id": tok.eos_token_id,
                "pad_token_id": tok.pad_token_id,
            },
            vision_config={**TOWER, **vision},
            tie_word_embeddings=text["tie_word_embeddings"],
            **visual_token_ids(tok),
        )
        with torch.device(device):
            torch.set_default_dtype(torch.bfloat16)
            vlm = Qwen2_5_VLForConditionalGeneration(config)
            torch.set_default_dtype(torch.float32)
    vlm.save_pretrained(folder)
    tok.save_pretrained(folder)
    limits = dict(min_pixels=28 * 28, max_pixels=1280 * 28 * 28)
    image_processor_class()(**limits).save_pretrained(folder)
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
