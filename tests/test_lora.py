"""LoRA: the model it starts from, what is trained, what the sampler is given, and peft's files."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import both_families, random_responses, run_here, train_on
from safetensors.torch import load_file, save_file
from test_train import two_are_one

import plumbing.merge
from plumbing.base.common import generator
from plumbing.models import lora, weights
from plumbing.models.weights import full_parameters, load_vlm
from plumbing.run import checkpoint
from plumbing.run.config import resolve
from plumbing.run.setup import setup
from plumbing.run.sync import SYNC_TOLERANCE, check_sync
from policy import Policy, WithoutAdapters, score_only
from rollout import TransformersSampler

RANK = 4
LAYERS = 4 * 7  # of the toy, times q, k, v, o, gate, up and down
SEEDS = [(0, "check", i) for i in range(4)]


@pytest.fixture
def adapted(folder, cfg, policy):
    """(learned, **settings) -> the policy with adapters; B is as large as was learned."""

    def make(learned, **settings):
        vlm = lora.add_adapters(load_vlm(folder), replace(cfg, **{"lora_rank": RANK} | settings))
        for i, layer in enumerate(lora.adapters(vlm)):
            B = layer.lora_B.weight.data
            B.copy_(learned * torch.randn(B.shape, generator=generator("learned", i)))
        return Policy(vlm, policy.banned)

    return make


@pytest.fixture
def rows(policy, prompts, processors):
    return policy.pack(prompts[:3], random_responses(prompts[:3], processors[0]))


def logprobs(policy, rows):
    return score_only(policy, rows, rows.pixels).logp


@both_families
def test_at_the_start_the_policy_is_the_model_and_its_reference_always(adapted, policy, rows):
    start, learned, wanted = adapted(0), adapted(0.1), logprobs(policy, rows)
    assert torch.equal(logprobs(start, rows), wanted)
    own, streamed = dict(policy.vlm.named_parameters()), dict(full_parameters(start))
    assert own.keys() == streamed.keys() and all(torch.equal(own[k], streamed[k]) for k in own)
    seen = logprobs(learned, rows)
    assert torch.equal(logprobs(WithoutAdapters(learned), rows), wanted)
    assert torch.equal(logprobs(learned, rows), seen) and not torch.equal(seen, wanted)


@both_families
def test_the_decoders_linear_layers_and_alone_are_trained(folder, cfg, policy, adapted, rows):
    """A layer has r (in + out) numbers more; no memory is needed to count them."""
    tuned, everything = adapted(0.1), sum(p.numel() for p in policy.parameters())
    names = [n for n, m in tuned.vlm.named_modules() if isinstance(m, lora.Adapted)]
    assert len(names) == LAYERS and all("language_model.layers" in n for n in names)
    tuned(rows, rows.pixels).logp.sum().backward()
    trained = {f"{n}.lora_{part}.weight" for n in names for part in "AB"}
    for name, p in tuned.vlm.named_parameters():
        assert p.requires_grad and p.grad.any() if name in trained else p.grad is None
    more = RANK * sum(sum(policy.vlm.get_submodule(n).weight.shape) for n in names)
    on_meta = weights.shape_of(folder, replace(cfg, lora_rank=RANK))
    assert lora.count(on_meta) == lora.count(tuned) == (more, everything)


def test_each_a_is_drawn_from_its_name(adapted):
    """Uniformly within 1 / sqrt(in), and the same in every process and on every day."""
    once, again, other = (lora.adapters(adapted(0, seed=seed)) for seed in (1, 1, 7))
    draws = [layer.lora_A.weight for layer in once]
    for i, A in enumerate(draws):
        assert 0.9 < A.abs().max() * A.shape[1] ** 0.5 <= 1
        assert torch.equal(A, again[i].lora_A.weight)
        assert not torch.equal(A, other[i].lora_A.weight)
        assert not any(torch.equal(A, B) for B in draws[i + 1 :] if A.shape == B.shape)


@both_families
def test_rounding_is_no_alarm(adapted, folder, cfg, prompts, processors):
    """A sampler in bfloat16, as on a GPU: what fills the zeros of B must not drown the model."""
    start, vlm = adapted(0, lora_rank=16), load_vlm(folder, torch.bfloat16)
    sampler = TransformersSampler(vlm, processors[0], start.banned, cfg)
    assert check_sync(sampler, start, prompts[:4], SEEDS, 9) < SYNC_TOLERANCE["bfloat16"] / 4


def stale(of, part):
    """Adapted.merged with A or B of one layer as they are now."""
    old = getattr(of, part).weight.detach().clone()

    def merged(layer):
        now = {p: getattr(layer, p).weight.detach() for p in ("lora_A", "lora_B")}
        now |= {part: old} if layer is of else {}
        return layer.weight + layer.scale * now["lora_B"] @ now["lora_A"]

    return merged


@pytest.mark.parametrize("learned", [0, 0.01])
def test_the_check_sees_what_is_not_merged(learned, adapted, folder, prompts, processors, cfg):
    """At the start and later, of each kind of layer, or all at once; no bit is left changed."""
    tuned, prompts = adapted(learned), prompts[:2]
    sampler = TransformersSampler(load_vlm(folder), processors[0], tuned.banned, cfg)
    before = {n: p.detach().clone() for n, p in tuned.vlm.named_parameters()}
    assert check_sync(sampler, tuned, prompts, SEEDS[:2], 1e-3) < 1e-5
    mine, layers = dict(sampler.vlm.named_parameters()), lora.adapters(tuned)
    assert all(torch.equal(mine[n], p) for n, p in full_parameters(tuned))  # in step afterwards
    parts = ["lora_A", "lora_B"] * 7 if learned else ["lora_B", "lora_A"] * 7
    lost = [stale(layers[i * 7 % LAYERS + i], parts[i]) for i in range(7)]
    for merged in [*lost, lambda layer: layer.weight.detach()]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lora.Adapted, "merged", merged)
            with pytest.raises(SystemExit, match="does not have the trainer's weights"):
                check_sync(sampler, tuned, prompts, SEEDS[:2], 1e-3)
    assert all(torch.equal(p, before[n]) for n, p in tuned.vlm.named_parameters())


@pytest.fixture
def saved(adapted, folder, cfg, tmp_path):
    (out := tmp_path / "checkpoint-3").mkdir()
    weights.save_model(adapted(0.1), out, folder, cfg, first=True)
    return out


def test_a_checkpoint_is_as_peft_writes_it(saved, adapted, folder, cfg, rows):
    """Merged by plumbing.merge and, where it is installed, by peft it is the policy."""
    about, written = json.loads((saved / lora.CONFIG).read_text()), load_file(saved / lora.WEIGHTS)
    assert (about["peft_type"], about["r"], about["lora_alpha"]) == ("LORA", RANK, cfg.lora_alpha)
    assert about["base_model_name_or_path"] == str(folder) and about["bias"] == "none"
    assert len(written) == 2 * LAYERS and {w.dtype for w in written.values()} == {torch.float32}
    name = "base_model.model.model.language_model.layers.2.mlp.down_proj.lora_"
    assert [written[f"{name}{x}.weight"].shape for x in "AB"] == [(RANK, 256), (128, RANK)]
    files, merged = {p.name for p in saved.iterdir()}, saved.with_name("checkpoint-3-merged")
    assert {"tokenizer.json", "preprocessor_config.json"} <= files and "config.json" not in files
    run_here(plumbing.merge.main, saved)
    assert {p.name for p in folder.iterdir()} <= {p.name for p in merged.iterdir()}
    with pytest.raises(SystemExit, match="exists already"):
        run_here(plumbing.merge.main, saved)

    def right(vlm):
        models = adapted(0.1), Policy(vlm, adapted(0).banned)
        return torch.allclose(*(logprobs(model, rows) for model in models), atol=1e-5)

    assert right(load_vlm(weights.find_model(merged)))
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(load_vlm(folder), saved)
    assert right(loaded.merge_and_unload().eval())


def test_adapters_that_cannot_be_merged_get_one_sentence(saved):
    about, file = saved / lora.CONFIG, saved / lora.WEIGHTS

    def refused(words, **values):
        about.write_text(json.dumps(json.loads(about.read_text()) | values))
        with pytest.raises(SystemExit, match=words):
            plumbing.merge.load_adapter(saved)

    refused("use_dora is not plain LoRA; merge it with peft", use_dora=True)
    refused("adapter_model.safetensors does not fit", use_dora=False, r=2 * RANK)
    save_file({k.replace("layers.3.", "layers.4."): w for k, w in load_file(file).items()}, file)
    refused("has other adapters than .*; the first is .*layers.4", r=RANK)
    about.write_text('{"r": 4}')
    refused("does not say what to merge .*base_model_name_or_path")


def test_settings_with_lora_and_on_a_small_card():
    card = resolve({"card": "24gb", "lora_rank": 32, "group_size": 4}, True)[0]
    card.check(1, True)
    assert (card.lora_rank, card.group_size, card.lr) == (32, 4, 1e-5)


def test_nothing_of_the_frozen_weights_is_saved(tmp_path, cfg):
    parts = setup(replace(cfg, lora_rank=RANK, out=str(tmp_path), prompts_per_step=2))
    checkpoint.save(tmp_path, {"step": 1, "cursor": 0}, parts)
    written = sum(f.stat().st_size for f in (tmp_path / "checkpoint-1/trainer").iterdir())
    assert 12 * lora.count(parts.policy)[0] < written < 2 * lora.count(parts.policy)[1]


def train(out, *flags, processes=1):
    adapters = ["--algo", "papo_g", "--lora_rank", RANK, "--lr", "1e-3"]
    return train_on(processes, out, *adapters, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["toy", "toy-qwen3"])
def test_two_processes_are_one(model, tmp_path):
    """Sharded adapters on a sharded frozen model; the sampler's copy is given merged weights."""
    flags = ["--steps", 2, "--model", model, "--activation_checkpointing"]
    _, two = (train(tmp_path / str(n), *flags, processes=n) for n in (1, 2))
    assert two[1]["sampler_gap"] < 1e-5
    merged = lambda folder: dict(full_parameters(plumbing.merge.load_adapter(folder)[0]))
    two_are_one(tmp_path / "1", tmp_path / "2", load=merged)


@pytest.mark.slow
def test_a_bfloat16_base_and_float32_adapters_in_one_shard_group(tmp_path):
    """As on a GPU; and a run goes on with another number of processes."""
    train(tmp_path, "--dtype", "bfloat16", "--steps", 1, processes=2)
    written = load_file(tmp_path / "checkpoint-1" / lora.WEIGHTS)
    assert {w.dtype for w in written.values()} == {torch.float32}
    lines = train(tmp_path, "--dtype", "bfloat16", "--steps", 2, "--resume")
    assert [m["step"] for m in lines] == [1, 2] and all(m["sampler_gap"] < 0.1 for m in lines)
