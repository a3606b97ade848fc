"""What a variant may hang into a step: a second prompt for a part of each group, and token weights.

A variant is a settings class, a subclass of Config, that defines some of these (variants/ and
fine_r1/ do; PAPO needs none of them):

    second_prompt(prompt, image_processor, generator) -> Prompt
        what the last `second_size` responses of each group are sampled on, a property
    weigh(groups, prompts, parts, step) -> groups
        after their advantages are known, from what a process has rolled out: [Group] and {position:
        Prompt}
    regroup(groups) -> groups
        how groups are scored; one with `second` set is scored on its second prompt
    token_weights(kl, counted, gather) -> [weights (B, G, R)]
        of the policy term, from KL(pi || pi_mask) of each token, one tensor a micro-batch
    at_step(step) and scheduled(); check(world_size, cuda); second_pictures
        knobs that change from step to step, and are logged; refusals; columns that rows must have
"""

from dataclasses import fields

import torch

from loss import k3
from plumbing.base.common import generator
from plumbing.data.prompts import Prompt
from rollout import Rollout


def sample_on_two(prompts, parts, step):
    """The last n2 of each group are sampled on a second prompt, one draw a
    group, and all G rewards form one pool for the advantages. {position: Prompt} -> [Rollout or
    None]

    Unless the variant regroups, all that follows is on the prompt's own picture, pi_old in the
    ratio of Eq. (1) included. Only the sampler's own log-probs of those n2 are those of the second
    one, so sampler_gap then measures how the pictures differ as well.
    """
    cfg, n2 = parts.cfg, parts.cfg.second_size
    seeds = [(cfg.seed, "sample", step, position) for position in prompts]
    other_seeds = [(cfg.seed, "sample second", step, position) for position in prompts]
    others = [second_prompt(p, position, parts, step) for position, p in prompts.items()]
    first = parts.sampler.generate([*prompts.values()], cfg.group_size - n2, seeds)
    last = parts.sampler.generate(others, n2, other_seeds)
    return [together(a, b) if a and b else None for a, b in zip(first, last)]


def together(a, b):
    """Two rollouts of one prompt as one."""
    return Rollout(*(getattr(a, f.name) + getattr(b, f.name) for f in fields(Rollout)))


def second_prompt(prompt: Prompt, position, parts, step) -> Prompt:
    """The second prompt of this position; the same one whenever it is asked for, so that only
    responses are exchanged between processes."""
    draw = generator(parts.cfg.seed, "second picture", step, position)
    return parts.cfg.second_prompt(prompt, parts.processors[1], draw)


def with_token_weights(batches, fixed, parts):
    """[train.Fixed] with the variant's weights of the policy term, made from the policy before the
    step's updates. A prompt without a picture keeps 1. Collective."""
    cfg = parts.cfg
    kl = [k3(known.old, known.masked.logp, cfg.kl_clamp)[0] for known in fixed]  # (B, G, R) each
    counted = [b.rows.scored.to(x.device) & b.pictured[:, None, None] for b, x in zip(batches, kl)]
    weights = cfg.token_weights(kl, counted, parts.processes.gather)
    both = zip(fixed, counted, weights)
    return [known._replace(weights=torch.where(c, w, 1.0)) for known, c, w in both]
