"""LoRA: the model it starts from, what is trained, what the sampler is given, and peft's files."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from conftest import ROOT, SMALL, both_families, command, random_responses
from safetensors.torch import load_file, save_file

import eval as evaluation
import plumbing.merge
import plumbing.policy
import rollout
import train as module
from plumbing import checkpoint, lora
from plumbing.common import generator
from plumbing.config import check, resolve
from plumbing.engine import check_sync
from plumbing.merge import load_adapter, merge
from plumbing.policy import (
    Policy,
    WithoutAdapters,
    full_parameters,
    load_processors,
    load_vlm,
    score_only,
)
from plumbing.setup import model_folder, setup, sleep_level
from rollout import TransformersSampler

RANK = 4
LAYERS = 4 * 7  # of the toy, times q, k, v, o, gate, up and down


def adapted(folder, cfg, policy, rank=RANK):
    """The policy again, with adapters that have not learned anything."""
    vlm = lora.add_adapters(load_vlm(folder), replace(cfg, lora_rank=rank))
    return Policy(vlm, policy.banned, policy.temperature)


def teach(policy, amount=0.1):
    """Give every B a value, as training would."""
    with torch.no_grad():
        for i, layer in enumerate(lora.adapters(policy)):
            B = layer.lora_B.weight
            B.copy_(amount * torch.randn(B.shape, generator=generator("teach", i)))
    return policy


@pytest.fixture
def tuned(folder, cfg, policy):
    return teach(adapted(folder, cfg, policy))


@pytest.fixture
def rows(policy, prompts, processors):
    return policy.pack(prompts[:3], random_responses(prompts[:3], processors[0]))


def look(policy, rows):
    return score_only(policy, rows, rows.pixels).logp


@both_families
def test_at_the_start_the_policy_is_the_model_itself(folder, cfg, policy, rows):
    start = adapted(folder, cfg, policy)
    assert torch.equal(look(start, rows), look(policy, rows))
    assert not torch.equal(look(teach(start), rows), look(policy, rows))
    own = dict(policy.vlm.named_parameters())
    streamed = dict(full_parameters(adapted(folder, cfg, policy)))
    assert own.keys() == streamed.keys() and all(torch.equal(own[k], streamed[k]) for k in own)


@both_families
def test_adapters_are_on_the_decoders_linear_layers_and_alone_are_trained(
    folder, cfg, policy, rows, prompts
):
    tuned = teach(adapted(folder, cfg, policy))
    names = [n for n, m in tuned.vlm.named_modules() if isinstance(m, lora.Adapted)]
    assert len(names) == LAYERS and all("language_model.layers" in n for n in names)
    tuned(rows, rows.pixels).logp.sum().backward()
    trained = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in tuned.named_parameters() if p.grad is not None}
    assert all(tuned.get_parameter(n).grad.any() for n in trained)
    assert {n.rpartition(".lora_")[0].removeprefix("vlm.") for n in trained} == set(names)
    assert len(trained) == 2 * LAYERS


def test_what_is_counted(folder, cfg, policy):
    """A layer of r (in + out) each; the frozen rest is the model. No memory is needed for it."""
    on_meta = plumbing.policy.shape_of(folder, replace(cfg, lora_rank=RANK))
    sizes = [(128, 128), (128, 64), (128, 64), (128, 128), (128, 256), (128, 256), (256, 128)]
    everything = sum(p.numel() for p in policy.parameters())
    assert lora.count(on_meta) == (4 * RANK * sum(i + o for i, o in sizes), everything)
    assert lora.count(policy) == (everything, 0)


def test_each_a_is_drawn_from_its_name(folder, cfg, policy):
    """Uniformly within 1 / sqrt(in), and the same in every process and on every day."""
    once, again = (lora.adapters(adapted(folder, cfg, policy)) for _ in range(2))
    draws = [layer.lora_A.weight for layer in once]
    assert all(torch.equal(a, layer.lora_A.weight) for a, layer in zip(draws, again))
    other = lora.adapters(adapted(folder, replace(cfg, seed=7), policy))
    for i, A in enumerate(draws):
        assert 0.9 < A.abs().max() * A.shape[1] ** 0.5 <= 1 and abs(A.mean()) < 0.02
        assert not torch.equal(A, other[i].lora_A.weight)
        assert not any(torch.equal(A, B) for B in draws[i + 1 :] if A.shape == B.shape)


@both_families
def test_merged_is_adapted(folder, cfg, policy, rows):
    """The model with W + (alpha / r) B A says what the model with the adapter beside W says."""
    tuned = teach(adapted(folder, cfg, policy))
    policy.vlm.load_state_dict(dict(full_parameters(tuned)), strict=False)
    assert torch.allclose(look(policy, rows), look(tuned, rows), atol=1e-5)
    layer = lora.adapters(tuned)[3]
    product = layer.lora_B.weight @ layer.lora_A.weight * cfg.lora_alpha / RANK
    assert torch.allclose(layer.merged(), layer.weight + product, atol=1e-6)


def test_the_reference_is_the_policy_without_its_adapters(tuned, policy, rows):
    wanted, seen = look(policy, rows), look(tuned, rows)
    assert torch.equal(look(WithoutAdapters(tuned), rows), wanted)
    assert torch.equal(look(tuned, rows), seen) and not torch.equal(seen, wanted)


# ------------------------------------------------------------------------------- the sampler


def stale(which, before):
    """full_parameters with one matrix of one layer as it was before: the sampler gets a product of
    old and new."""
    name, part = which

    def stream(policy):
        layer = policy.vlm.get_submodule(name)
        matrix = getattr(layer, part).weight
        for key, value in full_parameters(policy):
            if key == f"{name}.weight":
                now = matrix.detach().clone()
                with torch.no_grad():
                    matrix.copy_(before[which])
                    value = layer.merged()
                    matrix.copy_(now)
            yield key, value

    return stream


def unmerged(policy):
    """What a sync would send that knows nothing of adapters."""
    for name, p in policy.vlm.named_parameters():
        if not lora.of_adapter(name):
            yield name, p.detach()


@pytest.mark.parametrize("taught", [False, True])
def test_the_check_sees_every_matrix_that_is_not_merged(
    taught, folder, cfg, policy, prompts, monkeypatch
):
    """At the start, where every product is 0, and later; and all is undone to the last bit."""
    tuned = adapted(folder, cfg, policy)
    tuned = teach(tuned, 0.01) if taught else tuned
    tok = load_processors(folder, cfg)[0]
    sampler = TransformersSampler(load_vlm(folder), tok, policy.banned, cfg)
    names = [(0, "check", i) for i in range(2)]
    before = {n: p.detach().clone() for n, p in tuned.vlm.named_parameters()}
    assert check_sync(sampler, tuned, prompts[:2], names, 1e-3) < 1e-5
    assert all(torch.equal(p, before[n]) for n, p in tuned.vlm.named_parameters())
    mine = dict(sampler.vlm.named_parameters())
    assert all(torch.equal(mine[n], p) for n, p in full_parameters(tuned))  # in step afterwards
    layers = [n for n, m in tuned.vlm.named_modules() if isinstance(m, lora.Adapted)]
    some = [layers[i * 7 % LAYERS + i] for i in range(7)]  # each kind once, at any depth
    parts = [(n, part) for n in some for part in ("lora_A", "lora_B")]
    old = {(n, part): before[f"{n}.{part}.weight"] for n, part in parts}
    for which in [None, *parts]:
        monkeypatch.setattr(rollout, "full_parameters", stale(which, old) if which else unmerged)
        with pytest.raises(SystemExit, match="does not have the trainer's weights"):
            check_sync(sampler, tuned, prompts[:2], names, 1e-3)
        with torch.no_grad():  # a run would end here
            for n, p in tuned.vlm.named_parameters():
                p.copy_(before[n])


def test_the_sampler_of_one_process_samples_with_the_adapters(
    tuned, folder, cfg, policy, prompts, processors
):
    """It shares the trainer's module; one with a copy of its own is given the merged weights."""
    names = [(0, "sample", i) for i in range(4)]
    copy = TransformersSampler(load_vlm(folder), processors[0], policy.banned, cfg)
    copy.sync(tuned)
    shared = TransformersSampler(tuned.vlm, processors[0], policy.banned, cfg)
    shared.sync(tuned)
    for a, b in zip(*(s.generate(prompts[:4], 3, names) for s in (shared, copy))):
        for x, y, p, q in zip(a.tokens, b.tokens, a.logprobs, b.logprobs):
            assert torch.equal(x, y) and torch.allclose(p, q, atol=1e-5)


