"""What a model sees of a class, before and after training: Fine-R1's linear probe (arXiv
2602.07605, section 5.4, H1), by which its features hardly change.

    python -m fine_r1.probe out/kinds/base out/kinds-sft/checkpoint-20 \\
        --train out/kinds/train.parquet --test out/kinds/test_seen_open.parquet

Prints how many of the test pictures a linear classifier names right, in per cent. Its input is the
mean over a picture's tokens, as they leave the vision tower, and as they leave the last layer of
the language model, which is what the paper probes. It is a logistic regression with an L2 penalty;
the paper has none, and reports the best epoch on the test pictures.
"""

from functools import partial

import torch

from fine_r1.triplets import labelled
from plumbing.base.common import Parser, fail
from plumbing.base.console import track
from plumbing.data.prompts import encode
from plumbing.data.sources import Rows, opened, without
from plumbing.models.families import family_of
from plumbing.models.weights import load_processors, load_vlm
from plumbing.report.responses import aligned, as_trained, percent
from plumbing.run.config import resolve
from plumbing.run.setup import model_folder

SEEN = ("vision tower", "language model")


@torch.no_grad()
def features(vlm, examples, processors):
    """-> {of SEEN: (n, width)} of the pictures of n examples"""
    found, family = {name: [] for name in SEEN}, family_of(vlm.config)
    for example in track(examples, "looking", "pictures"):
        prompt = encode(example, *processors)
        positions = family.positions(vlm, prompt.ids, prompt.grid)
        tensors = prompt.ids, positions[:, None], prompt.pixels, prompt.grid
        ids, positions, pixels, grid = (x.to(vlm.device) for x in tensors)
        picture = dict(pixel_values=pixels, image_grid_thw=grid)
        tokens = vlm.model.get_image_features(**picture).pooler_output[0]
        last = vlm.model(input_ids=ids[None], position_ids=positions, **picture).last_hidden_state
        for name, x in zip(SEEN, (tokens, last[0][ids == vlm.config.image_token_id])):
            found[name].append(x.float().mean(0).cpu())
    return {name: torch.stack(rows) for name, rows in found.items()}


def probe(x, y, test, truth):
    """A logistic regression on (n, D) and classes (n,) -> its accuracy on (m, D) and (m,).
    Minimises the summed cross-entropy + |W|^2 / 2, on features of mean 0 and variance 1."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, test = (x - mean) / std, (test - mean) / std
    W = torch.zeros(x.shape[1], int(y.max()) + 1, requires_grad=True)
    b = torch.zeros(W.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([W, b], max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        wrong = torch.nn.functional.cross_entropy(x @ W + b, y, reduction="sum")
        total = wrong + W.square().sum() / 2
        total.backward()
        return total

    optimizer.step(loss)
    return ((test @ W + b).argmax(1) == truth).float().mean().item()


def main():
    """Probe each model on the same pictures, and print a line of each."""
    p = Parser(__doc__)
    p.add_argument("models", nargs="+", help="folders or hub names")
    p.add_argument("--train", required=True, help="pictures to learn the classes from, as --data")
    p.add_argument("--test", required=True, help="other pictures of these classes, as --data")
    args, rows = p.parse_args(), [["model", *SEEN]]
    cuda = torch.cuda.is_available()
    for model in args.models:
        folder = model_folder(model)
        cfg, _ = resolve({"model": model, "data": args.train, **as_trained(model)}, cuda)
        processors, sets = load_processors(folder, cfg), []
        for name, split in ((args.train, "train"), (args.test, "test")):
            data = opened(name, partial(Rows, name, split))
            sets.append([*without(data, data.faults(*processors, cfg.max_prompt_tokens))])
        classes = [[labelled(example)[0] for example in examples] for examples in sets]
        known = {name: i for i, name in enumerate(sorted({*classes[0]}))}
        if strange := sorted({*classes[1]} - {*known}):
            fail(f"{args.test} has the class {strange[0]}, which {args.train} has not")
        truths = [torch.tensor([known[name] for name in names]) for names in classes]
        vlm = load_vlm(folder).to("cuda" if cuda else "cpu")
        x, test = (features(vlm, examples, processors) for examples in sets)
        shares = [probe(x[name], truths[0], test[name], truths[1]) for name in SEEN]
        rows.append([str(model), *map(percent, shares)])
    print("\n".join(aligned(rows)))


if __name__ == "__main__":
    main()
