"""The vision tower as a GPU wants it: the same values and gradients in fewer and larger kernels.

In transformers 5.19 the patch embedding is a Conv3d whose kernel equals its stride, slow or greedy
for memory in bfloat16 (pytorch issues 166643 and 174051), and attention a Python loop over pictures
or windows. Here the first is one matrix product and the second one call of torch's own
(docs/speed.md). Parameters keep their names, and on a CPU every bit stays what it was.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

# transformers hands the borders of the pieces to attention functions with "flash" in their name,
# and calls all others once for each piece.
ATTENTION = "flash_in_pieces"


def prepare(vlm, family):
    """Let a model's vision tower compute in this file's way -> the same model"""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend_in_pieces)
    family.use_tower_attention(vlm, ATTENTION)
    family.tower(vlm).patch_embed.proj.__class__ = PatchProjection
    return vlm


class PatchProjection(nn.Conv3d):
    """Conv3d whose kernel equals its stride, on inputs as large as the kernel: (N, 3, t, p, p) ->
    (N, width, 1, 1, 1)"""

    def forward(self, patches):
        # A CPU's two ways differ in rounding, and runs on CPUs are to stay as they are.
        return self.product(patches) if patches.is_cuda else super().forward(patches)

    def product(self, patches):
        """y = W x + b, since the kernel lies on each patch exactly once."""
        rows = F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)  # (N, width)
        return rows[..., None, None, None]


def in_one_call(query):
    """Can varlen_attn take it? It is FlashAttention, for 16-bit numbers and heads of a multiple of
    8 up to 256 (those of the real towers have 64, 72 or 80), on CUDA from Ampere on. Float32,
    --dtype float32 on a GPU included, goes piece by piece. -> bool"""
    ampere = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)
    sixteen_bits, d = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    return ampere and sixteen_bits and d % 8 == 0 and d <= 256


def attend_in_pieces(module, query, key, value, attention_mask, **settings):
    """Attention within each piece of one row, as transformers calls it for a vision tower:
    (1, heads, N, d) -> ((1, N, heads, d), None)

    settings: scaling; cu_seq_lens_q (pieces + 1,) int32, where the pieces begin and end; and
    max_length_q, the longest one. There is neither a mask nor dropout.
    """
    scale, borders = settings["scaling"], settings["cu_seq_lens_q"]
    if in_one_call(query):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, d)
        longest = settings["max_length_q"]
        return varlen_attn(q, k, v, borders, borders, longest, longest, scale=scale)[None], None
    lengths = borders.diff().tolist()
    pieces = zip(*(x.split(lengths, dim=2) for x in (query, key, value)))
    seen = [F.scaled_dot_product_attention(*piece, scale=scale) for piece in pieces]
    return torch.cat([x.transpose(1, 2) for x in seen], dim=1), None
