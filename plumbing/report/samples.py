"""Samples for report.html: a few responses whose words are shaded by how much they depend on the
picture."""

import base64
import io
import json
from functools import partial
from pathlib import Path

from PIL import Image

from loss import k3
from plumbing.base.common import generator, only_shows, write_atomically
from plumbing.data.prompts import encode_all
from plumbing.data.sources import validation_split
from plumbing.models.families import to_picture
from policy import score_only
from reward import score

DARKEST = 3  # nats from which a word is drawn in full colour
LARGEST = (800, 280)  # pixels of a picture in the page, where it is 140 high
# So many tokens before a token settle its text: in UTF-8 a character has at most four bytes, and a
# token has at least one.
CONTEXT = 3


def write_samples(parts, step, questions=4, n=4):
    """Roll out the first validation questions and keep samples/<step>.json of them. Collective."""
    cfg, processors, folder = parts.cfg, parts.processors, Path(parts.cfg.out) / "samples"
    examples = parts.validation[validation_split(cfg.val_data)]
    chosen = [examples[i] for i in range(min(questions, len(examples)))]
    prompts = encode_all(chosen, *processors)
    seeds = [(cfg.seed, "samples", p.example.id) for p in prompts]
    rollouts = parts.sampler.generate(prompts, n, seeds)
    pairs = [(p, r) for p, r in zip(prompts, rollouts) if r is not None]
    looks = [look(parts, *pair) for pair in pairs]
    if not parts.processes.first:
        return
    with only_shows("samples are not kept"):
        grade = partial(score, grader=parts.grader, kind=cfg.reward)
        found = [told(*pair, *seen, grade, processors[0]) for pair, seen in zip(pairs, looks)]
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"{step:06d}.json", json.dumps(found))


def told(prompt, rollout, kl, pictures, grade, tok):
    """One question with its pictures and responses, ready for JSON. kl, pictures: as of look"""
    scores = grade(rollout.texts, [prompt.example.answer] * len(rollout.texts))
    texts = [words(tokens, kl and kl[g], tok) for g, tokens in enumerate(rollout.tokens)]
    return {
        "problem": prompt.example.problem,
        "answer": prompt.example.answer,
        "pictures": [as_png(picture) for picture in pictures],
        "responses": [{"reward": s["overall"], "words": t} for s, t in zip(scores, texts)],
    }


def look(parts, prompt, rollout):
    """KL_prcp of every token, and the picture and the masked picture, (H, W, 3) uint8 each
    -> (G lists of R numbers, two pictures), or (None, []) of a prompt that has none. --mask absent
    has no second picture to show."""
    rows = parts.policy.pack([prompt], [rollout.tokens])
    try:
        named = generator(parts.cfg.seed, "samples mask", prompt.example.id)
        rows.masked_pixels = parts.masker(prompt, named)
    except ValueError:  # validation data need not have what training needs, such as contrasts
        return None, []
    if prompt.grid is None:
        return None, []
    grid = prompt.grid[0]
    first = int(grid.prod())
    both = [x[:first] for x in (rows.pixels, rows.masked_pixels) if x is not None]
    pictures = [to_picture(x, grid, parts.processors[1]) for x in both]
    rows = rows.to(parts.processes.device)
    seen = score_only(parts.policy, rows, rows.pixels)
    masked = score_only(parts.policy, rows, rows.masked_pixels)
    return k3(seen.logp, masked.logp)[0][0].tolist(), pictures


def words(tokens, kl, tok):
    """One response as [(text of a token, its nats, how dark it is drawn, 0 to 1)]. Tokens that are
    a character only together are one text, with their nats added up. tokens (n,); kl: of each"""
    found, start = [], 0  # the first token that is not told of yet
    for end in range(1, len(tokens) + 1):
        # A token's own text depends on what precedes it, but on no more than a character's bytes.
        before, upto = (tok.decode(tokens[max(0, start - CONTEXT) : i]) for i in (start, end))
        broken_off = upto.endswith("\ufffd") and end - start <= CONTEXT
        if broken_off and end < len(tokens):
            continue
        nats = sum(kl[start:end]) if kl else 0.0
        found.append((upto[len(before) :], nats, min(1.0, nats / DARKEST)))
        start = end
    return found


def as_png(picture):
    """(H, W, 3) uint8 -> a PNG file within LARGEST, in base64"""
    buffer, image = io.BytesIO(), Image.fromarray(picture.numpy())
    image.thumbnail(LARGEST)
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
