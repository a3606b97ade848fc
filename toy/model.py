"""The toy policy before it has learned anything: a tiny real model and its tokenizer.

It is transformers' own class with a small config and a word-level tokenizer, saved in Hugging Face
format: nothing that loads it can tell that it is a toy.
"""

import torch

from plumbing.base.common import make_once
from plumbing.models.families import TOYS, VISUAL_TOKENS, image_processor_class
from toy.task import CELL, CELL_NAMES, COLOURS, GRID, SHAPES

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m.role }} "
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
NAMES = "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()
SPECIAL = [f"<|{name}|>" for name in NAMES]
WORDS = (
    "user assistant system a friend says . ? : ; , + = < > same none how many are there what "
    "colour shape is at more or and objects together describe the picture <think> </think> "
    "\\boxed{ }"
).split()
TASK_WORDS = [*COLOURS, *CELL_NAMES, *SHAPES, *(s + "s" for s in SHAPES)]
NUMBERS = [str(i) for i in range(2 * GRID**2 + 1)]


def tokenizer(words=(*WORDS, *TASK_WORDS, *NUMBERS)):
    """A word-level tokenizer with Qwen's special tokens, these words and a chat template.

    The words must contain user, assistant and system, which the template writes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert set(VISUAL_TOKENS) <= set(SPECIAL)
    vocabulary = {w: i for i, w in enumerate([*SPECIAL, "<unk>", *words])}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    base.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins words with one space
    return PreTrainedTokenizerFast(
        tokenizer_object=base,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
        chat_template=CHAT_TEMPLATE,
    )


def visual_token_ids(tok):
    """{setting of a Qwen-VL config: id} of the tokens that stand for pictures and their ends."""
    names = [token.strip("<|>") for token in VISUAL_TOKENS]
    ids = dict(zip(names, tok.convert_tokens_to_ids(VISUAL_TOKENS)))
    return {f"{name.removesuffix('_pad')}_token_id": i for name, i in ids.items()}


def family_settings(name):
    """-> (model class, config class, text settings, vision settings): what a toy's family needs
    beside what all toys share"""
    import transformers as t

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if name == "toy":
        text = {"rope_parameters": {**rope, "mrope_section": [4, 6, 6]}}
        vision = dict(patch_size=14, window_size=GRID * CELL, fullatt_block_indexes=[1])
        return t.Qwen2_5_VLForConditionalGeneration, t.Qwen2_5_VLConfig, text, vision
    rope |= {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = dict(head_dim=32, rope_parameters=rope)
    vision = dict(patch_size=16, num_position_embeddings=64, deepstack_visual_indexes=[0])
    return t.Qwen3VLForConditionalGeneration, t.Qwen3VLConfig, text, vision


def new_policy(tok, name="toy", seed=0):
    """A tiny Qwen2.5-VL, or for toy-qwen3 a tiny Qwen3-VL, with random weights: under a million
    parameters."""
    kind, config, own_text, own_vision = family_settings(name)
    text = own_text | dict(
        vocab_size=len(tok),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        tie_word_embeddings=True,
    )
    vision = own_vision | dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4)
    vision |= dict(out_hidden_size=128)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = dict(text_config=text, vision_config=vision, tie_word_embeddings=True)
        settings = config(**sizes, **visual_token_ids(tok))
        model = kind(settings)
        for p in model.parameters():  # std 0.02 is for wide models; a narrow one starts too quiet
            if p.ndim > 1:
                p.data.normal_(0, 0.06)
    return model


def save_once(parts, folder):
    """Save a policy, its tokenizer and its image processor as one Hugging Face folder, unless it is
    there already -> folder"""
    from transformers.utils import logging

    logging.disable_progress_bar()  # console.py tells what is under way

    def fill(making):
        for part in parts:
            part.save_pretrained(making)

    return make_once(folder, fill)


def processor(name="toy"):
    """The image processor of a toy: Qwen's own, with the patch size and the mean of its family."""
    limits = dict(min_pixels=CELL**2, max_pixels=64 * CELL**2)
    return image_processor_class()(**limits, **TOYS[name].toy_processor)
