"""The planner: sums held against hand numbers, the simulation against a real run of two processes
and against a deeper simulation, and docs/gpus.md against the planner's own output."""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, command

from plumbing.config import resolve
from plumbing.fit import ROWS, measuring, models, row, verdict
from plumbing.ledger import Ledger
from plumbing.memory import (
    ENGINE_ROOM,
    OUTSIDE,
    PREFILL_ROOM,
    Measured,
    Model,
    State,
    nearest,
    plan,
    state,
)
from plumbing.setup import why_not
from plumbing.shapes import SHAPES
from plumbing.simulation import count_parameters, settings_of, shallow, simulate

GB = 1e9


def config(**flags):
    given = dict(model="qwen2.5-vl-3b", sampler="vllm") | flags
    return resolve(given, cuda=True)[0]


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("qwen2.5-vl-3b", 3_754_622_976),
        ("qwen2.5-vl-7b", 8_292_166_656),
        ("qwen3-vl-2b", 2_127_532_032),
    ],
)
def test_shapes_have_the_published_number_of_parameters(name, parameters):
    assert count_parameters(SHAPES[name], config()) == (parameters, 0)


def test_what_is_always_there():
    # 4 billion parameters on 2 GPUs: 8 GB of weights, 16 of moments, 16 of whole gradients.
    assert state(4 * GB, 0, 2, False, True) == State(8 * GB, 16 * GB, 16 * GB, 8 * GB)
    assert state(4 * GB, 0, 2, True, False) == State(8 * GB, 16 * GB, 8 * GB, 0)
    # 10 million in an adapter on one GPU: 8 GB of base, and the base alone is the reference.
    assert state(1e7, 4 * GB, 1, True, True) == State(8_040_000_000, 8e7, 4e7, 0)


# A model of 1 billion parameters, whose updates take 5 GB beside what is always there.
TEXT = dict(vocab_size=100_000, hidden_size=1000, num_hidden_layers=10, num_attention_heads=10)
SMALL = Model({"text_config": TEXT}, 10**9)


