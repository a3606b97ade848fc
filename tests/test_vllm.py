"""The real vLLM engine, in this process, on the real (tiny) model. Skipped where none can run."""

import os
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SMALL, TORCHRUN, call, command, metrics
from PIL import Image

import plumbing.run.engine
from plumbing.base.common import generator
from plumbing.data.prompts import Example, encode
from plumbing.models.families import load_image_processor
from plumbing.models.weights import banned_tokens, full_parameters, load_vlm
from plumbing.report.record import memory_gb
from plumbing.run.config import default_sampler
from plumbing.run.engine import VLLMSampler
from plumbing.run.sync import check_sync, gaps
from policy import Policy
from rollout import TransformersSampler

default, why = default_sampler(torch.cuda.is_available())
pytestmark = pytest.mark.skipif(default != "vllm", reason=f"no vLLM engine: {why}")
both = ["toy", pytest.param("toy-qwen3", marks=pytest.mark.slow)]
qwen3 = pytest.mark.parametrize("toy_name", both, indirect=True, scope="session")
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def vllm_cfg(cfg):
    cfg = replace(cfg, sampler="vllm", temperature=TEMPERATURE)
    return replace(cfg, min_pixels=56 * 56, max_pixels=140 * 140)


@pytest.fixture(scope="module")
def mixed(folder, vllm_cfg, prompts, processors):
    """One picture, no picture, two pictures, and pictures that have to be enlarged and shrunk."""
    image_processor = load_image_processor(folder, vllm_cfg.min_pixels, vllm_cfg.max_pixels)
    pictures = [p.example.images[0] for p in prompts[:2]]
    noise = [Image.effect_noise(size, 90).convert("RGB") for size in ((30, 40), (333, 250))]
    examples = [
        prompts[0].example,
        Example("none", "how many red objects are there ?", "3"),
        Example("two", "<image> and <image> same ?", "3", pictures),
        Example("small", "<image> how many are there ?", "3", noise[:1]),
        Example("large", "<image> how many are there ?", "3", noise[1:]),
    ]
    return [encode(e, processors[0], image_processor) for e in examples], image_processor


@pytest.fixture(scope="module")
def engine(folder, processors, vllm_cfg, mixed):
    banned = banned_tokens(folder, processors[0])
    sampler = VLLMSampler(folder, (processors[0], mixed[1]), banned, vllm_cfg, 1)
    yield sampler
    sampler.close()


@pytest.fixture
def trainer(folder, engine):
    """The trainer's policy; the engine is given the untouched weights again afterwards."""
    yield Policy(load_vlm(folder), engine.banned, TEMPERATURE)
    engine.sync(Policy(load_vlm(folder), engine.banned, TEMPERATURE))


def seeds_of(prompts, *purpose):
    return [(0, *purpose, i) for i in range(len(prompts))]


def gap(policy, prompts, rollouts):
    """Largest difference between sampler and trainer, in nats."""
    return max(x.max().item() for x in gaps(policy, prompts, rollouts, "cpu"))


def test_a_second_picture_reaches_the_engine(engine, trainer, mixed, prompts):
    """A variant's second prompt, here noised; the engine sees what the trainer sees."""
    noisy = pytest.importorskip("variants.noisy_rollout")
    first = [encode(p.example, engine.tok, mixed[1]) for p in prompts[:4]]
    second = [noisy.noised(p, 700, generator(i), mixed[1]) for i, p in enumerate(first)]
    rollouts = engine.generate(second, 4, seeds_of(second, "noisy"))
    assert gap(trainer, second, rollouts) < 1e-2
    assert gap(trainer, first, rollouts) > 0.1


