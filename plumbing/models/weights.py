"""Weights of a model: load them, shard them over processes, stream them, save them."""

import copy
import shutil
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

from plumbing.base.common import MANIFEST, damaged, fail, first_line, read_json
from plumbing.base.console import doing, fetching, say
from plumbing.base.processes import gathered
from plumbing.models import families, lora
from plumbing.models.families import IMAGE_TOKEN, TOYS, family_of
from plumbing.models.vision import prepare

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def find_model(name):
    """A local folder as it is; a hub name downloaded once."""
    if Path(name).is_dir():
        return sound(whole_model(Path(name)))
    from huggingface_hub import snapshot_download

    try:
        with fetching(f"looking for {name} here, else on the hub"):
            return Path(snapshot_download(name))
    except Exception as error:
        nowhere = "is neither a folder here nor reachable on the hub"
        fail(f"model {name!r} {nowhere} ({type(error).__name__})")


def whole_model(folder):
    """A local folder, if it holds a model."""
    about = read_json(folder / "config.json")
    if (folder / lora.CONFIG).exists() and not about:
        merge = f"`python -m plumbing.merge {folder}`, and give the folder that this names"
        fail(f"{folder} holds an adapter only; merge it into its base model with {merge}")
    if not about:
        fail(f"{folder} holds no model: there is no config.json of one")
    if "config" in about:
        made = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        which = f"give one of its checkpoints, such as {made[-1]}" if made else "it saved none yet"
        fail(f"{folder} is a run and no model; {which}")
    return folder


def sound(folder):
    """A local folder, if its files are those of its manifest, where it has one."""
    if (folder / MANIFEST).exists():  # a checkpoint of a run of ours
        with doing(f"checking {folder}"):
            wrong = damaged(folder, among=lambda name: "/" not in name)
        if wrong:
            differs = f"{folder / wrong[0]} is not what {MANIFEST} says: it is damaged, or changed"
            fail(f"{differs}; give another one, or delete {MANIFEST} if the change is meant")
    return folder


def load_processors(folder, cfg):
    """-> (tokenizer, image processor) of a model folder, with the run's pixel limits."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    try:
        tok = AutoTokenizer.from_pretrained(folder)
        image_processor = families.load_image_processor(folder, cfg.min_pixels, cfg.max_pixels)
        check_chat_template(tok, Path(folder))
        return tok, image_processor
    except (OSError, ValueError, TypeError, TemplateError) as error:  # a template may be any
        lacks = f"no usable tokenizer and image processor files ({first_line(error)})"
        fail(f"{folder} has {lacks}; copy them from the model it was made from")


def check_chat_template(tok, folder):
    """Raises ValueError if a chat cannot be written down, or loses its picture on the way; warns
    where its turns end otherwise than the model's."""
    from jinja2 import TemplateError

    older = folder / "chat_template.json"  # as processors were saved by transformers 4.4x
    if not tok.chat_template and older.exists():
        tok.chat_template = read_json(older).get("chat_template")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}]
    text = tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    if text.count(IMAGE_TOKEN) != 1 or "what ?" not in text:
        raise ValueError(f"its chat template makes no {IMAGE_TOKEN} of a picture")
    with suppress(TemplateError):  # one that takes no second turn says nothing of its end
        turn = {"role": "assistant", "content": [{"type": "text", "text": "so"}]}
        end = tok.apply_chat_template([*chat, turn], tokenize=False).rpartition("so")[2].strip()
        if end and tok.eos_token not in end:
            other = f"its chat template ends a turn with {end!r}, its tokenizer's eos_token is "
            other += f"{tok.eos_token!r}: responses may never end, and be cut off"
            say(f"warning: {folder}: {other}")


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
    if broken := [name for name, p in vlm.named_parameters() if not p.isfinite().all()]:
        fail(f"{folder} holds numbers that are not finite, the first in {broken[0]}")
    return prepare(vlm.eval(), family)


def banned_tokens(folder, tok):
    """(V,) bool, V of the model in the folder: tokens that stand for pictures, and rows of the
    embedding that no token owns."""
    from transformers import AutoConfig

    V = AutoConfig.from_pretrained(folder).text_config.vocab_size
    if len(tok) > V:
        fail(f"{folder} has {V} tokens, and its tokenizer {len(tok)}; they are of two models")
    banned = torch.arange(V) >= len(tok)
    banned[[i for i in tok.convert_tokens_to_ids(families.VISUAL_TOKENS) if i is not None]] = True
    return banned


