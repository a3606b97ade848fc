"""The planner: its sums held against a simulation and against hand numbers, the docs against it.

The simulation ran train.update with FSDP2 and AdamW on tensors without values, and counted the
bytes of every storage while it lived (2026-11-27, torch 2.13.0, transformers 5.19.0).
"""

import json
import re
from types import SimpleNamespace

from plumbing import fit

import pytest
import torch
from conftest import ROOT

from plumbing.fit import ENGINE_ROOM, OUTSIDE, PREFILL_ROOM, activations, counts, plan, verdict
from plumbing.models.lora import add_adapters, count
from plumbing.models.shapes import PUBLISHED, without_weights
from plumbing.run import setup
from plumbing.run.config import resolve

GB = 1e9
THREE = without_weights("qwen2.5-vl-3b")
N = 3_754_622_976  # its parameters


def config(**flags):
    return resolve(dict(model="qwen2.5-vl-3b", sampler="vllm") | flags, cuda=True)[0]


@pytest.mark.parametrize("name, parameters", zip(PUBLISHED, [N, 8_292_166_656, 2_127_532_032]))
def test_shapes_have_the_published_number_of_parameters(name, parameters):
    model, cfg = without_weights(name), config(lora_rank=16)
    assert counts(model, config()) == (parameters, 0)
    assert counts(model, cfg) == count(add_adapters(model, cfg))


# Model, GPUs, their GB, flags; GB in update, roll-out, wake-up, resume; of the update, activations.
SIMULATED = [
    ("qwen3-vl-2b", 1, 80, {}, [52.28, 77.04, 43.16, 45.55], 6.73),
    ("qwen3-vl-2b", 2, 80, {}, [35.26, 60.02, 26.14, 24.28], 6.73),
    ("qwen2.5-vl-3b", 1, 80, {}, [86.14, 103.07, 72.45, 78.09], 8.04),
    ("qwen2.5-vl-3b", 2, 80, {}, [56.10, 73.04, 42.41, 40.55], 8.04),
    ("qwen2.5-vl-3b", 4, 80, {}, [41.00, 58.02, 27.39, 21.77], 7.97),
    ("qwen2.5-vl-7b", 2, 80, {}, [100.45, 109.34, 89.19, 85.92], 14.53),
    ("qwen2.5-vl-7b", 4, 80, {}, [58.99, 76.17, 56.02, 44.46], 14.53),
    ("qwen2.5-vl-7b", 8, 80, {}, [38.26, 59.58, 39.44, 23.73], 14.53),
    ("qwen2.5-vl-3b", 1, 24, {"card": "24gb"}, [14.90, 21.67, 20.30, 10.99], 3.92),
]


@pytest.mark.parametrize("name, world, memory, flags, phases, passing", SIMULATED)
def test_every_phase_takes_what_was_simulated(name, world, memory, flags, phases, passing):
    made = plan(without_weights(name), config(model=name, **flags), world, memory * GB)
    assert [x / GB for x in made.totals.values()] == pytest.approx(phases, rel=0.05)
    assert made.phases["update"]["activations"] / GB == pytest.approx(passing, rel=0.05)


KEPT = dict(activation_checkpointing=False)  # a run without it
OTHERS = [
    ("qwen2.5-vl-3b", 2, False, 16384, KEPT, 96.81),
    ("qwen3-vl-2b", 2, False, 16384, KEPT, 62.63),
    ("qwen2.5-vl-7b", 4, True, 4096, {}, 7.91),
    ("qwen2.5-vl-7b", 4, True, 65536, {}, 41.93),
    ("qwen2.5-vl-7b", 4, False, 16384, {}, 13.83),
    ("qwen2.5-vl-3b", 2, False, 16384, dict(dtype="float32"), 15.24),
]


@pytest.mark.parametrize("name, world, exchange, tokens, flags, passing", OTHERS)
def test_other_updates_take_what_was_simulated(name, world, exchange, tokens, flags, passing):
    found = activations(without_weights(name), config(**flags), world, exchange, tokens)
    assert found / GB == pytest.approx(passing, rel=0.05)


def test_what_is_always_there_by_hand():
    def of(memory=80, **flags):
        return plan(THREE, config(keep=2, **flags), 2, memory * GB)

    # On 2 GPUs: 4 N / 2 bytes of weights and of the reference, 8 N / 2 of moments; whole gradients,
    # which are no more than a fifth of 80 GB; two checkpoints while a third is written.
    made, always = of(), 2 * N + 2 * N + 4 * N
    assert not made.exchange and made.disk == 3 * 16 * N
    assert made.phases["update"]["gradients"] == 4 * N
    assert made.totals["roll-out"] == always + 40 * GB + OUTSIDE
    assert made.totals["wake-up"] == always + 2 * N + 6 * 151936 * 2048 + OUTSIDE
    assert made.totals["resume"] == always + 2 * N + OUTSIDE
    assert of(70).exchange and of(70).phases["update"]["gradients"] == 2 * N
    assert of(beta=0.0).phases["update"]["reference"] == 0
    assert of(sleep=False).phases["update"]["engine"] == 40 * GB
    # 2 bytes of weights; 2 x 2 bytes in each of 36 layers and 2 heads of 128 for 14,336 tokens; a
    # prefill of 6,144, the longest prompt and response.
    needed = 2 * N + 14_336 * 4 * 36 * 2 * 128 + ENGINE_ROOM + 6144 * PREFILL_ROOM
    assert of(gpu_memory_utilization=0.1).missing == needed - 8 * GB
    # Where pi_mask has a gradient too, all that a pass leaves behind is there twice.
    assert 2.5 < (of(masked_branch="grad").totals["update"] - made.totals["update"]) / GB < 3.5


