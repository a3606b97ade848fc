"""Train a vision-language model with PAPO. The whole loop is in this file; every formula is a call into loss.py or papo.py.

    torchrun train.py --algo papo_g                                    # a laptop: the toy model, in minutes
    torchrun --nproc_per_node 2 train.py --algo papo_g --steps 3       # two processes, FSDP2

One step:  roll out G responses a prompt  ->  rule reward  ->  group advantages  ->  log-probs: old, masked picture, reference
           ->  one or several optimiser updates on the objective of papo.py  ->  weights back to the sampler

Rollouts are small and pictures are not: processes exchange all rollouts of a step (token ids, log-probs, scores), and each reads
again the pictures of the prompts it will train on. So advantages, dynamic sampling and the denominator are plain local
arithmetic on the whole batch, and nothing depends on the number of processes.
"""
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import report
from config import check, fail, parser, resolve
from eval import evaluate_splits, splits_of, table
from model import Scores, score_only
from packing import Packed, batches_within
from papo import Group, fill_batch, group_advantages, objective, overlong_penalty
from reward import boxed
from run import Run


@dataclass
class Micro:
    """One forward pass worth of groups: B of them, and what is known about their tokens before the update."""
    picture: Packed                   # in host memory until it is used
    masked: Packed                    # the same rows on I_mask; only pixel_values differ
    advantages: torch.Tensor          # (B, G)
    sees: torch.Tensor                # (B,) bool: has a picture
    sampled: torch.Tensor             # (B, G, R) log-probs that the sampler reported
    old: torch.Tensor | None = None         # (B, G, R) log-probs that stay as they are during a step; None: equal to the
    ref: torch.Tensor | None = None         #           current ones (old), or not needed (ref, blind)
    blind: Scores | None = None             # the masked branch where it is kept for the whole step


def roll_out(run, step, positions):
    """Sample and score the prompts at these positions of the stream, shared between the processes -> [Group] of all of them,
    but for the prompts that could not be read or were refused by the sampler."""
    cfg = run.cfg
    with run.phase("rollout"):
        prompts = {p: prompt for p in positions[run.rank::run.world] if (prompt := run.readable(p))}
        rollouts = run.sampler.generate([*prompts.values()], cfg.group_size, [(cfg.seed, "sample", step, p) for p in prompts])
    with run.phase("reward"):
        groups = []
        run.grader.grade_all([(boxed(text), prompt.example.answer) for prompt, r in zip(prompts.values(), rollouts) if r for text in r.texts])
        for (p, prompt), r in zip(prompts.items(), rollouts):
            if r is None:
                continue
            late = overlong_penalty(torch.tensor([len(t) for t in r.tokens]), cfg.max_response_tokens, cfg.overlong_buffer)
            scores = [run.score(text, prompt.example.answer) | {"overlong_penalty": x} for text, x in zip(r.texts, late.tolist())]
            groups.append(Group(p, len(prompt.ids), r, scores, [finished or not cfg.mask_cut_off for finished in r.finished]))
    return sorted(run.gather(groups), key=lambda g: g.position)


def collect(run, step):
    """One step's groups -> (groups of the whole batch in order, {what became of the prompts that were rolled out: how many})."""
    def draw(n):
        run.cursor += n
        return roll_out(run, step, range(run.cursor - n, run.cursor))

    try:
        return fill_batch(draw, run.cfg)
    except ValueError as error:
        fail(f"step {step + 1}: {error}")


