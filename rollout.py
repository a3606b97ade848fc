"""What a rollout is, and how transformers makes one.

A rollout is G sampled responses to one prompt. Each response is exactly the tokens that were sampled, EOS included when it was
sampled; so what is trained is decided here, where tokens are chosen, and never guessed from token ids later.

Token t of response g is chosen by inverse-CDF sampling with a uniform number drawn up front from the generator named
(seed, "sample", step, prompt): a sample does not depend on which prompts share its batch, or on how many processes there are.
"""
from dataclasses import dataclass

import torch

from data import generator
from loss import policy_logits
from model import full_parameters, prompt_positions


@dataclass
class Rollout:
    """G responses to one prompt; lists have length G."""
    tokens: list            # (n,) int64 each, EOS inside when finished
    logprobs: list          # (n,) float32 each, under the distribution that was sampled from
    finished: list          # bool: ended by itself; False: cut off at the limit
    texts: list             # decoded, special tokens left out


def sampling_logprobs(logits, banned, temperature, top_p):
    """Log-probabilities of the distribution that is sampled: temperature, ban, then nucleus. (rows, V) -> (rows, V)"""
    logp = policy_logits(logits, temperature, banned).log_softmax(-1)
    if top_p < 1:
        p, order = logp.exp().sort(-1, descending=True)
        outside = (p.cumsum(-1) - p >= top_p).gather(-1, order.argsort(-1))      # what is left once top_p is covered
        logp = logp.masked_fill(outside, float("-inf")).log_softmax(-1)
    return logp


class TransformersSampler:
    """Samples with the model's own forward: prefill each prompt once, copy its cache G times, decode to EOS.

    vlm is the policy's own module where that is whole (one process), or a private copy that `sync` refreshes.
    """

    def __init__(self, vlm, tok, banned, cfg, rows=256):
        self.vlm, self.tok, self.banned, self.cfg, self.rows = vlm, tok, banned.to(vlm.device), cfg, rows

    def sync(self, policy):
        """Weights from the policy into the sampler, one tensor at a time."""
        if policy.vlm is self.vlm:
            return
        mine = dict(self.vlm.named_parameters())
        with torch.no_grad():
            for name, p in full_parameters(policy):
                mine[name].copy_(p)

    @torch.no_grad()
    def generate(self, prompts, n, names):
        """n responses to each prompt; names[i]: the random name (any tuple) of prompt i's draw -> [Rollout]"""
        size = max(1, self.rows // n)
        return [r for i in range(0, len(prompts), size) for r in self._batch(prompts[i:i + size], n, names[i:i + size])]

    def _prefill(self, prompts):
        """Prompts, left-padded -> (cache, logits of the first token (B, V), next position (B,), attention mask (B, P))."""
        B, P, device = len(prompts), max(len(p.ids) for p in prompts), self.vlm.device
        ids, mask = torch.full((B, P), self.tok.pad_token_id), torch.zeros(B, P, dtype=torch.long)
        positions = torch.zeros(3, B, P, dtype=torch.long)
        for b, p in enumerate(prompts):
            k = len(p.ids)
            ids[b, P - k:], mask[b, P - k:], positions[:, b, P - k:] = p.ids, 1, prompt_positions(self.vlm, p)
        pictures = [p for p in prompts if p.grid is not None]
        out = self.vlm(input_ids=ids.to(device), attention_mask=mask.to(device), position_ids=positions.to(device),
                       pixel_values=torch.cat([p.pixel_values for p in pictures]).to(device) if pictures else None,
                       image_grid_thw=torch.cat([p.grid for p in pictures]).to(device) if pictures else None,
                       use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1], positions.amax((0, 2)).to(device) + 1, mask.to(device)

    def _batch(self, prompts, n, names):
        limit, rows = self.cfg.max_response_tokens, len(prompts) * n
        uniform = torch.cat([torch.rand(n, limit, generator=generator(*name), dtype=torch.float64) for name in names])
        uniform = uniform.to(self.vlm.device)                                    # (rows, limit)
        cache, logits, position, mask = self._prefill(prompts)
        cache.batch_repeat_interleave(n)
        logits, position, mask = (x.repeat_interleave(n, 0) for x in (logits, position, mask))
        alive = torch.arange(rows, device=self.vlm.device)                       # rows of the cache -> responses
        chosen = torch.full((rows, limit), -1, device=self.vlm.device)           # -1: nothing was sampled here
        logprobs = torch.zeros(rows, limit, device=self.vlm.device)
        for t in range(limit):
            logp = sampling_logprobs(logits, self.banned, self.cfg.temperature, self.cfg.top_p)     # (alive, V)
            cdf = logp.double().exp().cumsum(-1)
            token = torch.searchsorted(cdf, uniform[alive, t, None] * cdf[:, -1:], right=True)      # (alive, 1)
            chosen[alive, t], logprobs[alive, t] = token[:, 0], logp.gather(-1, token)[:, 0]
            keep = token[:, 0] != self.tok.eos_token_id
            if not keep.any() or t == limit - 1:
                break
            if not keep.all():                                                   # finished responses leave the batch
                kept = keep.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                alive, token, position, mask = alive[kept], token[kept], position[kept], mask[kept]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = self.vlm(input_ids=token, attention_mask=mask, position_ids=(position + t).expand(3, -1)[..., None],
                              past_key_values=cache, use_cache=True).logits[:, -1]
        chosen, logprobs, lengths = chosen.cpu(), logprobs.cpu(), (chosen >= 0).sum(1).tolist()
        tokens = [chosen[i, :k] for i, k in enumerate(lengths)]
        texts = self.tok.batch_decode(tokens, skip_special_tokens=True)
        finished = [bool(x[-1] == self.tok.eos_token_id) for x in tokens]
        logprobs = [logprobs[i, :k] for i, k in enumerate(lengths)]
        return [Rollout(tokens[i:i + n], logprobs[i:i + n], finished[i:i + n], texts[i:i + n]) for i in range(0, rows, n)]
