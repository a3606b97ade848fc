"""Train a vision-language model with PAPO. The whole loop is in this file, and every formula is a
call into loss.py or papo.py.

    torchrun train.py --algo papo_g                                 # a laptop: the toy, in minutes
    torchrun --nproc_per_node 2 train.py --algo papo_g --steps 3    # two processes, FSDP2

One step is `train_step` below:

    roll out G responses a prompt -> rule reward -> group advantages -> log-probs of the responses
    on the picture and on the masked picture -> optimiser updates on the objective -> weights back
    to the sampler

Rollouts are small and pictures are not. So the processes exchange all rollouts of a step (token
ids, log-probs, scores), and each reads again the pictures of the prompts it will train on. Then
advantages, dynamic sampling and the denominator are plain local arithmetic on the whole batch, and
nothing depends on the number of processes.
"""

import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import papo
from credit import weigh
from groups import Group, on_own_pictures, prompt_of, sample_groups
from plumbing import checkpoint, report
from plumbing.checkpoint import Progress
from plumbing.common import Clock, fail, stop_requests
from plumbing.config import check, parser, resolve
from plumbing.console import say, track
from plumbing.packing import Packed, my_batches, padded
from plumbing.policy import Joint, Scores, score_only
from plumbing.setup import check_sampler, setup
from plumbing.watch import evaluate, show, watch
from reward import overlong_penalty, score


@dataclass
class MicroBatch:
    """The groups of one forward pass, B of them, and what is known of their tokens beforehand."""

    rows: Packed  # in host memory until it is used
    advantages: torch.Tensor  # (B, G)
    pictured: torch.Tensor  # (B,) bool: has the prompt a picture?
    sampled: torch.Tensor  # (B, G, R) log-probs that the sampler reported
    old: torch.Tensor | None = None  # (B, G, R); None: equal to the current ones
    ref: torch.Tensor | None = None  # (B, G, R); None: no reference
    masked: Scores | None = None  # pi_mask where it is kept for the whole step
    credit: torch.Tensor | None = None  # (B, G, R) weights of the policy term; None: 1


def train_step(parts, progress):
    """One step of the loop, on parts (plumbing.setup.Parts) -> its line of metrics."""
    clock, step = Clock(), progress.step
    parts = replace(parts, cfg=parts.cfg.at_step(step))
    cfg = parts.cfg
    groups, prompts, fate = collect(parts, progress, clock)
    parts.sampler.sleep()
    for group in groups:
        group.advantages = papo.group_advantages(group.rewards)  # (G,)
    size = cfg.prompts_per_update
    shares = [groups[i : i + size] for i in range(0, len(groups), size)]
    with clock("pack"):
        updates = [micro_batches(share, prompts, parts, step) for share in shares]
    score_before(updates, parts, clock)
    totals, norms = {}, []
    with clock("update"):
        for share, batches in zip(shares, updates):
            lengths = [n for group in share for n in group.lengths]
            N = papo.Denominators(max(1, sum(lengths)), max(1, len(lengths)))
            sums, norm, lr = update(batches, N, parts)
            totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
            norms.append(norm)
    with clock("sync"):
        parts.sampler.sync(parts.policy)
    progress.step += 1
    metrics = {"step": progress.step, **report.of_groups(groups), **report.of_totals(totals)}
    skipped = parts.optimiser.skipped
    metrics |= {"grad_norm": sum(norms) / len(norms), "lr": lr, "skipped_updates": skipped}
    metrics |= {"noise_steps": cfg.noise_steps} if cfg.rollout_picture == "noisy" else {}
    metrics |= {"gamma": cfg.gamma, **{f"{name}_prompts": n for name, n in fate.items()}}
    metrics |= {"grading_timeouts": sum(parts.processes.gather([parts.grader.timeouts]))}
    return metrics | report.of_time(clock, groups) | report.memory_gb()


