"""The real vLLM engine, in this process, on the real (tiny) model. Skipped only where no engine can
run."""

import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SMALL, command
from PIL import Image

import plumbing.engine
from masking import SOURCES
from plumbing.common import generator
from plumbing.config import default_sampler
from plumbing.data import Example, encode
from plumbing.engine import VLLMSampler, check_sync
from plumbing.packing import pack
from plumbing.policy import Policy, banned_tokens, full_parameters, load_processors, load_vlm
from rollout import TransformersSampler

name, why = default_sampler(torch.cuda.is_available())
pytestmark = pytest.mark.skipif(name != "vllm", reason=f"no vLLM engine: {why}")
qwen3 = pytest.mark.parametrize(
    "toy_name",
    ["toy", pytest.param("toy-qwen3", marks=pytest.mark.slow)],
    indirect=True,
    scope="session",
)
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def vllm_cfg(cfg):
    return replace(
        cfg, sampler="vllm", temperature=TEMPERATURE, min_pixels=56 * 56, max_pixels=140 * 140
    )


@pytest.fixture(scope="module")
def mixed(folder, vllm_cfg, prompts):
    """One picture, no picture, two pictures, and pictures that have to be enlarged and shrunk."""
    tok, image_processor = load_processors(folder, vllm_cfg)
    pictures = [p.example.images[0] for p in prompts[:2]]
    noise = [Image.effect_noise(size, 90).convert("RGB") for size in ((30, 40), (333, 250))]
    examples = [
        prompts[0].example,
        Example("none", "how many red objects are there ?", "3"),
        Example("two", "<image> and <image> same ?", "3", pictures),
        Example("small", "<image> how many are there ?", "3", noise[:1]),
        Example("large", "<image> how many are there ?", "3", noise[1:]),
    ]
    return [encode(e, tok, image_processor) for e in examples], image_processor


@pytest.fixture(scope="module")
def engine(folder, processors, vllm_cfg, mixed):
    banned = banned_tokens(folder, processors[0])
    sampler = VLLMSampler(folder, (processors[0], mixed[1]), banned, vllm_cfg, 1)
    yield sampler
    sampler.close()


@pytest.fixture
def trainer(folder, processors, engine):
    """The trainer's policy; the engine is given the untouched weights again afterwards."""
    policy = Policy(load_vlm(folder), banned_tokens(folder, processors[0]), TEMPERATURE)
    yield policy
    engine.sync(Policy(load_vlm(folder), policy.banned, TEMPERATURE))


def names(prompts, *purpose):
    return [(0, *purpose, i) for i in range(len(prompts))]


def scores(policy, prompts, rollouts):
    """What the trainer says of the sampled tokens, as policy.response_logprobs -> a list of
    tensors."""
    rows = pack(policy.vlm, prompts, [r.tokens for r in rollouts])
    with torch.no_grad():
        logp = policy(rows, rows.pixels).logp
    return [logp[b, g, : len(t)] for b, r in enumerate(rollouts) for g, t in enumerate(r.tokens)]


def gap(policy, prompts, rollouts):
    """Largest difference between sampler and trainer, in nats."""
    pairs = zip(scores(policy, prompts, rollouts), [x for r in rollouts for x in r.logprobs])
    return max((a - b).abs().max().item() for a, b in pairs)


def test_second_pictures_reach_the_engine(engine, trainer, mixed, vllm_cfg, prompts):
    """What --rollout_picture noisy and positive roll out on: the engine sees the same pictures as
    the trainer, but for the rounding of noise to 8 bits, and other ones than the first."""
    tok, image_processor = engine.tok, mixed[1]
    first = [encode(p.example, tok, image_processor) for p in prompts[:4]]
    others = [p.example.images[0].resize((200, 90)) for p in prompts[4:8]]
    pairs = zip(first, others)
    paired = [replace(p, example=replace(p.example, positive=[x])) for p, x in pairs]
    settings = replace(vllm_cfg, noise_steps=700)
    for name, given in (("noisy", first), ("positive", paired)):
        second = [SOURCES[name](p, settings, image_processor, generator(name)) for p in given]
        rollouts = engine.generate(second, 4, names(second, name))
        assert gap(trainer, second, rollouts) < (1e-2 if name == "noisy" else 1e-4)
        assert gap(trainer, first, rollouts) > 0.1


