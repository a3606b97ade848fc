"""A group of responses as one row of tokens, with the prompt and its picture computed once.

    [ prompt with picture | response 1 | response 2 | ... | response G ]

A token sees its own prompt and its own response. Every response starts at the position after the
prompt, so its log-probs are those of [prompt | response g] alone (tests/test_model.py), for one
encoding of the picture and one of the prompt. A worked example with the toy's token ids: the prompt
is a picture of one token (5) between its two marks (3 and 4), 31 32 reads "shape is", 40 reads
"the", and 2 ends a response:

    place        0    1    2    3    4    5    6    7    8
    input_ids    3    5    4  | 31   32    2 | 40    2    0     0 is padding
    part         0    0    0  |  1    1    1 |  2    2    3     0: the prompt; padding is one more
    position     0    1    2  |  3    4    5 |  3    4    0     what RoPE is told; padding: any

    who sees whom, query by query                  what predicts each response token
    place 2, token  4:  0 1 2                      response 1:  31 from 2,  32 from 3,  2 from 4
    place 5, token  2:  0 1 2 | 3 4 5              response 2:  40 from 2,   2 from 6
    place 7, token  2:  0 1 2 |       | 6 7

A place is an index in the row. Both responses begin at position 3, since each follows the prompt.
The last prompt token, at place 2, predicts the first token of both. So `predictor` is
[[2, 3, 4], [2, 6, 0]], `targets` [[31, 32, 2], [40, 2, 0]] and `scored` [[T, T, T], [T, T, F]]: the
end of a response is scored, padding is not. tests/test_examples.py packs this very example.

Two layouts of B groups, with the same result:
    rows    a row for each group, padded to the longest; a boolean mask. For CPUs and short rows.
    flat    all groups in one row, without padding but for the end; FlexAttention, which skips what
            no token may see. For GPUs.
"""

from dataclasses import dataclass, fields
from functools import cache

import torch
from torch.nn.attention.flex_attention import flex_attention

from plumbing.models.families import family_of

UNSEEN = -1  # the part of tokens that no text may see
# A flat row's length is rounded up to a multiple: FlexAttention compiles once for each length.
LENGTH_BUCKET = 1024


@dataclass
class Packed:
    """B groups of G responses, R tokens the longest, in rows of length S; N patches in all."""

    input_ids: torch.Tensor  # (rows, S)
    position_ids: torch.Tensor  # (3, rows, S) M-RoPE: time, height, width
    group: torch.Tensor  # (rows, S) which group a token belongs to
    part: torch.Tensor  # (rows, S) 0: prompt, g + 1: response g; padding is one more; or UNSEEN
    pixels: torch.Tensor | None  # (N, D) of the pictures
    masked_pixels: torch.Tensor | None  # (N, D) of the masked pictures, where they are needed
    grid: torch.Tensor | None  # (pictures, 3)
    row: torch.Tensor  # (B, G, R) which row a response token is in
    predictor: torch.Tensor  # (B, G, R) the place in that row whose output predicts the token
    targets: torch.Tensor  # (B, G, R) the tokens
    scored: torch.Tensor  # (B, G, R) bool: which of them count

    def to(self, device):
        values = (getattr(self, f.name) for f in fields(self))
        return Packed(*(None if x is None else x.to(device) for x in values))