# ----------------------------------------------------------------------------- peft's files


@pytest.fixture
def saved(tuned, folder, cfg, tmp_path):
    out = tmp_path / "checkpoint-3"
    out.mkdir()
    plumbing.policy.save(tuned, out, folder, cfg, first=True)
    return out


def test_an_adapter_is_written_as_peft_does(saved, tuned, folder, cfg):
    """Names, shapes and settings of peft's format (its documentation, "PEFT checkpoint format")."""
    about = json.loads((saved / "adapter_config.json").read_text())
    assert (about["peft_type"], about["r"], about["lora_alpha"]) == ("LORA", RANK, cfg.lora_alpha)
    assert about["base_model_name_or_path"] == str(folder) and about["bias"] == "none"
    weights = load_file(saved / "adapter_model.safetensors")
    assert len(weights) == 2 * LAYERS
    name = "base_model.model.model.language_model.layers.2.mlp.down_proj.lora_{}.weight"
    assert weights[name.format("A")].shape == (RANK, 256)
    assert weights[name.format("B")].shape == (128, RANK)
    assert {w.dtype for w in weights.values()} == {torch.float32}
    files = {p.name for p in saved.iterdir()}
    assert {"tokenizer.json", "preprocessor_config.json"} <= files
    assert not {"config.json", "model.safetensors"} & files


