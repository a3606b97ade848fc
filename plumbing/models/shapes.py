"""Published configurations of real models; and a model before it is loaded, without its weights.

Source: config.json of Qwen2.5-VL-3B-Instruct, Qwen2.5-VL-7B-Instruct and Qwen3-VL-2B-Instruct, of
Qwen on the hub: what decides shapes. The rest are transformers' defaults (tests/test_fit.py).
"""

from pathlib import Path

import torch

from plumbing.base.common import fail, first_line
from plumbing.models.families import family_of

TEXT_3B = dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, vocab_size=151936)
TEXT_7B = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, vocab_size=152064)
TEXT_2B = dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, vocab_size=151936)
TEXT_3B |= dict(num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True)
TEXT_7B |= dict(num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False)
TEXT_2B |= dict(num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True)
QWEN25_ROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1_000_000.0}
ROPE_2B = QWEN25_ROPE | dict(
    mrope_section=[24, 20, 20], mrope_interleaved=True, rope_theta=5_000_000.0
)
TOWER_2B = dict(depth=24, hidden_size=1024, intermediate_size=4096, out_hidden_size=2048)

PUBLISHED = {
    "qwen2.5-vl-3b": dict(
        model_type="qwen2_5_vl",
        tie_word_embeddings=True,
        text_config=TEXT_3B | dict(rope_parameters=QWEN25_ROPE),
        vision_config=dict(hidden_size=1280, out_hidden_size=2048),
    ),
    "qwen2.5-vl-7b": dict(
        model_type="qwen2_5_vl",
        tie_word_embeddings=False,
        text_config=TEXT_7B | dict(rope_parameters=QWEN25_ROPE),
        vision_config=dict(hidden_size=1280, out_hidden_size=3584),
    ),
    "qwen3-vl-2b": dict(
        model_type="qwen3_vl",
        tie_word_embeddings=True,
        text_config=TEXT_2B | dict(rope_parameters=ROPE_2B),
        vision_config=TOWER_2B | dict(deepstack_visual_indexes=[5, 11, 17]),
    ),
}


def without_weights(name):
    """A model on the device "meta", which has no memory. name: a folder, or a published name"""
    from transformers import AutoConfig, AutoModelForImageTextToText

    known = [shape for key, shape in PUBLISHED.items() if key in str(name).lower()]
    local = (Path(name) / "config.json").is_file()
    if not local and not known:
        fail(f"--model {name}: no folder with a config.json, and none of {', '.join(PUBLISHED)}")
    try:
        config = AutoConfig.from_pretrained(name) if local else AutoConfig.for_model(**known[0])
        family_of(config)
    except (OSError, ValueError) as error:
        fail(f"--model {name}: what it takes cannot be told, since {first_line(error)}")
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)
