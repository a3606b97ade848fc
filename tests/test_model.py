"""The packed forward gives what one row per response gives, for one prompt each."""

from dataclasses import fields, replace

import pytest
import torch
from conftest import both_families, random_responses

import policy as module
from loss import exact_entropy, exact_kl, policy_logits, token_logprobs
from masking import black_row, choose_patches, mask_patches
from plumbing.base.common import generator
from plumbing.data.prompts import Example, encode
from plumbing.models import packing
from plumbing.models.packing import attention_mask, pack
from policy import Policy, score_only

pytestmark = both_families


def look(policy, packed):
    """The policy's log-probs on the pictures."""
    return policy(packed, packed.pixels).logp


def one_by_one(policy, prompt, tokens):
    """transformers' own forward on [prompt | response], without a mask or positions of ours."""
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
    pictures = [p.example.images[0] for p in prompts[:2]]
    text = Example("t", "how many red objects are there ?", "3")
    two = Example("u", "<image> and <image> same ?", "3", pictures)
    return [prompts[0], encode(text, *processors), encode(two, *processors), prompts[1]]


def test_packed_is_one_by_one_in_value_and_gradient(policy, prompts, processors):
    mixed = ragged_prompts(prompts, processors)
    groups = random_responses(mixed, processors[0])
    packed = pack(policy.vlm, mixed, groups)
    logp, total = look(policy, packed), 0.0
    weights = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1)) * packed.scored
    for b, group in enumerate(groups):
        for g, tokens in enumerate(group):
            alone = one_by_one(policy, mixed[b], tokens)
            assert torch.allclose(logp[b, g, : len(tokens)], alone, atol=1e-5)
            assert packed.scored[b, g].sum() == len(tokens) and not logp[b, g, len(tokens) :].any()
            total = total + (alone * weights[b, g, : len(tokens)]).sum()
    assert near(gradients(policy, (logp * weights).sum()), gradients(policy, total))


def test_eos_is_scored_even_if_it_is_the_padding_token(policy, prompts, processors):
    """pack never asks what a token is: it scores what was sampled, and pads by length."""
    eos = processors[0].eos_token_id
    group = [torch.tensor([30, eos]), torch.tensor([0, 0, 0, eos])]
    packed = pack(policy.vlm, prompts[:1], [group])
    assert packed.scored.tolist() == [[[True, True, False, False], [True] * 4]]
    look(policy, packed).sum().backward()
    assert packed.targets[0, 0, 1] == eos and packed.targets[0, 1].tolist() == [0, 0, 0, eos]


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
        asked = (rows, None), (shorter, None), (rows, black)
        absent, wanted, other = (policy(*pair).logp for pair in asked)
    assert torch.allclose(absent, wanted, atol=1e-5)
    assert (absent - other).abs().max() > 1e-3


def test_banned_tokens_are_the_visual_ones(policy, processors):
    tok = processors[0]
    banned = tok.convert_ids_to_tokens(policy.banned.nonzero()[:, 0])
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    assert sorted(banned) == sorted(f"<|{name}|>" for name in names)


# ------------------------------------------------------------ both branches, sampled and exact


def two_branches(policy, prompts, processors):
    """A packed batch with a picture in every prompt, and with masked pictures."""
    packed = pack(policy.vlm, prompts[:2], random_responses(prompts[:2], processors[0]))
    hidden = choose_patches(len(packed.pixels), 0.6, generator("two branches"), 4)
    masked = mask_patches(packed.pixels, hidden, black_row(processors[1]))
    return replace(packed, masked_pixels=masked)


def distributions(policy, packed, pixels):
    """The logits of the whole row, and then the rows wanted -> {(b, g, t): (V,)}"""
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


def both(policy, rows, grad=True):
    """Scores on the picture and on the masked one, with exact entropies, and their exact KL."""
    seen = policy(rows, rows.pixels, exact=True)
    masked = policy(rows, rows.masked_pixels, exact=True, grad=grad)
    return seen, masked, policy.exact_kl(seen, masked, rows.scored, 0)


def test_scores_of_both_branches_are_what_they_say(policy, prompts, processors):
    packed = two_branches(policy, prompts, processors)
    with torch.no_grad():
        seen, masked, (kl, clamped) = both(policy, packed)
        real = distributions(policy, packed, packed.pixels)
        blind = distributions(policy, packed, packed.masked_pixels)
    for at, dist in real.items():
        o = packed.targets[at]
        assert torch.allclose(seen.logp[at], dist[o], atol=1e-5)
        assert torch.allclose(masked.logp[at], blind[at][o], atol=1e-5)
        assert torch.allclose(seen.entropy[at], exact_entropy(dist), atol=1e-5)
        assert torch.allclose(masked.entropy[at], exact_entropy(blind[at]), atol=1e-5)
        assert torch.allclose(kl[at], exact_kl(dist, blind[at])[0], atol=1e-5)
    assert kl.max() > 1e-3  # the mask does something
    assert not any(x[~packed.scored].any() for x in (seen.logp, seen.entropy, masked.logp, kl))
    cap = kl[packed.scored].median().item()
    capped, at_cap = policy.exact_kl(seen, masked, packed.scored, cap)
    assert not clamped.any() and torch.equal(at_cap, kl > cap) and at_cap.any()
    assert torch.equal(capped, kl.clamp(max=cap))
    plain = policy(packed, packed.pixels)
    assert plain.entropy is None and torch.equal(plain.logp, seen.logp)
    alone = score_only(policy, packed, packed.pixels, exact=True)  # as pi_old and a kept pi_mask
    assert torch.equal(alone.logp, seen.logp) and torch.equal(alone.entropy, seen.entropy)
    assert not alone.logp.requires_grad and alone.outputs is None