def test_an_adapter_comes_back_and_merges_to_a_whole_folder(saved, tuned, rows, cfg, tmp_path):
    again, base = load_adapter(saved)
    wanted = dict(tuned.vlm.named_parameters())
    assert all(torch.equal(p, wanted[n]) for n, p in again.vlm.named_parameters())
    merge(saved, tmp_path / "whole")
    policy = Policy(load_vlm(model_folder(str(tmp_path / "whole"), cfg)), tuned.banned)
    assert torch.allclose(look(policy, rows), look(tuned, rows), atol=1e-5)
    assert all((tmp_path / "whole" / p.name).exists() for p in base.iterdir() if p.is_file())
    with pytest.raises(SystemExit, match="exists already"):
        merge(saved, tmp_path / "whole")


def test_a_checkpoint_holds_both_where_it_is_asked_to(tuned, rows, folder, cfg, tmp_path):
    both = replace(cfg, lora_rank=RANK, merge=True)
    plumbing.policy.save(tuned, tmp_path, folder, both, first=True)
    assert (tmp_path / "adapter_model.safetensors").exists()
    whole = Policy(load_vlm(model_folder(str(tmp_path / "merged"), cfg)), tuned.banned)
    assert torch.allclose(look(whole, rows), look(tuned, rows), atol=1e-5)
    with pytest.raises(SystemExit, match="--merge: without LoRA there is nothing to merge"):
        check(replace(cfg, merge=True), 1, False)


def test_peft_loads_it(saved, tuned, folder, rows):
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(load_vlm(folder), saved).merge_and_unload()
    theirs = Policy(model.eval(), tuned.banned, tuned.temperature)
    assert torch.allclose(look(theirs, rows), look(tuned, rows), atol=1e-5)


