"""AdamW with what a run needs around it: schedules, clipping, a refusal of broken gradients."""

import math

import torch
from torch.distributed.fsdp import FSDPModule

from plumbing.base.console import say
from plumbing.base.processes import device_memory, gathered


def constant(warmup):
    """Share of the learning rate by update: a straight line up, then 1. Never 0, not even at first:
    the released code's first step trains at a rate of 0."""
    return lambda update: min(1.0, (update + 1) / max(1, warmup))


def cosine(warmup, total):
    """As constant, but after the warm-up half a cosine leads down to 0 at `total` updates."""
    rising = constant(warmup)

    def share(update):
        if update < warmup:
            return rising(update)
        return 0.5 * (1 + math.cos(math.pi * (update - warmup) / (total - warmup)))

    return share


def whole_gradients(parameters, memory):
    """Bytes of gradients that each process keeps between the passes of an update: float32, whole,
    and not exchanged before the last pass, as long as that is at most a fifth of the device's
    memory. Where it is more, they are exchanged at every pass, and only shards are kept: 0.

    parameters: how many are trained; memory: of the device, in bytes
    """
    size = 4 * parameters
    return size if size <= memory / 5 else 0


class Optimizer:
    """One optimizer update at a time: optimizer.step(policy) -> (gradient norm, learning rate)

    schedule(update, counted from 0): its share of cfg.lr; default: 1.
    updates, skipped: how many were made, and how many of them were refused since their gradient was
    not finite. Both are saved in checkpoints. Frozen parameters are none of its business.
    """

    def __init__(self, policy, cfg, schedule=None, betas=(0.9, 0.999)):
        self.cfg, self.updates, self.skipped = cfg, 0, 0
        self.schedule = schedule or constant(0)
        trained = [p for p in policy.parameters() if p.requires_grad]
        how = {"lr": cfg.lr, "weight_decay": cfg.weight_decay, "betas": betas}
        # Fused, it makes no temporary copies of the weights' size, and runs on the device only.
        fused = trained[0].device.type == "cuda" or None
        self.adamw = torch.optim.AdamW(trained, **how, fused=fused)
        self.memory = device_memory(trained[0].device)
        self.parameters = sum(p.numel() for p in trained)

    def sync_gradients(self, policy, now):
        """Whether the next backward pass exchanges gradients between processes: the last one of an
        update does (now); those before it only where gradients cannot add up whole on each process
        (whole_gradients)."""
        if isinstance(policy, FSDPModule):
            add_up = whole_gradients(self.parameters, self.memory) > 0
            policy.set_requires_gradient_sync(now or not add_up)

    def step(self, policy):
        """Clip the gradients and take the update, or refuse it; then forget the gradients."""
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), self.cfg.max_grad_norm)
        norm = gathered(norm).item()
        lr = self.cfg.lr * self.schedule(self.updates)
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
        else:
            self.skipped += 1
            skipped = f"update {self.updates + 1} is skipped ({self.skipped} so far)"
            say(f"warning: gradient norm is {norm}; {skipped}")
        self.adamw.zero_grad()
        self.updates += 1
        return norm, lr
