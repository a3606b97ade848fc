"""What is sampled, and that the log-probs reported are those of the distribution sampled from."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import both_families

from plumbing.data.prompts import encode
from plumbing.models.packing import pack
from reward import well_formed
from rollout import TransformersSampler
from toy.task import ToyData


def roll(policy, processors, cfg, prompts, n=4, **changes):
    sampler = TransformersSampler(policy.vlm, processors[0], policy.banned, replace(cfg, **changes))
    return sampler.generate(prompts, n, [(0, "sample", 0, i) for i in range(len(prompts))])


@both_families
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_logprobs_agree_with_the_trainer(top_p, policy, processors, cfg, prompts):
    """Prefill and cache against the packed forward: both of the distribution before the nucleus."""
    policy.temperature = 0.8
    rollouts = roll(policy, processors, cfg, prompts, temperature=0.8, top_p=top_p)
    rows = pack(policy.vlm, prompts, [r.tokens for r in rollouts])
    with torch.no_grad():
        logp = policy(rows, rows.pixels).logp
    for b, r in enumerate(rollouts):
        for g, sampled in enumerate(r.logprobs):
            assert torch.allclose(logp[b, g, : len(sampled)], sampled, atol=1e-4)
    assert rows.scored.sum() == sum(len(t) for r in rollouts for t in r.tokens)


@both_families
def test_eos_is_inside_and_ends_a_response(policy, processors, cfg, prompts):
    eos = processors[0].eos_token_id
    rollouts = roll(policy, processors, cfg, prompts, n=8)
    assert any(f for r in rollouts for f in r.finished)
    for r in rollouts:
        for tokens, logprobs, finished in zip(r.tokens, r.logprobs, r.finished):
            assert len(tokens) == len(logprobs) and (tokens[:-1] != eos).all()
            assert finished == (tokens[-1] == eos).item()
    cut = roll(policy, processors, cfg, prompts, max_response_tokens=3)
    assert all(len(t) == 3 and not f for r in cut for t, f in zip(r.tokens, r.finished))


@both_families
def test_a_sample_does_not_depend_on_its_batch(policy, processors, cfg, prompts):
    """Same seeds, same sample: alone, in company, in another order."""
    sampler = TransformersSampler(policy.vlm, processors[0], policy.banned, cfg)
    seeds = [(0, "sample", 3, i) for i in range(len(prompts))]
    together = sampler.generate(prompts, 3, seeds)
    reverse = sampler.generate(prompts[::-1], 3, seeds[::-1])[::-1]
    (alone,) = sampler.generate([prompts[5]], 3, [seeds[5]])
    for one, same in [*zip(reverse, together), (alone, together[5])]:
        assert all(torch.equal(x, y) for x, y in zip(one.tokens, same.tokens, strict=True))


@both_families
def test_visual_tokens_are_never_sampled(policy, processors, cfg, prompts):
    """Not even by a policy that wants nothing else: the next forward would look for a picture."""
    image = policy.vlm.config.image_token_id
    with torch.no_grad():
        policy.vlm.lm_head.weight[image] += 3.0 * policy.vlm.lm_head.weight.abs().max()
    for r in roll(policy, processors, cfg, prompts[:2], temperature=5.0):
        assert not policy.banned[torch.cat(r.tokens)].any()


def test_sampling_follows_the_distribution(policy, processors, cfg, prompts):
    """Frequencies of the first token against what the trainer says of every token there is."""
    policy.temperature, changes = 2.0, dict(temperature=2.0, max_response_tokens=1)
    (rollout,) = roll(policy, processors, cfg, prompts[:1], 2000, **changes)
    allowed = (~policy.banned).nonzero()
    rows = policy.pack(prompts[:1], [[*allowed]])
    with torch.no_grad():
        p = policy(rows, rows.pixels).logp[0, :, 0].exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-4) and 0.1 < p.max() < 0.9
    frequency = torch.cat(rollout.tokens).bincount(minlength=len(policy.banned)) / 2000
    assert (frequency[allowed[:, 0]] - p).abs().max() < 0.04
    assert not frequency[policy.banned].any()


@both_families
def test_a_prompt_that_is_too_long_is_refused_with_its_name(
    policy, processors, cfg, prompts, capsys
):
    short = [p for p in prompts if len(p.ids) < max(len(p.ids) for p in prompts)]
    assert 0 < len(short) < len(prompts)
    longest = max(len(p.ids) for p in short)
    rollouts = roll(policy, processors, cfg, prompts, max_prompt_tokens=longest)
    said = capsys.readouterr()
    for p, r in zip(prompts, rollouts):
        named = f"example {p.example.id} is left out" in said.out + said.err
        assert (r is not None) == (p in short) and named == (p not in short)


def test_a_think_that_the_template_opens_is_part_of_the_response(policy, processors, cfg):
    """As with Qwen3-VL-Thinking: its prompts end with <think>, and no response begins with it."""
    tok, image_processor = copy.deepcopy(processors[0]), processors[1]
    example = ToyData("train", 1)[0]
    plain = encode(example, tok, image_processor)
    tok.chat_template = tok.chat_template.replace("assistant ", "assistant <think> ")
    opened = encode(example, tok, image_processor)
    assert (plain.opening, opened.opening) == ("", "<think> ")
    assert opened.ids.tolist() == [*plain.ids.tolist(), tok.convert_tokens_to_ids("<think>")]
    [rollout] = roll(policy, (tok, image_processor), cfg, [opened])
    decoded = tok.batch_decode(rollout.tokens, skip_special_tokens=True)
    assert rollout.texts == ["<think> " + text for text in decoded]
    response = "one and two are 3 </think> \\boxed{3}"
    assert not well_formed(response) and well_formed(opened.opening + response)