def change(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_adapters_that_cannot_be_merged_get_one_sentence(saved, tmp_path):
    with pytest.raises(SystemExit, match="holds no adapter"):
        load_adapter(tmp_path)
    change(saved, use_dora=True)
    with pytest.raises(SystemExit, match="use_dora is not plain LoRA; merge it with peft"):
        load_adapter(saved)
    change(saved, use_dora=False, r=2 * RANK)
    with pytest.raises(SystemExit, match="adapter_model.safetensors does not fit"):
        load_adapter(saved)
    change(saved, r=RANK)
    file = saved / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({k.replace("layers.3.", "layers.4."): w for k, w in weights.items()}, file)
    with pytest.raises(SystemExit, match="has other adapters than .*; the first is .*layers.4"):
        load_adapter(saved)
    (saved / "adapter_config.json").write_text('{"r": 4}')
    with pytest.raises(SystemExit, match="does not say what to merge .*base_model_name_or_path"):
        load_adapter(saved)


def test_evaluation_says_how_to_merge_and_takes_what_was_merged(saved, monkeypatch, capsys):
    def run(main, *words):
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        main()
        return capsys.readouterr().out

    few = "--n 1 --questions 2 --sampler hf".split()
    with pytest.raises(SystemExit, match=f"adapter only; .*`python -m plumbing.merge {saved}`"):
        run(evaluation.main, "eval.py", "--model", saved, *few)
    merged = saved.with_name("checkpoint-3-merged")
    assert run(plumbing.merge.main, "merge", saved) == f"written: {merged}\n"
    assert "vision" in run(evaluation.main, "eval.py", "--model", merged, *few)


# ---------------------------------------------------------------------------------- settings


def test_settings_with_lora_and_on_a_small_card():
    """Ten times the learning rate; flags win over the card's row, and the row over the model's."""
    full, small = (
        resolve({"lora_rank": r, "model": "Qwen/Qwen2.5-VL-3B"}, True)[0] for r in (0, 8)
    )
    assert (full.lr, small.lr) == (1e-6, 1e-5)
    assert resolve({"lora_rank": 8}, False)[0].lr == 2e-3
    assert resolve({"lora_rank": 8, "lr": 3e-4}, False)[0].lr == 3e-4
    card = resolve({"card": "24gb", "lora_rank": 32, "group_size": 4}, True)[0]
    check(card, 1, True)
    assert (card.model, card.lora_rank, card.sleep) == ("Qwen/Qwen2.5-VL-3B-Instruct", 32, 2)
    assert (card.max_response_tokens, card.group_size, card.lr) == (1024, 4, 1e-5)
    longest = card.max_prompt_tokens + 5 * card.max_response_tokens
    assert longest <= card.tokens_per_forward  # a group of five is one pass
    with pytest.raises(SystemExit, match="--lora_rank -1: must not be negative"):
        check(resolve({"lora_rank": -1}, False)[0], 1, False)
    # 3.75 billion frozen parameters, 30 million trained: 7.5, 0.6 and 20 GB of room.
    assert sleep_level(30e6, 3.75e9, 1, 80e9, small) == 0
    assert sleep_level(30e6, 3.75e9, 1, 48e9, small) == 2


# -------------------------------------------------------------------------- the real commands

FLAGS = [*SMALL, "--algo", "papo_g", "--lora_rank", str(RANK), "--lr", "1e-3"]


def train(out, *flags, processes=1):
    """train.py on so many processes -> its metrics."""
    launch = [sys.executable]
    if processes > 1:
        torchrun = "-m torch.distributed.run --standalone --nproc_per_node"
        launch += [*torchrun.split(), str(processes)]
    kwargs = dict(cwd=ROOT, text=True, capture_output=True, timeout=400)
    done = subprocess.run([*launch, "train.py", "--out", out, *FLAGS, *map(str, flags)], **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def adapter(checkpoint):
    return load_file(checkpoint / "adapter_model.safetensors")


SAME = "reward loss policy_loss ref_kl perception_kl entropy masked_entropy grad_norm".split()


def one_run(out, folder, rank, **flags):
    """A run of this rank in this process -> Parts"""
    small = dict(sampler="hf", prompts_per_step=2, prompts_per_update=2, group_size=4, lr=1e-3)
    flags = {**small, **flags, "model": str(folder), "data": "toy", "lora_rank": rank}
    return setup(resolve({**flags, "out": str(out)}, False)[0])


def test_a_step_logs_what_full_training_logs(tmp_path, folder):
    """The same line of metrics; at the first update the reference is the policy."""
    lines = []
    for rank in (0, RANK):
        parts = one_run(tmp_path, folder, rank)
        lines.append(module.train_step(parts, module.Progress()))
        moments = sum(p.numel() for p in parts.optimiser.adamw.state)
        assert moments == lora.count(parts.policy)[0]
    full, small = lines
    assert full.keys() == small.keys() and full["phases"].keys() == small["phases"].keys()
    for name in ("loss", "reward", "entropy", "perception_kl", "ref_kl"):
        assert full[name] == pytest.approx(small[name], rel=1e-5, abs=1e-9), name
    assert small["ref_kl"] == 0 and small["grad_norm"] > 0


def test_a_run_that_was_cut_off_goes_on_bit_identical(tmp_path, folder):
    """A checkpoint after one step, and a second step that is lost; then from the checkpoint again.
    There is nothing of W on the disk, which would be 4 bytes for each frozen parameter."""
    parts, progress = one_run(tmp_path, folder, RANK), module.Progress()
    module.train_step(parts, progress)
    checkpoint.save(tmp_path, asdict(progress), parts)
    lost = module.train_step(parts, progress)
    wanted = [p.detach().clone() for p in parts.policy.parameters()]
    saved = tmp_path / "checkpoint-1"
    parts = one_run(tmp_path, folder, RANK)
    progress = module.Progress(**checkpoint.restore(saved, parts))
    again = module.train_step(parts, progress)
    assert all(torch.equal(a, b) for a, b in zip(wanted, parts.policy.parameters()))
    assert [lost[k] for k in SAME] == [again[k] for k in SAME] and again["step"] == 2
    written = sum(f.stat().st_size for f in (saved / "trainer").iterdir())
    trained, frozen = lora.count(parts.policy)
    assert 12 * trained < written < 2 * frozen


@pytest.mark.slow
@pytest.mark.parametrize("model", ["toy", "toy-qwen3"])
def test_two_processes_are_one(model, tmp_path):
    """FSDP2 over gloo, sharded adapters beside a sharded frozen model, layers made again in the
    backward pass; and the sampler's own copy is given merged weights."""
    flags = ["--steps", 2, "--model", model, "--activation_checkpointing", "--merge"]
    one, two = (train(tmp_path / str(n), *flags, processes=n) for n in (1, 2))
    for name in SAME:
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-3, abs=1e-6), name
        assert two[1][name] == pytest.approx(one[1][name], rel=2e-2, abs=1e-4), name
    assert two[1]["sampler_gap"] < 1e-5
    x, y = (adapter(tmp_path / n / "checkpoint-2") for n in ("1", "2"))
    assert x.keys() == y.keys() and all(torch.allclose(x[k], y[k], atol=1e-3) for k in x)
    merge(tmp_path / "2" / "checkpoint-2", tmp_path / "whole")
    x, y = (
        f / "model.safetensors" for f in (tmp_path / "whole", tmp_path / "2/checkpoint-2/merged")
    )
    x, y = load_file(x), load_file(y)
    assert x.keys() == y.keys() and all(torch.allclose(x[k], y[k], atol=1e-6) for k in x)


@pytest.mark.slow
def test_a_bfloat16_base_and_float32_adapters_in_one_shard_group(tmp_path):
    """As on a GPU: the frozen model is kept in bfloat16, the adapters are not; and a run goes on
    with another number of processes."""
    train(tmp_path / "run", "--steps", 1, "--dtype", "bfloat16", processes=2)
    assert {w.dtype for w in adapter(tmp_path / "run" / "checkpoint-1").values()} == {torch.float32}
    flags = ["--steps", 2, "--dtype", "bfloat16", "--resume"]
    lines = train(tmp_path / "run", *flags)
    assert [m["step"] for m in lines] == [1, 2] and all(m["sampler_gap"] < 0.1 for m in lines)


@pytest.mark.slow
def test_supervised_fine_tuning_with_lora(tmp_path):
    """sft.py has the same knob; the tower is frozen with or without --freeze_vision."""
    flags = "--data toy --steps 2 --prompts_per_update 4 --lora_rank 4 --save_every 1".split()
    done = command("sft.py", *flags, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(adapter(tmp_path / "run" / "checkpoint-2")) == 2 * LAYERS
