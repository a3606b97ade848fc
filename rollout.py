"""What a rollout is, and how transformers makes one. (plumbing/run/engine.py makes one with vLLM.)

A rollout is G sampled responses to one prompt. Each response is exactly the tokens that were
sampled, the end-of-sequence token (EOS) included when it was sampled. The trainer goes by these
lists, and never searches token ids for an EOS.

Every sampler reports the log-probability of each sampled token under loss.policy_logits, that is,
with the temperature, without the banned tokens (those that stand for pictures or that no token
owns), and before a nucleus is cut out. The trainer scores the same distribution, so what is left
between sampler and trainer is numerical, and it is logged.

Every random draw is seeded by a tuple, (seed, "sample", step, position of the prompt). So a sample
does not depend on the number of processes, nor, but for rounding, on which prompts share its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loss import policy_logits
from plumbing.base.common import fail, generator
from plumbing.base.console import Bar, say
from plumbing.data.prompts import Prompt
from plumbing.models.families import family_of
from plumbing.models.weights import full_parameters

if TYPE_CHECKING:
    from plumbing.run.config import Config
    from policy import Policy


@dataclass
class Rollout:
    """G responses to one prompt; every list has length G."""

    tokens: list  # (n,) int64 each, EOS inside when finished
    logprobs: list  # (n,) float32 each, of the sampled tokens, before the nucleus
    finished: list  # bool: ended by itself; False: cut off at the limit
    texts: list  # decoded, special tokens left out, from the <think> that the prompt may end with


@dataclass
class Group:
    """G responses to one prompt with their scores: what an advantage is formed in, and what shares
    a packed row."""

    position: int  # in the stream of training prompts; seeds every random draw of the prompt
    prompt_tokens: int
    rollout: Rollout
    scores: list  # G dicts: overall, format, accuracy
    advantages: Tensor  # (G,)
    second: bool = False  # is it scored on the prompt's second one (plumbing/run/hooks.py)?

    def values(self, name: str) -> Tensor:  # (G,)
        return torch.tensor([s[name] for s in self.scores])

    @property
    def rewards(self) -> Tensor:  # (G,)
        return self.values("overall")

    @property
    def lengths(self) -> list[int]:  # of the responses, in tokens
        return [len(t) for t in self.rollout.tokens]


class Sampler:
    """What all samplers share. A sampler of one's own writes `_generate` and `sync`."""

    def __init__(self, tok, banned: Tensor, cfg: Config):
        self.tok, self.banned, self.cfg = tok, banned, cfg

    def generate(
        self, prompts: list[Prompt], n: int, seeds: list[tuple], limit: int | None = None
    ) -> list[Rollout | None]:
        """n responses of at most `limit` tokens to each prompt; default: max_response_tokens.

        seeds[i]: the tuple that seeds prompt i's draw -> [Rollout, or None where the
        prompt was refused: it is named on the console, and ends nothing]
        """
        longest = self.cfg.max_prompt_tokens
        fits = [i for i, p in enumerate(prompts) if len(p.ids) <= longest]
        for p in (p for p in prompts if len(p.ids) > longest):
            refuse(p, f"{len(p.ids)} prompt tokens are more than --max_prompt_tokens {longest}")
        chosen, seeds = [prompts[i] for i in fits], [seeds[i] for i in fits]
        done = self._generate(chosen, n, seeds, limit or self.cfg.max_response_tokens)
        for prompt, rollout in zip(chosen, done):
            if rollout is not None:
                rollout.texts = [prompt.opening + text for text in rollout.texts]
        rollouts = dict(zip(fits, done))
        return [rollouts.get(i) for i in range(len(prompts))]

    def _generate(self, prompts, n, seeds, limit):
        """-> [Rollout or None], one a prompt"""
        raise NotImplementedError

    def _rollout(self, tokens, logprobs):
        """Two lists of G tensors -> Rollout"""
        finished = [bool(t[-1] == self.tok.eos_token_id) for t in tokens]
        texts = self.tok.batch_decode(tokens, skip_special_tokens=True)
        return Rollout(tokens, logprobs, finished, texts)

    def sync(self, policy: Policy) -> None:
        """The policy's weights into the sampler; collective."""
        raise NotImplementedError

    def sleep(self) -> None:
        """Give memory back to the trainer until the next sync."""

    def close(self) -> None:
        """Let go of the engine, where there is one."""


def refuse(prompt: Prompt, why: str) -> None:
    """Say on the console which prompt is left out, and why."""
    say(f"warning: example {prompt.example.id} is left out: {why}", every_rank=True)