def collect(parts, progress, clock):
    """The groups of one step -> (groups of the whole batch in order, {position: Prompt} of those
    that this process has read, {what became of the prompts rolled out: how many})"""
    processes, prompts = parts.processes, {}

    def draw(n):
        first, progress.cursor = progress.cursor, progress.cursor + n
        now, later = (range(i + processes.rank, i + n, processes.world) for i in (first, first + n))
        with clock("rollout"):
            mine = parts.stream.read(now, later)  # the later ones while the sampler is at work
        prompts.update(mine)
        groups = roll_out(mine, parts, progress.step, clock)
        return sorted(processes.gather(groups), key=lambda g: g.position)

    try:
        groups, fate = papo.fill_batch(draw, parts.cfg)
    except ValueError as error:
        fail(f"step {progress.step + 1}: {error}")
    return groups, prompts, fate


def roll_out(prompts, parts, step, clock):
    """Sample G responses to each of these prompts, and grade them. {position: Prompt} -> [Group],
    without the prompts that the sampler refused"""
    cfg, G = parts.cfg, parts.cfg.group_size
    with clock("rollout"):
        rollouts = sample_groups(prompts, parts, step)
    with clock("reward"):
        done = [(*item, r) for item, r in zip(prompts.items(), rollouts) if r is not None]
        texts = [text for _, _, rollout in done for text in rollout.texts]
        truths = [prompt.example.answer for _, prompt, _ in done for _ in range(G)]
        scores, groups = score(texts, truths, parts.grader, cfg.reward), []
        for i, (position, prompt, r) in enumerate(done):
            lengths = torch.tensor([len(t) for t in r.tokens])
            penalties = overlong_penalty(lengths, cfg.max_response_tokens, cfg.overlong_buffer)
            pairs = zip(scores[i * G : (i + 1) * G], penalties.tolist())
            whole = [s | {"overlong_penalty": penalty} for s, penalty in pairs]
            counted = [finished or not cfg.mask_cut_off for finished in r.finished]
            groups.append(Group(position, len(prompt.ids), r, whole, counted))
    return groups


def micro_batches(groups, prompts, parts, step):
    """This process's share of one update's groups -> [MicroBatch]"""
    cfg, device, batches = parts.cfg, parts.processes.device, []
    if cfg.rollout_picture != "clean" and cfg.update_on == "own":
        groups = on_own_pictures(groups, cfg.second_size)
    lengths = [g.packed_tokens for g in groups]
    shares = my_batches(lengths, parts.processes, cfg.tokens_per_forward)
    for indices in track(shares, "", "passes"):
        chosen = [groups[i] for i in indices]
        read = [prompt_of(g, prompts, parts, step) for g in chosen]
        tokens = [g.rollout.tokens for g in chosen]
        pairs = [zip(g.rollout.tokens, g.counted) for g in chosen]
        scored = [[torch.full((len(t),), counted) for t, counted in pair] for pair in pairs]
        rows = parts.policy.pack(read, tokens, scored)
        if cfg.masked_branch != "off":
            names = [(cfg.seed, "mask", step, g.position) for g in chosen]
            rows.masked_pixels = parts.masker.of_all(read, names)
        sampled = padded([g.rollout.logprobs for g in chosen], rows.scored.shape).to(device)
        advantages = torch.stack([g.advantages for g in chosen]).to(device)
        pictured = torch.tensor([p.grid is not None for p in read], device=device)
        batches.append(MicroBatch(rows, advantages, pictured, sampled))
    return batches


def score_before(updates, parts, clock):
    """What stays as it is while a step's updates change the weights: pi_old, pi_ref, and, as
    released, pi_mask without a gradient; and, from these, the credit of each token."""
    policy, cfg = parts.policy, parts.cfg
    credit = cfg.credit != "none"
    for u, batches in enumerate(updates):
        for batch in track(batches, "scoring", "passes"):
            rows = batch.rows.to(parts.processes.device)
            # At the first update pi_old is pi_theta itself: log_probs detaches it.
            if u > 0 or credit:
                with clock("old"):
                    batch.old = score_only(policy, rows, rows.pixels).logp
            if cfg.masked_branch == "kept" or credit:
                exact = cfg.entropy == "exact"  # the entropy over the whole vocabulary as well
                with clock("masked"):
                    batch.masked = score_only(policy, rows, rows.masked_pixels, exact)
            if parts.reference is not None:
                with clock("reference"):
                    batch.ref = score_only(parts.reference, rows, rows.pixels).logp
        if credit:
            with clock("credit"):
                weigh(batches, parts)