def perturb(policy, amount=0.02):
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(amount * torch.randn(p.shape, generator=generator("perturb", tuple(p.shape))))


@qwen3
def test_greedy_tokens_are_those_of_transformers(engine, trainer, mixed, vllm_cfg, monkeypatch):
    greedy = replace(vllm_cfg, top_p=1e-9)  # the nucleus of one token
    monkeypatch.setattr(engine, "cfg", greedy)
    sampler = TransformersSampler(trainer.vlm, engine.tok, trainer.banned, greedy)
    ours = sampler.generate(mixed[0], 1, names(mixed[0]))
    theirs = engine.generate(mixed[0], 1, names(mixed[0]))
    for a, b in zip(ours, theirs):
        assert a.tokens[0].tolist() == b.tokens[0].tolist()
        assert a.finished == b.finished and a.texts == b.texts
        assert torch.allclose(a.logprobs[0], b.logprobs[0], atol=1e-4)
    assert sum(len(r.tokens[0]) for r in ours) > 30


@qwen3
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_logprobs_agree_with_the_trainers(top_p, engine, trainer, mixed, vllm_cfg, monkeypatch):
    """At temperature 0.8, with a ban, and with a nucleus: scored is the distribution before it is
    cut."""
    monkeypatch.setattr(engine, "cfg", replace(vllm_cfg, top_p=top_p))
    rollouts = engine.generate(mixed[0], 6, names(mixed[0]))
    assert gap(trainer, mixed[0], rollouts) < 1e-4
    assert len({tuple(t.tolist()) for r in rollouts for t in r.tokens}) > 10


@qwen3
def test_samples_have_a_name(engine, prompts):
    a, b, c = (engine.generate(prompts[:4], 3, names(prompts[:4], step)) for step in (1, 1, 2))
    same = lambda x, y: all(
        torch.equal(s, t) for p, q in zip(x, y) for s, t in zip(p.tokens, q.tokens)
    )
    assert same(a, b) and not same(a, c)


@qwen3
def test_more_prompts_than_fit_into_one_step_of_the_engine(engine, trainer, prompts):
    """Prompts that are prefilled in chunks would end the CPU build here."""
    many = [
        replace(p, ids=torch.cat([p.ids[:-2], p.ids[-12:-2].repeat(12), p.ids[-2:]]))
        for p in prompts * 4
    ]
    assert sum(len(p.ids) for p in many) * 4 > 2 * 8192
    rollouts = engine.generate(many, 4, names(many), limit=4)
    assert None not in rollouts and gap(trainer, many, rollouts) < 1e-4


@qwen3
def test_eos_is_inside_and_the_length_limit_is_marked(engine, prompts):
    eos, rollouts = engine.tok.eos_token_id, engine.generate(prompts, 8, names(prompts))
    assert any(f for r in rollouts for f in r.finished)
    for r in rollouts:
        for tokens, logprobs, finished in zip(r.tokens, r.logprobs, r.finished):
            assert len(tokens) == len(logprobs) and (tokens[:-1] != eos).all()
            assert finished == (tokens[-1] == eos).item()
    cut = engine.generate(prompts, 4, names(prompts), limit=3)
    pairs = [(t, f) for r in cut for t, f in zip(r.tokens, r.finished)]
    assert all((t[-1] == eos) == f and (f or len(t) == 3) for t, f in pairs)
    assert sum(f for _, f in pairs) < len(pairs) / 4  # few end so early


@qwen3
def test_a_picture_is_encoded_once_for_all_its_responses(engine, mixed):
    """Patches that went through the engine's vision tower, against those of the distinct
    pictures."""
    engine.engine.reset_encoder_cache()
    engine.engine.reset_prefix_cache()
    patches = []
    hook = engine.llm.apply_model(
        lambda m: m.visual.register_forward_pre_hook(lambda _, args: patches.append(len(args[0])))
    )[0]
    prompts = [mixed[0][0], *mixed[0][3:]]
    engine.generate(prompts, 8, names(prompts))
    hook.remove()
    assert sum(patches) == sum(len(p.pixels) for p in prompts)


