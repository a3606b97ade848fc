"""Where this process stands among the others of a run that torchrun started, or alone."""

import math
import os
import sys

import torch
import torch.distributed as dist


def device_memory(device):
    """Bytes of memory of a CUDA device; infinite for a CPU, whose memory is nobody's share."""
    if device.type != "cuda":
        return math.inf
    return torch.cuda.get_device_properties(device).total_memory


class Processes:
    """The processes of a run: `rank` of `world`, and the `device` that this one works on.

    alone: this process works on something by itself, on the CPU, whatever run it belongs to.
    """

    def __init__(self, alone=False):
        self.rank = 0 if alone else int(os.environ.get("RANK", 0))
        self.world = 1 if alone else int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available() and not alone
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        # One process on a CPU needs neither shards nor mixed precision.
        self.sharded = cuda or self.world > 1
        if cuda:
            torch.cuda.set_device(self.device)
        if self.sharded and not dist.is_initialized():
            self._meet("cpu:gloo,cuda:nccl" if cuda else "gloo")

    def _meet(self, backend):
        if sys.platform == "darwin" and os.environ.get("LOCAL_WORLD_SIZE") == str(self.world):
            # gloo looks a Mac's own host name up, which often has no address; loopback always has.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0")
        method = "env://" if "MASTER_ADDR" in os.environ else "tcp://localhost:29500"
        dist.init_process_group(backend, init_method=method, rank=self.rank, world_size=self.world)

    @property
    def first(self):
        return self.rank == 0

    def barrier(self):
        """Wait until every process is here."""
        if self.world > 1:
            dist.barrier()

    def one_by_one(self, make):
        """make() in the first process, then in the others, which find what it has made or fetched.
        -> what it returns here. Collective."""
        made = make() if self.first else None
        self.barrier()
        return made or make()

    def gather(self, items):
        """Join the lists of all processes, in order of rank."""
        if self.world == 1:
            return items
        parts = [None] * self.world
        dist.all_gather_object(parts, items)
        return [x for part in parts for x in part]

    def add_up(self, totals):
        """Add {name: tensor} up over all processes; every process has the same names and shapes."""
        names = sorted(totals)
        stacked = torch.stack([totals[name] for name in names])
        if self.world > 1:
            dist.all_reduce(stacked)
        return dict(zip(names, stacked))

    def leave(self):
        """Let go of the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
