"""Runs that are hit at random moments, again and again, until they end: is anything lost?

    python bench/kill.py                                      # 200 blows, about an hour
    python bench/kill.py --blows 5 --cases grpo --out /tmp/kill.json

Each of CASES is run once and left alone. Then it is started, hit at a random moment, and started
again with --resume, until it ends: weights, optimizer and metrics have to be those of the run that
was left alone, bit for bit, and a single process may not end in a traceback. Programs are forks of
this one, which has their imports behind it, so most moments are moments of a run.
"""

import json
import os
import random
import resource
import shutil
import signal
import socket
import time
from collections import Counter
from functools import partial
from pathlib import Path

from runs import ROOT, start_child  # puts the project on the path

from fine_r1.kinds import write_kinds
from plumbing.base.common import MANIFEST, Parser, fail, write_atomically
from plumbing.base.console import Bar
from plumbing.report.record import read_metrics

BLOWS = {
    "kill": "SIGKILL to all its processes",
    "kill one": "SIGKILL to one of them, and a second later, as a launcher does, to the others",
    "term": "SIGTERM to all, as a scheduler sends: it saves, and ends",
    "stop": "SIGSTOP to all, SIGCONT after a second, and SIGKILL later",
    "full": "its files can grow to a random size only, as on a full disk",
}
SMALL = "--sampler hf --prompts_per_step 4 --prompts_per_update 2 --group_size 4 --steps 6 "
SMALL += "--save_every 1 --keep 2 --val_data= --max_response_tokens 16"
PAPO, KINDS = f"train.py --algo papo_g {SMALL}", "--model KINDS/base --data KINDS"
CASES = {  # a name: how many processes, and the command
    "grpo": (1, f"train.py --algo grpo {SMALL}"),
    "papo_g": (1, PAPO),
    "papo_d": (1, f"train.py --algo papo_d {SMALL}"),
    "lora": (1, f"{PAPO} --lora_rank 4"),
    "tapo": (1, f"fine_r1/tapo.py {KINDS}/train.parquet {SMALL} --no-dynamic_sampling"),
    "sft": (
        1,
        f"fine_r1/sft.py {KINDS}/sft.parquet --prompts_per_update 4 --steps 12 --save_every 3",
    ),
    "papo_g on two": (2, PAPO),
    "papo_d on two": (2, f"train.py --algo papo_d {SMALL}"),
    "lora on two": (2, f"{PAPO} --lora_rank 4"),
}


def as_process(rank, processes, port, most):
    """What a process of a run is told, and how large its files may be."""
    if processes > 1:
        told = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        told |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({name: str(value) for name, value in told.items()})
    if most:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))


