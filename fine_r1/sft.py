"""Supervised fine-tuning on chains of thought: what comes before reinforcement learning.

    torchrun fine_r1/sft.py --model Qwen/Qwen2.5-VL-3B-Instruct --data rows.json  # 4 H100s
    torchrun fine_r1/sft.py                                                       # a laptop: a toy

The loss is the mean of -log pi over the N tokens of the assistant's in the batch, whichever process
reads them: L = - 1/N sum_t log pi(o_t | q, I, o_<t)

What the assistant says counts, the end of a turn included, or the policy would never learn to stop.
What the system, the user and the chat template say does not. A conversation of the toy's:

    user  <image> what shape is at a1 ?      assistant  circle

    text      start user [ img ] what shape is at a1 ? end start assistant | circle end
    ids         1    8   3  5  4  29    31  32 33 50 15 2    1       9     |   54    2
    scored      .    .   .  .  .   .     .   .  .  .  . .    .       .     |    x    x

More turns follow in the same way. Rows and loop are those of reinforcement learning, with what was
said in the place of a sampled response (plumbing/models/packing.py, plumbing/report/loop.py).
"""

import json
import math
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import plumbing  # noqa: F401  before torch: how its threads wait

import torch

import toy.task  # noqa: F401  registers the data set "toy"
from fine_r1.conversations import encode_conversation, open_conversations
from plumbing.base.common import Clock, fail, read_json, write_atomically
from plumbing.base.console import doing, say, track
from plumbing.base.logs import open_log
from plumbing.base.optimizer import Optimizer, cosine
from plumbing.base.processes import Processes
from plumbing.data.prompts import Stream
from plumbing.data.sources import usable, validation_split, warn_of_shared_rows
from plumbing.models import weights
from plumbing.models.families import TOYS
from plumbing.models.packing import my_batches
from plumbing.report import record
from plumbing.report.loop import begin, take_steps
from plumbing.run import config
from plumbing.run.checkpoint import check_space
from plumbing.run.config import Config, borrow, knob
from plumbing.run.setup import policy_maker
from policy import Policy, score_only
from toy.model import new_policy, processor, save_once, tokenizer

# How a model is fine-tuned; laid over the knobs' defaults and the model's row of MODELS.
RECIPES = {
    # Fine-R1's first stage (LLaMA-Factory/cot_sft_3b.sh): 4 processes of 4 passes of 4 rows.
    "fine_r1": dict(epochs=10, prompts_per_update=64, lr=5e-6, warmup_updates=6, weight_decay=0.1)
    | dict(cutoff=4096, freeze_vision=True, save_every=100, eval_every=10),
    # From random weights, tower included, to a policy that answers in the right form.
    "toy": dict(epochs=8, prompts_per_update=64, lr=2e-3, warmup_updates=30, weight_decay=0.01)
    | dict(cutoff=512, save_every=64, eval_every=32),
}


@dataclass
class SftConfig:
    """Every knob of fine_r1/sft.py; those of train.py that it shares are borrowed from there."""

    recipe: str = knob(
        "", "settings to start from; default: toy for --data toy, else fine_r1", RECIPES, part="Run"
    )
    model: str = borrow("model")
    data: str = borrow("data", help="hub name, file or folder of conversations, or toy")
    val_data: str = borrow("val_data", help="as --data, for the validation loss; default: none")
    columns: str = borrow(
        "columns",
        default="problem,response,images",
        help="of --data: the problem, the response, and the pictures",
    )
    reward: str = borrow("reward", help="a problem is asked in the form of this reward of train.py")
    out: str = borrow("out", help="output folder; default: out/<model>-sft")
    seed: int = borrow("seed")
    epochs: float = knob(1.0, "times that every row is learned from", above=0)
    steps: int = borrow("steps", default=0, help="updates; 0: as --epochs says", above=None, low=0)
    resume: bool = borrow("resume")
    other_rows: bool = borrow("other_rows")
    prompts_per_update: int = borrow("prompts_per_update", part="Batch and model")
    tokens_per_forward: int = borrow("tokens_per_forward")
    cutoff: int = knob(4096, "longer conversations are left out", above=0)
    freeze_vision: bool = knob(False, "the vision tower stays as it is")
    lora_rank: int = borrow("lora_rank")
    lr: float = borrow("lr", part="The optimizer")
    warmup_updates: int = knob(0, "updates over which the learning rate rises", low=0)
    weight_decay: float = borrow("weight_decay")
    max_grad_norm: float = borrow("max_grad_norm")
    min_pixels: int = borrow("min_pixels", part="Pictures, memory and speed")
    max_pixels: int = borrow("max_pixels")
    dtype: str = borrow("dtype")
    activation_checkpointing: bool = borrow("activation_checkpointing")
    eval_every: int = borrow("eval_every", part="Watching and saving")
    eval_questions: int = borrow("eval_questions", help="conversations in a validation")
    save_every: int = borrow("save_every")
    keep: int = borrow("keep")
    log: str = borrow("log")
    hint_right: float = borrow("hint_right")

    # The schedule reaches to the last step, so a resumed run must keep to it.
    free_on_resume: ClassVar = Config.free_on_resume - {"steps"}
    lora_alpha: ClassVar = Config.lora_alpha
    temperature: ClassVar = 1.0  # the likelihood is that of the logits as they are
    algo: ClassVar = "sft"


