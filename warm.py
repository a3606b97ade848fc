"""The toy policy: a tiny real Qwen2.5-VL or Qwen3-VL, and the short supervised warm start that brings it to where RL has something to do.

It is transformers' own class with a small config and a word-level tokenizer, saved in Hugging Face
format: nothing that loads it can tell that it is a toy.
"""
import hashlib
import os
import random
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from data import Example, encode, generator
from masking import black_row, choose_patches, mask_patches
from model import Policy
from packing import pack
from toy import CELL, COLOURS, FAMILIES, GRID, HINT_RIGHT, NAMES, SHAPES, ask, describe, draw, random_board

CARELESS = 0.5                           # how often the warm start's last teacher misreads a fact, and writes a random one

CHAT_TEMPLATE = ("{% for m in messages %}<|im_start|> {{ m.role }} {% if m.content is string %}{{ m.content }}{% else %}"
                 "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
                 "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %} <|im_end|> {% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]
WORDS = ("user assistant system a friend says . ? : ; , + = < > same none how many are there what colour shape "
         "is at more or and objects together describe the picture <think> </think> \\boxed{ }").split()


def tokenizer():
    """A word-level tokenizer with Qwen's special tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = [*SPECIAL, "<unk>", *WORDS, *COLOURS, *NAMES, *SHAPES, *(s + "s" for s in SHAPES), *map(str, range(2 * GRID**2 + 1))]
    base = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    base.decoder = decoders.WordPiece(prefix="##", cleanup=False)     # joins words with one space
    return PreTrainedTokenizerFast(tokenizer_object=base, unk_token="<unk>", eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>", additional_special_tokens=SPECIAL,
                                   chat_template=CHAT_TEMPLATE)


def new_policy(tok, name="toy", seed=0):
    """transformers' own Qwen2.5-VL (or, for toy-qwen3, Qwen3-VL) with random weights and a small config, under a million parameters."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    ids = {f"{n}_token_id": tok.convert_tokens_to_ids(t) for n, t in
           [("image", "<|image_pad|>"), ("video", "<|video_pad|>"), ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>")]}
    text = dict(vocab_size=len(tok), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=None, eos_token_id=tok.eos_token_id,
                pad_token_id=tok.pad_token_id, tie_word_embeddings=True)
    vision = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=128)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if name == "toy":
        text["rope_parameters"] = {**rope, "mrope_section": [4, 6, 6]}
        vision |= dict(patch_size=14, window_size=GRID * CELL, fullatt_block_indexes=[1])
        kind, config = Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig
    else:
        text |= dict(head_dim=32, rope_parameters={**rope, "mrope_section": [6, 5, 5], "mrope_interleaved": True})
        vision |= dict(patch_size=16, num_position_embeddings=64, deepstack_visual_indexes=[0])
        kind, config = Qwen3VLForConditionalGeneration, Qwen3VLConfig
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids))
        for p in model.parameters():                 # std 0.02 is for wide models; a narrow one starts too quiet
            if p.ndim > 1:
                p.data.normal_(0, 0.06)
    return model


def lesson(index, questions, carelessness):
    """One picture of the warm start: its prompt up to the picture, then each question with its answer, and a description."""
    rng = random.Random(f"warm/{index}")
    board, texts = random_board(rng, False), []

    def careless(truth, possible):
        return rng.choice(list(possible)) if rng.random() < carelessness else truth
    while len(texts) < questions:
        question, solve = ask(FAMILIES[(index + len(texts)) % len(FAMILIES)], rng)
        solved, other = solve(board), solve(random_board(rng, False))
        if solved and other and solved[1] != other[1]:
            hint = solved[1] if rng.random() < HINT_RIGHT else other[1]
            thought, answer = solve(board, careless)
            texts.append((f"a friend says {hint} . {question}", f"<think> {thought} </think> \\boxed{{ {answer} }}"))
    texts.append(("describe the picture", describe(board)))
    return Example(f"warm-{index}", "<image>", "", [draw(board, rng)]), texts