class Program:
    """A program that is at work, on one process or more."""

    def __init__(self, words, out, processes, most=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        told = [partial(as_process, r, processes, port, most) for r in range(processes)]
        self.alive = [start_child(words, out, first) for first in told]
        self.statuses = []

    def wait(self, seconds):
        """Until all processes have ended, or one has failed and the others are killed, or so many
        seconds are over -> whether they have ended"""
        until = time.monotonic() + seconds
        while self.alive and time.monotonic() < until:
            for process in self.alive:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self.alive.remove(process)
                    self.statuses.append(os.waitstatus_to_exitcode(status))
            if any(self.statuses):
                until = min(until, time.monotonic() + 1)
            time.sleep(0.005)
        if any(self.statuses):
            self.send(signal.SIGKILL)
        return not self.alive

    def send(self, sign, only=slice(None)):
        for process in self.alive[only]:
            os.kill(process, sign)
        if sign == signal.SIGKILL and only == slice(None):
            for process in self.alive:
                os.waitpid(process, 0)
            self.alive = []


def hit(program, blow, rng, length):
    """One blow at a random moment of a run that takes so many seconds -> whether it ended before"""
    if blow in ("full", "none"):
        return program.wait(600)
    if program.wait(rng.uniform(0, 0.8 * length)):
        return True
    if blow == "stop":
        program.send(signal.SIGSTOP)
        time.sleep(1)
        program.send(signal.SIGCONT)
        if program.wait(rng.uniform(0, 0.8 * length)):
            return True
    if blow == "term":
        program.send(signal.SIGTERM)
        program.wait(600)
    elif blow == "kill one":
        program.send(signal.SIGKILL, slice(rng.randrange(len(program.alive)), None, 100))
        program.wait(600)
    program.send(signal.SIGKILL)
    return False


def left(out):
    """What a run has left: checksums of its last checkpoint's weights and optimizer, and what it
    measured, but for what takes time."""
    last = max(out.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
    sums = json.loads((last / MANIFEST).read_text(encoding="utf-8"))
    weights = {k: v for k, v in sums.items() if k.endswith((".safetensors", ".distcp"))}
    clocks = ("seconds", "phases", "tokens_per_second", "peak_memory_gb", "host_memory_gb")
    lines = [{k: v for k, v in m.items() if k not in clocks} for m in read_metrics(out)]
    return last.name, weights, lines


class Ring:
    """Where runs are hit, and what came of it."""

    def __init__(self, work, blows, seed):
        self.work, self.blows, self.rng = work, blows, random.Random(seed)
        self.counts, self.runs, self.lost, self.lengths = Counter(), Counter(), [], {}

    def left_alone(self, name, words, processes):
        """A case's run that nothing hits, made once; how long it takes is known then."""
        out = self.work / name / "alone"
        if name not in self.lengths:
            began = time.monotonic()
            Program([*words, "--out", str(out)], out, processes).wait(600)
            self.lengths[name] = time.monotonic() - began
        return out

    def bout(self, name, bar):
        """Hit a case until it ends, or there were enough blows, and hold it against one alone."""
        processes, command = CASES[name]
        words = command.replace("KINDS", str(self.work / "kinds")).split()
        alone, out = self.left_alone(name, words, processes), self.work / name / "hit"
        shutil.rmtree(out, ignore_errors=True)
        out.with_suffix(".log").unlink(missing_ok=True)
        while True:
            more = self.counts.total() < self.blows
            blow = self.rng.choice(list(BLOWS)) if more else "none"
            size = int(2 ** self.rng.uniform(10, 24)) if blow == "full" else None
            program = Program([*words, "--out", str(out)], out, processes, size)
            ended = hit(program, blow, self.rng, self.lengths[name])
            if ended and not any(program.statuses):
                break
            if not more:
                fail(f"{name} does not end; see {out.with_suffix('.log')}")
            self.counts[blow] += 1
            bar.update(1, name)
        self.runs[name] += 1
        said = out.with_suffix(".log").read_text("utf-8", "replace")
        if "Traceback" in said and processes == 1:  # one that misses another may say so as it likes
            self.lost.append(f"{name}: a traceback, see {out.with_suffix('.log')}")
        if left(alone) != left(out):
            self.lost.append(f"{name}: {out} is not {alone}")


def main():
    """Hit all cases in turn until there were so many blows; write how many, and what was lost."""
    p = Parser(__doc__)
    p.add_argument("--blows", type=int, default=200)
    p.add_argument("--cases", default=",".join(CASES), help="some of them, with commas between")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--work", type=Path, default=ROOT / "out/kill", help="for the runs")
    p.add_argument("--out", type=Path, default=ROOT / "results/kill.json")
    args = p.parse_args()
    names, ring = args.cases.split(","), Ring(args.work, args.blows, args.seed)
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    if any("KINDS" in CASES[name][1] for name in names):
        write_kinds(args.work / "kinds", updates=0)
    with Bar("blows", args.blows, "blows") as bar:
        while not ring.lost and ring.counts.total() < args.blows:
            for name in names:
                ring.bout(name, bar)
            found = {"blows": ring.counts, "runs": ring.runs, "lost": ring.lost, "seed": args.seed}
            write_atomically(args.out, json.dumps(found, indent=1))
    print("\n".join([f"{ring.counts[k]:4} x {says}" for k, says in BLOWS.items()]))
    print(
        f"{ring.runs.total()} runs: {len(ring.lost) or 'none'} lost anything", *ring.lost, sep="\n"
    )
    return bool(ring.lost)


if __name__ == "__main__":
    raise SystemExit(main())