def small(cfg):
    """With LoRA a hundredth is trained."""
    return replace(SMALL, frozen=SMALL.parameters * 99 // 100) if cfg.lora_rank else SMALL


def five(cfg, exchange):
    return Measured(10**9, 1.0, 2.0, 3.0, 5 * GB + 6.0)


def total(phase):
    return round(sum(phase.values()) / GB, 3)


def test_phases_by_hand():
    made = plan(SMALL, config(gpu_memory_utilization=0.5, keep=2), 2, 40 * GB, five)
    # 2 weights, 4 moments, 2 reference; 4 whole gradients, no more than a fifth of 40; 3 outside.
    assert not made.exchange and made.level == 2 and made.fits
    assert total(made.phases["update"]) == 2 + 4 + 2 + 4 + 5 + OUTSIDE / GB
    assert total(made.phases["roll-out"]) == 8 + 20 + OUTSIDE / GB
    assert total(made.phases["wake-up"]) == 8 + 2 + 0.6 + OUTSIDE / GB  # 2 N, one tensor of 10^8
    assert total(made.phases["resume"]) == 8 + 2 + OUTSIDE / GB
    assert made.disk == 3 * 16 * GB  # two are kept while a third is written


def test_what_the_settings_change():
    def of(memory=40, **flags):
        return plan(SMALL, config(**flags), 2, memory * GB, five)

    assert of(90).level == 0 and total(of(90).phases["update"]) == 20 + 45  # all fits beside it
    assert total(of(90, sleep=2).phases["update"]) == 20
    assert of(19).exchange and of(19).phases["update"]["gradients"] == 2 * GB
    assert of(beta=0.0).phases["update"]["reference"] == 0
    offloaded = of(cpu_offload=True)
    assert total(offloaded.phases["update"]) == 5 + OUTSIDE / GB and offloaded.host == 10 * GB
    # 2 GB of weights; keys and values of 14,336 tokens, 2 x 2 x 10 x 1000 bytes each; a prefill of
    # 6,144 tokens, the longest prompt and response.
    needed = 2 * GB + 14_336 * 40_000 + ENGINE_ROOM + 6144 * PREFILL_ROOM
    assert of(gpu_memory_utilization=0.1).missing == needed - 4 * GB


def test_an_adapter_costs_its_base_and_little_more():
    made = plan(replace(SMALL, frozen=10**9 - 10**7), config(sleep=2), 1, 24 * GB, five)
    assert total(made.phases["update"]) == 1.98 + 0.04 + 0.08 + 0.04 + 5 + OUTSIDE / GB
    assert made.disk == 3 * (4 * GB + 0.12 * GB)


def test_the_nearest_settings_fit_and_come_in_order():
    cfg = config(sleep=0)
    assert nearest(small, cfg, 2, 32 * GB, five)[0] == ["--sleep 2"]
    made, short = verdict(small, cfg, 2, 32 * GB, five)
    assert not made.fits and short.startswith(
        "this does not fit: update needs 36.0 GB on each of 2"
    )
    assert "these fit: --sleep 2" in short
    assert verdict(small, cfg, 2, 60 * GB, five)[1] == ""
    hopeless = verdict(small, cfg, 2, 1 * GB, five)[1]
    assert hopeless.endswith("no change that is known here fits (docs/gpus.md)")
    assert "--card 24gb" in verdict(small, cfg, 1, 24 * GB, five)[1]


def test_a_ledger_counts_storages_while_they_live():
    with Ledger() as ledger:
        x = torch.empty(1000)
        view, half = x.view(10, 100), x.to(torch.bfloat16)
        assert ledger.live == 4000 + 2000 and view.shape == (10, 100)
        half.untyped_storage().resize_(0)
        assert ledger.live == 4000
        chosen = view[torch.arange(10) < 3]  # how many are true is known
        assert chosen.shape == (3, 100) and ledger.live >= 4000 + 1200
        del x, view, half, chosen
    assert ledger.live == 0 and max(ledger.peaks.values()) >= 6000


# What a real process of two holds, on the toy: after a pass without an exchange, and after a step.
REAL = """
import json, sys, torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from conftest import random_responses
from torch.distributed.fsdp import FSDPModule
import papo, train
from plumbing.config import resolve
from plumbing.data import encode
from plumbing.optimiser import Optimiser
from plumbing.policy import banned_tokens, load_policy, load_processors
from plumbing.processes import Processes
from toy.task import ToyData

folder = {folder!r}
cfg = resolve(dict(model=folder, data="toy", sampler="hf", packing="rows"), cuda=False)[0]
processes = Processes()
processors = load_processors(folder, cfg)
policy = load_policy(folder, banned_tokens(folder, processors[0]), cfg, processes)
optimiser, data = Optimiser(policy, cfg), ToyData("train", 2)
prompts = [encode(data[i], *processors) for i in range(2)]
rows = policy.pack(prompts, random_responses(prompts, processors[0]))
def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)
said = {{"weights": size(p.to_local() for p in policy.parameters())}}
for exchange in (False, True):
    policy.set_requires_gradient_sync(exchange)
    policy(rows, rows.pixels).logp.sum().backward()
    sharded = [m for m in policy.modules() if isinstance(m, FSDPModule)]
    parts = [m._get_fsdp_state()._fsdp_param_group for m in sharded]
    if exchange:
        said["shards"] = size(p.grad.to_local() for p in policy.parameters())
    else:
        held = [p.unsharded_accumulated_grad_data if p.unsharded_accumulated_grad is not None
                else p.unsharded_param.grad for g in parts for p in g.fsdp_params]
        said["whole"] = size(held)
optimiser.step(policy)
moments = [v for s in optimiser.adamw.state.values() for n, v in s.items() if n != "step"]
said["moments"] = size(v.to_local() for v in moments)
if processes.first:
    print(json.dumps(said))
processes.leave()
"""


@pytest.mark.slow
def test_the_simulation_holds_what_a_real_run_of_two_processes_holds(folder, tmp_path):
    script = tmp_path / "real.py"
    script.write_text(REAL.format(root=str(ROOT), folder=str(folder)))
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    done = command(*torchrun[:1], *torchrun[1:], script)
    assert done.returncode == 0, done.stderr[-2000:]
    real = json.loads(done.stdout.splitlines()[-1])
    cfg = resolve({"model": str(folder), "data": "toy", "sampler": "hf"}, cuda=False)[0]
    for exchange, gradients in ((False, "whole"), (True, "shards")):
        here = simulate(settings_of(folder), cfg, 2, 2048, exchange, depth=(4, 2))
        assert here.weights == pytest.approx(real["weights"], rel=0.01)
        # An update leaves a few numbers for each of its 2,048 tokens behind.
        assert 0 <= here.moments - real["moments"] < 64 * 2048
        assert 0 <= here.gradients - real[gradients] < 64 * 2048


def deep():
    """The 3B's settings with few channels, 7 layers and 9 vision blocks."""
    narrow, text = dict(SHAPES["qwen2.5-vl-3b"]), dict(hidden_size=512, intermediate_size=2048)
    text |= dict(num_hidden_layers=7, num_attention_heads=4, vocab_size=2000)
    vision = dict(depth=9, hidden_size=128, intermediate_size=256, num_heads=4, out_hidden_size=512)
    narrow["text_config"] = narrow["text_config"] | text
    narrow["vision_config"] = narrow["vision_config"] | vision
    ids = "image_token_id video_token_id vision_start_token_id vision_end_token_id".split()
    return narrow | {name: 1990 + i for i, name in enumerate(ids)}


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [False, True])
def test_a_few_layers_tell_what_many_take(exchange):
    few = simulate(deep(), config(), 2, 2048, exchange)
    many = simulate(deep(), config(), 2, 2048, exchange, depth=(7, 9))
    assert few.parameters == many.parameters == count_parameters(deep(), config())[0]
    for name in ("weights", "moments", "gradients", "peak"):
        assert getattr(few, name) == pytest.approx(getattr(many, name), rel=1e-3), name