def log_probs(batch, rows, policy, cfg):
    """All log-probs that the objective needs of a micro-batch -> LogProbs

    pi_theta has the current weights, and so has pi_mask where cfg.masked_branch is "fresh". Where
    it is "kept", score_before has scored pi_mask; where it is "off", no term needs it.
    """
    exact, kl = cfg.entropy == "exact", None
    if cfg.masked_branch != "fresh":
        seen, masked = policy(rows, rows.pixels, exact), batch.masked
    elif cfg.perception == "exact":  # KL over the whole vocabulary: both distributions at once
        joint = Joint(rows.masked_pixels, cfg.masked_grad, cfg.kl_clamp)
        seen, masked, kl = policy(rows, rows.pixels, joint=joint)
    else:
        # log pi_theta(o_t | q, I, o_<t), and the same on I_mask.
        seen = policy(rows, rows.pixels, exact)
        masked = policy(rows, rows.masked_pixels, exact, cfg.masked_grad)
    old = seen.logp.detach() if batch.old is None else batch.old
    return papo.LogProbs(seen, old, batch.sampled, masked, batch.ref, kl, batch.credit)


def update(batches, N, parts):
    """One optimiser update over this process's micro-batches -> (sums of the metrics over all
    processes, gradient norm, learning rate)"""
    policy, cfg, totals = parts.policy, parts.cfg, {}
    policy.train()  # for activation checkpointing; there is no dropout
    for i, batch in enumerate(track(batches, "", "passes")):
        parts.optimiser.sync_gradients(policy, now=i == len(batches) - 1)
        rows = batch.rows.to(parts.processes.device)
        said = log_probs(batch, rows, policy, cfg)
        loss, sums = papo.objective(said, batch.advantages, rows.scored, batch.pictured, N, cfg)
        (loss * parts.processes.world).backward()  # FSDP averages over processes; J sums
        totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
    policy.eval()
    return parts.processes.add_up(totals), *parts.optimiser.step(policy)


def train(parts, progress):
    """Steps until the last one, or until the run is asked to stop -> whether it came to the end."""
    cfg, out, processes = parts.cfg, Path(parts.cfg.out), parts.processes
    steps = range(progress.step, cfg.steps)
    say(report.LINE)
    with stop_requests() as asked:
        for _ in track(steps, cfg.algo, "steps", done=progress.step):
            metrics = train_step(parts, progress)
            stop, last = any(processes.gather([bool(asked)])), progress.step == cfg.steps
            watch(parts, metrics, say)
            if last or stop or progress.step % cfg.save_every == 0:
                checkpoint.save(out, asdict(progress), parts)
            if stop and not last:
                return False
    return True


def main():
    """Parse, prepare, train, and show what came out."""
    cuda = torch.cuda.is_available()
    cfg, why = resolve(vars(parser().parse_args()), cuda)
    check(cfg, int(os.environ.get("WORLD_SIZE", 1)), cuda)
    first, out = os.environ.get("RANK", "0") == "0", Path(cfg.out)
    say(report.opening(cfg, why))
    newest = checkpoint.open_folder(out, cfg, say)
    parts = setup(cfg)  # every process has looked at the folder when this returns
    progress = Progress(**checkpoint.restore(newest, parts)) if newest else Progress()
    if first:
        report.write_config(out, cfg)
        report.cut_metrics(out, progress.step)
    check_sampler(parts, say)
    parts.sampler.sync(parts.policy)
    evaluate(parts, "before", say)
    ended = train(parts, progress)
    summaries = evaluate(parts, "after", say) if ended else {}
    parts.close()
    if not ended:
        say(f"stopped after step {progress.step}; continue with the same flags and --resume")
        sys.exit(130)
    if first:
        show(out, summaries, say)


if __name__ == "__main__":
    main()