def resolve_sft(flags, cuda):
    """Flags given on the command line -> (SftConfig, {knob: where its value comes from})"""
    model = flags.get("model") or ("Qwen/Qwen2.5-VL-3B-Instruct" if cuda else "toy")
    data = flags.get("data") or ("toy" if model in TOYS else "")
    if not data:
        fail("--data is needed: a file or folder of conversations, or a hub name; see --help")
    preset = config.preset_of(model, data)
    recipe = flags.get("recipe") or ("toy" if data == "toy" else "fine_r1")
    chosen = dict(model=model, data=data, recipe=recipe)
    chosen["out"] = f"out/{model if model in TOYS else preset}-sft"
    known = {f.name for f in fields(SftConfig)} - {"steps"}
    shared = {name: value for name, value in config.MODELS[preset].items() if name in known}
    layers = [(chosen, "default"), (shared, f"MODELS, row {preset}")]
    layers += [(RECIPES[recipe], f"RECIPES, row {recipe}"), (flags, "as asked")]
    settings, origin = {"activation_checkpointing": cuda}, {}
    for values, source in layers:
        settings |= values
        origin |= dict.fromkeys(values, source)
    if settings.get("lora_rank") and "lr" not in flags:
        settings["lr"], origin["lr"] = (
            config.lora_rate(settings["lr"]),
            "LoRA, ten times the recipe's",
        )
    return SftConfig(**settings), origin


@dataclass(frozen=True)
class SftParts:
    """What a run of fine_r1/sft.py is made of, by name."""

    cfg: SftConfig  # cfg.steps is the last step, also where --epochs says it
    processes: Processes
    folder: Path  # of the model that the run starts from
    stream: Stream  # of conversations
    validation: Stream | None  # None without --val_data
    policy: Policy
    optimizer: Optimizer
    log: object  # of plumbing/base/logs.py; None without --log

    def close(self):
        """Let go of the process group and of what --log named."""
        if self.log:
            self.log.close()
        self.processes.leave()