@qwen3
def test_greedy_tokens_are_those_of_transformers(engine, trainer, mixed, vllm_cfg, monkeypatch):
    greedy = replace(vllm_cfg, top_p=1e-9)  # the nucleus of one token
    monkeypatch.setattr(engine, "cfg", greedy)
    sampler = TransformersSampler(trainer.vlm, engine.tok, trainer.banned, greedy)
    ours = sampler.generate(mixed[0], 1, seeds_of(mixed[0]))
    theirs = engine.generate(mixed[0], 1, seeds_of(mixed[0]))
    for a, b in zip(ours, theirs):
        assert a.tokens[0].tolist() == b.tokens[0].tolist()
        assert a.finished == b.finished and a.texts == b.texts
        assert torch.allclose(a.logprobs[0], b.logprobs[0], atol=1e-4)
    assert sum(len(r.tokens[0]) for r in ours) > 30


@qwen3
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_logprobs_agree_with_the_trainers(top_p, engine, trainer, mixed, vllm_cfg, monkeypatch):
    """At temperature 0.8, with a ban, and with a nucleus: of the distribution before it is cut."""
    monkeypatch.setattr(engine, "cfg", replace(vllm_cfg, top_p=top_p))
    rollouts = engine.generate(mixed[0], 6, seeds_of(mixed[0]))
    assert gap(trainer, mixed[0], rollouts) < 1e-4
    assert len({tuple(t.tolist()) for r in rollouts for t in r.tokens}) > 5


@qwen3
def test_samples_have_a_name(engine, prompts):
    a, b, c = (engine.generate(prompts[:4], 3, seeds_of(prompts[:4], step)) for step in (1, 1, 2))
    tokens = lambda rollouts: [t.tolist() for r in rollouts for t in r.tokens]
    assert tokens(a) == tokens(b) != tokens(c)


@qwen3
def test_more_prompts_than_fit_into_one_step_of_the_engine(engine, trainer, prompts):
    # Prompts that are prefilled in chunks would end the CPU build.
    longer = lambda ids: torch.cat([ids[:-2], ids[-12:-2].repeat(12), ids[-2:]])
    many = [replace(p, ids=longer(p.ids)) for p in prompts * 4]
    assert sum(len(p.ids) for p in many) * 4 > 2 * 8192
    rollouts = engine.generate(many, 4, seeds_of(many), limit=4)
    assert None not in rollouts and gap(trainer, many, rollouts) < 1e-4


@qwen3
def test_eos_is_inside_and_the_length_limit_is_marked(engine, prompts):
    eos, rollouts = engine.tok.eos_token_id, engine.generate(prompts, 8, seeds_of(prompts))
    assert any(f for r in rollouts for f in r.finished)
    for r in rollouts:
        for tokens, logprobs, finished in zip(r.tokens, r.logprobs, r.finished):
            assert len(tokens) == len(logprobs) and (tokens[:-1] != eos).all()
            assert finished == (tokens[-1] == eos).item()
    cut = engine.generate(prompts, 4, seeds_of(prompts), limit=3)
    pairs = [(t, f) for r in cut for t, f in zip(r.tokens, r.finished)]
    assert all((t[-1] == eos) == f and (f or len(t) == 3) for t, f in pairs)


@qwen3
def test_a_picture_is_encoded_once_for_all_its_responses(engine, mixed):
    engine.engine.reset_encoder_cache()
    engine.engine.reset_prefix_cache()
    patches, count = [], lambda _, args: patches.append(len(args[0]))
    hook = engine.llm.apply_model(lambda m: m.visual.register_forward_pre_hook(count))[0]
    prompts = [mixed[0][0], *mixed[0][3:]]
    engine.generate(prompts, 8, seeds_of(prompts))
    hook.remove()
    assert sum(patches) == sum(len(p.pixels) for p in prompts)


@qwen3
def test_visual_tokens_are_never_sampled(engine, trainer, prompts):
    head = trainer.vlm.lm_head.weight.data
    head[engine.pad] += 3.0 * head.abs().max()  # a policy that wants nothing else
    engine.sync(trainer)
    rollouts = engine.generate(prompts, 8, seeds_of(prompts))
    assert not trainer.banned[torch.cat([t for r in rollouts for t in r.tokens])].any()
    assert gap(trainer, prompts, rollouts) < 1e-4


