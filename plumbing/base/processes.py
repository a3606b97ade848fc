"""Where this process stands among the others of a run that torchrun started, or alone."""

import ctypes
import faulthandler
import math
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

# The first process may be downloading a model. Nobody waits for one that dies: torchrun ends all.
PATIENCE = timedelta(hours=12)


def device_memory(device):
    """Bytes of memory of a CUDA device; infinite for a CPU, whose memory is nobody's share."""
    cuda = device.type == "cuda"
    return torch.cuda.get_device_properties(device).total_memory if cuda else math.inf


def gathered(tensor):
    """A tensor, whole on every process where it is sharded. Collective then."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def grow_segments():
    """Let the allocator of CUDA memory give partly used segments back, without which an engine that
    wakes up may find none; before its first allocation, and unless the user has settings for it."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def under_torchrun():
    """A worker that crashes below Python says where it was called from. And a torchrun that is
    killed outright leaves its workers at work: on Linux they then get the signal that it would have
    sent, and stop after the step."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        faulthandler.enable()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Processes:
    """The processes of a run: `rank` of `world`, and the `device` that this one works on. alone:
    this process works on something by itself, on the CPU, whatever run it belongs to."""

    def __init__(self, alone=False):
        self.rank = 0 if alone else int(os.environ.get("RANK", 0))
        self.first = self.rank == 0
        self.world = 1 if alone else int(os.environ.get("WORLD_SIZE", 1))
        # A Mac's own GPU (MPS) is left alone, since nobody has tried it: there the CPU computes.
        cuda = torch.cuda.is_available() and not alone
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
        self.sharded = cuda or self.world > 1  # one process on a CPU has no use for shards
        if cuda:
            grow_segments()
            torch.cuda.set_device(self.device)
        if not alone:
            under_torchrun()
        if self.sharded and not dist.is_initialized():
            self._meet("cpu:gloo,cuda:nccl" if cuda else "gloo")

    def _meet(self, backend):
        if sys.platform == "darwin" and os.environ.get("LOCAL_WORLD_SIZE") == str(self.world):
            # gloo looks a Mac's own host name up, which often has no address; loopback always has.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0")
        # Nobody has to find a lone process, and a port may be in use by another run.
        own = {"store": dist.HashStore()} if self.world == 1 else {}
        own |= {"rank": self.rank, "world_size": self.world, "timeout": PATIENCE}
        dist.init_process_group(backend, **own)

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
        stacked = torch.stack([totals[name] for name in sorted(totals)])
        if self.world > 1:
            dist.all_reduce(stacked)
        return dict(zip(sorted(totals), stacked))

    def leave(self):
        """Let go of the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
