"""The vLLM engine as a sampler, how weights get into it, and the check that they did."""

import contextlib
import os
from hashlib import sha256

import torch
import torch.distributed as dist

from loss import policy_logits
from plumbing.common import fail, generator
from plumbing.console import Bar, doing
from plumbing.families import IMAGE_TOKEN, family_of, picture_tokens
from plumbing.policy import DTYPES, full_parameters, response_logprobs
from rollout import Sampler, TransformersSampler, refuse

# Mean nats a token by which the log-probs of sampler and trainer may differ. A weight that does not
# arrive costs several.
SYNC_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
# The engine has to live in this process, where its logits and weights can be reached. It must not
# try FlashInfer's fused sampler, which seeded requests never use and which has to be compiled. On a
# CPU: no pinning of the trainer's threads to cores, and a KV cache of 1 GiB.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def build_sampler(cfg, folder, vlm, processors, banned, world=1):
    """The sampler of cfg.sampler. vlm: what the transformers sampler samples with; vLLM loads its
    own copy from the folder. processors: (tokenizer, image processor)"""
    if cfg.sampler == "vllm":
        return VLLMSampler(folder, processors, banned, cfg, world)
    return TransformersSampler(vlm, processors[0], banned, cfg)


def prefill_tokens(cfg, cuda):
    """The most tokens that an engine computes at once. On a GPU 4,096 keep it busy, and take half
    the memory of vLLM's own 8,192; on a CPU no prompt may be cut (_settings)."""
    return max(4096 if cuda else 8192, cfg.max_prompt_tokens + cfg.max_response_tokens)


