"""What is sampled, and that the log-probs reported are those of the distribution sampled from."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import torch
from conftest import both_families

from groups import sample_groups
from loss import policy_logits
from masking import noised
from plumbing.common import generator
from plumbing.data import encode
from plumbing.packing import pack
from plumbing.policy import load_vlm
from reward import well_formed
from rollout import TransformersSampler, nucleus
from toy.task import ToyData


def roll(policy, processors, cfg, prompts, n=4, **changes):
    sampler = TransformersSampler(policy.vlm, processors[0], policy.banned, replace(cfg, **changes))
    return sampler.generate(prompts, n, [(0, "sample", 0, i) for i in range(len(prompts))])


@both_families
def test_logprobs_agree_with_the_trainer(policy, processors, cfg, prompts):
    """Same temperature, same ban, another code path: prefill and cache against the packed
    forward."""
    policy.temperature = 0.8
    rollouts = roll(policy, processors, cfg, prompts, temperature=0.8)
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
    """Same name, same sample: alone, in company, in another order."""
    sampler = TransformersSampler(policy.vlm, processors[0], policy.banned, cfg)
    names = [(0, "sample", 3, i) for i in range(len(prompts))]
    together = sampler.generate(prompts, 3, names)
    for b in (0, 5):
        alone = sampler.generate([prompts[b]], 3, [names[b]])[0]
        assert all(torch.equal(x, y) for x, y in zip(alone.tokens, together[b].tokens))
    reverse = sampler.generate(prompts[::-1], 3, names[::-1])[::-1]
    assert all(
        torch.equal(x, y) for a, b in zip(reverse, together) for x, y in zip(a.tokens, b.tokens)
    )


@both_families
def test_visual_tokens_are_never_sampled(policy, processors, cfg, prompts):
    """Even a policy that wants nothing else: without the ban the next forward would look for a
    picture that is not there."""
    image = policy.vlm.config.image_token_id
    with torch.no_grad():
        policy.vlm.lm_head.weight[image] += 3.0 * policy.vlm.lm_head.weight.abs().max()
    for r in roll(policy, processors, cfg, prompts[:2], temperature=5.0):
        assert not policy.banned[torch.cat(r.tokens)].any()


def test_sampling_follows_the_distribution():
    """Frequencies of inverse-CDF sampling against the probabilities they come from."""
    logits = torch.tensor([[2.0, 1.0, 0.0, 5.0, -1.0]])
    banned = torch.tensor([0, 0, 0, 1, 0], dtype=torch.bool)
    p = policy_logits(logits, 1.0, banned).double().softmax(-1)[0]
    u = torch.rand(20_000, generator=generator("frequency"), dtype=torch.float64)
    counts = torch.searchsorted(p.cumsum(0), u * p.sum(), right=True).bincount(minlength=5) / len(u)
    assert p[3] == 0 and counts[3] == 0 and (counts - p).abs().max() < 0.02


def test_nucleus_by_hand():
    """p = .5 .3 .15 .05, top_p .7: the two likeliest stay, renormalised to .625 and .375."""
    p = torch.tensor([[0.15, 0.5, 0.05, 0.3]])
    assert torch.allclose(nucleus(p, 0.7), torch.tensor([[0.0, 0.625, 0.0, 0.375]]))
    assert torch.equal(nucleus(p, 1.0), p)
    assert torch.equal(nucleus(p, 1e-9), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))


@both_families
def test_logprobs_are_those_before_the_nucleus(policy, processors, cfg, prompts):
    """With top_p < 1 the trainer scores the whole distribution; so does the sampler, or their
    difference would be no error bar."""
    rollouts = roll(policy, processors, cfg, prompts[:2], top_p=0.5)
    with torch.no_grad():
        rows = pack(policy.vlm, prompts[:2], [r.tokens for r in rollouts])
        logp = policy(rows, rows.pixels).logp
    for b, r in enumerate(rollouts):
        assert all(
            torch.allclose(logp[b, g, : len(x)], x, atol=1e-4) for g, x in enumerate(r.logprobs)
        )


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


@both_families
def test_a_private_copy_is_stale_until_synced(policy, processors, cfg, folder, prompts):
    sampler = TransformersSampler(load_vlm(folder), processors[0], policy.banned, cfg)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator("perturb", p.numel())))
    names = [(0, "sync")]
    shared = TransformersSampler(policy.vlm, processors[0], policy.banned, cfg)
    want = shared.generate(prompts[:1], 4, names)[0]
    stale = sampler.generate(prompts[:1], 4, names)[0]
    sampler.sync(policy)
    fresh = sampler.generate(prompts[:1], 4, names)[0]
    assert not all(torch.equal(a, b) for a, b in zip(stale.tokens, want.tokens))
    assert all(torch.equal(a, b) for a, b in zip(fresh.tokens, want.tokens))


def test_half_of_a_group_is_rolled_out_on_a_noised_picture(policy, processors, cfg, prompts):
    """The first half is what the clean picture gives, the second what the noised one gives, and its
    log-probs are those on the noised one."""
    cfg = replace(cfg, rollout_picture="noisy", group_size=6, noise_steps=400)
    sampler = TransformersSampler(policy.vlm, processors[0], policy.banned, cfg)
    parts = SimpleNamespace(cfg=cfg, sampler=sampler, processors=processors)
    few = {7: prompts[0], 3: replace(prompts[1], ids=prompts[1].ids.repeat(40)), 9: prompts[2]}
    rollouts = sample_groups(few, parts, step=5)
    assert rollouts[1] is None and all(len(r.tokens) == 6 for r in rollouts if r)  # 3 is too long
    seen = [few[7], few[9]]
    draws = [generator(cfg.seed, "second picture", 5, position) for position in (7, 9)]
    blurred = [noised(p, 400, draw, processors[1]) for p, draw in zip(seen, draws)]
    for half, given, name in [(0, seen, "sample"), (1, blurred, "sample second")]:
        alone = sampler.generate(given, 3, [(cfg.seed, name, 5, position) for position in (7, 9)])
        rows = pack(policy.vlm, given, [r.tokens for r in alone])
        with torch.no_grad():
            logp = policy(rows, rows.pixels).logp
        for b, (r, own) in enumerate(zip([rollouts[0], rollouts[2]], alone)):
            mine = slice(3 * half, 3 * half + 3)
            assert all(torch.equal(x, y) for x, y in zip(r.tokens[mine], own.tokens))
            assert r.texts[mine] == own.texts and r.finished[mine] == own.finished
            for g, sampled in enumerate(r.logprobs[mine]):
                assert torch.allclose(logp[b, g, : len(sampled)], sampled, atol=1e-4)


def test_noise_that_has_faded_leaves_two_halves_of_one_kind(policy, processors, cfg, prompts):
    cfg = replace(cfg, rollout_picture="noisy", group_size=4, noise_steps=0)
    sampler = TransformersSampler(policy.vlm, processors[0], policy.banned, cfg)
    parts = SimpleNamespace(cfg=cfg, sampler=sampler, processors=processors)
    (r,) = sample_groups({2: prompts[0]}, parts, step=0)
    (again,) = sampler.generate([prompts[0]], 2, [(cfg.seed, "sample second", 0, 2)])
    assert all(torch.equal(x, y) for x, y in zip(r.tokens[2:], again.tokens))
    assert not all(torch.equal(x, y) for x, y in zip(r.tokens[:2], r.tokens[2:]))  # other draws


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