def sft_setup(cfg):
    """SftConfig -> SftParts. Collective: every process of the run calls it."""
    processes = Processes()
    log = open_log(cfg, processes.first)
    rows = [open_conversations(cfg.data, "train", cfg)]
    if cfg.val_data:
        rows.append(open_conversations(cfg.val_data, validation_split(cfg.val_data), cfg))
    folder = processes.one_by_one(lambda: starting_folder(cfg))
    processors = weights.load_processors(folder, cfg)
    kept = [usable(data, processors, cfg.cutoff, cfg, processes) for data in rows]
    if cfg.val_data and processes.first:
        warn_of_shared_rows(*kept)
    stream, *held_out = (Stream(x, cfg.seed, *processors, encode_conversation) for x in kept)

    steps = cfg.steps or math.ceil(cfg.epochs * -(-len(kept[0]) // cfg.prompts_per_update))
    # Nothing is banned: tokens that must not be sampled become less likely too.
    banned = torch.zeros_like(weights.banned_tokens(folder, processors[0])).to(processes.device)
    with doing(f"loading the policy, {folder}", aloud=True):
        policy = weights.load_policy(folder, policy_maker(banned, cfg, processes), cfg, processes)
    if cfg.freeze_vision:
        policy.family.tower(policy.vlm).requires_grad_(False)
    check_space(policy, steps, cfg, say)
    if cfg.activation_checkpointing:
        policy.vlm.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = Optimizer(policy, cfg, cosine(cfg.warmup_updates, steps))
    validation, cfg = held_out[0] if held_out else None, replace(cfg, steps=steps)
    return SftParts(cfg, processes, folder, stream, validation, policy, optimizer, log)


def starting_folder(cfg):
    """The folder of the model; the untrained toy is made in the run's own."""
    if cfg.model not in TOYS:
        return weights.find_model(cfg.model)
    folder, tok = Path(cfg.out) / "untrained", tokenizer()
    return save_once((new_policy(tok, cfg.model), tok, processor(cfg.model)), folder)


def supervised_update(batches, N, policy, optimizer, processes):
    """One optimizer update on this process's packed rows, a list of passes -> (loss, gradient norm,
    learning rate). N: scored tokens of the rows of all processes together."""
    total = 0.0
    policy.train()  # for activation checkpointing; there is no dropout
    for i, rows in enumerate(track(batches, "", "passes")):
        optimizer.sync_gradients(policy, now=i == len(batches) - 1)
        rows = rows.to(processes.device)
        # L = - 1/N sum_t log pi(o_t | q, I, o_<t), of which this is the sum over one pass's tokens.
        loss = -policy(rows, rows.pixels).logp.sum() / N
        (loss * processes.world).backward()  # FSDP averages over processes; L sums
        total = total + loss.detach()
    policy.eval()
    return processes.add_up({"loss": total})["loss"].item(), *optimizer.step(policy)


def passes(positions, stream, parts):
    """The conversations at these positions of a stream -> (this process's share of them as packed
    rows, one a pass; scored tokens of all; how many could not be read). Collective."""
    processes = parts.processes
    mine = stream.read(positions[processes.rank :: processes.world])
    sizes = [(p, len(c.prompt.ids) + len(c.tokens), c.scored.sum().item()) for p, c in mine.items()]
    known = sorted(processes.gather(sizes))
    # Every process needs equally many, so the first may come again; it counts only once.
    everyone, batches = known + known[:1] * (-len(known) % processes.world), []
    lengths = [length for _, length, _ in everyone]
    budget, flat = parts.cfg.tokens_per_forward, parts.policy.flat
    for indices in my_batches(lengths, processes, budget, flat) if known else []:
        chosen = []
        for i in indices:
            position = everyone[i][0]
            one = mine.get(position) or stream[position]
            nothing = torch.zeros_like(one.scored)
            chosen.append(one if i < len(known) else replace(one, scored=nothing))
        batches.append(pack_conversations(chosen, parts.policy))
    return batches, sum(n for _, _, n in known), len(positions) - len(known)


def pack_conversations(read, policy):
    """[Conversation] -> Packed: a group of one response each."""
    tokens, scored = [[c.tokens] for c in read], [[c.scored] for c in read]
    return policy.pack([c.prompt for c in read], tokens, scored)


def sft_step(parts, progress):
    """One update, on SftParts -> its line of metrics. An epoch is every
    conversation once; its last update has what is left."""
    clock, n, size = Clock(), len(parts.stream.examples), parts.cfg.prompts_per_update
    epoch, k = divmod(progress.step, -(-n // size))
    positions = range(epoch * n + k * size, min(epoch * n + (k + 1) * size, (epoch + 1) * n))
    with clock("read"):
        batches, N, lost = passes(positions, parts.stream, parts)
    metrics = {}
    with clock("update"):
        if batches:  # there are none where not one conversation could be read
            done = supervised_update(batches, N, parts.policy, parts.optimizer, parts.processes)
            metrics = dict(zip(("loss", "grad_norm", "lr"), done))
    progress.step, progress.cursor = progress.step + 1, positions.stop
    metrics = {"step": progress.step, "epoch": positions.stop / n, **metrics, "tokens": N}
    metrics |= {"left_out": lost, "skipped_updates": parts.optimizer.skipped}
    return metrics | record.step_seconds(clock) | record.memory_gb()


def validation_loss(parts):
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


def measure_loss(parts, metrics):
    """Validate where it is time to, and keep a step's line of metrics."""
    cfg, step = parts.cfg, metrics["step"]
    if cfg.val_data and (step == cfg.steps or cfg.eval_every and step % cfg.eval_every == 0):
        metrics["val_loss"] = validation_loss(parts)
    if parts.processes.first:
        record.log(Path(cfg.out), metrics, parts.log)


def show_loss(parts, metrics):
    """Tell of a step, and bring the page up to date."""
    cfg, step = parts.cfg, metrics["step"]
    names = [name for name in ("loss", "val_loss", "grad_norm", "lr") if name in metrics]
    shown = [f"{name} {metrics[name]:.4g}" for name in names]
    say("  ".join([f"step {step}/{cfg.steps}", *shown, f"{metrics['seconds']:.1f} s"]))
    if parts.processes.first and (step == cfg.steps or step % cfg.save_every == 0):
        record.write_page(Path(cfg.out))


def main():
    """Parse, prepare, train, and show what came out."""
    cuda = torch.cuda.is_available()
    flags = vars(config.parser(SftConfig, __doc__).parse_args())
    if flags.pop("print_config", False):
        return print("\n".join(record.settings_table(*resolve_sft(flags, cuda))))
    cfg, _ = resolve_sft(flags, cuda)
    config.check_knobs(cfg, cuda)
    say(f"model {cfg.model}, data {cfg.data}, recipe {cfg.recipe}, output {cfg.out}")
    parts, progress = begin(cfg, sft_setup)
    out, file = Path(cfg.out), Path(cfg.out) / "evaluation.json"
    if cfg.val_data and progress.step == 0:
        losses = {"before": validation_loss(parts)}
        say(f"validation loss before training: {losses['before']:.4f}")
        if parts.processes.first:
            write_atomically(file, json.dumps(losses))
    take_steps(parts, progress, sft_step, measure_loss, show_loss)
    parts.close()
    if cfg.val_data and parts.processes.first:
        losses = read_json(file) | {"after": record.read_metrics(out)[-1]["val_loss"]}
        write_atomically(file, json.dumps(losses))
        record.write_page(out)
    say(f"written: {out / f'checkpoint-{progress.step}'}; train.py --model goes on from there")


if __name__ == "__main__":
    main()