class VLLMSampler(Sampler):
    """A vLLM engine in this process, beside the trainer: one a process, or one for every
    cfg.tensor_parallel of them.

    Prompts go in as what vLLM's own preprocessing makes of a question and its pictures: the
    trainer's token ids, and the rows of pixels that the trainer's vision tower sees. So a picture
    is decoded and processed once, for both. One request asks for n responses, so that a prompt is
    prefilled once and its picture encoded once (prefix and encoder cache).

    The engine's logits pass through the trainer's own policy_logits before anything is done to
    them. So banned tokens cannot be sampled, and the engine's raw log-probs are those of the
    trainer's distribution, at any temperature and top_p.
    """

    def __init__(self, folder, processors, banned, cfg, world):
        tok, self.image_processor = processors
        super().__init__(tok, banned, cfg)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from transformers import AutoConfig
        from vllm import LLM

        self.family = family_of(AutoConfig.from_pretrained(folder))
        self.pad = tok.convert_tokens_to_ids(IMAGE_TOKEN)
        self.level = cfg.sleep if torch.cuda.is_available() else 0  # the CPU build cannot sleep
        try:
            with doing("starting the vLLM engine", aloud=True):
                self.llm = LLM(**self._settings(folder, cfg, world))
        except Exception as error:  # too long for the model, too large for the GPU, no such kernel
            why = " ".join(str(error).split())[:300]
            fail(f"the vLLM engine does not start ({why}); --sampler hf does without it", here=True)
        self.engine, self.asleep = self.llm.llm_engine, False

        def score_as_the_trainer(model):
            whole, temperature = model.compute_logits, cfg.temperature
            model.compute_logits = lambda outputs: policy_logits(
                whole(outputs), temperature, banned.to(outputs.device)
            )

        self.llm.apply_model(score_as_the_trainer)

    def _settings(self, folder, cfg, world):
        longest, cuda = cfg.max_prompt_tokens + cfg.max_response_tokens, torch.cuda.is_available()
        return dict(
            model=str(folder),
            dtype=cfg.dtype,
            seed=cfg.seed,
            max_model_len=longest,
            tensor_parallel_size=cfg.tensor_parallel,
            distributed_executor_backend="external_launcher" if world > 1 else None,
            gpu_memory_utilization=cfg.gpu_memory_utilization,
            enable_sleep_mode=self.level > 0,
            enforce_eager=not cuda,  # CUDA graphs pay off on a GPU only
            # On a CPU a prompt is prefilled whole: that build cannot rewind the random generator of
            # one that was cut into chunks. On CUDA noise is a function of seed and position.
            enable_chunked_prefill=None if cuda else False,
            # vLLM's own all-reduce shares memory in a way that expandable segments, which
            # Processes sets, do not allow; NCCL takes its place.
            disable_custom_all_reduce=True,
            max_num_batched_tokens=prefill_tokens(cfg, cuda),
            limit_mm_per_prompt={"video": 0},
            mm_processor_kwargs={
                "size": {"shortest_edge": cfg.min_pixels, "longest_edge": cfg.max_pixels}
            },
            mm_device_do_normalize=False,  # pixels come normalised (_input)
            mm_processor_cache_gb=0,  # pictures rarely come back, and these caches have leaked
            generation_config="vllm",  # no sampling defaults from the model's own folder
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )

    def _generate(self, prompts, n, names, limit):
        requests = [self._request(p, n, name, limit) for p, name in zip(prompts, names)]
        requests, mine = self._of_all(requests)
        refused, done = {}, {}
        for i, (parts, params) in enumerate(requests):
            try:
                self.engine.add_request(str(i), self._input(*parts), params)
            except Exception as error:  # it raises errors of many kinds, assertions among them
                refused[i] = str(error).strip().split("\n")[0] or type(error).__name__
        with Bar("sampling", len(requests) - len(refused), "prompts") as bar:
            while self.engine.has_unfinished_requests():
                finished = [out for out in self.engine.step() if out.finished]
                done |= {int(out.request_id): out for out in finished}
                bar.update(len(finished))
        for i, prompt in zip(mine, prompts):
            if i in refused:
                refuse(prompt, refused[i])
        return [self._read(done[i]) if i in done else None for i in mine]

    def _of_all(self, requests):
        """The processes of one engine must ask for the same, in one order -> (requests of them all,
        which of them are mine)"""
        if self.cfg.tensor_parallel == 1:
            return requests, range(len(requests))
        from vllm.distributed.parallel_state import get_tp_group

        group, parts = get_tp_group(), [None] * self.cfg.tensor_parallel
        dist.all_gather_object(parts, requests, group=group.cpu_group)
        start = sum(map(len, parts[: group.rank_in_group]))
        everything = [request for part in parts for request in part]
        return everything, range(start, start + len(requests))

    def _request(self, prompt, n, name, limit):
        """-> ((token ids, pixels or None, grid or None), vLLM's sampling parameters)"""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        pixels = prompt.pixels if prompt.grid is None else prompt.pixels.to(DTYPES[self.cfg.dtype])
        # Response g is drawn with seed + g.
        seed = int(torch.randint(2**62, (), generator=generator(*name)))
        return (prompt.ids, pixels, prompt.grid), SamplingParams(
            n=n,
            temperature=1.0,
            top_p=self.cfg.top_p,
            max_tokens=limit,
            seed=seed,
            logprobs=0,
            stop_token_ids=[self.tok.eos_token_id],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _input(self, ids, pixels, grid):
        """ids (P,), pixels (N, D), grid (K, 3) -> what vLLM calls an engine input. Raises
        ValueError where ids and pictures do not fit each other."""
        from vllm.inputs import mm_input, tokens_input
        from vllm.multimodal.inputs import MultiModalFieldConfig as Field
        from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

        if grid is None:
            return tokens_input(ids.tolist())
        rows, tokens = grid.prod(-1), picture_tokens(grid, self.image_processor)
        places = (ids == self.pad).nonzero()[:, 0]
        if len(places) != sum(tokens):
            raise ValueError(f"{len(places)} tokens stand for pictures that take {sum(tokens)}")
        fields = {
            "pixel_values": Field.flat_from_sizes("image", rows),
            "image_grid_thw": Field.batched("image", keep_on_cpu=True),
        }
        values = {"pixel_values": pixels, "image_grid_thw": grid}
        items = MultiModalKwargsItems.from_hf_inputs(values, fields)
        hashes = [
            name_of_picture(*part) for part in zip(pixels.split(rows.tolist()), grid.tolist())
        ]
        ranges = [PlaceholderRange(int(at[0]), len(at)) for at in places.split(tokens)]
        return mm_input(ids.tolist(), items, {"image": hashes}, {"image": ranges})

    def _read(self, out):
        """What vLLM returns -> Rollout"""
        logprobs = [
            torch.tensor([at[t].logprob for at, t in zip(o.logprobs, o.token_ids)])
            for o in out.outputs
        ]
        return self._rollout([torch.tensor(o.token_ids) for o in out.outputs], logprobs)

    def sync(self, policy):
        """Stream the policy's weights into the engine, one whole tensor at a time, and forget all
        that the old ones computed."""
        self._wake("weights")
        weights = {"weights_iterator": full_parameters(policy)}
        self.llm.collective_rpc("reload_weights", kwargs=weights)

        def tie_again(model):
            # The CPU build multiplies with a packed copy of each matrix. A head tied to the
            # embedding receives no weight of its own, so its copy stays the old one unless it is
            # made anew; elsewhere this does nothing.
            head = model.get_submodule(self.family.lm_head)
            head.quant_method.process_weights_after_loading(head)

        self.llm.apply_model(tie_again)
        self._wake("kv_cache")
        self.engine.reset_prefix_cache()
        self.engine.reset_mm_cache()
        self.engine.reset_encoder_cache()

    def sleep(self):
        """Give memory back to the trainer until the next sync. Level 1 keeps the weights in host
        memory; level 2 drops them, which costs nothing here, since they are replaced before the
        engine wakes."""
        if self.level:
            self.llm.sleep(self.level)
            self.asleep = True

    def close(self):
        """Take the engine's process groups down while they still exist."""
        self.engine.engine_core.shutdown()

    def _wake(self, what):
        if self.asleep:
            self.llm.wake_up(tags=[what])
            self.asleep = what != "kv_cache"


def name_of_picture(pixels, shape):
    """What the engine's caches know a picture by. pixels (N, D), in host memory; shape: patches
    along t, h, w"""
    content = pixels.contiguous().view(torch.uint8).numpy().tobytes()
    return sha256(content + repr(shape).encode()).hexdigest()


@contextlib.contextmanager
def perturbed(policy):
    """While this lasts, every tensor of the policy differs from what it was; afterwards it is the
    same to the last bit. Each process changes its own shards.

    In a matrix three entries of every eleven change their sign, which doing it again undoes.
    Eleven divides no width of these models, so no whole row or column is turned, and nothing
    cancels: not in the product of two matrices, such as a LoRA's, which turning all signs would
    leave as it was. In a vector, and in a matrix of zeros, entries rise and fall by a half, and a
    copy is kept, which is small. A key bias of hundreds, as Qwen2.5 has them, is hardly changed:
    turned against its weights it would saturate the attention, where bfloat16 alone makes the
    trainer and the sampler differ.
    """
    tensors = [p.detach() for p in policy.parameters()]
    tensors = [(x.to_local() if hasattr(x, "to_local") else x).view(-1) for x in tensors]
    dims = [p.ndim for p in policy.parameters()]
    kept = {i: x.clone() for i, x in enumerate(tensors) if dims[i] < 2 or not x.any()}

    def turn():
        for x in (x for i, x in enumerate(tensors) if i not in kept):
            for start in (0, 1, 3):
                x[start::11].neg_()

    turn()
    for i in kept:
        tensors[i][::2] += 0.5
        tensors[i][1::2] -= 0.5
    try:
        yield
    finally:
        turn()
        for i, x in kept.items():
            tensors[i].copy_(x)


def check_sync(sampler, policy, prompts, names, tolerance, device="cpu"):
    """Is the sampler really given the trainer's weights? -> mean |difference| of their log-probs

    Perturbs every tensor, syncs, and compares the log-probs of a few sampled tokens; then all is
    as it was. Ends with a sentence if the difference is not below `tolerance`. In float32 a single
    tensor that does not arrive is found; in bfloat16, whose rounding is more than one small bias
    changes, a kind of them is.
    """
    with perturbed(policy):
        sampler.sync(policy)
        rollouts = sampler.generate(prompts, 2, names, limit=32)
        if not any(rollouts):
            fail("none of the first prompts can be read and sampled; the warnings say why", True)
        ours = response_logprobs(policy, prompts, rollouts, device)
    theirs = [x for r in rollouts if r for x in r.logprobs]
    gap = torch.cat([(a - b).abs() for a, b in zip(ours, theirs)]).mean().item()
    sampler.sync(policy)
    if not gap < tolerance:
        fail(
            "the sampler does not have the trainer's weights: after a sync their log-probs differ "
            f"by {gap:.3g} on average, more than {tolerance:g}; another version of vLLM, or "
            "--sampler hf, may help",
            here=True,
        )
    return gap
