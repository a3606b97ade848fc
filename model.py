"""The policy: load it, score many responses with each prompt computed once, shard it, save it.

    row of the packed forward:   [ prompt with picture | response 1 | response 2 | ... | response G | padding ]

A token sees its own prompt and its own response. Every response starts at the position after the prompt, so its logits are
those of [prompt | response g] alone (tests/test_model.py), for one encoding of the picture and one of the prompt.
"""
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from config import fail
from loss import exact_entropy, exact_kl, policy_logits, token_logprobs

VISUAL_TOKENS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Packed:
    """B groups as rows of length S; G responses a group, R tokens the longest; N patches over all pictures."""
    input_ids: torch.Tensor                # (B, S)
    position_ids: torch.Tensor             # (3, B, S) M-RoPE: time, height, width
    allowed: torch.Tensor                  # (B, 1, S, S) bool, query may look at key
    pixel_values: torch.Tensor | None      # (N, D)
    grid: torch.Tensor | None              # (pictures, 3)
    predictor: torch.Tensor                # (B, G, R) place in the row whose output predicts the token
    targets: torch.Tensor                  # (B, G, R)
    mask: torch.Tensor                     # (B, G, R) bool, tokens that are scored

    def to(self, device):
        return Packed(*(None if getattr(self, f.name) is None else getattr(self, f.name).to(device) for f in fields(self)))


def prompt_positions(vlm, prompt):
    """M-RoPE positions of a prompt, (3, P); what follows it starts at their maximum + 1."""
    types = (prompt.ids == vlm.config.image_token_id).long()[None]
    return vlm.model.get_rope_index(prompt.ids[None], types, image_grid_thw=prompt.grid)[0][:, 0]


def pack(vlm, prompts, groups, scored=None):
    """Lay out B prompts and their responses. groups[b][g]: (n,) token ids; scored[b][g]: (n,) bool, default all.

    Responses keep their own lengths: there is no padding between them, only at the end of a row.
    """
    B, G, R = len(prompts), max(map(len, groups)), max(len(t) for group in groups for t in group)
    S = max(len(p.ids) + sum(map(len, group)) for p, group in zip(prompts, groups))
    ids, segment = torch.zeros(B, S, dtype=torch.long), torch.full((B, S), -1)   # segment: 0 prompt, g response g, -1 padding
    positions = torch.zeros(3, B, S, dtype=torch.long)
    predictor, targets = torch.zeros(2, B, G, R, dtype=torch.long)
    mask = torch.zeros(B, G, R, dtype=torch.bool)
    for b, (prompt, group) in enumerate(zip(prompts, groups)):
        P = end = len(prompt.ids)
        ids[b, :P], segment[b, :P], positions[:, b, :P] = prompt.ids, 0, prompt_positions(vlm, prompt)
        after = positions[:, b, :P].max() + 1
        for g, tokens in enumerate(group):
            start, end, n = end, end + len(tokens), len(tokens)
            ids[b, start:end], segment[b, start:end] = tokens, g + 1
            positions[:, b, start:end] = after + torch.arange(n)
            predictor[b, g, :n] = torch.arange(start - 1, end - 1)
            predictor[b, g, 0] = P - 1                       # the first token of every response is predicted by the prompt
            targets[b, g, :n], mask[b, g, :n] = tokens, True if scored is None else scored[b][g]
    q, k = segment[:, :, None], segment[:, None, :]
    allowed = ((k == 0) | (k == q)) & torch.ones(S, S, dtype=torch.bool).tril()  # (B, S, S); row padding sees the prompt
    pictures = [p for p in prompts if p.grid is not None]
    return Packed(ids, positions, allowed[:, None], torch.cat([p.pixel_values for p in pictures]) if pictures else None,
                  torch.cat([p.grid for p in pictures]) if pictures else None, predictor, targets, mask)


class Scores(NamedTuple):
    """What the policy says of the sampled tokens: (B, G, R) float32 each, 0 where the mask is false; None: not asked for."""
    logp: torch.Tensor                           # log pi(o_t | q, I, o_<t)
    entropy: torch.Tensor | None = None          # H[pi] over the whole vocabulary
    masked: torch.Tensor | None = None           # log pi(o_t | q, I_mask, o_<t)
    masked_entropy: torch.Tensor | None = None
    kl: tuple | None = None                      # KL(pi || pi_mask) over the whole vocabulary, and where it was clamped


