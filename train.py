"""Train a vision-language model with PAPO. The whole loop is in this file, and every formula is a
call into loss.py or papo.py.

    torchrun train.py --algo papo_g                                 # a laptop: the toy, in minutes
    torchrun --nproc_per_node 2 train.py --algo papo_g --steps 3    # two processes, FSDP2

One step is `train_step` below:

    roll out G responses a prompt -> rule reward -> group advantages -> log-probs of the responses
    on the picture and on the masked picture -> optimizer updates on the objective -> weights back
    to the sampler

Rollouts are small and pictures are not. So the processes exchange all rollouts of a step (token
ids, log-probs, scores), and each reads the pictures of those of its prompts that another one drew.
Then advantages, dynamic sampling and the denominator are plain local arithmetic on the whole batch,
and nothing depends on the number of processes.
"""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import plumbing  # noqa: F401  before torch: how its threads wait

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import papo
import toy.task  # noqa: F401  registers the data set "toy"
from eval import evaluate_splits
from plumbing.base.common import Clock, fail
from plumbing.base.console import say, track
from plumbing.data.prompts import Prompt
from plumbing.models.packing import Packed, my_batches, padded
from plumbing.report import record
from plumbing.report.loop import begin, take_steps
from plumbing.report.watch import measure, measure_all, show_run, show_step
from plumbing.run.checkpoint import Progress
from plumbing.run.config import Config, parser, resolve
from plumbing.run.hooks import sample_on_two, second_prompt, with_token_weights
from plumbing.run.setup import Parts, check_sampler, setup
from policy import Scores, score_only
from reward import score
from rollout import Group


class MicroBatch(NamedTuple):
    """The groups of one forward pass, B of them, and what is known of them without the model."""

    rows: Packed  # in host memory until it is used
    advantages: Tensor  # (B, G)
    pictured: Tensor  # (B,) bool: has the prompt a picture?
    sampled: Tensor  # (B, G, R) log-probs that the sampler reported


class Fixed(NamedTuple):
    """What stays as it is for a micro-batch while a step's updates change the weights."""

    old: Tensor | None  # (B, G, R) pi_old; None: equal to the current policy
    masked: Scores | None  # pi_mask, where it is kept for the step, or token weights need it
    ref: Tensor | None  # (B, G, R) pi_ref; None: no reference
    weights: Tensor | None = None  # (B, G, R) of the policy term; None: 1


def train_step(parts: Parts, progress: Progress) -> dict:
    """One step of the loop, on parts (plumbing.run.setup.Parts) -> its line of metrics"""
    clock, step = Clock(), progress.step
    parts = replace(parts, cfg=parts.cfg.at_step(step))
    cfg = parts.cfg
    groups, prompts, counts = collect(parts, progress, clock)
    parts.sampler.sleep()
    size = cfg.prompts_per_update
    shares = [groups[i : i + size] for i in range(0, len(groups), size)]
    with clock("pack"):
        updates = [micro_batches(share, prompts, parts, step) for share in shares]
    fixed = [score_before(batches, u > 0, parts, clock) for u, batches in enumerate(updates)]
    totals: dict[str, Tensor] = {}
    norms = []
    with clock("update"):
        for share, batches, known in zip(shares, updates, fixed):
            lengths = [n for group in share for n in group.lengths]
            N = papo.Denominators(sum(lengths), len(lengths))
            sums, norm, lr = update(list(zip(batches, known)), N, parts)
            totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
            norms.append(norm)
    with clock("sync"):
        parts.sampler.sync(parts.policy)
    progress.step += 1
    metrics = {"step": progress.step, **record.of_groups(groups), **record.of_totals(totals)}
    skipped = parts.optimizer.skipped
    metrics |= {"grad_norm": sum(norms) / len(norms), "lr": lr, "skipped_updates": skipped}
    metrics |= cfg.scheduled() | {f"{name}_prompts": n for name, n in counts.items()}
    metrics |= {"grading_timeouts": sum(parts.processes.gather([parts.grader.timeouts]))}
    return metrics | record.of_time(clock, groups) | record.memory_gb()


