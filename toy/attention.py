"""Where a policy's attention goes: the paper's Figure 7 shows examples, here they are counted.

    python -m toy.attention START/POLICY=CHECKPOINT ... --out out/attention.json

A checkpoint answers questions of `vision`. Of all that its responses' tokens attend to, heads
averaged: the share that lies on the picture, layer by layer; and of this, in questions about one of
the four cells, the share on that cell (a quarter, if it is even). Beside it stands KL_prcp.

The rule, written before all but one start was measured: attention to the picture "rises" where the
mean over layers of PAPO_G less GRPO, seeds averaged, has a 95 % interval over warm starts above 0.
"""

import json
from argparse import ArgumentTypeError
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import plumbing  # noqa: F401  before torch: how its threads wait

import torch

from plumbing.base.common import Parser, read_json, write_atomically
from plumbing.data.prompts import encode_all
from plumbing.report.responses import aligned, percent
from plumbing.report.samples import look
from plumbing.run.config import resolve
from plumbing.run.setup import setup
from toy.task import CELL_NAMES


@torch.no_grad()
def on_picture(vlm, prompt, tokens):
    """What predicts each of a response's R tokens -> (layers, R, picture tokens), its attention to
    the picture, averaged over heads. vlm: with eager attention, since others keep no weights"""
    ids = torch.cat([prompt.ids, tokens])[None]
    shown = dict(pixel_values=prompt.pixels, image_grid_thw=prompt.grid)
    layers = torch.cat(vlm(input_ids=ids, output_attentions=True, **shown).attentions).mean(1)
    # (layers, S, S): the prompt's last token predicts the first of the response, whose last none
    return layers[:, len(prompt.ids) - 1 : -1, ids[0] == vlm.config.image_token_id]


def measure(checkpoint, questions, n=2):
    """-> {"layers": shares on the picture, "cell": share of these on the cell that is asked about,
    "kl": KL_prcp}: means over responses of means over tokens"""
    flags = dict(model=checkpoint, data="toy", sampler="hf", algo="papo_g")
    parts = setup(resolve(flags | {"eval_questions": questions}, cuda=False)[0])
    examples, policy = parts.validation["vision"], parts.policy
    prompts = encode_all([examples[i] for i in range(questions)], *parts.processors)
    seeds = [("attention", p.example.id) for p in prompts]
    pairs = [*zip(prompts, parts.sampler.generate(prompts, n, seeds))]
    of_rows = [(x, t) for p, r in pairs for x, t in zip(look(parts, p, r)[0], r.tokens)]
    kl = [fmean(row[: len(tokens)]) for row, tokens in of_rows]
    policy.vlm.set_attn_implementation("eager")
    layers, cell = [], []
    for prompt, tokens in [(p, tokens) for p, rollout in pairs for tokens in rollout.tokens]:
        seen = on_picture(policy.vlm, prompt, tokens).mean(1)  # (layers, picture tokens)
        layers.append(seen.sum(-1))
        about = [i for i, name in enumerate(CELL_NAMES) if name in prompt.example.problem.split()]
        cell += [float(seen[:, i].sum() / seen.sum()) for i in about]  # a token of the picture each
    parts.close()
    shares = torch.stack(layers).mean(0).tolist()
    return {"layers": [round(x, 4) for x in shares], "cell": fmean(cell), "kl": fmean(kl)}


def named(text):
    """START/POLICY=CHECKPOINT -> (START, POLICY, CHECKPOINT)"""
    name, _, checkpoint = text.partition("=")
    if name.count("/") != 1 or not Path(checkpoint).is_dir():
        raise ArgumentTypeError(f"{text}: give START/POLICY=the folder of a checkpoint")
    return *name.split("/"), checkpoint


def main():
    """Measure, print and perhaps keep: {policy: {start: what measure returns}}"""
    p = Parser(__doc__)
    p.add_argument("checkpoints", nargs="+", type=named, metavar="START/POLICY=CHECKPOINT")
    p.add_argument("--questions", type=int, default=64)
    p.add_argument("--out", type=Path, help="the numbers as JSON; what it has is not made again")
    args = p.parse_args()
    found = defaultdict(dict, read_json(args.out) if args.out else {})
    for start, policy, checkpoint in args.checkpoints:
        if start not in found[policy]:
            found[policy][start] = measure(checkpoint, args.questions)
            if args.out:
                write_atomically(args.out, json.dumps(found, indent=1))
    width = len(next(iter(next(iter(found.values())).values()))["layers"])
    rows = [["policy", *(f"layer {i} %" for i in range(width)), "cell %", "KL_prcp", "starts"]]
    for policy, starts in found.items():
        columns = [*zip(*([*s["layers"], s["cell"]] for s in starts.values()))]
        kl = fmean(s["kl"] for s in starts.values())
        rows.append([policy, *(percent(fmean(x)) for x in columns), f"{kl:.3f}", str(len(starts))])
    print("\n".join(aligned(rows)))


if __name__ == "__main__":
    main()
