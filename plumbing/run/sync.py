"""The check that a sampler is given the trainer's weights."""

from contextlib import contextmanager

import torch

from plumbing.base.common import fail
from policy import score_only

# Mean nats a token by which sampler and trainer may differ; perturbed, by this factor of what they
# differ by before, if that is more, as in deep models. A weight that does not arrive costs several.
SYNC_TOLERANCE, SYNC_FACTOR = {"float32": 1e-3, "bfloat16": 0.25}, 4


@contextmanager
def perturbed(policy):
    """While this lasts, every tensor of the policy differs from what it was; afterwards it is the
    same to the last bit. Each process changes its own shards.

    In a matrix three entries of every eleven change their sign, which doing it again undoes. Eleven
    divides no width of these models, so no whole row or column is turned. A matrix of zeros, as a
    LoRA's B, is filled with small numbers; in a vector, entries rise and fall by a half: turned
    around, a key bias of hundreds, as in Qwen2.5, would saturate the attention.
    """
    vectors, matrices = [], []
    for p in policy.parameters():
        shard = p.to_local() if hasattr(p, "to_local") else p
        (matrices if p.ndim > 1 else vectors).append(shard.detach().view(-1))
    zeros = [x for x in matrices if not x.any()]
    kept = [(x, x.clone()) for x in [*vectors, *zeros]]

    def turn():
        for x in matrices:
            for start in (0, 1, 3):
                x[start::11].neg_()

    for x in zeros:
        x.fill_(0.05)
    for x in vectors:
        x[::2] += 0.5
        x[1::2] -= 0.5
    turn()
    try:
        yield
    finally:
        turn()
        for x, before in kept:
            x.copy_(before)


def check_sync(sampler, policy, prompts, seeds, tolerance, device="cpu"):
    """Is the sampler really given the trainer's weights? -> mean |difference| of their log-probs

    Compares those of a few sampled tokens, and again with every tensor perturbed; then all is as it
    was. Ends with a sentence if they differ too much. In float32 a single tensor that does not
    arrive is found; in bfloat16, whose rounding is larger, a kind of them is.
    """
    asked = (sampler, policy, prompts, seeds, device)
    before = gap_after_sync(*asked)
    with perturbed(policy):
        gap = gap_after_sync(*asked)
    sampler.sync(policy)
    if not (before < tolerance and gap < max(tolerance, SYNC_FACTOR * before)):
        differ = f"log-probs differ by {before:.3g}, and by {gap:.3g} with every tensor changed"
        lacks = "after a sync the sampler does not have the trainer's weights"
        fail(f"{lacks}: {differ}; another version of vLLM, or --sampler hf, may help", True)
    return gap


def gap_after_sync(sampler, policy, prompts, seeds, device):
    """Mean |difference| of the log-probs of 32 tokens a response, in nats."""
    sampler.sync(policy)
    rollouts = sampler.generate(prompts, 2, seeds, limit=32)
    if not any(rollouts):
        fail("none of the first prompts can be read and sampled; the warnings say why", True)
    return torch.cat(gaps(policy, prompts, rollouts, device)).mean().item()


def gaps(policy, prompts, rollouts, device):
    """|difference| of the policy's log-probs of sampled tokens from the sampler's -> a list of (n,)
    tensors, response by response. Prompts whose rollout is None are passed over."""
    pairs = [(p, r) for p, r in zip(prompts, rollouts) if r]
    rows = policy.pack([p for p, _ in pairs], [r.tokens for _, r in pairs]).to(device)
    logp = score_only(policy, rows, rows.pixels).logp.cpu()
    sampled = [(logp[b, g], x) for b, (_, r) in enumerate(pairs) for g, x in enumerate(r.logprobs)]
    return [(ours[: len(theirs)] - theirs).abs() for ours, theirs in sampled]
