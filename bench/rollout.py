"""Roll out and sync, timed.

    python bench/rollout.py                                           # the toy model on a CPU
    python bench/rollout.py --shape qwen2.5-vl-3b --prompts 64 --group 5 --tokens 512 \\
        --pixels 401408

Every response runs to --tokens (EOS is banned), so that runs are comparable. The first round, which
compiles and warms up, is not counted. Prints a small table and one JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace

import torch
from shapes import SHAPES, build, prompts  # puts the project on the path

from plumbing.config import default_sampler, resolve
from plumbing.engine import build_sampler
from plumbing.policy import Policy, banned_tokens, load_processors, load_vlm


def main():
    """Build, warm up, measure."""
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--shape", choices=SHAPES, default="toy")
    p.add_argument("--sampler", choices=["vllm", "hf"], default=default_sampler(cuda)[0])
    p.add_argument(
        "--folder", help="where the model is written, and found again; default: a temporary folder"
    )
    for name, default, text in [
        ("prompts", 16, "prompts per round"),
        ("group", 8, "G, responses per prompt"),
        ("tokens", 48, "tokens per response"),
        ("pixels", 7056, "of each picture"),
        ("words", 28, "tokens of text per prompt"),
        ("rounds", 5, "timed rounds"),
    ]:
        p.add_argument(f"--{name}", type=int, default=default, help=text)
    args = p.parse_args()
    device = "cuda" if cuda else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        folder = build(args.shape, args.folder or scratch, device)
        cfg, _ = resolve(
            {
                "model": str(folder),
                "data": "toy",
                "sampler": args.sampler,
                "dtype": "bfloat16" if cuda else "float32",
                "sleep": 0,
                "max_response_tokens": args.tokens,
                "max_pixels": 1280 * 28 * 28,
            },
            cuda,
        )
        tok, image_processor = processors = load_processors(folder, cfg)
        batch = prompts(args.prompts, args.pixels, args.words, tok, image_processor)
        cfg = replace(cfg, max_prompt_tokens=max(len(p.ids) for p in batch))
        banned = banned_tokens(folder, tok)
        banned[tok.eos_token_id] = True
        vlm = load_vlm(folder, torch.bfloat16 if cuda else torch.float32).to(device)
        policy = Policy(vlm, banned.to(device))
        sampler = build_sampler(cfg, folder, policy.vlm, processors, banned)
        seconds = {"roll out": [], "sync": []}

        def roll_out(r):
            sampler.generate(batch, args.group, [("bench", r, i) for i in range(len(batch))])

        def sync(r):
            sampler.sync(policy)

        for r in range(args.rounds + 1):
            for what, work in [("roll out", roll_out), ("sync", sync)]:
                start = time.perf_counter()
                work(r)
                if cuda:
                    torch.cuda.synchronize()
                if r:
                    seconds[what].append(time.perf_counter() - start)
        sampler.close()
    responses = args.prompts * args.group
    median = {k: statistics.median(v) for k, v in seconds.items()}
    where = torch.cuda.get_device_name() if cuda else "CPU"
    print(
        f"{args.shape}, {args.sampler}, {where}: {args.prompts} prompts of {len(batch[0].ids)} "
        f"tokens, {responses} responses of {args.tokens} tokens"
    )
    for what, times in seconds.items():
        span = f"{min(times):.3f} .. {max(times):.3f} over {args.rounds} rounds"
        print(f"{what:<10}{median[what]:>9.3f} s   ({span})")
    rates = {
        "responses_per_second": responses / median["roll out"],
        "tokens_per_second": responses * args.tokens / median["roll out"],
    }
    print(json.dumps({**vars(args), "seconds": median, **rates}))


if __name__ == "__main__":
    main()
