"""Where this process stands among the others of a run that torchrun started, or alone."""

import math
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

# How long a process waits for the others, where torch gives up after 10 minutes (NCCL) or 30
# (gloo): the first one may be downloading a model, or writing it to a slow disk. One that dies is
# not waited for, since torchrun then ends them all.
PATIENCE = timedelta(hours=12)


def device_memory(device):
    """Bytes of memory of a CUDA device; infinite for a CPU, whose memory is nobody's share."""
    if device.type != "cuda":
        return math.inf
    return torch.cuda.get_device_properties(device).total_memory


def gathered(tensor):
    """A tensor, whole on every process where it is sharded. Collective then."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def grow_segments():
    """Let the allocator of CUDA memory give partly used segments back, without which an engine that
    wakes up may find none; before its first allocation, and unless the user has settings for it."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


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
            grow_segments()
            torch.cuda.set_device(self.device)
        if self.sharded and not dist.is_initialized():
            self._meet("cpu:gloo,cuda:nccl" if cuda else "gloo")

    def _meet(self, backend):
        if sys.platform == "darwin" and os.environ.get("LOCAL_WORLD_SIZE") == str(self.world):
            # gloo looks a Mac's own host name up, which often has no address; loopback always has.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0")
        place = dict(rank=self.rank, world_size=self.world, timeout=PATIENCE)
        if self.world == 1:
            # Nobody has to find a lone process, and a port may be in use by another run.
            place["store"] = dist.HashStore()
        dist.init_process_group(backend, **place)

    @property
    def first(self):
        return self.rank == 0

    def use_cores(self):
        """Take this process's share of the machine's cores. torchrun and vLLM, as it starts, leave
        torch a single thread, and with --cpu_offload Adam runs on the host."""
        known = hasattr(os, "sched_getaffinity")  # the cores that this process may use
        cores = len(os.sched_getaffinity(0)) if known else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))

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
