"""LoRA (arXiv 2106.09685): the model stays as it is, and a small product beside it is trained.

    h = W x + (alpha / r) B A x          W (out, in) frozen;  A (r, in) and B (out, r) trained

B starts as 0, so training starts from the model itself. Every linear layer of the language model's
decoder has such an adapter: q, k, v, o, gate, up and down. The vision tower has none, and is frozen
like the rest. Three things follow:

    memory     gradients and Adam's moments are those of A and B; the rest is kept in the type that
               it computes in
    pi_ref     is the policy with its adapters switched off (policy.WithoutAdapters): no second copy
    sampler    is sent W + (alpha / r) B A, under the name of W (policy.full_parameters)

A checkpoint holds A and B in the format of Hugging Face's peft, which can load it. --merge adds a
whole model folder, and `python -m plumbing.merge` makes one afterwards.
"""

import json
import math
import re
from contextlib import contextmanager

import torch
from torch import nn

from plumbing.common import generator
from plumbing.processes import gathered

# The layers with an adapter, by their names in the model, for us and for peft (re.fullmatch). Only
# the decoder's: parts of Qwen2.5-VL's vision tower are called gate_proj, up_proj and down_proj too.
TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
PREFIX = "base_model.model."  # before every name in peft's files
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Adapted(nn.Linear):
    """A linear layer with an adapter. Its own weight and bias keep their names, and are those of
    the layer that it takes the place of; lora_A and lora_B have peft's."""

    def __init__(self, linear, rank, alpha):
        out, into, biased = linear.out_features, linear.in_features, linear.bias is not None
        super().__init__(into, out, biased, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        # Masters are float32 whatever the base is: updates of bfloat16 numbers would be lost.
        like = dict(bias=False, device=linear.weight.device, dtype=torch.float32)
        self.lora_A = nn.utils.skip_init(nn.Linear, into, rank, **like)
        self.lora_B = nn.utils.skip_init(nn.Linear, rank, out, **like)
        self.scale, self.on = alpha / rank, True

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
    each from a generator with a name. On the meta device there is nothing to draw.
    """
    if not cfg.lora_rank:
        return vlm
    vlm.requires_grad_(False)
    for name, linear in list(vlm.named_modules()):
        if re.fullmatch(TARGETS, name):
            layer = Adapted(linear, cfg.lora_rank, cfg.lora_alpha)
            vlm.set_submodule(name, layer)
            if not linear.weight.is_meta:
                A, draw = layer.lora_A.weight, generator(cfg.seed, "lora", name)
                A.data = nn.init.kaiming_uniform_(
                    torch.empty(A.shape), math.sqrt(5), generator=draw
                )
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
    """How many parameters are trained, and how many frozen. A model on the meta device will do."""
    sizes = {True: 0, False: 0}
    for p in model.parameters():
        sizes[p.requires_grad] += p.numel()
    return sizes[True], sizes[False]


def save_adapter(vlm, folder, base, first):
    """Write adapter_config.json and adapter_model.safetensors as peft does. Collective; the first
    process writes.

    base: the name or folder of the model that the adapter belongs to
    """
    from safetensors.torch import save_file

    weights = {}
    for name, p in vlm.named_parameters():
        if of_adapter(name):
            value = gathered(p).detach()
            if first:
                weights[PREFIX + name] = value.cpu().contiguous()
    if not first:
        return
    layer = adapters(vlm)[0]
    rank = layer.lora_A.out_features
    about = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base), r=rank)
    about |= dict(lora_alpha=layer.scale * rank, lora_dropout=0.0, target_modules=TARGETS)
    about |= dict(bias="none", fan_in_fan_out=False, inference_mode=True)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(about, indent=2))
