"""AdamW with what a run needs around it: a warm-up, clipping, and a refusal of broken gradients."""

import math

import torch
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm


class Optimiser:
    """One optimiser update at a time: optimiser.step(policy) -> (gradient norm, learning rate)

    updates, skipped: how many were made, and how many of them were refused since their gradient was
    not finite. Both are saved in checkpoints.
    """

    def __init__(self, policy, cfg):
        self.cfg, self.updates, self.skipped = cfg, 0, 0
        self.adamw = torch.optim.AdamW(
            policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay
        )

    def sync_gradients(self, policy, now):
        """Whether the next backward pass exchanges gradients between processes.

        Before the last pass of an update they only add up, whole on each process: less to send,
        more to keep. With --cpu_offload, which asks for memory, they are exchanged each time.
        """
        if isinstance(policy, FSDPModule):
            policy.set_requires_gradient_sync(now or self.cfg.cpu_offload)

    def step(self, policy):
        """Clip the gradients and take the update, or refuse it; then forget the gradients."""
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), self.cfg.max_grad_norm)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        # Never 0, not even at first: the released code's first step trains at a rate of 0.
        lr = self.cfg.lr * min(1.0, (self.updates + 1) / max(1, self.cfg.warmup_updates))
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
        else:
            self.skipped += 1
            tqdm.write(
                f"warning: gradient norm is {norm}; update {self.updates + 1} is skipped "
                f"({self.skipped} so far)"
            )
        self.adamw.zero_grad()
        self.updates += 1
        return norm, lr
