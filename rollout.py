"""What a rollout is, how vLLM makes one, how transformers makes one, and how the weights get there.

A rollout is G sampled responses to one prompt. Each response is exactly the tokens that were sampled, EOS included when it was
sampled; so what is trained is decided here, where tokens are chosen, and never guessed from token ids later.

Both samplers report the log-probability of each sampled token under loss.policy_logits: temperature and ban, before the nucleus
is cut out. That is the distribution that the trainer scores, so what is left between sampler and trainer is numerical, and logged.
Both draw under a random name: (seed, "sample", step, prompt), so a sample does not depend on the number of processes.
"""
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

from config import fail
from data import generator
from loss import policy_logits
from masking import picture
from model import full_parameters
from packing import prompt_positions


@dataclass
class Rollout:
    """G responses to one prompt; lists have length G."""
    tokens: list            # (n,) int64 each, EOS inside when finished
    logprobs: list          # (n,) float32 each, of the sampled tokens, before the nucleus
    finished: list          # bool: ended by itself; False: cut off at the limit
    texts: list             # decoded, special tokens left out


class Sampler:
    """What both samplers share. sync: weights from the policy into the sampler; sleep: give memory back until the next sync; close: the end."""

    def __init__(self, tok, banned, cfg):
        self.tok, self.banned, self.cfg = tok, banned, cfg

    def generate(self, prompts, n, names, limit=None):
        """n responses of at most `limit` tokens (default: max_response_tokens) to each prompt; names[i]: the random name (any tuple) of
        prompt i's draw -> [Rollout, or None where the prompt was refused: named on the console, and not a crash]"""
        longest = self.cfg.max_prompt_tokens
        for p in (p for p in prompts if len(p.ids) > longest):
            refuse(p, f"{len(p.ids)} prompt tokens are more than --max_prompt_tokens {longest}")
        fits = [i for i, p in enumerate(prompts) if len(p.ids) <= longest]
        done = self._generate([prompts[i] for i in fits], n, [names[i] for i in fits], limit or self.cfg.max_response_tokens)
        rollouts = dict(zip(fits, done))
        return [rollouts.get(i) for i in range(len(prompts))]

    def _rollout(self, tokens, logprobs):
        """Lists of G tensors -> Rollout."""
        return Rollout(tokens, logprobs, [bool(t[-1] == self.tok.eos_token_id) for t in tokens],
                       self.tok.batch_decode(tokens, skip_special_tokens=True))

    def sleep(self):
        pass

    close = sleep


def refuse(prompt, why):
    tqdm.write(f"warning: example {prompt.example.id} is left out: {why}")


def build_sampler(cfg, folder, vlm, tok, image_processor, banned, world=1):
    """The sampler of cfg.sampler. vlm: what the transformers sampler samples with; vLLM loads its own copy from the folder."""
    if cfg.sampler == "vllm":
        return VLLMSampler(folder, tok, image_processor, banned, cfg, world)
    return TransformersSampler(vlm, tok, banned, cfg)


# ------------------------------------------------------------------------------------------------------------------- vLLM