@qwen3
def test_visual_tokens_are_never_sampled(engine, trainer, prompts, processors):
    """A policy that wants nothing else."""
    image = processors[0].convert_tokens_to_ids("<|image_pad|>")
    with torch.no_grad():
        trainer.vlm.lm_head.weight[image] += 3.0 * trainer.vlm.lm_head.weight.abs().max()
    engine.sync(trainer)
    rollouts = engine.generate(prompts, 8, names(prompts))
    assert not trainer.banned[torch.cat([t for r in rollouts for t in r.tokens])].any()
    assert gap(trainer, prompts, rollouts) < 1e-4


@qwen3
def test_a_refused_prompt_is_named_and_the_others_go_on(engine, prompts, capsys):
    bad = replace(
        prompts[1],
        ids=prompts[1].ids[prompts[1].ids != engine.pad],
        example=replace(prompts[1].example, id="no placeholder"),
    )
    long = replace(
        prompts[2], ids=prompts[2].ids.repeat(20), example=replace(prompts[2].example, id="endless")
    )
    batch = [prompts[0], bad, long, prompts[3]]
    rollouts = engine.generate(batch, 2, names(batch))
    assert [r is None for r in rollouts] == [False, True, True, False]
    said = "".join(capsys.readouterr())
    assert "example no placeholder is left out" in said and "example endless is left out" in said
    # And nothing of them is left in the engine.
    assert engine.generate(prompts, 2, names(prompts))[7] is not None


@qwen3
def test_weights_and_caches_are_fresh_after_a_sync(engine, trainer, prompts):
    """The same prompts again, so that whatever a stale prefix or picture cache holds would be
    used."""
    before = engine.generate(prompts, 2, names(prompts))
    perturb(trainer)
    assert gap(trainer, prompts, engine.generate(prompts, 2, names(prompts))) > 0.05
    engine.sync(trainer)
    after = engine.generate(prompts, 2, names(prompts))
    assert gap(trainer, prompts, after) < 1e-4 and gap(trainer, prompts, before) > 0.05


@qwen3
def test_the_check_finds_a_sync_that_does_nothing_and_one_that_forgets_a_tensor(
    engine, trainer, prompts, monkeypatch
):
    some, whole = prompts[:3], full_parameters
    before = [p.clone() for p in trainer.parameters()]
    assert check_sync(engine, trainer, some, names(some), 1e-3) < 1e-4
    # Undone to the last bit.
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters()))
    for lost in (
        "visual.blocks.0.attn.proj.weight",
        "language_model.layers.2.mlp.down_proj.weight",
        "embed_tokens.weight",
    ):
        parameters = trainer.vlm.named_parameters()
        stale = {n: p.detach().clone() for n, p in parameters if n.endswith(lost)}
        assert len(stale) == 1

        def forgets(policy, stale=stale):
            return ((n, stale.get(n, p)) for n, p in whole(policy))

        monkeypatch.setattr(plumbing.engine, "full_parameters", forgets)
        with pytest.raises(SystemExit, match="does not have the trainer's weights"):
            check_sync(engine, trainer, some, names(some), 1e-3)
        monkeypatch.undo()
    monkeypatch.setattr(engine, "sync", lambda policy: None)
    with pytest.raises(SystemExit, match="does not have the trainer's weights"):
        check_sync(engine, trainer, some, names(some), 1e-3)


@qwen3
def test_a_sync_streams(engine, trainer, monkeypatch):
    """At no moment are more than a few of the tensors alive that were gathered for the engine."""
    whole, alive, most = full_parameters, weakref.WeakSet(), [0]
    total = sum(p.numel() for p in trainer.vlm.parameters())

    def counted(policy):
        for n, p in whole(policy):
            p = p.clone()
            alive.add(p)
            most[0] = max(most[0], sum(x.numel() for x in alive))
            yield n, p

    monkeypatch.setattr(plumbing.engine, "full_parameters", counted)
    engine.sync(trainer)
    assert 0 < most[0] < total / 4