def micro_batches(run, groups, step):
    """This process's share of one update's groups -> [Micro]"""
    cfg, n, batches = run.cfg, len(groups) // run.world, []
    shares = [groups[r * n:(r + 1) * n] for r in range(run.world)]
    lengths = [[g.packed_tokens for g in share] for share in shares]
    passes = max(len(batches_within(x, cfg.tokens_per_forward)) for x in lengths)       # the same number on every process
    for chosen in batches_within(lengths[run.rank], cfg.tokens_per_forward, passes):
        part = [shares[run.rank][i] for i in chosen]
        prompts = [run.prompt(g.position) for g in part]
        scored = [[torch.full((len(t),), counts) for t, counts in zip(g.rollout.tokens, g.counts)] for g in part]
        packed = run.policy.pack(prompts, [g.rollout.tokens for g in part], scored)
        masked, sees = packed, [p.grid is not None for p in prompts]
        if any(sees) and (cfg.gamma or cfg.eta2):              # I_mask: one draw a prompt, shared by its G responses
            hidden = [run.mask(p, "mask", step, g.position) for p, g in zip(prompts, part)]
            masked = replace(packed, pixel_values=torch.cat([x for x in hidden if x is not None]))
        sampled = torch.zeros(packed.mask.shape)
        for b, g in enumerate(part):
            for row, logprobs in zip(sampled[b], g.rollout.logprobs):
                row[:len(logprobs)] = logprobs
        batches.append(Micro(packed, masked, torch.stack([g.advantages for g in part]).to(run.device),
                             torch.tensor(sees, device=run.device), sampled.to(run.device)))
    return batches


def score_fixed(run, updates):
    """What stays as it is while a step's updates change the weights: old, reference, and the masked branch unless recomputed."""
    cfg = run.cfg
    for u, batches in enumerate(updates):
        for micro in batches:
            if u > 0:                                          # before the first update pi_old is pi_theta itself
                with run.phase("old"):
                    micro.old = score_only(run.policy, micro.picture.to(run.device)).logp
            if (cfg.gamma or cfg.eta2) and not cfg.recompute_masked:
                with run.phase("masked"):
                    micro.blind = score_only(run.policy, micro.masked.to(run.device), exact=cfg.entropy == "exact")
            if run.reference is not None:
                with run.phase("reference"):
                    micro.ref = score_only(run.reference, micro.picture.to(run.device)).logp


def score_current(run, micro):
    """The pass with a gradient -> Scores of the picture, and of the masked picture: this update's or the one that was kept."""
    cfg, fresh = run.cfg, (run.cfg.gamma or run.cfg.eta2) and run.cfg.recompute_masked
    scores = run.policy(micro.picture.to(run.device), micro.masked.to(run.device) if fresh else None, cfg.masked_grad,
                        "exact" in (cfg.entropy, cfg.perception), cfg.kl_clamp)
    if micro.blind is not None:
        scores = scores._replace(masked=micro.blind.logp, masked_entropy=micro.blind.entropy)
    return scores


def update(run, batches, total_tokens, total_responses):
    """One optimiser update over this process's micro-batches -> (sums over all processes, gradient norm, learning rate)."""
    cfg, totals = run.cfg, {}
    run.policy.train()                                                           # for activation checkpointing; there is no dropout
    for i, micro in enumerate(batches):
        run.sync_gradients(i == len(batches) - 1)
        scores, mask = score_current(run, micro), micro.picture.mask.to(run.device)
        old = scores.logp.detach() if micro.old is None else micro.old
        loss, sums = objective(scores, old, micro.ref, micro.sampled, micro.advantages, mask, micro.sees, total_tokens, total_responses, cfg)
        (loss * run.world).backward()                                            # FSDP averages over processes; J sums
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value.double()
    run.policy.eval()
    names = sorted(totals)
    stacked = torch.stack([totals[n] for n in names])
    if run.world > 1:
        dist.all_reduce(stacked)
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), cfg.max_grad_norm)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
    lr = cfg.lr * min(1.0, (run.updates + 1) / max(1, cfg.warmup_updates))       # never 0, not even at first
    if math.isfinite(norm):
        for group in run.optimiser.param_groups:
            group["lr"] = lr
        run.optimiser.step()
    else:
        run.skipped += 1
        tqdm.write(f"warning: gradient norm is {norm}; update {run.updates + 1} is skipped ({run.skipped} so far)")
    run.optimiser.zero_grad()
    run.updates += 1
    return dict(zip(names, stacked.tolist())), norm, lr