class VLLMSampler(Sampler):
    """A vLLM engine in this process, beside the trainer: one engine a process, or one for every cfg.tensor_parallel processes.

    Prompts go in as token ids with each picture's placeholders folded back into one, and the picture as the pixels that the
    trainer's vision tower sees, already resized; the engine expands the placeholder itself, and must arrive at our ids. One request
    asks for n responses, so that a prompt is prefilled once and its picture encoded once (prefix and encoder cache).

    The engine's logits pass through the trainer's own policy_logits before anything is done to them. So banned tokens cannot be
    sampled, and the engine's raw log-probs are those of the trainer's distribution, at any temperature and top_p.
    """

    def __init__(self, folder, tok, image_processor, banned, cfg, world):
        super().__init__(tok, banned, cfg)
        # The engine has to live in this process, where its logits and weights can be reached. The CPU settings: no pinning of
        # the trainer's threads to cores, and a KV cache of 1 GiB.
        for setting in ("ENABLE_V1_MULTIPROCESSING=0", "LOGGING_LEVEL=ERROR", "CPU_KVCACHE_SPACE=1", "CPU_OMP_THREADS_BIND=nobind"):
            os.environ.setdefault(*f"VLLM_{setting}".split("="))
        from vllm import LLM
        cuda = torch.cuda.is_available()
        self.image_processor, self.pad = image_processor, tok.convert_tokens_to_ids("<|image_pad|>")
        self.level = cfg.sleep if cuda else 0                                    # the CPU build cannot sleep
        settings = dict(
            model=str(folder), dtype=cfg.dtype, seed=cfg.seed, max_model_len=cfg.max_prompt_tokens + cfg.max_response_tokens,
            tensor_parallel_size=cfg.tensor_parallel, distributed_executor_backend="external_launcher" if world > 1 else None,
            gpu_memory_utilization=cfg.gpu_memory_utilization, enable_sleep_mode=self.level > 0,
            enforce_eager=not cuda,                              # CUDA graphs pay off on a GPU only
            # A prompt is prefilled whole: the CPU build cannot rewind the random generator of one that was cut into chunks.
            enable_chunked_prefill=False, max_num_batched_tokens=max(8192, cfg.max_prompt_tokens + cfg.max_response_tokens),
            limit_mm_per_prompt={"video": 0},
            mm_processor_kwargs={"size": {"shortest_edge": cfg.min_pixels, "longest_edge": cfg.max_pixels}},
            mm_processor_cache_gb=0,                             # pictures rarely come back, and these caches have leaked
            generation_config="vllm",                            # no sampling defaults from the model's own folder
            disable_log_stats=True, use_tqdm_on_load=False)
        try:
            self.llm = LLM(**settings)
        except Exception as error:                               # too long for the model, too large for the GPU, no such kernel, ...
            fail(f"the vLLM engine does not start ({' '.join(str(error).split())[:300]}); --sampler hf does without it", here=True)
        self.engine, self.asleep = self.llm.llm_engine, False

        def score_as_the_trainer(model):
            whole, temperature = model.compute_logits, cfg.temperature
            model.compute_logits = lambda hidden: policy_logits(whole(hidden), temperature, banned.to(hidden.device))
        self.llm.apply_model(score_as_the_trainer)

    def _generate(self, prompts, n, names, limit):
        requests = [self._request(p, n, name, limit) for p, name in zip(prompts, names)]
        mine = range(len(requests))
        if self.cfg.tensor_parallel > 1:                         # the processes of one engine must ask for the same, in one order
            from vllm.distributed.parallel_state import get_tp_group
            parts = [None] * self.cfg.tensor_parallel
            dist.all_gather_object(parts, requests, group=get_tp_group().cpu_group)
            start = sum(map(len, parts[:get_tp_group().rank_in_group]))
            requests, mine = [r for part in parts for r in part], range(start, start + len(requests))
        refused, done = {}, {}
        for i, (prompt, params) in enumerate(requests):
            try:
                self.engine.add_request(str(i), prompt, params)
            except Exception as error:                           # it raises errors of many kinds, assertions among them
                refused[i] = str(error).strip().split("\n")[0] or type(error).__name__
        while self.engine.has_unfinished_requests():
            done |= {int(out.request_id): out for out in self.engine.step() if out.finished}
        for i, prompt in zip(mine, prompts):
            if i in refused:
                refuse(prompt, refused[i])
        return [self._read(done[i], prompt) if i in done else None for i, prompt in zip(mine, prompts)]

    def _request(self, prompt, n, name, limit):
        """-> (what vLLM calls a prompt, its sampling parameters)"""
        from PIL import Image
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        folded = torch.ones(len(prompt.ids), dtype=torch.bool)
        folded[1:] = (prompt.ids[1:] != self.pad) | (prompt.ids[:-1] != self.pad)        # the first of each run of placeholders
        request = {"prompt_token_ids": prompt.ids[folded].tolist()}
        if prompt.grid is not None:
            parts = zip(prompt.pixel_values.split(prompt.grid.prod(-1).tolist()), prompt.grid)
            request["multi_modal_data"] = {"image": [Image.fromarray(picture(rows, grid, self.image_processor).numpy())
                                                     for rows, grid in parts]}
        seed = int(torch.randint(2**62, (), generator=generator(*name)))           # response g is drawn with seed + g
        return request, SamplingParams(n=n, temperature=1.0, top_p=self.cfg.top_p, max_tokens=limit, seed=seed,
                                       logprobs=0, stop_token_ids=[self.tok.eos_token_id], ignore_eos=True, detokenize=False,
                                       output_kind=RequestOutputKind.FINAL_ONLY)

    def _read(self, out, prompt):
        if list(out.prompt_token_ids) != prompt.ids.tolist():
            fail(f"vLLM reads example {prompt.example.id} as {len(out.prompt_token_ids)} tokens and the trainer as {len(prompt.ids)}: the "
                 "model folder's image processor does not fit --min_pixels and --max_pixels", here=True)
        logprobs = [torch.tensor([at[t].logprob for at, t in zip(o.logprobs, o.token_ids)]) for o in out.outputs]
        return self._rollout([torch.tensor(o.token_ids) for o in out.outputs], logprobs)

    def sync(self, policy):
        """Stream the policy's weights into the engine, one whole tensor at a time, and forget all that the old ones computed."""
        self._wake("weights")
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": full_parameters(policy)})

        def tie_again(model):
            # The CPU build multiplies with a packed copy of each matrix. A head tied to the embedding receives no weight of its
            # own, so its copy stays the old one unless it is made anew (elsewhere this does nothing).
            head = model.get_submodule("language_model.lm_head")
            head.quant_method.process_weights_after_loading(head)
        self.llm.apply_model(tie_again)
        self._wake("kv_cache")
        self.engine.reset_prefix_cache()
        self.engine.reset_mm_cache()
        self.engine.reset_encoder_cache()

    def sleep(self):
        """Give memory back to the trainer until the next sync. Level 1 keeps the weights in host memory; level 2 drops them, which
        costs nothing here, since they are replaced before the engine wakes."""
        if self.level:
            self.llm.sleep(self.level)
            self.asleep = True

    def close(self):
        self.engine.engine_core.shutdown()                       # takes its process groups down while they still exist

    def _wake(self, what):
        if self.asleep:
            self.llm.wake_up(tags=[what])
            self.asleep = what != "kv_cache"


