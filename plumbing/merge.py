"""Make a whole model folder of a checkpoint that holds an adapter (plumbing/models/lora.py).

    python -m plumbing.merge out/qwen2.5-vl-3b-papo_g/checkpoint-202

writes checkpoint-202-merged beside it, or the folder that is named second: the base model with
W + (alpha / r) B A for W, in float32, for eval.py, train.py, transformers and vLLM.
"""

from pathlib import Path
from types import SimpleNamespace

import torch

from plumbing.base.common import Parser, fail, first_line, make_once, read_json
from plumbing.models.lora import CONFIG, PREFIX, WEIGHTS, add_adapters, of_adapter
from plumbing.models.weights import find_model, load_vlm, save_hf
from policy import Policy


def load_adapter(folder):
    """A folder with an adapter -> (Policy of its base model with it, the base's folder). Ends with
    a sentence if the adapter is not plain LoRA of the decoder, or of another model."""
    from safetensors.torch import load_file

    try:
        about = read_json(folder / CONFIG)
        name, rank, alpha = (about[k] for k in ("base_model_name_or_path", "r", "lora_alpha"))
        rank, alpha = int(rank), float(alpha)
    except (TypeError, ValueError, KeyError) as error:
        fail(f"{folder / CONFIG} does not say what to merge ({first_line(error)})")
    others = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
    if other := [setting for setting in others if about.get(setting)]:
        fail(f"{folder / CONFIG}: {other[0]} is not plain LoRA; merge it with peft")
    base = find_model(name)
    vlm = add_adapters(load_vlm(base), SimpleNamespace(lora_rank=rank, lora_alpha=alpha, seed=0))
    try:
        named = {n.removeprefix(PREFIX): w for n, w in load_file(folder / WEIGHTS).items()}
        found = vlm.load_state_dict(named, strict=False)
    except (OSError, RuntimeError, ValueError) as error:  # no file, no safetensors, other shapes
        fail(f"{folder / WEIGHTS} does not fit {base} ({first_line(error)})")
    if wrong := found.unexpected_keys + [*filter(of_adapter, found.missing_keys)]:
        fail(f"{folder / WEIGHTS} has other adapters than {base}; the first is {wrong[0]}")
    return Policy(vlm, torch.zeros(0, dtype=torch.bool)), base


def main():
    """Merge, as asked."""
    p = Parser(__doc__)
    p.add_argument("checkpoint", type=Path, help="a folder with an adapter")
    p.add_argument("out", type=Path, nargs="?", help="default: <checkpoint>-merged")
    args = p.parse_args()
    out = args.out or args.checkpoint.with_name(f"{args.checkpoint.name}-merged")
    if out.exists():
        fail(f"{out} exists already; name another folder")
    policy, base = load_adapter(args.checkpoint)
    make_once(out, lambda folder: save_hf(policy, folder, base, first=True))
    print(f"written: {out}")


if __name__ == "__main__":
    main()
