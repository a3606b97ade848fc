"""The packed forward gives what one row per response gives, for one prompt each."""

from dataclasses import fields, replace

import pytest
import torch
from conftest import both_families, random_responses

import plumbing.policy
from loss import exact_entropy, exact_kl, policy_logits, token_logprobs
from masking import black_row, choose_patches, mask_patches
from plumbing.common import generator
from plumbing.data import Example, encode
from plumbing.packing import attention_mask, pack
from plumbing.policy import Joint, Policy, load_vlm

pytestmark = both_families


def look(policy, packed):
    """The policy's log-probs on the pictures."""
    return policy(packed, packed.pixels).logp


def one_by_one(policy, prompt, tokens):
    """The plain way: transformers' own forward on [prompt | response], no custom mask, no custom
    positions."""
    ids = torch.cat([prompt.ids, tokens])[None]
    types = (ids == policy.vlm.config.image_token_id).int()
    logits = policy.vlm(
        input_ids=ids,
        pixel_values=prompt.pixels,
        image_grid_thw=prompt.grid,
        mm_token_type_ids=types,
        attention_mask=torch.ones_like(ids),
    ).logits[0]
    logits = logits[len(prompt.ids) - 1 : -1]
    return token_logprobs(policy_logits(logits, policy.temperature, policy.banned), tokens)


def ragged_prompts(prompts, processors):
    """One picture, no picture, two pictures."""
    pictures = [p.example.images[0] for p in prompts]
    return [
        prompts[0],
        encode(Example("t", "how many red objects are there ?", "3"), *processors),
        encode(Example("u", "<image> and <image> same ?", "3", pictures[:2]), *processors),
        prompts[1],
    ]


def test_packed_is_one_by_one_in_value_and_gradient(policy, prompts, processors):
    mixed = ragged_prompts(prompts, processors)
    groups = random_responses(mixed, processors[0])
    packed = pack(policy.vlm, mixed, groups)
    logp = look(policy, packed)
    weights = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1)) * packed.scored
    (logp * weights).sum().backward()
    shared = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    for b, group in enumerate(groups):
        for g, tokens in enumerate(group):
            alone = one_by_one(policy, mixed[b], tokens)
            assert torch.allclose(logp[b, g, : len(tokens)], alone, atol=1e-5)
            assert packed.scored[b, g].sum() == len(tokens) and not logp[b, g, len(tokens) :].any()
            (alone * weights[b, g, : len(tokens)]).sum().backward()
    for name, p in policy.named_parameters():
        atol = 1e-5 * max(1.0, p.grad.abs().max().item())
        assert torch.allclose(shared[name], p.grad, atol=atol), name


def test_company_does_not_matter(policy, prompts, processors):
    """A group's log-probs do not depend on the other rows of its batch."""
    groups = random_responses(prompts[:3], processors[0])
    together = look(policy, pack(policy.vlm, prompts[:3], groups))
    for b in range(3):
        alone = look(policy, pack(policy.vlm, [prompts[b]], [groups[b]]))
        assert torch.allclose(together[b, :, : alone.shape[2]], alone[0], atol=1e-5)


def test_eos_is_scored_even_if_it_is_the_padding_token(policy, prompts, processors):
    """pack never asks what a token is: it scores what was sampled, and pads by length."""
    eos = processors[0].eos_token_id
    group = [torch.tensor([30, eos]), torch.tensor([0, 0, 0, eos])]
    packed = pack(policy.vlm, prompts[:1], [group])
    assert packed.scored.tolist() == [[[True, True, False, False], [True] * 4]]
    look(policy, packed).sum().backward()
    assert packed.targets[0, 0, 1] == eos and packed.targets[0, 1].tolist() == [0, 0, 0, eos]


def test_the_picture_matters_to_the_score(policy, prompts, processors):
    groups = random_responses(prompts[:1], processors[0])
    packed = pack(policy.vlm, prompts[:1], groups)
    seen = look(policy, packed)
    black = torch.zeros_like(packed.pixels)
    assert (seen - policy(packed, black).logp).abs().max() > 1e-3