def check_sync(sampler, policy, prompts, score, tolerance, names):
    """Is the sampler really given the trainer's weights? Ends with a sentence if not. -> mean |difference| of their log-probs

    Turns the sign of every weight, which is undone exactly and needs no copy, syncs, and compares the log-probs of a few
    sampled tokens: a tensor that did not arrive shows at once. score(prompts, rollouts) -> the trainer's, a list of tensors.
    """
    def turn():
        with torch.no_grad():
            for p in policy.parameters():
                p.neg_()
        sampler.sync(policy)
    turn()
    rollouts = sampler.generate(prompts, 2, names, limit=32)
    if not any(rollouts):
        fail("none of the first prompts can be read and sampled; the warnings above say why", here=True)
    difference = torch.cat([(a - b).abs() for a, b in zip(score(prompts, rollouts), [x for r in rollouts if r for x in r.logprobs])])
    turn()
    gap = difference.mean().item()
    if not gap < tolerance:
        fail(f"the sampler does not have the trainer's weights: after a sync their log-probs differ by {gap:.3g} on average, more than "
             f"{tolerance:g}; another version of vLLM, or --sampler hf, may help", here=True)
    return gap


# ----------------------------------------------------------------------------------------------------------- transformers

def nucleus(p, top_p):
    """The likeliest tokens that cover top_p, renormalised: (rows, V) -> (rows, V)"""
    if top_p == 1:
        return p
    ordered, order = p.sort(-1, descending=True)
    inside = (ordered.cumsum(-1) - ordered < top_p).gather(-1, order.argsort(-1))
    p = p * inside
    return p / p.sum(-1, keepdim=True)