class Policy(nn.Module):
    """pi_theta: a vision-language model that scores packed responses under the sampler's temperature and ban."""

    def __init__(self, vlm, banned, temperature=1.0):
        super().__init__()
        self.vlm, self.temperature = vlm, temperature
        self.register_buffer("banned", banned, persistent=False)                # (V,) bool

    def forward(self, x, masked=None, masked_grad=False, exact=False, kl_clamp=0.0):
        """Packed -> Scores. masked: the same rows on I_mask, scored too, with a gradient if masked_grad; exact: the
        whole-vocabulary terms as well. Both pictures in one call, since the exact KL needs both distributions at once."""
        logp, entropy, dist = self.score(x, exact)
        if masked is None:
            return Scores(logp, entropy)
        with torch.set_grad_enabled(masked_grad and torch.is_grad_enabled()):
            blind, blind_entropy, blind_dist = self.score(masked, exact)
        kl = tuple(self.unpack(v, x.mask) for v in exact_kl(dist, blind_dist, kl_clamp)) if exact else None
        return Scores(logp, entropy, blind, blind_entropy, kl)

    def score(self, x, exact):
        """-> log-probs (B, G, R), exact entropies (B, G, R), log-distributions (tokens, V); the last two None unless exact."""
        hidden = self.vlm.model(input_ids=x.input_ids, position_ids=x.position_ids, pixel_values=x.pixel_values,
                                image_grid_thw=x.grid, attention_mask={"full_attention": x.allowed},
                                use_cache=False).last_hidden_state                              # (B, S, width)
        row = torch.arange(len(hidden), device=hidden.device)[:, None, None].expand_as(x.mask)  # (B, G, R)
        picked = hidden[row[x.mask], x.predictor[x.mask]]                                       # (tokens, width)
        logits = policy_logits(self.vlm.lm_head(picked), self.temperature, self.banned)         # (tokens, V)
        logp = self.unpack(token_logprobs(logits, x.targets[x.mask]), x.mask)
        if not exact:
            return logp, None, None
        dist = logits.log_softmax(-1)
        return logp, self.unpack(exact_entropy(dist), x.mask), dist

    @staticmethod
    def unpack(values, mask):
        """One value a token, (tokens,), to its place: (B, G, R), 0 where mask is false."""
        return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def load_processors(folder, cfg):
    """-> (tokenizer, image processor) of a model folder, with the run's pixel limits."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    try:
        tok = AutoTokenizer.from_pretrained(folder)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder, min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels)
    except (OSError, ValueError) as error:
        fail(f"{folder} has no usable tokenizer and image processor files ({str(error).splitlines()[0]}); "
             "copy them from the model it was made from")
    return tok, image_processor


def load_vlm(folder, dtype=torch.float32):
    """The vision-language model in a Hugging Face folder."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging
    logging.disable_progress_bar()
    try:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    except (OSError, ValueError) as error:
        fail(f"{folder} cannot be loaded as a vision-language model ({str(error).splitlines()[0]})")


def banned_tokens(folder, tok):
    """(V,) bool, V of the model in the folder: tokens that stand for pictures, and rows of the embedding that no token owns. A sampled <|image_pad|>
    would make the next forward look for a picture that is not there."""
    from transformers import AutoConfig
    banned = torch.arange(AutoConfig.from_pretrained(folder).text_config.vocab_size) >= len(tok)
    banned[[i for i in tok.convert_tokens_to_ids(VISUAL_TOKENS) if i is not None]] = True
    return banned


def resolve_folder(name, warm_steps):
    """A local folder as it is; a hub name downloaded once; the toy made once."""
    if name == "toy":
        from warm import build
        return build(warm_steps)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name))
    except Exception as error:
        fail(f"model {name!r} is neither a folder here nor reachable on the hub ({type(error).__name__})")


def shard(policy, dtype):
    """FSDP2: every decoder layer and vision block, then the rest. Master weights and reductions float32, compute in dtype."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in [*policy.vlm.model.visual.blocks, *policy.vlm.model.language_model.layers]:
        fully_shard(block, mp_policy=precision)
    fully_shard(policy, mp_policy=precision)


def full_parameters(policy):
    """Stream (Hugging Face name, whole tensor), one at a time; a collective call when the policy is sharded."""
    for name, p in policy.vlm.named_parameters():
        yield name, (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()


def save_hf(policy, folder, source, rank):
    """Write a Hugging Face folder: safetensors, config, and the source folder's tokenizer and processor files."""
    weights = {}
    for name, p in full_parameters(policy):
        if rank == 0:
            weights[name] = p.cpu()
    if rank == 0:
        policy.vlm.save_pretrained(folder, state_dict=weights)
        for file in Path(source).iterdir():
            if file.suffix in (".json", ".txt", ".jinja") and not file.name.endswith(".index.json") and not (folder / file.name).exists():
                shutil.copy(file, folder)
