"""The packed forward gives what one row per response gives, for one prompt each."""
import torch

from conftest import random_responses
from data import Example, encode
from loss import token_logprobs
from model import pack


def one_by_one(policy, prompt, tokens):
    """The plain way: transformers' own forward on [prompt | response], no custom mask, no custom positions."""
    ids = torch.cat([prompt.ids, tokens])[None]
    types = (ids == policy.vlm.config.image_token_id).int()
    logits = policy.vlm(input_ids=ids, pixel_values=prompt.pixel_values, image_grid_thw=prompt.grid, mm_token_type_ids=types,
                        attention_mask=torch.ones_like(ids)).logits[0]
    return token_logprobs(logits[len(prompt.ids) - 1:-1], tokens, policy.temperature, policy.banned)


def ragged_prompts(prompts, processors):
    """One picture, no picture, two pictures."""
    pictures = [p.example.images[0] for p in prompts]
    return [prompts[0], encode(Example("t", "how many red objects are there ?", "3"), *processors),
            encode(Example("u", "<image> and <image> same ?", "3", pictures[:2]), *processors), prompts[1]]


def test_packed_is_one_by_one_in_value_and_gradient(policy, prompts, processors):
    mixed = ragged_prompts(prompts, processors)
    groups = random_responses(mixed, processors[0])
    packed = pack(policy.vlm, mixed, groups)
    logp = policy(packed)
    weights = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1)) * packed.mask
    (logp * weights).sum().backward()
    shared = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    for b, group in enumerate(groups):
        for g, tokens in enumerate(group):
            alone = one_by_one(policy, mixed[b], tokens)
            assert torch.allclose(logp[b, g, :len(tokens)], alone, atol=1e-5)
            assert packed.mask[b, g].sum() == len(tokens) and not logp[b, g, len(tokens):].any()
            (alone * weights[b, g, :len(tokens)]).sum().backward()
    for name, p in policy.named_parameters():
        assert torch.allclose(shared[name], p.grad, atol=1e-5 * max(1.0, p.grad.abs().max().item())), name


def test_company_does_not_matter(policy, prompts, processors):
    """A group's log-probs do not depend on the other rows of its batch."""
    groups = random_responses(prompts[:3], processors[0])
    together = policy(pack(policy.vlm, prompts[:3], groups))
    for b in range(3):
        alone = policy(pack(policy.vlm, [prompts[b]], [groups[b]]))
        assert torch.allclose(together[b, :, :alone.shape[2]], alone[0], atol=1e-5)


def test_eos_is_scored_even_if_it_is_the_padding_token(policy, prompts, processors):
    """pack never asks what a token is: it scores what was sampled, and pads by length."""
    eos = processors[0].eos_token_id
    packed = pack(policy.vlm, prompts[:1], [[torch.tensor([30, eos]), torch.tensor([0, 0, 0, eos])]])
    assert packed.mask.tolist() == [[[True, True, False, False], [True] * 4]]
    policy(packed).sum().backward()
    assert packed.targets[0, 0, 1] == eos and packed.targets[0, 1].tolist() == [0, 0, 0, eos]


def test_the_picture_matters_to_the_score(policy, prompts, processors):
    groups = random_responses(prompts[:1], processors[0])
    packed = pack(policy.vlm, prompts[:1], groups)
    seen = policy(packed)
    packed.pixel_values = torch.zeros_like(packed.pixel_values)
    assert (seen - policy(packed)).abs().max() > 1e-3


def test_banned_tokens_are_the_visual_ones(policy, processors):
    tok = processors[0]
    assert sorted(tok.convert_ids_to_tokens(policy.banned.nonzero()[:, 0])) == sorted(
        ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
