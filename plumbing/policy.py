"""The policy: load it, score packed responses with it, shard it, save it."""

import copy
import json
import shutil
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from loss import exact_entropy, exact_kl, policy_logits, token_logprobs
from plumbing import lora
from plumbing.common import fail, first_line
from plumbing.console import fetching
from plumbing.families import (
    IMAGE_TOKEN,
    TOYS,
    VISUAL_TOKENS,
    family_of,
    load_image_processor,
)
from plumbing.packing import UNSEEN, attention_mask, may_attend, pack
from plumbing.processes import gathered
from plumbing.vision import prepare

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Elements of (tokens, vocabulary) in float32 that exist at a time: 256 MiB, forwards or backwards.
LOGITS_AT_ONCE = 2**26


class Scores(NamedTuple):
    """What the policy says of the sampled tokens on one picture: (B, G, R), 0 if not scored."""

    logp: torch.Tensor  # log pi(o_t | q, picture, o_<t)
    entropy: torch.Tensor | None = None  # H over the whole vocabulary, if it was asked for


class Joint(NamedTuple):
    """A second picture to score in the same call, for the KL over the whole vocabulary."""

    masked_pixels: torch.Tensor | None  # (N, D)
    masked_grad: bool  # is there a gradient through it?
    kl_clamp: float


@cache
def flex(compiled):
    """FlexAttention. Compiled, it skips the blocks that no token may see; a CPU runs it as it is.

    After 8 lengths torch gives up compiling and goes on with something slow and, backwards, wrong;
    so the limit is raised, and reaching it is an error.
    """
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