def test_an_absent_picture_is_one_whose_tokens_were_taken_out(policy, prompts, processors):
    """Without pixels the log-probs are those of rows from which the picture's tokens are deleted,
    every other token staying at its position; and not those of a black picture."""
    prompt = prompts[0]
    tokens = random_responses([prompt], processors[0])
    rows = policy.pack([prompt], tokens)
    black = black_row(processors[1]).expand_as(rows.pixels)
    stays = rows.input_ids[0] != policy.vlm.config.image_token_id
    assert 0 < stays.sum() < len(stays)
    place = stays.cumsum(0) - 1  # of each token that stays
    cut = {f.name: getattr(rows, f.name) for f in fields(rows)}
    cut |= {name: cut[name][:, stays] for name in ("input_ids", "group", "part")}
    cut |= {"position_ids": rows.position_ids[:, :, stays], "predictor": place[rows.predictor]}
    shorter = type(rows)(**cut | {"pixels": None, "grid": None})
    with torch.no_grad():
        absent, wanted, other = (
            policy(r, pixels).logp for r, pixels in ((rows, None), (shorter, None), (rows, black))
        )
    assert torch.allclose(absent, wanted, atol=1e-5)
    assert (absent - other).abs().max() > 1e-3


def test_banned_tokens_are_the_visual_ones(policy, processors):
    tok = processors[0]
    assert sorted(tok.convert_ids_to_tokens(policy.banned.nonzero()[:, 0])) == sorted(
        ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    )


# ------------------------------------------------------------ both branches, sampled and exact


def two_branches(policy, prompts, processors, ratio=0.6):
    """A packed batch with a picture in every prompt, and with masked pictures."""
    mixed = [prompts[0], prompts[1]]
    packed = pack(policy.vlm, mixed, random_responses(mixed, processors[0]))
    hidden = choose_patches(len(packed.pixels), ratio, generator("two branches"), 4)
    masked = mask_patches(packed.pixels, hidden, black_row(processors[1]))
    return replace(packed, masked_pixels=masked)


def distributions(policy, packed, pixels):
    """The plain way to the same positions: the logits of the whole row, and then the rows wanted.
    -> {(b, g, t): (V,)}"""
    outputs = policy.vlm.model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        pixel_values=pixels,
        image_grid_thw=packed.grid,
        attention_mask=attention_mask(packed),
        use_cache=False,
    ).last_hidden_state
    logits = policy_logits(policy.vlm.lm_head(outputs), policy.temperature, policy.banned)
    return {
        (b, g, t): logits[b, packed.predictor[b, g, t]].log_softmax(-1)
        for b, g, t in packed.scored.nonzero().tolist()
    }


def test_scores_of_both_branches_are_what_they_say(policy, prompts, processors):
    packed = two_branches(policy, prompts, processors)
    with torch.no_grad():
        seen, masked, kl = policy(
            packed, packed.pixels, joint=Joint(packed.masked_pixels, False, 0)
        )
        real = distributions(policy, packed, packed.pixels)
        blind = distributions(policy, packed, packed.masked_pixels)
    for at, dist in real.items():
        o = packed.targets[at]
        assert torch.allclose(seen.logp[at], dist[o], atol=1e-5)
        assert torch.allclose(masked.logp[at], blind[at][o], atol=1e-5)
        assert torch.allclose(seen.entropy[at], exact_entropy(dist), atol=1e-5)
        assert torch.allclose(masked.entropy[at], exact_entropy(blind[at]), atol=1e-5)
        assert torch.allclose(kl[0][at], exact_kl(dist, blind[at])[0], atol=1e-5)
    assert not any(x[~packed.scored].any() for x in (seen.logp, seen.entropy, masked.logp, kl[0]))
    assert policy(packed, packed.pixels).entropy is None
    assert torch.equal(seen.logp, look(policy, packed))


