"""What a group is: G responses to one prompt, on which pictures they are sampled, and on which they
are scored.

A group is what an advantage is formed in (papo.group_advantages) and what shares a packed row. Its
responses are sampled on the prompt's picture, or some of them on a second one: a noised picture, or
another one of the same class (--rollout_picture). The second picture is made again from its name
where it is needed, so that only responses are exchanged between processes.
"""

from dataclasses import dataclass, fields, replace

import torch

from masking import SOURCES
from plumbing.common import generator
from rollout import Rollout


@dataclass
class Group:
    """G responses to one prompt with their scores, rewards and, once known, advantages."""

    position: int  # in the stream of training prompts; names the prompt in every random draw
    prompt_tokens: int
    rollout: Rollout  # tokens, log-probs, finished or cut off
    scores: list  # G dicts: overall, format, accuracy, overlong_penalty
    counted: list  # G bools: is the response part of the loss?
    advantages: torch.Tensor | None = None  # (G,)
    second: bool = False  # is it scored on a second picture (on_own_pictures)?

    def values(self, name):
        return torch.tensor([s[name] for s in self.scores])

    @property
    def rewards(self):  # (G,)
        return self.values("overall") + self.values("overlong_penalty")

    @property
    def packed_tokens(self):  # in the training passes, where the prompt is computed once
        return self.prompt_tokens + sum(map(len, self.rollout.tokens))

    @property
    def lengths(self):  # of the responses that count
        return [len(t) for t, counted in zip(self.rollout.tokens, self.counted) if counted]


def sample_groups(prompts, parts, step):
    """G responses to each prompt of a step, {position: Prompt} -> [Rollout, or None where the
    prompt was refused]

    Unless --rollout_picture is clean, the last n2 of each group are sampled on a second picture
    (masking.py, @source), one draw a prompt, and all G rewards form one pool for the advantages.
    With --update_on anchor all that follows, pi_old in the ratio of Eq. (1) included, is on the
    prompt's own picture, without a correction, as NoisyRollout's Eq. (2) and TAPO's objective say.
    Only the sampler's own log-probs of those n2 are those of the second picture. So sampler_gap
    then measures how the pictures differ as well, and --importance_cap would correct for it, which
    neither paper does. With --update_on own see `on_own_pictures`.
    """
    cfg, given = parts.cfg, [*prompts.values()]
    names = [(cfg.seed, "sample", step, position) for position in prompts]
    if cfg.rollout_picture == "clean":
        return parts.sampler.generate(given, cfg.group_size, names)
    other = [(cfg.seed, "sample second", step, position) for position in prompts]
    second = [second_picture(p, position, parts, step) for position, p in prompts.items()]
    n1, n2 = cfg.group_size - cfg.second_size, cfg.second_size
    if n1 == n2:  # one call keeps an engine busier than two
        both = parts.sampler.generate(given + second, n1, names + other)
    else:
        both = parts.sampler.generate(given, n1, names) + parts.sampler.generate(second, n2, other)
    first, last = both[: len(given)], both[len(given) :]
    return [together(a, b) if a and b else None for a, b in zip(first, last)]


def second_picture(prompt, position, parts, step):
    """The prompt with the second picture that it is rolled out on -> Prompt; the same one whenever
    it is asked for."""
    draw = generator(parts.cfg.seed, "second picture", step, position)
    return SOURCES[parts.cfg.rollout_picture](prompt, parts.cfg, parts.processors[1], draw)


def on_own_pictures(groups, n2):
    """Groups whose advantages are known, each as two: what was rolled out on the prompt's picture,
    and the last n2 responses, which were on the second one, to be scored there too.

    The code released with TAPO updates on the picture that a response was rolled out on
    (ray_trainer.py:586-632); its paper conditions every response on the first one.
    """
    found = []
    for group in groups:
        n1 = len(group.scores) - n2
        for part, second in ((slice(n1), False), (slice(n1, None), True)):
            rollout = Rollout(*(getattr(group.rollout, f.name)[part] for f in fields(Rollout)))
            lists = dict(scores=group.scores[part], counted=group.counted[part])
            lists |= dict(rollout=rollout, advantages=group.advantages[part])
            found.append(replace(group, second=second, **lists))
    return found


def together(a, b):
    """Two rollouts of one prompt as one."""
    return Rollout(*(getattr(a, f.name) + getattr(b, f.name) for f in fields(Rollout)))


def prompt_of(group, prompts, parts, step):
    """What a group is scored on. prompts: {position: Prompt}, those that are read already"""
    prompt = prompts.get(group.position) or parts.stream[group.position]
    return second_picture(prompt, group.position, parts, step) if group.second else prompt