def train_step(run, step):
    """One step of the loop at the top of this file -> its line of metrics."""
    cfg, began, totals, norms = run.cfg, time.perf_counter(), {}, []
    run.seconds, run.prompts = {}, {}
    groups, fate = collect(run, step)
    run.sampler.sleep()
    run.prompts = {g.position: run.prompts[g.position] for g in groups if g.position in run.prompts}     # not those thrown away
    for group in groups:
        group.advantages = group_advantages(group.rewards)                       # (G,)
    slices = [groups[i:i + cfg.prompts_per_update] for i in range(0, len(groups), cfg.prompts_per_update)]
    with run.phase("pack"):
        updates = [micro_batches(run, s, step) for s in slices]
    score_fixed(run, updates)
    with run.phase("update"):
        for s, batches in zip(slices, updates):
            lengths = [n for g in s for n in g.lengths]                          # of the whole update, all processes
            sums, norm, lr = update(run, batches, max(1, sum(lengths)), max(1, len(lengths)))
            totals = {k: totals.get(k, 0.0) + v for k, v in sums.items()}
            norms.append(norm)
    with run.phase("sync"):
        run.sampler.sync(run.policy)
    optimiser = {"grad_norm": sum(norms) / len(norms), "lr": lr}
    return report.step_line(run, step + 1, groups, fate, totals, optimiser, time.perf_counter() - began)


def main():
    """Parse, prepare, train, and show what came out."""
    cfg, why = resolve(vars(parser().parse_args()), torch.cuda.is_available())
    check(cfg, int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.is_available())
    first = int(os.environ.get("RANK", 0)) == 0
    say = tqdm.write if first else (lambda *_: None)
    say(f"model {cfg.model} ({why['model']}), data {cfg.data}, validation on {cfg.val_data or 'nothing (--val_data)'}, algorithm {cfg.algo}, output {cfg.out}")
    say(f"sampler {cfg.sampler} ({why['sampler']}), temperature {cfg.temperature}, top_p {cfg.top_p}"
        + ("" if cfg.top_p == 1 else ": responses come from the nucleus, log-probs and ratios are those of the whole distribution"))
    out = Path(cfg.out)
    newest = checkpoint.open_folder(out, cfg)
    run = Run(cfg)                                             # every process has looked at the folder when this returns
    start = checkpoint.restore(run, newest) if newest else 0
    if first:
        report.write_config(out, cfg)
        report.cut_metrics(out, start)
    gap = run.check_sync()
    if gap is not None:
        say(f"weights reach the sampler: with every sign turned, log-probs differ by {gap:.1e} nats a token from the trainer's")
    run.sampler.sync(run.policy)
    before = out / "evaluation.json"
    if cfg.val_data and not before.exists():
        summaries = {"before": evaluate_splits(run, splits_of(cfg.val_data), cfg.eval_n, "test")}
        say("\n".join(["accuracy before training:", *table(summaries["before"])]))
        if first:
            report.write_atomically(before, json.dumps(summaries, indent=1))
    stop = []
    handlers = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}   # torchrun sends both
    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc=cfg.algo, unit="step", disable=not first)
    for step in bar:
        metrics = train_step(run, step)
        last, asked_to_stop = step + 1 == cfg.steps, any(run.gather([bool(stop)]))
        if cfg.val_data and cfg.eval_every and ((step + 1) % cfg.eval_every == 0 or last):
            began = time.perf_counter()
            metrics["val_accuracy"] = evaluate_splits(run, [run.val_split], 2, "val")[run.val_split]["accuracy"]
            report.samples(run, out, step + 1)
            metrics["val_seconds"] = time.perf_counter() - began
        say(report.console_line(metrics, cfg.steps))
        if first:
            report.log(out, metrics)
            report.curves(out) if "val_accuracy" in metrics else None
            for line in report.collapse_warnings(report.read_metrics(out)) if cfg.gamma else []:
                say(line)
        if last or asked_to_stop or (step + 1) % cfg.save_every == 0:
            checkpoint.save(run, step + 1)
        if asked_to_stop and not last:
            say(f"stopped after step {step + 1}; continue with the same flags and --resume")
            run.close()
            sys.exit(130)
    for name, handler in handlers.items():
        signal.signal(name, handler)
    if cfg.val_data:
        summaries = {**json.loads(before.read_text()), "after": evaluate_splits(run, splits_of(cfg.val_data), cfg.eval_n, "test")}
    run.close()
    if first:
        report.curves(out)
        if cfg.val_data:
            report.write_atomically(before, json.dumps(summaries, indent=1))
            say("\n".join(report.before_after(summaries)))
        say("written: " + ", ".join(str(p) for p in sorted(out.iterdir()) if not p.name.startswith(".")))


if __name__ == "__main__":
    main()
