"""Make a whole model folder of a checkpoint that holds an adapter (plumbing/lora.py).

    python -m plumbing.merge out/qwen2.5-vl-3b-papo_g/checkpoint-202

writes checkpoint-202-merged beside it, or the folder that is named second: the base model with
W + (alpha / r) B A for W, in float32, for eval.py, train.py, transformers and vLLM.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch

from plumbing.common import Parser, fail, first_line
from plumbing.lora import CONFIG, PREFIX, WEIGHTS, add_adapters, of_adapter
from plumbing.policy import Policy, find_model, load_vlm, save_hf

PLAIN = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")


def load_adapter(folder):
    """A folder with an adapter -> (Policy of its base model with the adapter, the base's folder).

    Ends with a sentence if the adapter is none of this project's, or of another model.
    """
    from safetensors.torch import load_file

    if not (folder / CONFIG).exists():
        fail(f"{folder} holds no adapter: there is no {CONFIG}")
    try:
        about = json.loads((folder / CONFIG).read_text())
        name, rank, alpha = (about[k] for k in ("base_model_name_or_path", "r", "lora_alpha"))
    except (OSError, ValueError, KeyError) as error:
        fail(f"{folder / CONFIG} does not say what to merge ({first_line(error)})")
    if other := [setting for setting in PLAIN if about.get(setting)]:
        fail(f"{folder / CONFIG}: {other[0]} is not plain LoRA; merge it with peft")
    base = find_model(name)
    kind = SimpleNamespace(lora_rank=rank, lora_alpha=alpha, seed=0)
    vlm = add_adapters(load_vlm(base), kind)
    try:
        weights = load_file(folder / WEIGHTS)
        named = {name.removeprefix(PREFIX): w for name, w in weights.items()}
        found = vlm.load_state_dict(named, strict=False)
    except (OSError, RuntimeError, ValueError) as error:  # no file, no safetensors, other shapes
        fail(f"{folder / WEIGHTS} does not fit {base} ({first_line(error)})")
    if wrong := found.unexpected_keys + [*filter(of_adapter, found.missing_keys)]:
        fail(f"{folder / WEIGHTS} has other adapters than {base}; the first is {wrong[0]}")
    return Policy(vlm, torch.zeros(0, dtype=torch.bool)), base


def merge(folder, out):
    """The base model with the folder's adapter merged into it, as a whole model folder."""
    if out.exists():
        fail(f"{out} exists already; name another folder")
    policy, base = load_adapter(folder)
    making = out.with_name(f".making-{out.name}")
    shutil.rmtree(making, ignore_errors=True)  # of a merge that was stopped
    making.mkdir(parents=True)
    save_hf(policy, making, base, first=True)
    making.rename(out)


def main():
    """Merge, as asked."""
    p = Parser(__doc__)
    p.add_argument("checkpoint", type=Path, help="a folder with an adapter")
    p.add_argument("out", type=Path, nargs="?", help="default: <checkpoint>-merged")
    args = p.parse_args()
    out = args.out or args.checkpoint.with_name(f"{args.checkpoint.name}-merged")
    merge(args.checkpoint, out)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
