"""One process of a run: the models, the data and the sampler it holds, and where it stands among the others.

Memory, per process, with N parameters over W processes: weights, gradients and Adam's two moments in float32 are 16 N / W bytes, the
reference 4 N / W; while gradients add up over the passes of an update they are whole, 4 N; and the sampler holds its own whole copy (2 N in
bfloat16, shared by --tensor_parallel processes).
"""
import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

import report
from config import fail
from data import Rows, Selection, Stream, generator, load
from masking import Masker
from model import DTYPES, Policy, banned_tokens, load_processors, load_vlm, resolve_folder, score_only, sharded_policy
from reward import Grader, compute_score
from rollout import build_sampler, check_sync

SYNC_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}     # mean nats a token; a weight that does not arrive costs several


class Run:
    """All that stays the same between steps: the models, the data and where this process stands among the others."""

    def __init__(self, cfg):
        self.cfg, self.rank, self.world = cfg, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        sharded = cuda or self.world > 1                       # one CPU process needs neither shards nor mixed precision
        if sharded and not dist.is_initialized():
            method = "env://" if "MASTER_ADDR" in os.environ else "tcp://localhost:29500"
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", init_method=method, rank=self.rank, world_size=self.world)
        folder = resolve_folder(cfg.model, cfg.warm_steps) if self.rank == 0 else None       # rank 0 makes or fetches it,
        self.barrier()                                                                       # the others wait
        self.folder = folder or resolve_folder(cfg.model, cfg.warm_steps)
        self.tok, self.image_processor = load_processors(self.folder, cfg)
        self.columns = (cfg.problem_column, cfg.answer_column, cfg.images_column)
        self.stream = Stream(self.usable(load(cfg.data, "train", 1_000_000, cfg.seed, self.columns)), cfg, self.tok,       # data first: what is
                             self.image_processor)                                                                         # wrong shows in seconds
        self.banned = banned_tokens(self.folder, self.tok).to(self.device)

        def new_policy():
            if sharded:
                return sharded_policy(self.folder, self.banned, cfg, self.device)
            return Policy(load_vlm(self.folder), self.banned, cfg.temperature, cfg.packing == "flat")
        self.policy = new_policy()
        self.reference = new_policy().requires_grad_(False) if cfg.beta > 0 else None
        if cfg.activation_checkpointing:
            self.policy.vlm.gradient_checkpointing_enable({"use_reentrant": False})
        vlm = self.policy.vlm
        if sharded and cfg.sampler == "hf":
            vlm = load_vlm(self.folder, DTYPES[cfg.dtype]).to(self.device)       # the sampler's own whole copy
        engine = replace(cfg, sleep=self.sleep_level()) if cuda else cfg
        self.sampler = build_sampler(engine, self.folder, vlm, self.tok, self.image_processor, self.banned, self.world)
        self.optimiser = torch.optim.AdamW(self.policy.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
        self.masker, self.grader = Masker(cfg, self.image_processor, self.device), Grader()
        self.held_out = {}                                     # validation data by split
        self.val_split = "val" if cfg.val_data == "toy" else "test"
        self.prompts = {}                                      # those that this process has read in this step, by position
        self.cursor = self.updates = self.skipped = 0          # prompts consumed, optimiser updates made, updates refused

    def usable(self, data):
        """The rows of a data set that can be used. Every process checks a share of them; the others are named in a file."""
        if not isinstance(data, Rows):
            return data
        share = data.faults(self.tok, self.image_processor, self.cfg.max_prompt_tokens, slice(self.rank, None, self.world), self.rank == 0)
        faults = dict(self.gather(list(share.items())))
        if self.rank == 0:
            report.left_out(Path(self.cfg.out), data, faults, self.cfg.strict)
        return Selection(data, faults)

    def validation(self, split):
        """A split of --val_data, read once; the rows of a file that cannot be used are left out."""
        if split not in self.held_out:
            self.held_out[split] = self.usable(load(self.cfg.val_data, split, self.cfg.eval_questions, 0, self.columns))
        return self.held_out[split]

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def sync_gradients(self, now):
        """Whether the next backward pass exchanges gradients between processes. Before the last one they only add up, whole on each of
        them: less to send, more to keep; with --cpu_offload, which asks for memory, they are exchanged each time."""
        if isinstance(self.policy, FSDPModule):
            self.policy.set_requires_gradient_sync(now or self.cfg.cpu_offload)

    def close(self):
        """Let go of the grader's process, the engine and the process group."""
        self.grader.close()
        self.sampler.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def gather(self, items):
        """Lists of every process, joined in order of rank."""
        if self.world == 1:
            return items
        parts = [None] * self.world
        dist.all_gather_object(parts, items)
        return [x for part in parts for x in part]

    def sleep_level(self):
        """What the engine must give back while training (--sleep -1): nothing where everything fits beside it, else all."""
        if self.cfg.sleep >= 0:
            return self.cfg.sleep
        count = sum(p.numel() for p in self.policy.parameters())
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return sleep_level(count, self.world, self.reference is not None, memory, self.cfg.gpu_memory_utilization)

    def check_sync(self, questions=4):
        """Perturb, sync, compare: does the sampler follow the trainer? -> mean |difference| of log-probs, or None if they share weights."""
        if getattr(self.sampler, "vlm", None) is self.policy.vlm:
            return None
        names = [(self.cfg.seed, "check sync", self.rank, i) for i in range(questions)]
        prompts = [p for p in (self.readable(self.rank * questions + i) for i in range(questions)) if p is not None]
        return check_sync(self.sampler, self.policy, prompts, self.logprobs, SYNC_TOLERANCE[self.cfg.dtype], names[:len(prompts)])

    def logprobs(self, prompts, rollouts):
        """The trainer's log-probs of sampled tokens -> a list of (n,) tensors, prompt by prompt, response by response."""
        pairs = [(p, r.tokens) for p, r in zip(prompts, rollouts) if r]
        packed = self.policy.pack(*zip(*pairs)).to(self.device)
        logp = score_only(self.policy, packed).logp.cpu()
        return [logp[b, g, :len(t)] for b, (_, tokens) in enumerate(pairs) for g, t in enumerate(tokens)]

    def readable(self, position):
        """The training prompt at a position of the stream; None, and a warning, if it cannot be read."""
        try:
            return self.prompt(position)
        except ValueError as error:
            tqdm.write(f"warning: left out: {error}")
            return None

    def prompt(self, position):
        """The training prompt at a position of the stream, read once a step. Raises ValueError if it cannot be read."""
        if position not in self.prompts:
            self.prompts[position] = self.stream[position]
        return self.prompts[position]

    def score(self, text, answer):
        return compute_score(text, answer, self.grader, self.cfg.reward)

    def mask(self, prompt, *name):
        """The masked pictures of a prompt, under a random name."""
        try:
            return self.masker(prompt, generator(self.cfg.seed, *name))
        except ValueError as error:
            fail(str(error), here=True)

    @contextlib.contextmanager
    def phase(self, name):
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def sleep_level(parameters, world, reference, memory, utilization, room=20e9):
    """0 if all that the top of this file counts and `room` bytes for activations fit beside an awake engine, else 2."""
    return 0 if ((16 + 4 * reference) / world + 4) * parameters + room <= (1 - utilization) * memory else 2
