"""The vLLM engine as a sampler, and how weights get into it. docs/vllm.md says why it is set as it
is."""

import os
from hashlib import sha256

import torch

from loss import policy_logits
from plumbing.base.common import fail, first_line, generator
from plumbing.base.console import Bar, doing
from plumbing.models.families import IMAGE_TOKEN, family_of, picture_tokens
from plumbing.models.weights import DTYPES, full_parameters
from plumbing.run.config import prefill_tokens
from rollout import Sampler, refuse

# The engine has to live in this process, where its logits and weights can be reached. On a CPU: no
# pinning of the trainer's threads to cores, and a KV cache of 1 GiB.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",  # nothing is told of a run to anybody
}


class VLLMSampler(Sampler):
    """A vLLM engine in this process, beside the trainer. It takes the trainer's token ids and rows
    of pixels.

    Logits pass through the trainer's own policy_logits before anything is done to them. So banned
    tokens cannot be sampled, and the engine's raw log-probs are those of the trainer's
    distribution, at any temperature and top_p.
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
        self.sleeps = cfg.sleep and torch.cuda.is_available()  # the CPU build cannot
        try:
            with doing("starting the vLLM engine", aloud=True):
                self.llm = LLM(**self._settings(folder, cfg, world))
        except Exception as error:  # too long for the model, too large for the GPU, no such kernel
            why = " ".join(str(error).split())[:300]
            fail(f"the vLLM engine does not start ({why}); --sampler hf does without it", True)
        self.engine, self.asleep = self.llm.llm_engine, False

        def score_as_the_trainer(model):
            whole, T = model.compute_logits, cfg.temperature
            model.compute_logits = lambda x: policy_logits(whole(x), T, banned.to(x.device))

        self.llm.apply_model(score_as_the_trainer)

    def _settings(self, folder, cfg, world):
        from vllm.engine.arg_utils import EngineArgs

        cuda = torch.cuda.is_available()
        sizes = {"shortest_edge": cfg.min_pixels, "longest_edge": cfg.max_pixels}
        # Pixels come normalised (_input). Not every vLLM has the switch: 0.26 never does it again.
        once = {"mm_device_do_normalize"} & set(vars(EngineArgs))
        return dict.fromkeys(once, False) | dict(
            model=str(folder),
            dtype=cfg.dtype,
            seed=cfg.seed,
            max_model_len=cfg.max_prompt_tokens + cfg.max_response_tokens,
            distributed_executor_backend="external_launcher" if world > 1 else None,
            gpu_memory_utilization=cfg.gpu_memory_utilization,
            enable_sleep_mode=self.sleeps,
            enforce_eager=not cuda,  # CUDA graphs pay off on a GPU only
            enable_chunked_prefill=None if cuda else False,  # the CPU build cannot rewind its draws
            disable_custom_all_reduce=True,  # it and expandable segments exclude each other
            max_num_batched_tokens=prefill_tokens(cfg, cuda),
            max_num_seqs=512 if cuda else None,  # whose logits policy_logits makes copies of
            limit_mm_per_prompt={"video": 0},
            mm_processor_kwargs={"size": sizes},
            mm_processor_cache_gb=0,  # pictures rarely come back, and these caches have leaked
            generation_config="vllm",  # no sampling defaults from the model's own folder
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )

    def _generate(self, prompts, n, seeds, limit):
        requests = [self._request(p, n, seed, limit) for p, seed in zip(prompts, seeds)]
        refused, done = {}, {}
        for i, (parts, params) in enumerate(requests):
            try:
                self.engine.add_request(str(i), self._input(*parts), params)
            except Exception as error:  # it raises errors of many kinds, assertions among them
                refused[i] = first_line(error)
        with Bar("sampling", len(requests) - len(refused), "prompts") as bar:
            while self.engine.has_unfinished_requests():
                finished = [out for out in self.engine.step() if out.finished]
                done |= {int(out.request_id): out for out in finished}
                bar.update(len(finished))
        for i, why in refused.items():
            refuse(prompts[i], why)
        return [self._read(done[i]) if i in done else None for i in range(len(prompts))]

    def _request(self, prompt, n, seed, limit):
        """-> ((token ids, pixels or None, grid or None), vLLM's sampling parameters)"""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        pixels = prompt.pixels if prompt.grid is None else prompt.pixels.to(DTYPES[self.cfg.dtype])
        # Response g is drawn with this number + g.
        drawn = int(torch.randint(2**62, (), generator=generator(*seed)))
        return (prompt.ids, pixels, prompt.grid), SamplingParams(
            n=n,
            temperature=1.0,
            top_p=self.cfg.top_p,
            max_tokens=limit,
            seed=drawn,
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
        fields = dict(pixel_values=Field.flat_from_sizes("image", rows))
        fields |= dict(image_grid_thw=Field.batched("image", keep_on_cpu=True))
        values = dict(pixel_values=pixels, image_grid_thw=grid)
        items = MultiModalKwargsItems.from_hf_inputs(values, fields)
        pictures = zip(pixels.split(rows.tolist()), grid.tolist())
        hashes = [name_of_picture(*picture) for picture in pictures]
        ranges = [PlaceholderRange(int(at[0]), len(at)) for at in places.split(tokens)]
        return mm_input(ids.tolist(), items, {"image": hashes}, {"image": ranges})

    def _read(self, out):
        """What vLLM returns -> Rollout"""
        tokens = [torch.tensor(o.token_ids) for o in out.outputs]
        pairs = (zip(o.logprobs, o.token_ids) for o in out.outputs)
        logprobs = [torch.tensor([at[t].logprob for at, t in each]) for each in pairs]
        return self._rollout(tokens, logprobs)

    def sync(self, policy):
        """Stream the policy's weights into the engine, one whole tensor at a time, and forget all
        that the old ones computed."""
        self._wake("weights")
        weights = {"weights_iterator": full_parameters(policy)}
        self.llm.collective_rpc("reload_weights", kwargs=weights)

        def tie_again(model):
            # The CPU build multiplies with packed copies. That of a head tied to the embedding,
            # which receives no weight of its own, has to be made anew; elsewhere nothing happens.
            head = model.get_submodule(self.family.lm_head)
            head.quant_method.process_weights_after_loading(head)

        self.llm.apply_model(tie_again)
        self._wake("kv_cache")
        if not self.engine.reset_prefix_cache():
            fail("the vLLM engine keeps what older weights computed: requests are under way", True)
        self.engine.reset_mm_cache()
        self.engine.reset_encoder_cache()

    def sleep(self):
        """Give memory back to the trainer until the next sync, which brings new weights: so level
        2, which keeps no copy of the old ones."""
        if self.sleeps:
            self.llm.sleep(2)
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