def pack(vlm, prompts, groups, scored=None, flat=False):
    """Lay out B prompts and their responses -> Packed, without masked pictures.

    groups[b][g]: (n,) token ids; scored[b][g]: (n,) bool, which of them count; default: all.
    """
    B, G = len(prompts), max(map(len, groups))
    R = max(len(tokens) for group in groups for tokens in group)
    lengths = [packed_length(p, group) for p, group in zip(prompts, groups)]
    whole = -(-sum(lengths) // LENGTH_BUCKET) * LENGTH_BUCKET
    rows, S = (1, whole) if flat else (B, max(lengths))
    ids, which, part = torch.zeros(3, rows, S, dtype=torch.long)
    part += G + 1  # padding sees its row's last prompt: what sees nothing at all would be NaN
    positions = torch.zeros(3, rows, S, dtype=torch.long)
    row, predictor, targets = torch.zeros(3, B, G, R, dtype=torch.long)
    in_loss, start = torch.zeros(B, G, R, dtype=torch.bool), 0
    for b, (prompt, group) in enumerate(zip(prompts, groups)):
        r, start = (0, start) if flat else (b, 0)
        # Place last - 1 holds the prompt's last token, which predicts every first token.
        end = last = start + len(prompt.ids)
        at = family_of(vlm.config).positions(vlm, prompt.ids, prompt.grid)
        ids[r, start:end], part[r, start:end], positions[:, r, start:end] = prompt.ids, 0, at
        which[r, start:], row[b] = b, r
        for g, tokens in enumerate(group):
            start, end, n = end, end + len(tokens), len(tokens)
            ids[r, start:end], part[r, start:end] = tokens, g + 1
            positions[:, r, start:end] = at.max() + 1 + torch.arange(n)
            if (tokens == vlm.config.image_token_id).any():  # a user's later turn shows a picture
                both = torch.cat([prompt.ids, tokens])
                places = family_of(vlm.config).positions(vlm, both, prompt.grid)
                positions[:, r, start:end] = places[:, len(prompt.ids) :]
            predictor[b, g, :n] = torch.arange(start - 1, end - 1)
            predictor[b, g, 0] = last - 1
            targets[b, g, :n] = tokens
            in_loss[b, g, :n] = True if scored is None else scored[b][g]
        start = end
    pixels, grid = join([p.pixels for p in prompts]), join([p.grid for p in prompts])
    return Packed(ids, positions, which, part, pixels, None, grid, row, predictor, targets, in_loss)


def join(parts):
    """Tensors of the prompts that have a picture, one after the other; None where none has one."""
    parts = [x for x in parts if x is not None]
    return torch.cat(parts) if parts else None


def padded(groups, shape):
    """One value a response token, groups[b][g] (n,), to where pack puts that token: (B, G, R), 0
    elsewhere."""
    values = torch.zeros(shape)
    for b, group in enumerate(groups):
        for g, own in enumerate(group):
            values[b, g, : len(own)] = own
    return values


def packed_length(prompt, group):
    """Tokens of a prompt and its responses, the prompt counted once."""
    return len(prompt.ids) + sum(map(len, group))


def batches_within(lengths, budget, at_least=1, flat=False):
    """Share groups of these packed lengths out to forward passes -> lists of their indices.

    Each list holds at most `budget` tokens, padded to its longest unless it is flat, and long
    groups come together. Never fewer than at_least lists, since all processes run the same number
    of passes, and never an empty one.
    """
    batches, taken = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        taken += lengths[i if flat or not batches else batches[-1][0]]
        if batches and taken <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            taken = lengths[i]
    while len(batches) < at_least:
        batches.append([max(batches, key=len).pop()])
    return batches


def my_batches(lengths, processes, budget, flat=False):
    """This process's share of an update's groups, as lists of indices, one list a forward pass.

    lengths: the packed lengths of all the update's groups; every process gets equally many groups,
    dealt out as the prompts were, whose pictures it then has, and runs as many passes as the one
    that needs most of them.
    """
    shares = [range(r, len(lengths), processes.world) for r in range(processes.world)]
    passes = max(len(batches_within([lengths[i] for i in s], budget, 1, flat)) for s in shares)
    mine = shares[processes.rank]
    batches = batches_within([lengths[i] for i in mine], budget, passes, flat)
    return [[mine[i] for i in batch] for batch in batches]


def may_attend(group, part):
    """Who sees whom in a packed row, for both layouts alike: (row, head, query, key) -> bool."""

    def rule(b, h, q, k):
        same_group = group[b, q] == group[b, k]
        return (k <= q) & same_group & ((part[b, k] == 0) | (part[b, q] == part[b, k]))

    return rule


def attention_mask(x):
    """Packed -> (rows, 1, S, S) bool: may the query in the last but one axis attend to the key?"""
    rows, S = x.input_ids.shape
    b, i = (torch.arange(n, device=x.input_ids.device) for n in (rows, S))
    return may_attend(x.group, x.part)(b[:, None, None], None, i[:, None], i)[:, None]


def use_flex_attention(vlm, family):
    """Let a model's language model attend in a flat row; attention_mask is then a BlockMask."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("packed_flex", packed_flex)
    family.use_attention(vlm, "packed_flex")


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
