"""Samples for report.html: a few responses whose words are shaded by how much they depend on the
picture."""

import base64
import html
import io
from functools import partial

from PIL import Image

from loss import k3
from plumbing.common import generator, write_atomically
from plumbing.data import encode_all
from plumbing.families import to_picture
from plumbing.page import DARKEST
from plumbing.policy import score_only
from reward import score

LARGEST = (800, 280)  # pixels of a picture in the page, where it is 140 high
# So many tokens before a token settle its text: in UTF-8 a character has at most four bytes, and a
# token has at least one.
CONTEXT = 3


def write_samples(parts, examples, out, step, questions=4, n=4):
    """Roll out a few validation questions, and keep them as samples/<step>.html, a piece of the
    page that plumbing/page.py makes. Collective."""
    seed, processors = parts.cfg.seed, parts.processors
    chosen = [examples[i] for i in range(min(questions, len(examples)))]
    prompts = encode_all(chosen, *processors)
    names = [(seed, "samples", p.example.id) for p in prompts]
    rollouts = parts.sampler.generate(prompts, n, names)
    grade = partial(score, grader=parts.grader, kind=parts.cfg.reward)
    blocks = []
    for prompt, rollout in ((p, r) for p, r in zip(prompts, rollouts) if r is not None):
        kl, both = look(parts, prompt, rollout)
        pictures = "".join(map(as_png, both))
        scores = grade(rollout.texts, [prompt.example.answer] * n)
        lines = [
            f"<div><code>{shaded(tokens, kl and kl[g], processors[0])}</code> "
            f"<span class=r>reward {scores[g]['overall']:.1f}</span></div>"
            for g, tokens in enumerate(rollout.tokens)
        ]
        blocks.append(
            f"<div class=p><div>{pictures}</div><div><b>{html.escape(prompt.example.problem)}</b> "
            f"<span class=r>answer: {html.escape(prompt.example.answer)}</span>{''.join(lines)}"
            "</div></div>"
        )
    if parts.processes.first:
        folder = out / "samples"
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"{step:06d}.html", "\n".join(blocks))


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
    a character only together are one text, with their nats added up.

    tokens (n,); kl: a number a token, or None
    """
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


def shaded(tokens, kl, tok):
    """One response as HTML. tokens (n,); kl: a number a token, or None"""
    return "".join(
        f'<span style="--s:{shade:.2f}" title="{nats:.3f} nats">{html.escape(word)}</span>'
        for word, nats, shade in words(tokens, kl, tok)
    )


def as_png(picture):
    """(H, W, 3) uint8 -> an HTML picture, within LARGEST"""
    buffer, image = io.BytesIO(), Image.fromarray(picture.numpy())
    image.thumbnail(LARGEST)
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/png;base64,{data}">'