def collect(parts: Parts, progress: Progress, clock: Clock):
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
        groups, counts = papo.fill_batch(draw, parts.cfg)
    except ValueError as error:
        fail(f"step {progress.step + 1}: {error}")
    return groups, prompts, counts


def roll_out(prompts: dict[int, Prompt], parts: Parts, step: int, clock: Clock) -> list[Group]:
    """Sample G responses to each of these prompts, grade them, and compare them within the group.
    {position: Prompt} -> [Group], without the prompts that the sampler refused"""
    cfg, G, groups = parts.cfg, parts.cfg.group_size, []
    seeds = [(cfg.seed, "sample", step, position) for position in prompts]
    with clock("rollout"):
        if cfg.second_size:  # of a variant
            rollouts = sample_on_two(prompts, parts, step)
        else:
            rollouts = parts.sampler.generate([*prompts.values()], G, seeds)
    with clock("reward"):
        done = [(*item, r) for item, r in zip(prompts.items(), rollouts) if r is not None]
        texts = [text for _, _, rollout in done for text in rollout.texts]
        truths = [prompt.example.answer for _, prompt, _ in done for _ in range(G)]
        scores = score(texts, truths, parts.grader, cfg.reward)
        for i, (position, prompt, r) in enumerate(done):
            graded = scores[i * G : (i + 1) * G]
            rewards = torch.tensor([s["overall"] for s in graded])  # (G,)
            advantages = papo.group_advantages(rewards)  # (G,)
            groups.append(Group(position, len(prompt.ids), r, graded, advantages))
    return cfg.weigh(groups, prompts, parts, step)


def micro_batches(groups: list[Group], prompts: dict, parts: Parts, step: int) -> list[MicroBatch]:
    """This process's share of one update's groups, as forward passes. prompts: those read so far"""
    cfg, device, batches = parts.cfg, parts.processes.device, []
    groups = cfg.regroup(groups)
    lengths = [g.prompt_tokens + sum(g.lengths) for g in groups]
    passes = my_batches(lengths, parts.processes, cfg.tokens_per_forward, parts.policy.flat)
    for indices in track(passes, "", "passes"):
        chosen = [groups[i] for i in indices]
        read = []
        for g in chosen:
            prompt = prompts.get(g.position) or parts.stream[g.position]
            read.append(second_prompt(prompt, g.position, parts, step) if g.second else prompt)
        rows = parts.policy.pack(read, [g.rollout.tokens for g in chosen])
        if cfg.needs_masked:
            seeds = [(cfg.seed, "mask", step, g.position) for g in chosen]
            rows = replace(rows, masked_pixels=parts.masker.of_all(read, seeds))
        sampled = padded([g.rollout.logprobs for g in chosen], rows.scored.shape).to(device)
        advantages = pad_sequence([g.advantages for g in chosen], batch_first=True).to(device)
        pictured = torch.tensor([p.grid is not None for p in read], device=device)
        batches.append(MicroBatch(rows, advantages, pictured, sampled))
    return batches


def score_before(batches: list, updated: bool, parts: Parts, clock: Clock) -> list[Fixed]:
    """What the updates of this step leave as it is: pi_old, pi_ref, and, as released, pi_mask
    without a gradient; and, from these, a variant's token weights.

    updated: an update comes before this one in the step; without one pi_old is pi_theta itself
    """
    policy, cfg, fixed = parts.policy, parts.cfg, []
    for batch in track(batches, "scoring", "passes"):
        rows = batch.rows.to(parts.processes.device)
        old = masked = ref = None
        if updated or cfg.token_weights:
            with clock("old"):
                old = score_only(policy, rows, rows.pixels).logp
        if cfg.needs_masked and (cfg.token_weights or not cfg.fresh_masked):
            with clock("masked"):
                masked = score_only(policy, rows, rows.masked_pixels, cfg.entropy == "exact")
        if parts.reference is not None:
            with clock("reference"):
                ref = score_only(parts.reference, rows, rows.pixels).logp
        fixed.append(Fixed(old, masked, ref))
    return with_token_weights(batches, fixed, parts) if cfg.token_weights else fixed


