"""Supervised fine-tuning on chains of thought: what comes before reinforcement learning.

    torchrun sft.py --model Qwen/Qwen2.5-VL-3B-Instruct --data rows.json    # Fine-R1's stage 1
    torchrun sft.py --data toy                                              # a laptop: the toy

Reinforcement learning makes likelier what the policy already does now and then. Where it never
looks, compares and concludes, no group of responses holds one to reward. So a few hundred written
chains of thought are learned first, word for word; Fine-R1 (arXiv 2602.07605) learns 404 of them,
each ten times. The policy that comes out is what train.py starts from:

    torchrun train.py --algo papo_g --model out/qwen2.5-vl-3b-sft/checkpoint-70

The loss is the mean of -log pi over the N tokens of the assistant's in the batch, whichever process
reads them:

    L = - 1/N sum_t log pi(o_t | q, I, o_<t)

What the assistant says counts, the end of a turn included, or the policy would never learn to stop.
What the system, the user and the chat template say does not. A conversation of the toy's:

    user  <image> what shape is at a1 ?      assistant  circle

    text      start user [ img ] what shape is at a1 ? end start assistant | circle end
    ids         1    8   3  5  4  29    31  32 33 50 15 2    1       9     |   54    2
    scored      .    .   .  .  .   .     .   .  .  .  . .    .       .     |    x    x

The two scored tokens are predicted by the token to the left of each. In a conversation of several
turns the next user's words follow, unscored, and then the assistant's again. The rows are those of
reinforcement learning (plumbing/packing.py): a prompt, then what was said to it, in which the
template writes each turn as it would for a sampled response (plumbing/conversations.py).
"""

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from plumbing import checkpoint, report
from plumbing.checkpoint import Progress
from plumbing.common import Clock, stop_requests, write_atomically
from plumbing.config import check_knobs, parser
from plumbing.console import say, track
from plumbing.conversations import by_prompt
from plumbing.packing import my_batches
from plumbing.policy import score_only
from plumbing.supervised import SFT, SftConfig, resolve, setup


def update(batches, N, policy, optimiser, processes):
    """One optimiser update on this process's packed rows, a list of passes -> (loss, gradient norm,
    learning rate)

    N: scored tokens of all processes' rows together. The same for every way to share rows out.
    """
    total = 0.0
    policy.train()  # for activation checkpointing; there is no dropout
    for i, rows in enumerate(track(batches, "", "passes")):
        optimiser.sync_gradients(policy, now=i == len(batches) - 1)
        rows = rows.to(processes.device)
        # L = - 1/N sum_t log pi(o_t | q, I, o_<t), of which this is the sum over one pass's tokens.
        loss = -policy(rows, rows.pixels).logp.sum() / N
        (loss * processes.world).backward()  # FSDP averages over processes; L sums
        total = total + loss.detach()
    policy.eval()
    return processes.add_up({"loss": total})["loss"].item(), *optimiser.step(policy)


