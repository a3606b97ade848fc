"""The policy: packed responses on a picture -> the log-probs of their tokens.

pi_theta and pi_mask are two calls of the same network on two sets of pixels (train.log_probs):

    seen = policy(rows, rows.pixels)             log pi_theta(o_t | q, I,      o_<t)
    masked = policy(rows, rows.masked_pixels)    log pi_mask (o_t | q, I_mask, o_<t)

A row holds a prompt once and its G responses behind it (plumbing/models/packing.py). pi_old and
pi_ref are the same call under other weights, without a gradient (`score_only`).
plumbing/models/weights.py loads, shards and saves what is inside.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint

from loss import exact_entropy, exact_kl, policy_logits, token_logprobs
from plumbing.data.prompts import Prompt
from plumbing.models import packing
from plumbing.models.families import family_of
from plumbing.models.lora import switched_off
from plumbing.models.packing import Packed

# Elements of (tokens, vocabulary) in float32 that exist at a time: 256 MiB, forwards or backwards.
LOGITS_AT_ONCE = 2**26


class Scores(NamedTuple):
    """What the policy says of the sampled tokens on one picture."""

    logp: Tensor  # (B, G, R) log pi(o_t | q, picture, o_<t); 0 where no token is scored
    entropy: Tensor | None  # (B, G, R) H over the whole vocabulary, if it was asked for
    # (n, width) of the last layer, which predict the n scored tokens; None where only numbers stay
    outputs: Tensor | None = None

    def detach(self) -> "Scores":
        H = None if self.entropy is None else self.entropy.detach()
        return Scores(self.logp.detach(), H)


class Policy(nn.Module):
    """A vision-language model that scores packed responses under the sampler's temperature and ban.

    vlm: of transformers; banned (V,) bool: tokens that are never sampled; flat: the layout of
    packing.py for GPUs
    """

    vlm: Any
    banned: Tensor

    def __init__(self, vlm: Any, banned: Tensor, temperature: float = 1.0, flat: bool = False):
        super().__init__()
        self.vlm, self.family = vlm, family_of(vlm.config)
        self.temperature, self.flat = temperature, flat
        self.register_buffer("banned", banned, persistent=False)
        if flat:
            packing.use_flex_attention(vlm, self.family)

    def pack(self, prompts: list[Prompt], groups: list, scored: list | None = None) -> Packed:
        """packing.pack in the layout that this policy reads."""
        return packing.pack(self.vlm, prompts, groups, scored, self.flat)

    def forward(self, rows: Packed, pixels: Tensor | None, exact=False, grad=True) -> Scores:
        """Packed rows on one picture -> Scores

        pixels (N, D): rows.pixels for pi_theta, rows.masked_pixels for pi_mask; None: no picture
        exact: with the entropy over the whole vocabulary; grad: with a gradient
        """
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            outputs = self.outputs(rows, pixels)  # (n, width)
            read = partial(self.read, exact=exact)
            logp, entropy = self.in_slices(read, outputs, rows.targets[rows.scored])
            entropy = None if entropy is None else in_place(entropy, rows.scored)
            return Scores(in_place(logp, rows.scored), entropy, outputs)

    def exact_kl(self, seen: Scores, masked: Scores, scored: Tensor, clamp: float):
        """KL(pi || pi_mask) over the whole vocabulary from what forward returned for both pictures
        -> (value, clamped), (B, G, R) each

        scored (B, G, R) bool, as in the rows; clamp: in nats, 0 for none
        """
        compare = partial(self.compare, clamp=clamp)
        kl, clamped = self.in_slices(compare, seen.outputs, masked.outputs)
        return in_place(kl, scored), in_place(clamped, scored)

    def in_slices(self, function: Callable, *columns: Tensor) -> tuple:
        """function(*columns), LOGITS_AT_ONCE at a time and made again for the backward pass, so
        that (tokens, vocabulary) never exists as a whole. columns (n, ...) -> a tuple of (n,)"""
        size = max(1, LOGITS_AT_ONCE // self.vlm.config.text_config.vocab_size)
        if len(columns[0]) <= size:
            return function(*columns)
        pieces = zip(*(column.split(size) for column in columns))
        found = [checkpoint(function, *piece, use_reentrant=False) for piece in pieces]
        return tuple(None if x[0] is None else torch.cat(x) for x in zip(*found))

    def logits(self, outputs: Tensor) -> Tensor:
        """(n, width) -> (n, V), of the distribution that is sampled from"""
        return policy_logits(self.vlm.lm_head(outputs), self.temperature, self.banned)

    def read(self, outputs: Tensor, targets: Tensor, exact: bool):
        """Outputs (n, width) and the tokens they predict -> (logp, entropy or None), (n,) each."""
        logits = self.logits(outputs)
        logp = token_logprobs(logits, targets)
        return logp, exact_entropy(logits.log_softmax(-1)) if exact else None

    def compare(self, outputs: Tensor, masked_outputs: Tensor, clamp: float):
        """Outputs on both pictures, (n, width) each -> (KL, clamped), (n,) each. Where those on the
        masked one have no gradient, the head's weights get none from them either."""
        dist = self.logits(outputs).log_softmax(-1)
        with torch.set_grad_enabled(masked_outputs.requires_grad and torch.is_grad_enabled()):
            other = self.logits(masked_outputs).log_softmax(-1)
        return exact_kl(dist, other, clamp)

    def outputs(self, rows: Packed, pixels: Tensor | None) -> Tensor:
        """-> (n, width): the last layer's outputs that predict the n scored tokens.

        Without pixels there is no picture: its tokens, where the prompts have such, keep their
        places, and no other token sees them.
        """
        nothing = 0.0
        if pixels is None:
            nothing = self.family.look_at_nothing(self.vlm, self.banned.device)
            of_pictures = rows.input_ids == self.vlm.config.image_token_id
            rows = replace(rows, part=rows.part.masked_fill(of_pictures, packing.UNSEEN))
        if self.flat:
            R, S = rows.input_ids.shape
            rule = packing.may_attend(rows.group, rows.part)
            attend = create_block_mask(rule, R, None, S, S, device=rows.input_ids.device)
        else:
            attend = packing.attention_mask(rows)
        outputs = self.family.outputs(self.vlm, rows, pixels, attend) + nothing  # (rows, S, width)
        return outputs[rows.row[rows.scored], rows.predictor[rows.scored]]


def in_place(values: Tensor, scored: Tensor) -> Tensor:
    """One value a scored token, (n,), to where it belongs: (B, G, R), 0 elsewhere."""
    empty = torch.zeros(scored.shape, dtype=values.dtype, device=values.device)
    return empty.masked_scatter(scored, values)


@torch.no_grad()
def score_only(policy: Any, rows: Packed, pixels: Tensor | None, exact: bool = False) -> Scores:
    """Scores without a gradient. policy: a Policy, or a function that is called as one

    FSDP2 leaves the root's weights whole after a forward pass, for the backward pass to find them.
    Where none follows they must go, or what is written to the parameters next is written to a copy.
    """
    scores = policy(rows, pixels, exact)
    if isinstance(policy, FSDPModule):
        policy.reshard()
    return scores._replace(outputs=None)


class WithoutAdapters:
    """pi_ref of a policy with LoRA: the same model with its adapters switched off, for score_only.
    It is what the policy was before training, and takes no memory."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def __call__(self, rows: Packed, pixels: Tensor | None, exact: bool = False) -> Scores:
        with switched_off(self.policy):
            return score_only(self.policy, rows, pixels, exact)