@pytest.mark.parametrize("memory", [23.7, 25.4])  # what an L4 reports, and what a 4090 does
def test_one_card_of_24_gb_has_2_gb_to_spare_with_lora(memory):
    made = plan(THREE, config(card="24gb"), 1, memory * GB)
    assert made.fits and max(made.totals.values()) < (memory - 2) * GB
    assert made.phases["resume"]["weights"] == 2 * N + 4 * 29_933_568
    assert made.phases["resume"]["moments"] == 8 * 29_933_568
    assert made.phases["update"]["reference"] == 0  # the base is the reference


def test_a_run_that_does_not_fit_is_told_what_is_short_and_what_makes_room():
    short = verdict(THREE, config(sleep=False), 2, 80 * GB)[1]
    assert short.startswith("this does not fit: update needs 96.1 GB on each of 2 GPUs that have")
    assert "; --lora_rank 16 or more GPUs make room (" in short
    # Either does, for the runs that docs/gpus.md says do not fit.
    for model, world in ((THREE, 1), (without_weights("qwen2.5-vl-7b"), 2)):
        for more, flags in ((1, dict(lora_rank=16)), (2, {})):
            assert verdict(model, config(**flags), more * world, 80 * GB)[1] == ""
    assert verdict(THREE, config(sleep=False), 2, 200 * GB)[1] == ""
    assert "; --card 24gb has settings for such a card" in verdict(THREE, config(), 1, 24 * GB)[1]
    small = verdict(THREE, config(gpu_memory_utilization=0.1), 4, 80 * GB)[1]
    assert re.search(
        "the engine needs .* more than its --gpu_memory_utilization 0.1 .*; raise it", small
    )


def test_training_asks_before_it_loads(folder, tmp_path, monkeypatch):
    """On CUDA, which is not here: the device's memory is given, the rest is as it runs."""
    monkeypatch.setattr(setup, "device_memory", lambda device: 1e6)
    monkeypatch.setattr(setup, "which", lambda name: None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    first = SimpleNamespace(device=torch.device("cuda"), world=2, first=True, gather=list)
    lacks = "here, and a C compiler .gcc. and Python.h .python3-dev. is"
    with pytest.raises(SystemExit, match=lacks):
        setup.must_fit(folder, config(), first)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(setup, "which", lambda name: "/usr/bin/gcc")
    with pytest.raises(SystemExit, match="this does not fit: "):
        setup.must_fit(folder, config(), first)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(SystemExit, match="cannot be told, since its model_type is bert"):
        setup.must_fit(tmp_path, config(), first)
    setup.must_fit(tmp_path, config(), SimpleNamespace(device=torch.device("cpu")))


@pytest.mark.parametrize("gpus, code, last", [(2, 0, "it fits"), (1, 1, "error: this does not")])
def test_the_command(monkeypatch, capsys, gpus, code, last):
    monkeypatch.setattr("sys.argv", f"fit --model qwen2.5-vl-3b --gpus {gpus}".split())
    with pytest.raises(SystemExit) as ended:
        fit.main()
    out = capsys.readouterr().out
    assert ended.value.code == code and out.splitlines()[-1].startswith(last)
    assert out.startswith(f"qwen2.5-vl-3b, 3.75 billion parameters; {gpus} x 80.0 GB\n\n| phase |")
    assert "| roll-out |" in out and "once an update; 180.2 GB of checkpoints" in out


def told(name, world, memory, flags, *_):
    """The line of docs/gpus.md on one of SIMULATED."""
    made, short = verdict(without_weights(name), config(model=name, **flags), world, memory * GB)
    named = name + "".join(f" `--{flag} {value}`" for flag, value in flags.items())
    says = "does not fit" if short else "fits"
    numbers = " | ".join(map(fit.gb, [*made.totals.values(), made.disk]))
    return f"| {world} x {memory} GB | {named} | {numbers} | {says} |"


def test_the_tables_in_the_docs_are_the_planners_output():
    pages = [(ROOT / page).read_text() for page in ("docs/gpus.md", "README.md")]
    shown, quoted = (re.findall(r"^\| \d+ x \d+ GB .*$", page, re.M) for page in pages)
    assert shown == [told(*row) for row in SIMULATED]
    assert len(quoted) == 3 and set(quoted) <= set(shown)