def test_one_picture_at_a_time_says_what_both_at_once_say(policy, prompts, processors):
    packed = two_branches(policy, prompts, processors)
    both = policy(packed, packed.pixels, joint=Joint(packed.masked_pixels, True, 0))
    for together, pixels in zip(both, (packed.pixels, packed.masked_pixels)):
        alone = policy(packed, pixels, exact=True)
        assert torch.allclose(alone.logp, together.logp, atol=1e-6)
        assert torch.allclose(alone.entropy, together.entropy, atol=1e-6)
        assert not policy(packed, pixels, exact=True, grad=False).entropy.requires_grad


def gradients(policy, value):
    policy.zero_grad()
    value.backward()
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in policy.named_parameters()
    }


def test_gradients_reach_the_branch_they_are_meant_for(policy, prompts, processors):
    """Down to the weights: each exact term against the same term written out, the other branch held
    fixed where it should be."""
    packed = two_branches(policy, prompts, processors)
    at = list(packed.scored.nonzero().tolist())
    o = [int(packed.targets[tuple(i)]) for i in at]
    total = {
        "entropy": lambda seen, masked, kl: seen.entropy.sum(),
        "masked_entropy": lambda seen, masked, kl: masked.entropy.sum(),
        "masked": lambda seen, masked, kl: masked.logp.sum(),
        "kl": lambda seen, masked, kl: kl[0].sum(),
    }
    plain = {
        "entropy": lambda real, blind: exact_entropy(real).sum(),
        "masked_entropy": lambda real, blind: exact_entropy(blind).sum(),
        "masked": lambda real, blind: blind[range(len(at)), o].sum(),
        "kl": lambda real, blind: exact_kl(real, blind)[0].sum(),
    }
    for masked_grad in (False, True):
        for name in total:
            joint = Joint(packed.masked_pixels, masked_grad, 0)
            value = total[name](*policy(packed, packed.pixels, joint=joint))
            if name.startswith("masked") and not masked_grad:
                assert not value.requires_grad  # nothing to differentiate: a constant
                continue
            got = gradients(policy, value)
            real, blind = (
                torch.stack([d[tuple(i)] for i in at])
                for d in (
                    distributions(policy, packed, packed.pixels),
                    distributions(policy, packed, packed.masked_pixels),
                )
            )
            want = gradients(policy, plain[name](real, blind if masked_grad else blind.detach()))
            scale = max(w.abs().max() for w in want.values())
            assert scale > 1e-3
            for n in want:
                assert torch.allclose(got[n], want[n], atol=2e-5 * scale), (name, masked_grad, n)


# ------------------------------------------------------------------- layouts, chunks, budgets


def test_flat_is_rows(folder, policy, prompts, processors):
    """All groups in one row with FlexAttention, as on a GPU (a CPU can run it forwards only)."""
    mixed = ragged_prompts(prompts, processors)
    groups = random_responses(mixed, processors[0])
    flat = Policy(load_vlm(folder), policy.banned, policy.temperature, flat=True)
    packed = flat.pack(mixed, groups)
    assert packed.input_ids.shape == (1, 1024)
    with torch.no_grad():
        rows = look(policy, policy.pack(mixed, groups))
        assert torch.allclose(look(flat, packed), rows, atol=1e-5)


def test_the_flat_layout_hides_the_same_from_each_token(policy, prompts, processors):
    mixed = ragged_prompts(prompts, processors)
    groups = random_responses(mixed, processors[0])
    rows, flat = pack(policy.vlm, mixed, groups), pack(policy.vlm, mixed, groups, flat=True)
    for name in ("targets", "scored"):
        assert torch.equal(getattr(rows, name), getattr(flat, name))
    seen = []
    for packed in (rows, flat):
        allowed, ids, m = attention_mask(packed)[:, 0], packed.input_ids, packed.scored
        seen.append(
            [
                (ids[r][allowed[r, q]].tolist(), packed.position_ids[:, r, allowed[r, q]].tolist())
                for r, q in zip(packed.row[m].tolist(), packed.predictor[m].tolist())
            ]
        )
    assert seen[0] == seen[1]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("masked_grad", [False, True])
