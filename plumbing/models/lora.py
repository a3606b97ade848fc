"""LoRA (arXiv 2106.09685): the model stays as it is, and a small product beside it is trained.

    h = W x + (alpha / r) B A x          W (out, in) frozen;  A (r, in) and B (out, r) trained

Every linear layer of the language model's decoder has such an adapter. B starts as 0, so training
starts from the model itself; pi_ref is the policy with its adapters switched off; the sampler is
sent W + (alpha / r) B A under the name of W; a checkpoint holds A and B in the format of Hugging
Face's peft. docs/lora.md says more, and why peft itself is not used.
"""

import json
import math
import re
from contextlib import contextmanager

import torch
from torch import nn

from plumbing.base.common import generator
from plumbing.base.processes import gathered

# The layers with an adapter, by their names in the model, for us and for peft (re.fullmatch). Only
# the decoder's: parts of Qwen2.5-VL's vision tower are called gate_proj, up_proj and down_proj too.
TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
PREFIX = "base_model.model."  # before every name in peft's files
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Adapted(nn.Linear):
    """A linear layer with an adapter; lora_A and lora_B have peft's names."""

    def forward(self, x):
        h = super().forward(x)
        return h + self.scale * self.lora_B(self.lora_A(x)) if self.on else h

    @torch.no_grad()
    def merged(self):
        """W + (alpha / r) B A, whole and in float32: (out, in). Collective if sharded."""
        W, A, B = (gathered(p) for p in (self.weight, self.lora_A.weight, self.lora_B.weight))
        return torch.addmm(W.float(), B, A, alpha=self.scale)


def add_adapters(vlm, cfg):
    """Freeze the model and give it the adapters of cfg.lora_rank; 0: leave it alone -> vlm

    A is drawn as by loralib and peft, uniformly within 1 / sqrt(in) of 0 (the paper says Gaussian),
    each from a generator with a name.
    """
    if not (r := cfg.lora_rank):
        return vlm
    vlm.requires_grad_(False)
    for name, layer in list(vlm.named_modules()):
        if re.fullmatch(TARGETS, name):
            layer.__class__ = Adapted
            layer.scale, layer.on = cfg.lora_alpha / r, True
            # Float32 whatever the base is: small updates of bfloat16 numbers would be lost.
            like = dict(bias=False, dtype=torch.float32, device=layer.weight.device)
            layer.lora_A = nn.utils.skip_init(nn.Linear, layer.in_features, r, **like)
            layer.lora_B = nn.utils.skip_init(nn.Linear, r, layer.out_features, **like)
            if not layer.weight.is_meta:
                draw = generator(cfg.seed, "lora", name)
                nn.init.kaiming_uniform_(layer.lora_A.weight, math.sqrt(5), generator=draw)
                nn.init.zeros_(layer.lora_B.weight)
    return vlm


def adapters(model):
    """The layers with an adapter, in the model's order; none without LoRA."""
    return [module for module in model.modules() if isinstance(module, Adapted)]


def of_adapter(name):
    """Is a parameter of this name A or B of an adapter?"""
    return ".lora_A." in name or ".lora_B." in name


@contextmanager
def switched_off(model):
    """While this lasts, the model is the one without adapters."""
    layers = adapters(model)
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


def count(model):
    """-> how many parameters are trained, and how many frozen"""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters()) - trained


def save_adapter(vlm, folder, base, first):
    """Write A and B as peft does; base: the name or folder of the model that they belong to.
    Collective; the first process writes."""
    from safetensors.torch import save_file

    whole = {PREFIX + n: gathered(p) for n, p in vlm.named_parameters() if of_adapter(n)}
    if not first:
        return
    rank, scale = adapters(vlm)[0].lora_A.out_features, adapters(vlm)[0].scale
    about = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base), r=rank)
    about |= dict(lora_alpha=scale * rank, lora_dropout=0.0, target_modules=TARGETS, bias="none")
    about |= dict(fan_in_fan_out=False, inference_mode=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in whole.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(about, indent=2), "utf-8")