def warm_start(vlm, tok, image_processor, steps, pictures=16, lr=2e-3):
    """Supervised learning of chains of thought and dense descriptions, before RL, from three teachers in turn.

    The first (3/16 of the steps) only describes pictures: answers alone teach the language prior long before the vision tower
    learns to see. The second also answers four questions a picture. The third (the last 1/7) does so carelessly, so that the
    policy knows more than it shows, as a pretrained model does: there is something for RL to bring out.

    Each picture is the shared prompt of a packed row whose "responses" are the questions with their answers, and the
    description; the loss is on the answers only. One picture in eight is partly or wholly masked, so that the blind policy is
    what it is in a large model: one that still writes sense, and guesses.
    """
    black = black_row(image_processor)
    policy = Policy(vlm.train(), torch.zeros(len(tok), dtype=torch.bool))
    optimiser = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    bar, third = tqdm(range(steps), desc="toy warm start", unit="step"), steps * 6 // 7
    for step in bar:
        rate = min(1.0, (step + 1) / 30) if step < third else 0.5 * (steps - step) / (steps - third)
        for group in optimiser.param_groups:
            group["lr"] = lr * rate
        prompts, groups, scored = [], [], []
        for index in range(step * pictures, (step + 1) * pictures):
            example, texts = lesson(index, 0 if step < steps * 3 // 16 else 4, CARELESS if step >= third else 0.0)
            prompt = encode(example, tok, image_processor)
            end = (prompt.ids == tok.convert_tokens_to_ids("<|vision_end|>")).nonzero().item() + 1
            prompt.ids = prompt.ids[:end]
            if index % 8 == 7:
                ratio = 0.3 + 0.7 * random.Random(f"warm mask/{index}").random()
                hidden = choose_patches(len(prompt.pixel_values), ratio, generator("warm mask", index), image_processor.merge_size**2)
                prompt.pixel_values = mask_patches(prompt.pixel_values, hidden, black)
            asked = [tok(f"{q} <|im_end|> <|im_start|> assistant")["input_ids"] for q, _ in texts]
            answered = [tok(f"{a} <|im_end|>")["input_ids"] for _, a in texts]
            prompts.append(prompt)
            groups.append([torch.tensor(q + a) for q, a in zip(asked, answered)])
            scored.append([torch.arange(len(q + a)) >= len(q) for q, a in zip(asked, answered)])
        packed = pack(vlm, prompts, groups, scored)
        loss = -policy(packed).logp.sum() / packed.mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    vlm.eval()


def processor(name):
    """The image processor of a toy, Qwen's own: patches of 14 pixels and the mean of CLIP's data, or 16 and a half."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    limits = dict(min_pixels=CELL**2, max_pixels=64 * CELL**2)
    return Qwen2VLImageProcessorPil(**limits) if name == "toy" else \
        Qwen2VLImageProcessorPil(**limits, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def build(steps, name="toy"):
    """The warm-started toy policy as a Hugging Face folder; made once, cached by a hash of all it depends on."""
    import transformers
    here = Path(__file__).parent
    source = "".join((here / name).read_text() for name in ("warm.py", "toy.py", "data.py", "model.py", "packing.py", "loss.py", "masking.py"))
    key = hashlib.sha256(f"{source}{steps}{torch.__version__}{transformers.__version__}".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("PAPO_CACHE", Path.home() / ".cache" / "papo"))
    folder = cache / f"{name}-{key}"
    if folder.is_dir():
        return folder
    tok = tokenizer()
    image_processor, vlm = processor(name), new_policy(tok, name)
    warm_start(vlm, tok, image_processor, steps)
    making = cache / f"making-{name}-{key}-{os.getpid()}"
    vlm.save_pretrained(making)
    tok.save_pretrained(making)
    image_processor.save_pretrained(making)
    try:
        making.rename(folder)
    except OSError:                      # another process was faster; its folder holds the same
        shutil.rmtree(making)
    return folder
