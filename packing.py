"""A group of responses as one row of tokens, with the prompt and its picture computed once.

    [ prompt with picture | response 1 | response 2 | ... | response G ]

A token sees its own prompt and its own response. Every response starts at the position after the prompt, so its logits are
those of [prompt | response g] alone (tests/test_model.py), for one encoding of the picture and one of the prompt.

Two layouts of B groups, with the same result:
    rows    a row for each group, padded to the longest; a boolean mask and scaled_dot_product_attention. For CPUs and short rows.
    flat    all groups in one row, without padding but for the end; FlexAttention, which skips what no token may see. For GPUs.
"""
from dataclasses import dataclass, fields

import torch

LENGTH_BUCKET = 1024           # a flat row's length is rounded up to a multiple: FlexAttention compiles once for each length


@dataclass
class Packed:
    """B groups of G responses, R tokens the longest, laid out in rows of length S; N patches over all pictures."""
    input_ids: torch.Tensor                # (rows, S)
    position_ids: torch.Tensor             # (3, rows, S) M-RoPE: time, height, width
    group: torch.Tensor                    # (rows, S) which group a token belongs to
    response: torch.Tensor                 # (rows, S) 0: the prompt, g + 1: response g; padding is one more response
    pixel_values: torch.Tensor | None      # (N, D)
    grid: torch.Tensor | None              # (pictures, 3)
    row: torch.Tensor                      # (B, G, R) row and
    predictor: torch.Tensor                # (B, G, R) place in it, whose output predicts the token
    targets: torch.Tensor                  # (B, G, R)
    mask: torch.Tensor                     # (B, G, R) bool, tokens that are scored

    def to(self, device):
        return Packed(*(None if getattr(self, f.name) is None else getattr(self, f.name).to(device) for f in fields(self)))


def prompt_positions(vlm, prompt):
    """M-RoPE positions of a prompt, (3, P); what follows it starts at their maximum + 1."""
    types = (prompt.ids == vlm.config.image_token_id).long()[None]
    return vlm.model.get_rope_index(prompt.ids[None], types, image_grid_thw=prompt.grid)[0][:, 0]


def pack(vlm, prompts, groups, scored=None, flat=False):
    """Lay out B prompts and their responses. groups[b][g]: (n,) token ids; scored[b][g]: (n,) bool, default all."""
    B, G, R = len(prompts), max(map(len, groups)), max(len(t) for group in groups for t in group)
    lengths = [len(p.ids) + sum(map(len, group)) for p, group in zip(prompts, groups)]
    rows, S = (1, -(-sum(lengths) // LENGTH_BUCKET) * LENGTH_BUCKET) if flat else (B, max(lengths))
    ids, which, part = torch.zeros(3, rows, S, dtype=torch.long)
    part += G + 1                                            # padding sees its row's last prompt: what sees nothing would be NaN
    positions = torch.zeros(3, rows, S, dtype=torch.long)
    row, predictor, targets = torch.zeros(3, B, G, R, dtype=torch.long)
    mask, start = torch.zeros(B, G, R, dtype=torch.bool), 0
    for b, (prompt, group) in enumerate(zip(prompts, groups)):
        r, start = (0, start) if flat else (b, 0)
        end = last = start + len(prompt.ids)                 # the prompt's end, whose last token predicts every response's first
        at = positions[:, r, start:end] = prompt_positions(vlm, prompt)
        ids[r, start:end], part[r, start:end], which[r, start:], row[b] = prompt.ids, 0, b, r
        for g, tokens in enumerate(group):
            start, end, n = end, end + len(tokens), len(tokens)
            ids[r, start:end], part[r, start:end], positions[:, r, start:end] = tokens, g + 1, at.max() + 1 + torch.arange(n)
            predictor[b, g, :n] = torch.arange(start - 1, end - 1)
            predictor[b, g, 0] = last - 1
            targets[b, g, :n], mask[b, g, :n] = tokens, True if scored is None else scored[b][g]
        start = end
    pictures = [p for p in prompts if p.grid is not None]
    return Packed(ids, positions, which, part, torch.cat([p.pixel_values for p in pictures]) if pictures else None,
                  torch.cat([p.grid for p in pictures]) if pictures else None, row, predictor, targets, mask)


def batches_within(lengths, budget, at_least=1):
    """Groups of these packed lengths -> lists of their indices, each list at most `budget` tokens once padded to its longest,
    long ones together. Never fewer than at_least lists (processes run the same number of passes), never an empty one."""
    order, batches = sorted(range(len(lengths)), key=lambda i: -lengths[i]), []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    while len(batches) < at_least:
        largest = max(batches, key=len)
        batches.append([largest.pop()])
    return batches


def may_see(group, response):
    """The rule of the packed forward, for FlexAttention and for a boolean mask alike: (row, head, query, key) -> bool."""
    def rule(b, h, q, k):
        return (k <= q) & (group[b, q] == group[b, k]) & ((response[b, k] == 0) | (response[b, q] == response[b, k]))
    return rule


def boolean_mask(x):
    """Packed -> (rows, 1, S, S) bool: the query in the second-to-last axis may look at the key in the last."""
    rows, S = x.input_ids.shape
    b, i = torch.arange(rows, device=x.input_ids.device), torch.arange(S, device=x.input_ids.device)
    return may_see(x.group, x.response)(b[:, None, None], None, i[:, None], i)[:, None]