def log_probs(batch: MicroBatch, known: Fixed, rows: Packed, parts: Parts) -> papo.LogProbs:
    """All log-probs that the objective needs of a micro-batch.

    pi_theta has the current weights, and so has pi_mask with --masked_branch fresh or grad; as
    released it is kept from before the step's updates.
    """
    policy, cfg, kl = parts.policy, parts.cfg, None
    exact, masked = cfg.entropy == "exact", known.masked
    seen = policy(rows, rows.pixels, exact)  # log pi_theta(o_t | q, I, o_<t)
    if cfg.fresh_masked:  # log pi_mask(o_t | q, I_mask, o_<t)
        masked = policy(rows, rows.masked_pixels, exact, grad=cfg.masked_branch == "grad")
        if cfg.perception == "exact":
            kl = policy.exact_kl(seen, masked, rows.scored, cfg.kl_clamp)
    old = seen.logp.detach() if known.old is None else known.old
    return papo.LogProbs(seen, old, batch.sampled, masked, known.ref, kl, known.weights)


def update(pairs: list[tuple[MicroBatch, Fixed]], N: papo.Denominators, parts: Parts):
    """One optimizer update over this process's micro-batches -> (sums of the metrics over all
    processes, gradient norm, learning rate)"""
    policy, cfg = parts.policy, parts.cfg
    totals: dict[str, Tensor] = {}
    policy.train()  # for activation checkpointing; there is no dropout
    for i, (batch, known) in enumerate(track(pairs, "", "passes")):
        parts.optimizer.sync_gradients(policy, now=i == len(pairs) - 1)
        rows = batch.rows.to(parts.processes.device)
        logprobs = log_probs(batch, known, rows, parts)
        with_picture = rows.scored & batch.pictured[:, None, None]
        terms = papo.terms_of(logprobs, batch.advantages, with_picture, cfg)
        loss = papo.objective(terms, rows.scored, N, cfg)
        (loss * parts.processes.world).backward()  # FSDP averages over processes; J sums
        sums = papo.metrics_of(terms, logprobs, rows.scored, with_picture)
        # The loss is a sum over tokens divided by N. Times N.tokens, it is averaged as the others.
        count = rows.scored.sum().double()
        sums["loss"] = torch.stack([(loss.detach() * N.tokens).double(), count])
        totals = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
    policy.eval()
    return parts.processes.add_up(totals), *parts.optimizer.step(policy)


def main(settings: type[Config] = Config) -> None:
    """Parse, prepare, train, and show what came out. settings: a variant's own subclass"""
    cuda = torch.cuda.is_available()
    flags = vars(parser(settings).parse_args())
    only_print = flags.pop("print_config", False)
    cfg, origin = resolve(flags, cuda, settings)
    if only_print:
        return print("\n".join(record.settings_table(cfg, origin)))
    cfg.check(int(os.environ.get("WORLD_SIZE", 1)), cuda)
    say(record.opening(cfg, origin))
    parts, progress = begin(cfg, setup)
    check_sampler(parts, say)
    parts.sampler.sync(parts.policy)
    measure_all(parts, "before", evaluate_splits)
    validate = partial(measure, evaluate_splits=evaluate_splits)
    take_steps(parts, progress, train_step, validate, show_step)
    summaries = measure_all(parts, "after", evaluate_splits)
    parts.close()
    if parts.processes.first:
        show_run(Path(cfg.out), summaries)


if __name__ == "__main__":
    main()
