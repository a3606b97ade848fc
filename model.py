"""The policy: load it, score packed responses with it, shard it, save it.

Qwen2.5-VL and Qwen3-VL differ in patch size, positions and where the picture enters (deepstack); all of that is inside
transformers' own forward, which only gets our mask and positions.
"""
import shutil
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from config import TOYS, fail
from loss import exact_entropy, exact_kl, policy_logits, token_logprobs
from packing import boolean_mask, may_see, pack

VISUAL_TOKENS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOGITS_AT_ONCE = 2**26         # elements of (tokens, vocabulary) in float32 that exist at a time: 256 MiB, forward or backward


class Scores(NamedTuple):
    """What the policy says of the sampled tokens: (B, G, R) float32 each, 0 where the mask is false; None: not asked for."""
    logp: torch.Tensor                           # log pi(o_t | q, I, o_<t)
    entropy: torch.Tensor | None = None          # H[pi] over the whole vocabulary
    masked: torch.Tensor | None = None           # log pi(o_t | q, I_mask, o_<t)
    masked_entropy: torch.Tensor | None = None
    kl: tuple | None = None                      # KL(pi || pi_mask) over the whole vocabulary, and where it was clamped


@cache
def flex(compiled):
    """FlexAttention; compiled, it skips the blocks of the mask that no token may see. A CPU runs it as it is, to test the layout.

    torch gives up compiling after 8 lengths and then goes on with something slow and, backwards, wrong; so the limit is raised, and an error."""
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 256, True
    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def flex_attention_forward(module, query, key, value, attention_mask, scaling=None, **_):
    """FlexAttention as an attention function of transformers: (rows, heads, S, d) each -> ((rows, S, heads, d), None)"""
    return flex(query.is_cuda)(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True).transpose(1, 2).contiguous(), None


class Policy(nn.Module):
    """pi_theta: a vision-language model that scores packed responses under the sampler's temperature and ban."""

    def __init__(self, vlm, banned, temperature=1.0, flat=False):
        super().__init__()
        self.vlm, self.temperature, self.flat = vlm, temperature, flat
        self.register_buffer("banned", banned, persistent=False)                # (V,) bool
        if flat:                                                                # the vision tower keeps its own attention
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
            ALL_ATTENTION_FUNCTIONS.register("packed_flex", flex_attention_forward)
            vlm.model.language_model.config._attn_implementation = "packed_flex"

    def pack(self, prompts, groups, scored=None):
        """packing.pack in the layout that this policy reads."""
        return pack(self.vlm, prompts, groups, scored, self.flat)

    def forward(self, x, masked=None, masked_grad=False, exact=False, kl_clamp=0.0):
        """Packed -> Scores. masked: the same rows on I_mask, scored too, with a gradient if masked_grad; exact: the
        whole-vocabulary terms as well. Both pictures in one call, since the exact KL needs both distributions at once.

        Logits are made LOGITS_AT_ONCE at a time, and made again for the backward pass, so (tokens, V) never exists as a whole.
        """
        columns = [self.hidden(x), x.targets[x.mask]]                           # (tokens, width), (tokens,)
        if masked is not None:
            with torch.set_grad_enabled(masked_grad and torch.is_grad_enabled()):
                columns.append(self.hidden(masked))
        size = max(1, LOGITS_AT_ONCE // self.vlm.config.text_config.vocab_size)
        terms = partial(self.terms, masked_grad=masked_grad, exact=exact, kl_clamp=kl_clamp)
        if len(columns[0]) <= size:
            values = terms(*columns)
        else:
            chunks = [checkpoint(terms, *chunk, use_reentrant=False) for chunk in zip(*(c.split(size) for c in columns))]
            values = {name: torch.cat([c[name] for c in chunks]) for name in chunks[0]}
        values = {name: self.unpack(v, x.mask) for name, v in values.items()}
        kl = (values.pop("kl"), values.pop("clamped")) if "kl" in values else None
        return Scores(**values, kl=kl)

    def terms(self, hidden, targets, blind=None, *, masked_grad, exact, kl_clamp):
        """Some tokens' hidden states (n, width), on the picture and on the masked one -> {name of a Scores field: (n,)}"""
        def read(h, name):
            logits = policy_logits(self.vlm.lm_head(h), self.temperature, self.banned)                      # (n, V)
            out = {"logp" if name == "" else "masked": token_logprobs(logits, targets)}
            if not exact:
                return out, None
            dist = logits.log_softmax(-1)
            return out | {f"{name}entropy": exact_entropy(dist)}, dist
        values, dist = read(hidden, "")
        if blind is not None:
            with torch.set_grad_enabled(masked_grad and torch.is_grad_enabled()):
                more, blind_dist = read(blind, "masked_")
            values |= more
            if exact:
                values["kl"], values["clamped"] = exact_kl(dist, blind_dist, kl_clamp)
        return values

    def hidden(self, x):
        """-> (tokens, width): the outputs that predict the scored tokens."""
        unseen = self.look_at_nothing() if x.pixel_values is None else 0.0
        if self.flat:
            rows, S = x.input_ids.shape
            allowed = create_block_mask(may_see(x.group, x.response), rows, None, S, S, device=x.input_ids.device)
        else:
            allowed = boolean_mask(x)
        hidden = self.vlm.model(input_ids=x.input_ids, position_ids=x.position_ids, pixel_values=x.pixel_values, image_grid_thw=x.grid,
                                attention_mask=allowed, use_cache=False).last_hidden_state + unseen         # (rows, S, width)
        return hidden[x.row[x.mask], x.predictor[x.mask]]

    def look_at_nothing(self):
        """Run the vision tower on one token's worth of zeros, weighed with 0. A sharded tower is gathered by all processes together:
        one whose prompts have no picture would leave the others waiting for it, in the forward and in the backward pass. And so every
        weight always has a gradient, and the optimiser's state is whole in every checkpoint."""
        vision = self.vlm.config.vision_config
        rows, width = vision.spatial_merge_size**2, 3 * vision.temporal_patch_size * vision.patch_size**2
        side = vision.spatial_merge_size
        device = self.banned.device
        seen = self.vlm.model.get_image_features(torch.zeros(rows, width, device=device), torch.tensor([[1, side, side]], device=device))
        return 0.0 * sum(t.sum() for t in [*seen.pooler_output, *(f for level in getattr(seen, "deepstack_features", None) or [] for f in level)])

    @staticmethod
    def unpack(values, mask):
        """One value a token, (tokens,), to its place: (B, G, R), 0 where mask is false."""
        return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


@torch.no_grad()
def score_only(policy, *args, **kwargs):
    """Scores without a gradient. FSDP2 leaves the root's weights whole after a forward pass, for the backward pass to find them; where
    none follows, they must go, or what is written to the parameters next is written to a copy."""
    scores = policy(*args, **kwargs)
    if isinstance(policy, FSDPModule):
        policy.reshard()
    return scores


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
    if name in TOYS:
        from warm import build
        return build(warm_steps, name)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name))
    except Exception as error:
        fail(f"model {name!r} is neither a folder here nor reachable on the hub ({type(error).__name__})")