def load_policy(folder, make, cfg, processes):
    """The policy of a model folder: whole in the only process, or sharded; then the first reads it
    into host memory and sends the shards. make: f(vlm) -> policy.Policy, of setup.policy_maker"""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    state, sharded = {}, processes.sharded
    if processes.first:
        vlm = load_vlm(folder, master_dtype(cfg) if sharded else torch.float32)
        whole = make(lora.add_adapters(vlm, cfg))
    if not sharded:
        return whole
    policy = empty_policy(folder, make, cfg, processes.device)
    if processes.first:
        state, buffers = whole.state_dict(), dict(whole.named_buffers())
        for name, buffer in policy.named_buffers():
            buffer.copy_(buffers[name])
    how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(policy, state, options=how)
    for buffer in policy.buffers():  # not in the state: tables of the rotary positions, the ban
        dist.broadcast(buffer, 0)
    return policy


@torch.no_grad()
def copy_of(policy, folder, make, cfg, processes):
    """The policy as it is now, in memory of its own; each process copies its shards."""
    if not processes.sharded:
        return copy.deepcopy(policy)
    twin = empty_policy(folder, make, cfg, processes.device)
    for mine, p in zip(twin.parameters(), policy.parameters()):
        mine.to_local().copy_(p.to_local())
    for mine, buffer in zip(twin.buffers(), policy.buffers()):
        mine.copy_(buffer)
    return twin


def master_dtype(cfg):
    """What the weights of a sharded model are kept in: float32, and with LoRA, where they do not
    change, what they are computed in."""
    return DTYPES[cfg.dtype] if cfg.lora_rank else torch.float32


def shape_of(folder, cfg):
    """The policy's model without its values, on the device "meta", which has no memory."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config, dtype = AutoConfig.from_pretrained(folder), master_dtype(cfg)
    make = AutoModelForImageTextToText.from_config
    with torch.device("meta"):
        vlm = make(config, attn_implementation="sdpa", dtype=dtype).eval()
        return lora.add_adapters(vlm, cfg)


def empty_policy(folder, make, cfg, device):
    """A Policy sharded over all processes by FSDP2: every decoder layer and vision block, then the
    rest. It has memory, and no values in it. Masters and reductions are float32, and it computes in
    cfg.dtype; of a block's parameters those that are trained must have one type for FSDP2."""
    vlm = shape_of(folder, cfg)
    policy = make(vlm)
    prepare(vlm, policy.family)
    precision = fsdp.MixedPrecisionPolicy(param_dtype=DTYPES[cfg.dtype], reduce_dtype=torch.float32)
    # Named, since torch's default is a GPU wherever there is one, and `device` may be a CPU.
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for part in [*policy.family.blocks(vlm), policy]:
        fsdp.fully_shard(part, mesh=mesh, mp_policy=precision)
    policy.to_empty(device=device)
    vlm.tie_weights()
    return policy


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


def save_model(policy, folder, source, cfg, first):
    """What a checkpoint holds for others to load: a Hugging Face folder, or, with LoRA, peft's
    files. source: the folder of the model cfg.model. Collective; the first process writes."""
    if not lora.adapters(policy):
        return save_hf(policy, folder, source, first)
    local = cfg.model in TOYS or Path(cfg.model).is_dir()  # else it is a name on the hub
    lora.save_adapter(policy.vlm, folder, Path(source).resolve() if local else cfg.model, first)
    if first:
        copy_files(source, folder, but=["config.json", "generation_config.json"])


def save_hf(policy, folder, source, first):
    """Write a Hugging Face folder, with the tokenizer's and processors' files of the source folder.
    Collective; the first process keeps what is streamed, and writes."""
    from transformers import GenerationConfig

    weights = {name: p.cpu() for name, p in full_parameters(policy) if first}
    if first:
        vlm, own = policy.vlm, policy.vlm.generation_config
        if (Path(source) / "generation_config.json").exists():  # it is copied, be it valid or not:
            vlm.generation_config = GenerationConfig()  # transformers writes none that is not
        vlm.save_pretrained(folder, state_dict=weights)
        vlm.generation_config = own
        copy_files(source, folder, but=["config.json"])


def copy_files(source, folder, but):
    """The files of a model folder's tokenizer and processors to another one. but: others' names"""
    for file in Path(source).iterdir():
        others = file.name in (*but, MANIFEST) or file.name.endswith(".index.json")
        if file.suffix in (".json", ".txt", ".jinja") and not others:
            shutil.copy(file, folder)