@qwen3
def test_a_refused_prompt_is_named_and_the_others_go_on(engine, prompts, capsys):
    a, b = (replace(p, example=replace(p.example, id=f"bad {p.example.id}")) for p in prompts[1:3])
    a, b = replace(a, ids=a.ids[a.ids != engine.pad]), replace(b, ids=b.ids.repeat(20))
    batch = [prompts[0], a, b, prompts[3]]  # without a placeholder, and endless
    rollouts = engine.generate(batch, 2, seeds_of(batch))
    assert [r is None for r in rollouts] == [False, True, True, False]
    said = "".join(capsys.readouterr())
    assert all(f"example {p.example.id} is left out" in said for p in (a, b))
    assert engine.generate(prompts, 2, seeds_of(prompts))[7] is not None  # nothing of them is left


@qwen3
def test_weights_and_caches_are_fresh_after_a_sync(engine, trainer, prompts):
    """The same prompts again, so that what a stale prefix or picture cache holds would be used."""
    before = engine.generate(prompts, 2, seeds_of(prompts))
    for p in trainer.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=generator("perturb", tuple(p.shape)))
    assert gap(trainer, prompts, engine.generate(prompts, 2, seeds_of(prompts))) > 0.05
    engine.sync(trainer)
    after = engine.generate(prompts, 2, seeds_of(prompts))
    assert gap(trainer, prompts, after) < 1e-4 and gap(trainer, prompts, before) > 0.05


@qwen3
def test_the_check_finds_a_sync_that_does_nothing_and_one_that_forgets_a_tensor(
    engine, trainer, prompts, monkeypatch
):
    some, whole = prompts[:3], full_parameters
    losses = ["visual.blocks.0.attn.proj", "language_model.layers.2.mlp.down_proj", "embed_tokens"]
    before = {n: p.detach().clone() for n, p in trainer.vlm.named_parameters()}
    check = lambda: check_sync(engine, trainer, some, seeds_of(some), 1e-3)
    assert check() < 1e-4
    assert all(torch.equal(p, before[n]) for n, p in trainer.vlm.named_parameters())
    for lost in losses:
        stale = {n: p for n, p in before.items() if n.endswith(f"{lost}.weight")}
        assert len(stale) == 1
        forgets = lambda policy, stale=stale: ((n, stale.get(n, p)) for n, p in whole(policy))
        monkeypatch.setattr(plumbing.run.engine, "full_parameters", forgets)
        with pytest.raises(SystemExit, match="does not have the trainer's weights"):
            check()
    monkeypatch.setattr(engine, "sync", lambda policy: None)
    with pytest.raises(SystemExit, match="does not have the trainer's weights"):
        check()


@qwen3
def test_a_sync_streams(engine, trainer, monkeypatch):
    """At no moment are more than a few of the tensors alive that were gathered for the engine."""
    whole, alive, sizes = full_parameters, weakref.WeakSet(), []

    def counted(policy):
        for n, p in whole(policy):
            p = p.clone()
            alive.add(p)
            sizes.append(sum(x.numel() for x in alive))
            yield n, p

    monkeypatch.setattr(plumbing.run.engine, "full_parameters", counted)
    engine.sync(trainer)
    assert 0 < max(sizes) < sum(p.numel() for p in trainer.vlm.parameters()) / 4


def test_the_peak_of_a_step_is_without_what_a_sleeping_engine_gives_back(monkeypatch):
    """vLLM's own allocator, which knows what is in its pool, and a made-up card."""
    cumem = pytest.importorskip("vllm.device_allocator.cumem")
    card = dict(is_available=True, mem_get_info=(1e9, 5e9), max_memory_allocated=9e9)
    for name, value in card.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert memory_gb()["peak_memory_gb"] == 9  # it never sleeps, and has no pool
    monkeypatch.setattr(cumem.CuMemAllocator, "instance", pool := cumem.CuMemAllocator())
    pool.python_malloc_callback((0, 3e9, 1, 0))  # device, bytes, address, handle
    assert memory_gb()["peak_memory_gb"] == 6