def passes(positions, stream, parts):
    """The conversations at these positions of a stream -> (this process's share of them as packed
    rows, a list of forward passes; scored tokens of all; how many could not be read)

    Each process reads a share, and all know of all of them how long they are.
    """
    processes = parts.processes
    share = -(-len(positions) // processes.world)
    mine = stream.read(positions[processes.rank * share :][:share])
    sizes = [(p, len(c.prompt.ids) + len(c.tokens), c.scored.sum().item()) for p, c in mine.items()]
    known = processes.gather(sizes)
    # Every process needs equally many, so the first may come again; it counts only once.
    everyone, batches = known + known[:1] * (-len(known) % processes.world), []
    lengths = [length for _, length, _ in everyone]
    for indices in my_batches(lengths, processes, parts.cfg.tokens_per_forward) if known else []:
        chosen = []
        for i in indices:
            position = everyone[i][0]
            one = mine.get(position) or stream[position]
            counts = torch.full_like(one.scored, i < len(known))
            chosen.append(replace(one, scored=one.scored & counts))
        batches.append(pack(chosen, parts.policy))
    return batches, sum(n for _, _, n in known), len(positions) - len(known)


def pack(conversations, policy):
    """Conversations -> Packed; those that share a prompt share a row, as the responses of a group
    do."""
    groups = by_prompt(conversations, policy.vlm.config.image_token_id)
    tokens = [[c.tokens for c in group] for group in groups]
    scored = [[c.scored for c in group] for group in groups]
    return policy.pack([group[0].prompt for group in groups], tokens, scored)


def train_step(parts, progress):
    """One update, on parts (plumbing.supervised.Parts) -> its line of metrics. An epoch is every
    conversation once; its last update has what is left."""
    clock, n, size = Clock(), len(parts.stream.examples), parts.cfg.prompts_per_update
    epoch, k = divmod(progress.step, parts.updates_per_epoch)
    positions = range(epoch * n + k * size, min(epoch * n + (k + 1) * size, (epoch + 1) * n))
    with clock("read"):
        batches, N, lost = passes(positions, parts.stream, parts)
    metrics = {}
    with clock("update"):
        if batches:  # there are none where not one conversation could be read
            learned = update(batches, N, parts.policy, parts.optimiser, parts.processes)
            metrics = dict(zip(("loss", "grad_norm", "lr"), learned))
    progress.step, progress.cursor = progress.step + 1, positions.stop
    metrics = {"step": progress.step, "epoch": positions.stop / n, **metrics, "tokens": N}
    metrics |= {"left_out": lost, "skipped_updates": parts.optimiser.skipped}
    return metrics | report.seconds(clock) | report.memory_gb()


def validate(parts):
    """The same mean of -log pi, over the assistant's tokens of --val_data, without a gradient."""
    cfg, policy, processes = parts.cfg, parts.policy, parts.processes
    n, size = min(len(parts.validation.examples), cfg.eval_questions), cfg.prompts_per_update
    total, N = torch.zeros((), device=processes.device), 0
    for start in track(range(0, n, size), "validation", f"x {size} conversations"):
        positions = range(start, min(start + size, n))
        batches, tokens, _ = passes(positions, parts.validation, parts)
        N += tokens
        for rows in batches:
            rows = rows.to(processes.device)
            total -= score_only(policy, rows, rows.pixels).logp.sum()
    return processes.add_up({"loss": total})["loss"].item() / max(1, N)


def watch(parts, metrics, say):
    """Validate where it is time to, and show what a step's metrics are."""
    cfg, step, last = parts.cfg, metrics["step"], metrics["step"] == parts.steps
    if cfg.val_data and (last or cfg.eval_every and step % cfg.eval_every == 0):
        metrics["val_loss"] = validate(parts)
    shown = [
        f"{k} {metrics[k]:.4g}" for k in ("loss", "val_loss", "grad_norm", "lr") if k in metrics
    ]
    say("  ".join([f"step {step}/{parts.steps}", *shown, f"{metrics['seconds']:.1f} s"]))
    if parts.processes.first:
        report.log(Path(cfg.out), metrics, parts.log)
        if last or step % cfg.save_every == 0:
            report.write_page(Path(cfg.out))


def train(parts, progress):
    """Steps until the last one, or until the run is asked to stop -> whether it came to the end."""
    cfg, processes = parts.cfg, parts.processes
    steps = range(progress.step, parts.steps)
    with stop_requests() as asked:
        for _ in track(steps, "sft", "steps", done=progress.step):
            watch(parts, train_step(parts, progress), say)
            stop, last = any(processes.gather([bool(asked)])), progress.step == parts.steps
            if last or stop or progress.step % cfg.save_every == 0:
                checkpoint.save(Path(cfg.out), asdict(progress), parts)
            if stop and not last:
                return False
    return True


def main():
    """Parse, prepare, train, and show what came out."""
    cuda = torch.cuda.is_available()
    cfg = resolve(vars(parser(SftConfig, SFT).parse_args()), cuda)
    check_knobs(cfg, cuda)
    first, out = os.environ.get("RANK", "0") == "0", Path(cfg.out)
    say(f"model {cfg.model}, data {cfg.data}, recipe {cfg.recipe}, output {out}")
    newest = checkpoint.open_folder(out, cfg, say)
    parts = setup(cfg)  # every process has looked at the folder when this returns
    progress = Progress(**checkpoint.restore(newest, parts)) if newest else Progress()
    if first:
        report.write_config(out, cfg)
        report.cut_metrics(out, progress.step)
    file = out / "evaluation.json"
    if cfg.val_data and progress.step == 0:
        before = validate(parts)
        say(f"validation loss before training: {before:.4f}")
        if first:
            write_atomically(file, json.dumps({"before": before}))
    ended = train(parts, progress)
    parts.close()
    if not ended:
        say(f"stopped after step {progress.step}; continue with the same flags and --resume")
        sys.exit(130)
    if cfg.val_data and first:
        losses = json.loads(file.read_text()) | {"after": report.read_metrics(out)[-1]["val_loss"]}
        write_atomically(file, json.dumps(losses))
        report.write_page(out)
        say(f"validation loss before {losses['before']:.4f}, after {losses['after']:.4f}")
    say(f"written: {out / f'checkpoint-{progress.step}'}; train.py --model goes on from there")


if __name__ == "__main__":
    main()