def sharded_policy(folder, banned, cfg, device):
    """A Policy sharded over all processes by FSDP2: every decoder layer and vision block, then the rest. Master weights and
    reductions float32, compute in cfg.dtype.

    Only rank 0 reads the model, into host memory; the others start from a model without memory, and are sent their shards.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from transformers import AutoConfig, AutoModelForImageTextToText
    whole = Policy(load_vlm(folder), banned) if dist.get_rank() == 0 else None
    with torch.device("meta"):
        vlm = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), attn_implementation="sdpa", dtype=torch.float32).eval()
    policy = Policy(vlm, banned, cfg.temperature, cfg.packing == "flat")
    settings = dict(mp_policy=MixedPrecisionPolicy(param_dtype=DTYPES[cfg.dtype], reduce_dtype=torch.float32),
                    offload_policy=CPUOffloadPolicy() if cfg.cpu_offload else OffloadPolicy())
    for block in [*vlm.model.visual.blocks, *vlm.model.language_model.layers]:
        fully_shard(block, **settings)
    fully_shard(policy, **settings)
    policy.to_empty(device="cpu" if cfg.cpu_offload else device)
    vlm.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False, cpu_offload=cfg.cpu_offload)
    set_model_state_dict(policy, whole.state_dict() if whole else {}, options=options)
    sources = dict(whole.named_buffers()) if whole else {}
    for name, buffer in policy.named_buffers():             # not in the state: the tables of the rotary positions, the ban
        value = sources[name].to(device) if whole else torch.empty_like(buffer, device=device)
        dist.broadcast(value, 0)
        module, _, leaf = name.rpartition(".")
        setattr(policy.get_submodule(module), leaf, value)
    return policy


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
            wanted = file.suffix in (".json", ".txt", ".jinja") and not file.name.endswith(".index.json")
            if wanted and (not (folder / file.name).exists() or file.name == "generation_config.json"):
                shutil.copy(file, folder)