class TransformersSampler(Sampler):
    """Samples with the model's own forward: prefill each prompt once, copy its cache G times, and
    decode until every response has ended.

    vlm is the policy's own module where that is whole (one process), or a private copy that `sync`
    refreshes. A token is chosen by inverse-CDF sampling, with a uniform number drawn up front.
    """

    def __init__(self, vlm, tok, banned: Tensor, cfg: Config, rows: int = 256):
        super().__init__(tok, banned.to(vlm.device), cfg)
        self.vlm, self.rows = vlm, rows

    @torch.no_grad()
    def sync(self, policy: Policy) -> None:
        if policy.vlm is self.vlm:
            return
        mine = dict(self.vlm.named_parameters())
        for name, p in full_parameters(policy):
            mine[name].copy_(p)

    @torch.no_grad()
    def _generate(self, prompts, n, seeds, limit):
        size, rollouts = max(1, self.rows // n), []
        with Bar("sampling", len(prompts) * n, "responses") as bar:
            for i in range(0, len(prompts), size):
                rollouts += self._batch(prompts[i : i + size], n, seeds[i : i + size], limit, bar)
        return rollouts

    def _prefill(self, prompts):
        """B prompts, left-padded to P tokens -> (cache, logits of the first token (B, V), position
        of the first token (B,), attention mask (B, P))"""
        B, P, device = len(prompts), max(len(p.ids) for p in prompts), self.vlm.device
        ids = torch.full((B, P), self.tok.eos_token_id)  # what fills up is not attended to
        attend, positions = torch.zeros(B, P, dtype=torch.long), torch.zeros(3, B, P).long()
        for b, p in enumerate(prompts):
            k = P - len(p.ids)
            ids[b, k:], attend[b, k:] = p.ids, 1
            positions[:, b, k:] = family_of(self.vlm.config).positions(self.vlm, p.ids, p.grid)
        pictured = [p for p in prompts if p.grid is not None]
        pixels = torch.cat([p.pixels for p in pictured]).to(device) if pictured else None
        grid = torch.cat([p.grid for p in pictured]).to(device) if pictured else None
        out = self.vlm(
            input_ids=ids.to(device),
            attention_mask=attend.to(device),
            position_ids=positions.to(device),
            pixel_values=pixels,
            image_grid_thw=grid,
            use_cache=True,
            logits_to_keep=1,
        )
        first = positions.amax((0, 2)).to(device) + 1
        return out.past_key_values, out.logits[:, -1], first, attend.to(device)

    def _batch(self, prompts, n, seeds, limit, bar):
        rows, device = len(prompts) * n, self.vlm.device
        draws = [torch.rand(n, limit, generator=generator(*x), dtype=torch.float64) for x in seeds]
        uniform = torch.cat(draws).to(device)  # (rows, limit)
        cache, logits, position, attend = self._prefill(prompts)
        if not logits.isfinite().all():
            fail("the model's logits are not finite; its weights may be damaged", every_rank=True)
        cache.batch_repeat_interleave(n)
        logits, position, attend = (x.repeat_interleave(n, 0) for x in (logits, position, attend))
        alive = torch.arange(rows, device=device)  # which response each row of the cache belongs to
        chosen = torch.full((rows, limit), -1, device=device)  # -1: nothing was sampled here
        logprobs = torch.zeros(rows, limit, device=device)
        for t in range(limit):
            logits = policy_logits(logits, self.cfg.temperature, self.banned)  # (alive, V)
            logp = logits.log_softmax(-1)
            cdf = nucleus(logp.double().exp(), self.cfg.top_p).cumsum(-1)
            drawn = uniform[alive, t, None] * cdf[:, -1:]
            token = torch.searchsorted(cdf, drawn, right=True)  # (alive, 1)
            chosen[alive, t], logprobs[alive, t] = token[:, 0], logp.gather(-1, token)[:, 0]
            unfinished = token[:, 0] != self.tok.eos_token_id
            if not unfinished.any() or t == limit - 1:
                break
            if not unfinished.all():  # finished responses leave the batch
                kept = unfinished.nonzero()[:, 0]
                bar.update(len(alive) - len(kept))
                cache.batch_select_indices(kept)
                alive, token = alive[kept], token[kept]
                position, attend = position[kept], attend[kept]
            attend = torch.cat([attend, attend.new_ones(len(attend), 1)], 1)
            logits = self.vlm(
                input_ids=token,
                attention_mask=attend,
                position_ids=(position + t).expand(3, -1)[..., None],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
        bar.update(len(alive))
        return self._split(chosen.cpu(), logprobs.cpu(), n)

    def _split(self, chosen, logprobs, n):
        """(rows, limit) each, -1 after a response's end -> [Rollout], n rows each"""
        lengths = [*enumerate((chosen >= 0).sum(1).tolist())]
        # Clones: a view is sent to other processes with all that it is a view of.
        tokens, logprobs = ([x[i, :k].clone() for i, k in lengths] for x in (chosen, logprobs))
        starts = range(0, len(lengths), n)
        return [self._rollout(tokens[i : i + n], logprobs[i : i + n]) for i in starts]


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens that cover top_p, renormalised: (rows, V) -> (rows, V)

    Of the probabilities .5 .3 .15 .05, top_p = .7 keeps the first two, as .625 and .375.
    """
    if top_p == 1:
        return p
    ordered, order = p.sort(-1, descending=True)
    inside = (ordered.cumsum(-1) - ordered < top_p).gather(-1, order.argsort(-1))
    p = p * inside
    return p / p.sum(-1, keepdim=True)