@pytest.mark.slow
def test_no_more_layers_are_simulated_than_there_are():
    few = shallow(deep(), 2, 3)
    exact = simulate(few, config(), 2, 2048, True, depth=(2, 3))
    assert exact == simulate(few, config(), 2, 2048, True)
    assert exact.parameters == count_parameters(few, config())[0]


@pytest.mark.slow
def test_the_simulation_works_on_the_cpu_where_there_is_a_gpu(monkeypatch):
    """What torch would shard over by itself there."""
    few = shallow(deep(), 2, 2)
    expected = simulate(few, config(), 2, 2048, False)
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda: torch.device("cuda"))
    assert simulate(few, config(), 2, 2048, False) == expected


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_stopped_with_a_sentence(folder, tmp_path, capsys):
    cfg = config(model=str(folder))
    assert why_not(folder, cfg, 2, 1e6).startswith("this does not fit: ")
    assert why_not(tmp_path, cfg, 2, 1e6) == ""  # no model to simulate: the run goes on
    assert "whether this run fits is not known" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_says_that_one_card_of_24_gb_is_enough():
    done = command("-m", "plumbing.fit", *"--card 24gb --gpus 1 --memory 24".split())
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| roll-out |" in done.stdout and done.stdout.endswith("it fits\n")
    assert "passes" in done.stderr  # 18 seconds, and not in silence


@pytest.mark.slow
def test_one_card_of_24_gb_has_2_gb_to_spare_with_lora():
    cfg, settings = config(card="24gb"), SHAPES["qwen2.5-vl-3b"]
    model, measure = models(settings)(cfg), measuring(settings, 1)
    assert 2.9e7 < model.trained < 3.0e7
    for memory in (23.7 * GB, 25.4 * GB):  # what an L4 reports, and what a 4090 does
        made = plan(model, cfg, 1, memory, measure)
        assert made.fits and made.level == 2
        assert max(made.totals.values()) < memory - 2 * GB


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, world, exchange, peak",
    [
        ("qwen2.5-vl-3b", 2, False, 53),
        ("qwen2.5-vl-3b", 4, False, 38),
        ("qwen2.5-vl-7b", 4, False, 80),
        ("qwen2.5-vl-7b", 4, True, 55),
        ("qwen2.5-vl-7b", 8, False, 63),
        ("qwen3-vl-2b", 2, False, 32),
    ],
)
def test_another_simulation_says_the_same(name, world, exchange, peak):
    """GB of an update, the reference included, as an independent simulation with torch's own FSDP
    memory tracker found them."""
    cfg = config(model=name)
    found = simulate(SHAPES[name], cfg, world, 16384, exchange)
    assert (found.peak + found.weights) / GB == pytest.approx(peak, rel=0.1)


def documented():
    return re.findall(r"^\| \d+ x \d+ GB .*$", (ROOT / "docs/gpus.md").read_text(), re.M)


@pytest.mark.slow
@pytest.mark.parametrize("line", ROWS, ids=lambda line: f"{line[0]} x {line[1]}")
def test_the_table_in_the_docs_is_the_planners_output(line):
    assert row(*line) in documented()


def test_the_table_in_the_docs_has_every_row():
    shown = [tuple(re.match(r"\| (\d+) x (\d+) GB \| ([\w.-]+)", x).groups()) for x in documented()]
    assert shown == [(str(world), str(memory), name) for name, world, memory, *_ in ROWS]
    quoted = re.findall(r"^\| \d+ x \d+ GB .*$", (ROOT / "README.md").read_text(), re.M)
    assert len(quoted) == 3 and set(quoted) <= set(documented())