def test_the_model_runner_is_the_one_that_is_asked_for(engine):
    kinds = lambda worker: [kind.__module__ for kind in type(worker.model_runner).__mro__]
    (modules,) = engine.llm.collective_rpc(kinds)
    v2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
    assert ("vllm.v1.worker.gpu.model_runner" in modules) == v2


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests above have run it")
def test_the_model_runner_of_cuda_does_the_same():
    """Runner V2 under some of the tests above: its sampler, its log-probs, its weights anew."""
    some = "model_runner_is or greedy or logprobs or (caches and fresh)"
    flags = ["-q", "-p", "runner_v2", "-m", "not slow", "-k", some, "tests/test_vllm.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = command("-m", "pytest", *flags, env=env, timeout=1200)
    assert done.returncode == 0 and "5 passed" in done.stdout, done.stdout[-3000:]


def train(out, *flags, processes=1):
    launch = [*TORCHRUN, processes] if processes > 1 else []
    launch += ["train.py", "--out", out, *SMALL[2:], "--sampler", "vllm", "--algo", "papo_g"]
    done = command(*launch, *flags, timeout=400)
    assert done.returncode == 0 and "Exception" not in done.stderr, done.stderr[-3000:]
    return done.stdout, metrics(out)


def evaluate(model):
    said = call("eval.py", "--model", model, *"--n 2 --questions 4 --sampler vllm".split())
    assert "vision" in said
    return said


def test_training_samples_with_vllm(tmp_path):
    stdout, lines = train(tmp_path / "run", "--steps", 2, "--top_p", 0.99)
    assert "sampler vllm (as asked)" in stdout and "responses come from the nucleus" in stdout
    assert "weights reach the sampler" in stdout and len(lines) == 2
    for m in lines:  # the second step samples with the weights of the first's updates
        assert m["sampler_gap"] < 1e-5 and abs(m["sampler_kl"]) < 1e-6
        assert m["host_memory_gb"] > 0.1 and m["refused_prompts"] == 0
    assert "sampler vllm (as asked)" in evaluate(tmp_path / "run" / "checkpoint-2")


@pytest.mark.slow
def test_two_processes_with_an_engine_each(tmp_path):
    _, lines = train(tmp_path, "--steps", 2, processes=2)
    assert len(lines) == 2 and all(m["sampler_gap"] < 1e-5 for m in lines)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_with_lora_the_engine_samples_from_the_merged_weights(processes, tmp_path):
    flags = ["--steps", 2, "--lora_rank", 4, "--lr", 1e-2]
    stdout, lines = train(tmp_path / "run", *flags, processes=processes)
    assert "LoRA of rank 4" in stdout and "weights reach the sampler" in stdout
    assert all(m["sampler_gap"] < 1e-5 for m in lines) and lines[1]["ref_kl"] > 1e-4
    call("-m", "plumbing.merge", tmp_path / "run" / "checkpoint-2")
    evaluate(tmp_path / "run" / "checkpoint-2-merged")


@pytest.mark.slow
def test_bfloat16_stays_within_the_tolerance_of_the_check(tmp_path):
    _, run = train(tmp_path, *"--steps 2 --dtype bfloat16 --importance_cap 2".split(), processes=2)
    assert all(1e-4 < m["sampler_gap"] < 0.1 for m in run)


@pytest.mark.slow
def test_memory_is_flat_over_200_steps(tmp_path):
    _, lines = train(tmp_path / "run", "--steps", 200, "--gamma", 0.02, "--anneal_steps", 0)
    memory = [m["host_memory_gb"] for m in lines]
    assert sum(memory[-20:]) / 20 - sum(memory[40:60]) / 20 < 0.05


@qwen3
def test_an_engine_that_cannot_start_says_why(folder, processors, vllm_cfg):
    banned, long = banned_tokens(folder, processors[0]), replace(vllm_cfg, max_prompt_tokens=5000)
    with pytest.raises(SystemExit, match="engine does not start .*max_model_len.*--sampler hf"):
        VLLMSampler(folder, processors, banned, long, 1)