class TransformersSampler(Sampler):
    """Samples with the model's own forward: prefill each prompt once, copy its cache G times, decode to EOS.

    vlm is the policy's own module where that is whole (one process), or a private copy that `sync` refreshes. A token is chosen
    by inverse-CDF sampling with a uniform number drawn up front, so it does not depend on which prompts share its batch either.
    """

    def __init__(self, vlm, tok, banned, cfg, rows=256):
        super().__init__(tok, banned.to(vlm.device), cfg)
        self.vlm, self.rows = vlm, rows

    def sync(self, policy):
        """Weights from the policy into the sampler, one tensor at a time."""
        if policy.vlm is self.vlm:
            return
        mine = dict(self.vlm.named_parameters())
        with torch.no_grad():
            for name, p in full_parameters(policy):
                mine[name].copy_(p)

    @torch.no_grad()
    def _generate(self, prompts, n, names, limit):
        size = max(1, self.rows // n)
        return [r for i in range(0, len(prompts), size) for r in self._batch(prompts[i:i + size], n, names[i:i + size], limit)]

    def _prefill(self, prompts):
        """Prompts, left-padded -> (cache, logits of the first token (B, V), next position (B,), attention mask (B, P))."""
        B, P, device = len(prompts), max(len(p.ids) for p in prompts), self.vlm.device
        ids, mask = torch.full((B, P), self.tok.pad_token_id), torch.zeros(B, P, dtype=torch.long)
        positions = torch.zeros(3, B, P, dtype=torch.long)
        for b, p in enumerate(prompts):
            k = len(p.ids)
            ids[b, P - k:], mask[b, P - k:], positions[:, b, P - k:] = p.ids, 1, prompt_positions(self.vlm, p)
        pictures = [p for p in prompts if p.grid is not None]
        out = self.vlm(input_ids=ids.to(device), attention_mask=mask.to(device), position_ids=positions.to(device),
                       pixel_values=torch.cat([p.pixel_values for p in pictures]).to(device) if pictures else None,
                       image_grid_thw=torch.cat([p.grid for p in pictures]).to(device) if pictures else None,
                       use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1], positions.amax((0, 2)).to(device) + 1, mask.to(device)

    def _batch(self, prompts, n, names, limit):
        rows, device = len(prompts) * n, self.vlm.device
        uniform = torch.cat([torch.rand(n, limit, generator=generator(*name), dtype=torch.float64) for name in names]).to(device)
        cache, logits, position, mask = self._prefill(prompts)
        cache.batch_repeat_interleave(n)
        logits, position, mask = (x.repeat_interleave(n, 0) for x in (logits, position, mask))
        alive = torch.arange(rows, device=device)                                # rows of the cache -> responses
        chosen = torch.full((rows, limit), -1, device=device)                    # -1: nothing was sampled here
        logprobs = torch.zeros(rows, limit, device=device)
        for t in range(limit):
            logp = policy_logits(logits, self.cfg.temperature, self.banned).log_softmax(-1)     # (alive, V)
            cdf = nucleus(logp.double().exp(), self.cfg.top_p).cumsum(-1)
            token = torch.searchsorted(cdf, uniform[alive, t, None] * cdf[:, -1:], right=True)  # (alive, 1)
            chosen[alive, t], logprobs[alive, t] = token[:, 0], logp.gather(-1, token)[:, 0]
            keep = token[:, 0] != self.tok.eos_token_id
            if not keep.any() or t == limit - 1:
                break
            if not keep.all():                                                   # finished responses leave the batch
                kept = keep.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                alive, token, position, mask = alive[kept], token[kept], position[kept], mask[kept]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            logits = self.vlm(input_ids=token, attention_mask=mask, position_ids=(position + t).expand(3, -1)[..., None],
                              past_key_values=cache, use_cache=True).logits[:, -1]
        chosen, logprobs, lengths = chosen.cpu(), logprobs.cpu(), (chosen >= 0).sum(1).tolist()
        tokens, logprobs = ([x[i, :k] for i, k in enumerate(lengths)] for x in (chosen, logprobs))
        return [self._rollout(tokens[i:i + n], logprobs[i:i + n]) for i in range(0, rows, n)]