def test_the_model_runner_is_the_one_that_is_asked_for(engine):
    (modules,) = engine.llm.collective_rpc(
        lambda worker: [kind.__module__ for kind in type(worker.model_runner).__mro__]
    )
    v2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
    assert ("vllm.v1.worker.gpu.model_runner" in modules) == v2


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests above have run it")
def test_the_model_runner_of_cuda_does_the_same():
    """Runner V2 under some of the tests above: its sampler, its log-probs, its weights anew."""
    some = "model_runner_is or greedy or logprobs or (caches and fresh)"
    flags = ["-q", "-p", "runner_v2", "-m", "not slow", "-k", some, "tests/test_vllm.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        text=True,
        capture_output=True,
        timeout=1200,
    )
    assert done.returncode == 0 and "5 passed" in done.stdout, done.stdout[-3000:]


# -------------------------------------------------------------------------- the real commands

FLAGS = [*SMALL[2:], "--sampler", "vllm", "--algo", "papo_g"]


def train(out, *flags, processes=1):
    launch = [sys.executable]
    if processes > 1:
        torchrun = "-m torch.distributed.run --standalone --nproc_per_node"
        launch += [*torchrun.split(), str(processes)]
    done = subprocess.run(
        [*launch, "train.py", "--out", out, *map(str, [*FLAGS, *flags])],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Exception" not in done.stderr
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return done.stdout, [json.loads(line) for line in lines]


def test_training_samples_with_vllm(tmp_path):
    stdout, lines = train(tmp_path / "run", "--steps", 2, "--top_p", 0.99)
    assert "sampler vllm (as asked)" in stdout and "responses come from the nucleus" in stdout
    assert "weights reach the sampler" in stdout
    assert [m["step"] for m in lines] == [1, 2]
    for m in lines:  # the second step samples with the weights of the first's updates
        assert m["sampler_gap"] < 1e-5 and abs(m["sampler_kl"]) < 1e-6
        assert m["host_memory_gb"] > 0.1 and m["refused_prompts"] == 0
    checkpoint = tmp_path / "run" / "checkpoint-2"
    flags = "--n 2 --questions 4 --sampler vllm".split()
    done = command("eval.py", "--model", checkpoint, *flags)
    assert done.returncode == 0 and "sampler vllm (as asked)" in done.stdout, done.stderr[-2000:]
    assert "vision" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_processes_with_an_engine_each_or_one_between_them(tensor_parallel, tmp_path):
    _, lines = train(
        tmp_path / "run", "--steps", 2, "--tensor_parallel", tensor_parallel, processes=2
    )
    assert len(lines) == 2 and all(m["sampler_gap"] < 1e-5 for m in lines)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_with_lora_the_engine_samples_from_the_merged_weights(processes, tmp_path):
    """At the second step the adapters have learned, and the engine's log-probs are the trainer's;
    what it was sent is what --merge writes."""
    flags = ["--steps", 2, "--lora_rank", 4, "--lr", 1e-2, "--merge"]
    stdout, lines = train(tmp_path / "run", *flags, processes=processes)
    assert "LoRA of rank 4" in stdout and "weights reach the sampler" in stdout
    assert all(m["sampler_gap"] < 1e-5 for m in lines) and lines[1]["ref_kl"] > 1e-4
    flags = "--n 2 --questions 4 --sampler vllm".split()
    done = command("eval.py", "--model", tmp_path / "run" / "checkpoint-2" / "merged", *flags)
    assert done.returncode == 0 and "vision" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
def test_bfloat16_stays_within_the_tolerance_of_the_check(tmp_path):
    _, lines = train(
        tmp_path / "run", "--steps", 2, "--dtype", "bfloat16", "--importance_cap", 2, processes=2
    )
    assert all(1e-4 < m["sampler_gap"] < 0.1 for m in lines)


@pytest.mark.slow
def test_memory_is_flat_over_200_steps(tmp_path):
    _, lines = train(tmp_path / "run", "--steps", 200, "--gamma", 0.02, "--anneal_steps", 0)
    memory = [m["host_memory_gb"] for m in lines]
    early, late = sum(memory[40:60]) / 20, sum(memory[-20:]) / 20
    assert late - early < 0.05, (early, late)


@qwen3
def test_an_engine_that_cannot_start_says_why(folder, processors, vllm_cfg):
    banned, long = banned_tokens(folder, processors[0]), replace(vllm_cfg, max_prompt_tokens=5000)
    said = "error: the vLLM engine does not start .*max_model_len.*--sampler hf"
    with pytest.raises(SystemExit, match=said):
        VLLMSampler(folder, processors, banned, long, 1)