def test_chunked_is_unchunked(exact, masked_grad, policy, prompts, processors, monkeypatch):
    """In pieces of three tokens, made again in the backward pass: the same values and the same
    gradients."""
    packed = two_branches(policy, prompts, processors)

    def run():
        if exact:
            joint = Joint(packed.masked_pixels, masked_grad, 0)
            seen, masked, (kl, clamped) = policy(packed, packed.pixels, joint=joint)
            parts = [seen.logp, masked.logp, seen.entropy, masked.entropy, kl]
            values = [*parts, clamped.float()]
        else:
            seen = policy(packed, packed.pixels)
            masked = policy(packed, packed.masked_pixels, grad=masked_grad)
            parts = [seen.logp, masked.logp]
            values = [*seen, *masked]
        return values, gradients(policy, sum((i + 1) * x.sum() for i, x in enumerate(parts)))

    whole, grad = run()
    few = 3 * policy.vlm.config.text_config.vocab_size
    monkeypatch.setattr(plumbing.policy, "LOGITS_AT_ONCE", few)
    sizes, lm_head = [], policy.vlm.lm_head.forward
    monkeypatch.setattr(policy.vlm.lm_head, "forward", lambda h: sizes.append(len(h)) or lm_head(h))
    pieces, grad_again = run()
    assert max(sizes) == 3 and sum(sizes) >= 2 * packed.scored.sum()
    for a, b in zip(whole, pieces):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-6))
    for n in grad:
        atol = 1e-5 * max(1.0, grad[n].abs().max().item())
        assert torch.allclose(grad[n], grad_again[n], atol=atol), n


def test_looking_at_nothing_changes_nothing_but_reaches_the_tower(policy, prompts, processors):
    """What a process does whose prompts have no picture, while others wait for it in the vision
    tower."""
    text = [encode(Example("t", "how many red objects are there ?", "3"), *processors)]
    groups = random_responses(text, processors[0])
    logp = look(policy, policy.pack(text, groups))
    assert all(
        torch.allclose(logp[0, g, : len(t)], one_by_one(policy, text[0], t), atol=1e-5)
        for g, t in enumerate(groups[0])
    )
    logp.sum().backward()
    tower = [p.grad for p in policy.vlm.model.visual.parameters()]
    assert all(g is not None and not g.any() for g in tower)


def test_one_response_and_cut_off_responses(policy, prompts, processors):
    """G = 1, and responses of which some tokens do not count."""
    tokens = random_responses(prompts[:1], processors[0])[0][0]
    single = look(policy, policy.pack(prompts[:1], [[tokens]]))[0, 0]
    assert torch.allclose(single, one_by_one(policy, prompts[0], tokens), atol=1e-5)
    groups = random_responses(prompts[:2], processors[0])
    scored = [[torch.full((len(t),), g != 1) for g, t in enumerate(group)] for group in groups]
    all_of_them = look(policy, policy.pack(prompts[:2], groups))
    some = look(policy, policy.pack(prompts[:2], groups, scored))
    assert not some[:, 1].any()
    assert torch.allclose(some[:, [0, 2]], all_of_them[:, [0, 2]], atol=1e-6)


def test_bfloat16_stays_near(policy, prompts, processors):
    """Largest and mean difference of a log-prob from float32, in nats."""
    groups = random_responses(prompts, processors[0])
    packed = policy.pack(prompts, groups)
    with torch.no_grad():
        exact = look(policy, packed)
        half = policy.to(torch.bfloat16)(packed, packed.pixels.bfloat16()).logp
    difference = (exact - half).abs()[packed.scored]
    assert half.dtype == torch.float32 and difference.mean() < 0.05 and difference.max() < 0.5