def gradients(policy, value):
    """{weight: its gradient}"""
    names, weights = zip(*policy.named_parameters())
    options = dict(retain_graph=True, materialize_grads=True)
    return dict(zip(names, torch.autograd.grad(value, weights, **options)))


def near(got, want):
    """Are all gradients the same, up to rounding of each weight's largest one?"""
    sizes = {n: max(1.0, w.abs().max().item()) for n, w in want.items()}
    return all(torch.allclose(got[n], want[n], atol=2e-5 * sizes[n]) for n in want)


@pytest.mark.parametrize("grad", [False, True])
def test_gradients_reach_the_branch_they_are_meant_for(grad, policy, prompts, processors):
    """Down to the weights: each exact term against the same term written out, the other branch held
    fixed where it should be, the head that both branches share included."""
    packed = two_branches(policy, prompts, processors)
    o = packed.targets[packed.scored].tolist()
    real, blind = (
        torch.stack([*distributions(policy, packed, pixels).values()])
        for pixels in (packed.pixels, packed.masked_pixels)
    )
    seen, masked, (kl, _) = both(policy, packed, grad)
    pairs = {
        "entropy": (seen.entropy, exact_entropy(real)),
        "masked entropy": (masked.entropy, exact_entropy(blind)),
        "masked": (masked.logp, blind[range(len(o)), o]),
        "kl": (kl, exact_kl(real, blind if grad else blind.detach())[0]),
    }
    for name, (ours, plain) in pairs.items():
        if name.startswith("masked") and not grad:
            assert not ours.requires_grad  # nothing to differentiate: a constant
            continue
        got, want = gradients(policy, ours.sum()), gradients(policy, plain.sum())
        assert near(got, want) and any(w.abs().max() > 1e-3 for w in want.values()), name


# ------------------------------------------------------------------- layouts, chunks, budgets


def test_flat_is_rows(policy, prompts, processors, monkeypatch):
    """All groups in one row with FlexAttention, as on a GPU (a CPU can run it forwards only)."""
    monkeypatch.setattr(packing, "LENGTH_BUCKET", 256)
    mixed = ragged_prompts(prompts, processors)
    groups = random_responses(mixed, processors[0])
    with torch.no_grad():
        rows = look(policy, policy.pack(mixed, groups))
        flat = Policy(policy.vlm, policy.banned, policy.temperature, flat=True)
        packed = flat.pack(mixed, groups)
        assert len(packed.input_ids) == 1 and torch.allclose(look(flat, packed), rows, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_chunked_is_unchunked(grad, policy, prompts, processors, monkeypatch):
    """In pieces of three tokens, made again backwards: the same values and the same gradients."""
    packed = two_branches(policy, prompts, processors)

    def run():
        seen, masked, (kl, clamped) = both(policy, packed, grad)
        parts = [seen.logp, masked.logp, seen.entropy, masked.entropy, kl]
        return parts, gradients(policy, sum((i + 1) * x.sum() for i, x in enumerate(parts)))

    whole, grads = run()
    few = 3 * policy.vlm.config.text_config.vocab_size
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", few)
    sizes, lm_head = [], policy.vlm.lm_head.forward
    monkeypatch.setattr(policy.vlm.lm_head, "forward", lambda h: sizes.append(len(h)) or lm_head(h))
    pieces, grads_again = run()
    assert max(sizes) == 3 and sum(sizes) >= 2 * packed.scored.sum()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, pieces, strict=True))
    assert near(grads_again, grads)


def test_looking_at_nothing_changes_nothing_but_reaches_the_tower(policy, prompts, processors):
    """What a process does whose prompts have no picture, while others wait for it in the tower."""
    text = [encode(Example("t", "how many red objects are there ?", "3"), *processors)]
    groups = random_responses(text, processors[0])
    logp = look(policy, policy.pack(text, groups))
    for g, t in enumerate(groups[0]):
        assert torch.allclose(logp[0, g, : len(t)], one_by_one(policy, text[0], t), atol=1e-5)
    logp.sum().backward()
    tower = [p.grad for p in policy.vlm.model.visual.parameters()]
    assert all(g is not None and not g.any() for g in tower)