def packed_flex(module, query, key, value, attention_mask, scaling=None, **_):
    """FlexAttention as transformers calls it: (rows, heads, S, d) -> ((rows, S, heads, d), None)"""
    attend = flex(query.is_cuda)
    out = attend(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


class Policy(nn.Module):
    """pi_theta: a vision-language model that scores packed responses under the sampler's
    temperature and ban."""

    def __init__(self, vlm, banned, temperature=1.0, flat=False):
        super().__init__()
        self.vlm, self.family = vlm, family_of(vlm.config)
        self.temperature, self.flat = temperature, flat
        self.register_buffer("banned", banned, persistent=False)  # (V,) bool
        if flat:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            ALL_ATTENTION_FUNCTIONS.register("packed_flex", packed_flex)
            self.family.use_attention(vlm, "packed_flex")

    def pack(self, prompts, groups, scored=None):
        """packing.pack in the layout that this policy reads."""
        return pack(self.vlm, prompts, groups, scored, self.flat)

    def forward(self, rows, pixels, exact=False, grad=True, joint=None):
        """Packed rows on one picture -> Scores

        pixels: rows.pixels for pi_theta, rows.masked_pixels for pi_mask; None: no picture
        exact: with the entropy over the whole vocabulary; grad: with a gradient
        joint: a second picture that is scored in the same call, since the exact KL needs both
        distributions at once -> (Scores, Scores of the second, (KL, where it was clamped))

        Logits are made LOGITS_AT_ONCE at a time, and made again for the backward pass, so that
        (tokens, vocabulary) never exists as a whole.
        """
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            return self.score(rows, pixels, exact, joint)

    def score(self, rows, pixels, exact, joint):
        """What forward says, in the gradient mode that it sets."""
        columns = [self.outputs(rows, pixels), rows.targets[rows.scored]]  # (n, width), (n,)
        if joint is not None:
            with torch.set_grad_enabled(joint.masked_grad and torch.is_grad_enabled()):
                columns.append(self.outputs(rows, joint.masked_pixels))
        read = partial(self.read_both, joint=joint) if joint else partial(self.read, exact=exact)
        size = max(1, LOGITS_AT_ONCE // self.vlm.config.text_config.vocab_size)
        if len(columns[0]) <= size:
            values = read(*columns)
        else:
            pieces = zip(*(column.split(size) for column in columns))
            chunks = [checkpoint(read, *piece, use_reentrant=False) for piece in pieces]
            values = [None if x[0] is None else torch.cat(x) for x in zip(*chunks)]
        values = [None if x is None else in_place(x, rows.scored) for x in values]
        if joint is None:
            return Scores(*values)
        return Scores(*values[:2]), Scores(*values[2:4]), tuple(values[4:])

    def read(self, outputs, targets, exact):
        """Outputs (n, width) and the tokens they predict -> (logp, entropy or None), (n,) each."""
        logits = policy_logits(self.vlm.lm_head(outputs), self.temperature, self.banned)  # (n, V)
        logp = token_logprobs(logits, targets)
        return logp, exact_entropy(logits.log_softmax(-1)) if exact else None

    def read_both(self, outputs, targets, masked_outputs, joint):
        """-> (logp, entropy, masked logp, masked entropy, KL, clamped), (n,) each."""

        def one(x):
            logits = policy_logits(self.vlm.lm_head(x), self.temperature, self.banned)  # (n, V)
            logp, dist = token_logprobs(logits, targets), logits.log_softmax(-1)
            return (logp, exact_entropy(dist)), dist

        seen, seen_dist = one(outputs)
        with torch.set_grad_enabled(joint.masked_grad and torch.is_grad_enabled()):
            masked, masked_dist = one(masked_outputs)
        return *seen, *masked, *exact_kl(seen_dist, masked_dist, joint.kl_clamp)

    def outputs(self, rows, pixels):
        """-> (n, width): the last layer's outputs that predict the n scored tokens.

        Without pixels there is no picture: its tokens, where the prompts have such, keep their
        places, and no other token sees them.
        """
        nothing = 0.0
        if pixels is None:
            nothing = self.family.look_at_nothing(self.vlm, self.banned.device)
            of_pictures = rows.input_ids == self.vlm.config.image_token_id
            rows = replace(rows, part=rows.part.masked_fill(of_pictures, UNSEEN))
        if self.flat:
            R, S = rows.input_ids.shape
            rule = may_attend(rows.group, rows.part)
            attend = create_block_mask(rule, R, None, S, S, device=rows.input_ids.device)
        else:
            attend = attention_mask(rows)
        outputs = self.family.outputs(self.vlm, rows, pixels, attend) + nothing
        return outputs[rows.row[rows.scored], rows.predictor[rows.scored]]


def in_place(values, scored):
    """One value a scored token, (n,), to where it belongs: (B, G, R), 0 elsewhere."""
    empty = torch.zeros(scored.shape, dtype=values.dtype, device=values.device)
    return empty.masked_scatter(scored, values)


@torch.no_grad()
def score_only(policy, rows, pixels, exact=False):
    """Scores without a gradient.

    FSDP2 leaves the root's weights whole after a forward pass, for the backward pass to find them.
    Where none follows they must go, or what is written to the parameters next is written to a copy.
    """
    scores = policy(rows, pixels, exact)
    if isinstance(policy, FSDPModule):
        policy.reshard()
    return scores


class WithoutAdapters:
    """pi_ref of a policy with LoRA: the same model with its adapters switched off, for score_only.
    It is what the policy was before training, and takes no memory."""

    def __init__(self, policy):
        self.policy = policy

    def __call__(self, rows, pixels, exact=False):
        with lora.switched_off(self.policy):
            return score_only(self.policy, rows, pixels, exact)


def response_logprobs(policy, prompts, rollouts, device):
    """The policy's log-probs of sampled tokens -> a list of (n,) tensors, response by response.

    Prompts whose rollout is None are passed over.
    """
    pairs = [(p, r.tokens) for p, r in zip(prompts, rollouts) if r]
    rows = policy.pack(*zip(*pairs)).to(device)
    logp = score_only(policy, rows, rows.pixels).logp.cpu()
    return [logp[b, g, : len(t)] for b, (_, group) in enumerate(pairs) for g, t in enumerate(group)]


# ------------------------------------------------------------------------------- load and save


def find_model(name):
    """A local folder as it is; a hub name downloaded once."""
    if Path(name).is_dir():
        return whole_model(Path(name))
    from huggingface_hub import snapshot_download

    try:
        with fetching(f"looking for {name} here, else on the hub"):
            return Path(snapshot_download(name))
    except Exception as error:
        kind = type(error).__name__
        fail(f"model {name!r} is neither a folder here nor reachable on the hub ({kind})")


def whole_model(folder):
    """A local folder, if it holds a model."""
    if (folder / lora.CONFIG).exists() and not (folder / "config.json").exists():
        fail(
            f"{folder} holds an adapter only; merge it into its base model with `python -m "
            f"plumbing.merge {folder}`, and give the folder that this names"
        )
    if not (folder / "config.json").exists():
        fail(f"{folder} holds no model: there is no config.json")
    if made := sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime):
        fail(f"{folder} is a run and no model; give one of its checkpoints, such as {made[-1]}")
    return folder


def load_processors(folder, cfg):
    """-> (tokenizer, image processor) of a model folder, with the run's pixel limits."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    try:
        tok = AutoTokenizer.from_pretrained(folder)
        image_processor = load_image_processor(folder, cfg.min_pixels, cfg.max_pixels)
        check_chat_template(tok, Path(folder))
        return tok, image_processor
    except (OSError, ValueError, TemplateError) as error:
        fail(
            f"{folder} has no usable tokenizer and image processor files ({first_line(error)}); "
            "copy them from the model it was made from"
        )


def check_chat_template(tok, folder):
    """Raises ValueError if a chat cannot be written down, or loses its picture on the way."""
    older = folder / "chat_template.json"  # as processors were saved by transformers 4.4x
    if not tok.chat_template and older.exists():
        tok.chat_template = json.loads(older.read_text())["chat_template"]
    if not tok.chat_template:
        raise ValueError("the tokenizer has no chat template")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}]
    text = tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    if text.count(IMAGE_TOKEN) != 1 or "what ?" not in text:
        raise ValueError(f"its chat template makes no {IMAGE_TOKEN} of a picture")


def load_vlm(folder, dtype=torch.float32):
    """The vision-language model in a Hugging Face folder. Ends with a sentence that names what is
    missing if its files do not fill the model: transformers would draw that at random."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    load = AutoModelForImageTextToText.from_pretrained
    try:
        vlm, found = load(folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
        family = family_of(vlm.config)
    except Exception as error:  # of many kinds, depending on what is wrong with which file
        fail(f"{folder} cannot be loaded as a vision-language model ({first_line(error)})")
    if missing := sorted(found["missing_keys"]):
        other = sorted(found["unexpected_keys"])
        hint = f"; it has {other[0]} instead" if other else ""
        fail(f"{folder} lacks {len(missing)} weights, the first is {missing[0]}{hint}")
    return prepare(vlm.eval(), family)


def banned_tokens(folder, tok):
    """(V,) bool, V of the model in the folder: tokens that stand for pictures, and rows of the
    embedding that no token owns."""
    from transformers import AutoConfig

    size = AutoConfig.from_pretrained(folder).text_config.vocab_size
    banned = torch.arange(size) >= len(tok)
    banned[[i for i in tok.convert_tokens_to_ids(VISUAL_TOKENS) if i is not None]] = True
    return banned


def load_policy(folder, banned, cfg, processes):
    """The policy of a model folder: sharded over the processes, or whole in the only one."""
    if processes.sharded:
        return sharded_policy(folder, banned, cfg, processes.device)
    vlm = lora.add_adapters(load_vlm(folder), cfg)
    return Policy(vlm, banned, cfg.temperature, cfg.packing == "flat")


@torch.no_grad()
def copy_of(policy, folder, cfg, processes):
    """The policy as it is now, in memory of its own. Each process copies its shards: nothing is
    read or sent."""
    if not processes.sharded:
        return copy.deepcopy(policy)
    twin = empty_policy(folder, policy.banned, cfg, processes.device)
    for mine, p in zip(twin.parameters(), policy.parameters()):
        mine.to_local().copy_(p.to_local())
    for name, buffer in policy.named_buffers():
        place(twin, name, buffer.clone())
    return twin


def sharded_policy(folder, banned, cfg, device):
    """The policy of a model folder, sharded over all processes.

    Only rank 0 reads the model, into host memory; the others start from a model without memory, and
    are sent their shards.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    loaded = None
    if dist.get_rank() == 0:
        loaded = Policy(lora.add_adapters(load_vlm(folder, master_dtype(cfg)), cfg), banned)
    policy = empty_policy(folder, banned, cfg, device)
    options = StateDictOptions(
        full_state_dict=True,
        broadcast_from_rank0=True,
        strict=False,
        cpu_offload=cfg.cpu_offload,
    )
    set_model_state_dict(policy, loaded.state_dict() if loaded else {}, options=options)
    send_buffers(policy, loaded, device)
    return policy


def master_dtype(cfg):
    """What the weights of a sharded policy are kept in: float32, and with LoRA, where they do not
    change, what they are computed in."""
    return DTYPES[cfg.dtype] if cfg.lora_rank else torch.float32


def shape_of(folder, cfg):
    """The policy's model without its values, on the device "meta", which has no memory."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config, dtype = AutoConfig.from_pretrained(folder), master_dtype(cfg)
    with torch.device("meta"):
        vlm = AutoModelForImageTextToText.from_config(
            config, attn_implementation="sdpa", dtype=dtype
        )
        return lora.add_adapters(vlm.eval(), cfg)


def empty_policy(folder, banned, cfg, device):
    """A Policy sharded over all processes by FSDP2: every decoder layer and vision block, then the
    rest. Master weights and reductions are float32, and it computes in cfg.dtype. With LoRA the
    masters are A and B, and what is frozen is kept in cfg.dtype; FSDP2 wants one type of those
    parameters of a block that are trained, and casts each to the type that it computes in. It has
    memory for weights and buffers, and no values in it.
    """
    vlm = shape_of(folder, cfg)
    policy = Policy(vlm, banned, cfg.temperature, cfg.packing == "flat")
    prepare(vlm, policy.family)
    precision = MixedPrecisionPolicy(param_dtype=DTYPES[cfg.dtype], reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy() if cfg.cpu_offload else OffloadPolicy()
    # Named, since torch's default is a GPU wherever there is one, and `device` may be a CPU.
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for part in [*policy.family.blocks(vlm), policy]:
        fully_shard(part, mesh=mesh, mp_policy=precision, offload_policy=offload)
    policy.to_empty(device="cpu" if cfg.cpu_offload else device)
    vlm.tie_weights()
    return policy


def send_buffers(policy, loaded, device):
    """Rank 0's buffers to everybody: what is not in the state, such as the tables of the rotary
    positions and the ban."""
    sources = dict(loaded.named_buffers()) if loaded else {}
    for name, buffer in policy.named_buffers():
        value = sources[name].to(device) if loaded else torch.empty_like(buffer, device=device)
        dist.broadcast(value, 0)
        place(policy, name, value)


def place(policy, name, buffer):
    """Set a buffer by its whole name."""
    module, _, leaf = name.rpartition(".")
    setattr(policy.get_submodule(module), leaf, buffer)


def full_parameters(policy):
    """Stream (Hugging Face name, whole tensor), one at a time; collective if sharded. A weight with
    an adapter comes merged, in float32: who receives it rounds."""
    for name, p in policy.vlm.named_parameters():
        module, _, leaf = name.rpartition(".")
        layer = policy.vlm.get_submodule(module)
        if isinstance(layer, lora.Adapted) and leaf == "weight":
            yield name, layer.merged()
        elif not lora.of_adapter(name):
            yield name, gathered(p).detach()


def save(policy, folder, source, cfg, first):
    """What a checkpoint holds for others to load: a Hugging Face folder, or, with LoRA, peft's
    files. source: the folder of the model cfg.model. Collective; the first process writes."""
    if not lora.adapters(policy):
        return save_hf(policy, folder, source, first)
    elsewhere = cfg.model in TOYS or Path(cfg.model).is_dir()  # not on the hub
    base = Path(source).resolve() if elsewhere else cfg.model
    lora.save_adapter(policy.vlm, folder, base, first)
    if cfg.merge:
        save_hf(policy, folder / "merged", source, first)
    if first:
        copy_files(source, folder, but=["config.json", "generation_config.json"])


def save_hf(policy, folder, source, first):
    """Write a Hugging Face folder: safetensors, config, and the source folder's tokenizer and
    processor files. Collective; the first process writes."""
    weights = {}
    for name, p in full_parameters(policy):
        if first:
            weights[name] = p.cpu()
    if not first:
        return
    policy.vlm.save_pretrained(folder, state_dict=weights)
    copy_files(source, folder)


def copy_files(source, folder, but=()):
    """The tokenizer and processor files of a model folder to another one that lacks them."""
    for file in Path(source).iterdir():
        wanted = file.suffix in (".json", ".txt", ".jinja") and file.name not in but
        wanted = wanted and not file.name.endswith(".index.json")
        if wanted and (not (folder / file.name).exists() or file.name == "generation_config.json"):
            shutil.copy(file, folder)
