"""The real command, run as a user runs it: every algorithm, stop and resume, two processes, bad
input."""

import dataclasses
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, command
from safetensors.torch import load_file
from torch.optim import AdamW

import papo
import train as module
from plumbing import checkpoint
from plumbing.config import Config, check, resolve
from plumbing.lora import count
from plumbing.policy import shape_of
from plumbing.setup import setup
from rollout import TransformersSampler
from toy.task import ToyData

NUMBERS = (
    "reward accuracy format loss policy_loss entropy clip_high_fraction clip_low_fraction "
    "response_tokens cut_off grad_norm lr seconds tokens_per_second peak_memory_gb"
).split()


def train(out, *flags):
    done = command("train.py", "--out", out, *SMALL, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "\r" not in done.stderr + done.stdout  # this is no terminal
    return done.stdout


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder):
    """An uninterrupted run of six steps, saved at every other one."""
    out = tmp_path_factory.mktemp("run") / "whole"
    return out, train(out, "--algo", "papo_g", "--steps", 6, "--save_every", 2, "--eval_every", 3)


def test_what_a_run_leaves(finished):
    out, stdout = finished
    names = {p.name for p in out.iterdir()}
    files = {"config.json", "metrics.jsonl", "curves.png", "report.html", "evaluation.json"}
    assert files | {"checkpoint-4", "checkpoint-6"} <= names
    # Checkpoints are whole, and two are kept.
    assert not [n for n in names if n.startswith(".making")] and "checkpoint-2" not in names
    lines = metrics(out)
    assert [m["step"] for m in lines] == list(range(1, 7))
    for m in lines:
        for name in NUMBERS + ["perception_kl", "masked_entropy", "ref_kl"]:
            assert isinstance(m[name], float) and m[name] == m[name], name
        assert m["perception_kl"] > 0 and m["entropy"] > 0
        phases = {"rollout", "reward", "masked", "reference", "old", "update", "sync"}
        assert phases <= set(m["phases"])
    assert "val_accuracy" in lines[2] and "val_accuracy" in lines[5]
    assert lines[0]["lr"] == 2e-4  # not 0 on the first step
    assert "general" in stdout and "vision" in stdout and "blind" in stdout
    assert str(out / "report.html") in stdout
    page = (out / "report.html").read_text()
    assert page.count("<img") == 3 * 4 * 2  # before training, and at two validations
    assert "nats" in page and "after step 6" in page and "boxed" in page
    assert page.count("<polyline") > 12 and "step 6 of 6" in page
    after = json.loads((out / "evaluation.json").read_text())["after"]["vision"]["accuracy"]
    assert f'<td class="n">{100 * after:.1f}</td>' in page
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_first_lines_say_which_model_and_why(finished):
    assert re.match(
        r"model toy \(default where there is no CUDA device\), data toy, validation on toy, "
        r"algorithm papo_g",
        finished[1],
    )


def test_logged_config_is_the_one_used(finished, tmp_path):
    """The file holds the object that train.py worked with, and what the optimiser and the sampler
    hold comes from it."""
    logged = json.loads((finished[0] / "config.json").read_text())
    cfg = Config(**logged["config"])
    assert (cfg.algo, cfg.steps, cfg.prompts_per_step, cfg.save_every) == ("papo_g", 6, 4, 2)
    assert "torch" in logged["versions"]
    parts = setup(dataclasses.replace(cfg, out=str(tmp_path), lr=3e-5, weight_decay=0.02))
    (group,) = parts.optimiser.adamw.param_groups
    assert group["lr"] == 3e-5 and group["weight_decay"] == 0.02
    assert parts.sampler.cfg is parts.cfg and parts.policy.temperature == cfg.temperature
    assert metrics(finished[0])[-1]["lr"] == cfg.lr


def test_checkpoints_load_elsewhere(finished):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    folder = finished[0] / "checkpoint-6"
    load = Qwen2_5_VLForConditionalGeneration.from_pretrained
    model, info = load(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tok = AutoTokenizer.from_pretrained(folder)
    assert tok.chat_template and (folder / "preprocessor_config.json").exists()
    assert model.generation_config.eos_token_id == tok.eos_token_id


AFTER_PAPO = [pytest.param(algo, marks=pytest.mark.slow) for algo in ("vppo", "pgpo", "noisy")]
DAPO = pytest.param("dapo", marks=pytest.mark.slow)  # PAPO-D does all that it does


@pytest.mark.parametrize("algo", ["grpo", DAPO, "papo_d", *AFTER_PAPO])
def test_the_other_algorithms_run(algo, tmp_path):
    train(tmp_path / "run", "--algo", algo, "--steps", 2)
    last = metrics(tmp_path / "run")[-1]
    assert ("perception_kl" in last) == (algo in ("papo_d", "vppo", "pgpo"))
    assert ("credit_weight" in last) == (algo in ("vppo", "pgpo"))
    assert ("noise_steps" in last) == (algo == "noisy")
    assert ("ref_kl" in last) == (algo == "grpo")
    if algo == "vppo":  # 0.4 of each response's tokens, rounded up, with a mean alpha of 1
        assert 0.4 < last["credited_tokens"] < 0.6
        assert last["credit_weight"] == pytest.approx(last["credited_tokens"], rel=0.1)
    if algo == "pgpo":  # each response keeps its advantage in sum
        assert last["credit_weight"] == pytest.approx(1.0)
    if algo not in ("grpo", "noisy"):  # dynamic sampling kept informative groups only
        assert last["equal_groups"] == 0 and last["generated_prompts"] >= 4


def same_weights(a, b):
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_ends_bit_identical(finished, tmp_path):
    """SIGKILL at random moments, the moment of saving included; --resume until it ends; the weights
    are those of no kill at all."""
    out, kills, rng = tmp_path / "killed", 0, random.Random(0)
    flags = [sys.executable, "train.py", "--out", str(out), *SMALL, "--algo", "papo_g"]
    flags += ["--steps", "6", "--save_every", "2", "--eval_every", "3"]
    while True:
        resume = ["--resume"] if (out / "config.json").exists() else []
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        process = subprocess.Popen(flags + resume, cwd=ROOT, text=True, **pipes)
        if kills < 3:
            started = time.monotonic()
            # The second kill waits for a checkpoint that is being written; the others come some
            # time after the first step.
            watch = being_saved if kills == 1 else metrics_started
            while process.poll() is None and not watch(out) and time.monotonic() - started < 120:
                time.sleep(0.002)
            time.sleep(rng.random() * (0.02 if kills == 1 else 2.0))
            process.kill()
            kills += 1
        log = process.communicate()[0]
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, log[-3000:]
    assert kills == 3 and same_weights(out / "checkpoint-6", finished[0] / "checkpoint-6")
    drop = "seconds phases tokens_per_second peak_memory_gb host_memory_gb val_seconds".split()
    whole, parts = (
        [{k: v for k, v in m.items() if k not in drop} for m in metrics(o)]
        for o in (finished[0], out)
    )
    assert whole == parts


def being_saved(out):
    return list(out.glob(".making-*"))


def metrics_started(out):
    return (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > 0


def test_ctrl_c_saves_then_stops_and_resumes(tmp_path):
    out = tmp_path / "run"
    flags = [sys.executable, "train.py", "--out", str(out), *SMALL]
    flags += ["--steps", "200", "--save_every", "1000"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(flags, cwd=ROOT, text=True, **pipes)
    deadline = time.monotonic() + 120
    while not metrics_started(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr[-2000:]
    step = int(re.search(r"stopped after step (\d+)", stdout)[1])
    assert (out / f"checkpoint-{step}").is_dir() and metrics(out)[-1]["step"] == step
    train(out, "--resume", "--steps", step + 1, "--save_every", 1000)
    assert [m["step"] for m in metrics(out)] == list(range(1, step + 2))


def test_the_engine_sleeps_while_a_resumed_run_makes_the_optimisers_state(
    finished, tmp_path, monkeypatch
):
    """torch makes that state by a real step, whose memory an awake engine would have. The
    first sync, which wakes the engine, comes after it."""
    out, events = shutil.copytree(finished[0], tmp_path / "run"), []

    def record(kind, name):
        real = getattr(kind, name)

        def recorded(*given, **more):
            events.append(name)
            return real(*given, **more)

        monkeypatch.setattr(kind, name, recorded)

    for name in ("sleep", "sync"):
        record(TransformersSampler, name)
    record(AdamW, "step")
    flags = ["--save_every", 2, "--eval_every", 3, "--steps", 6, "--val_data", "", "--resume"]
    config = json.loads((out / "config.json").read_text())
    config["config"]["val_data"] = ""
    (out / "config.json").write_text(json.dumps(config))
    argv = ["train.py", "--out", out, *SMALL, "--algo", "papo_g", *flags]
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    module.main()
    assert events == ["sleep", "step", "sync"]


def train_on(processes, out, *flags):
    """train.py on so many processes -> its metrics."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc_per_node", str(processes)]
    flags = ["train.py", "--out", out, *SMALL, *map(str, flags)]
    kwargs = dict(cwd=ROOT, text=True, capture_output=True, timeout=300)
    done = subprocess.run([*launch, *flags], **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(out)


SAME = (
    "reward accuracy loss policy_loss ref_kl perception_kl entropy masked_entropy grad_norm"
).split()
SETTINGS = {
    "official": "",
    "paper": "--objective paper",
    "exact": "--perception exact --entropy exact --masked_grad --eta2 0.03",
    "qwen3": "--model toy-qwen3 --activation_checkpointing --tokens_per_forward 400",
    "vppo": "--algo vppo",
    "pgpo": "--credit pgpo --recompute_masked --rollout_picture noisy",
    "compiled": "--compile",
}


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(flags.split(), id=name, marks=[pytest.mark.slow] if flags else [])
        for name, flags in SETTINGS.items()
    ],
)
def test_two_processes_are_one(flags, tmp_path):
    """FSDP2 over gloo: the same losses, rewards and gradient norms as one process, and the same
    weights after three updates and more."""
    one, two = (train_on(n, tmp_path / str(n), "--steps", 2, *flags) for n in (1, 2))
    for name in (name for name in [*SAME, "credit_weight"] if name in one[0]):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-3, abs=1e-6), name
        assert two[1][name] == pytest.approx(one[1][name], rel=2e-2, abs=1e-4), name
    files = (tmp_path / n / "checkpoint-2" / "model.safetensors" for n in ("1", "2"))
    x, y = map(load_file, files)
    assert x.keys() == y.keys() and all(torch.allclose(x[k], y[k], atol=1e-3) for k in x)


@pytest.mark.slow
def test_a_process_without_a_picture_does_not_leave_the_other_waiting(folder, tmp_path):
    """Of two prompts one has a picture and one has none: each process gets one of them, and the
    vision tower needs both."""
    question, picture = "how many red objects are there ?", str(tmp_path / "a.png")
    rows = [
        {"problem": f"<image> {question}", "answer": "3", "images": [picture]},
        {"problem": question, "answer": "3", "images": []},
    ]
    ToyData("train", 1)[0].images[0].save(tmp_path / "a.png")
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--model", folder, "--data", tmp_path / "mixed.jsonl", "--prompts_per_step", 2]
    flags += ["--max_response_tokens", 16, "--tokens_per_forward", 1, "--dtype", "float32"]
    flags += ["--packing", "rows", "--lr", "1e-4", "--steps", 2]
    one, two = (train_on(n, tmp_path / str(n), *flags) for n in (1, 2))
    for name in SAME:
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-3, abs=1e-6), name


@pytest.mark.slow
def test_two_nodes_are_one(tmp_path):
    """Two launchers that find each other, as on two machines with a shared folder; the lines that
    docs/gpus.md gives."""
    one = train_on(1, tmp_path / "one", "--steps", 1)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    launch += ["--nproc_per_node", "1", "--master_addr", "localhost", "--master_port", str(port)]
    program = ["train.py", "--out", str(tmp_path / "two"), *SMALL, "--steps", "1"]
    logs, nodes = [tmp_path / "first.log", tmp_path / "second.log"], []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            streams = dict(stdout=file, stderr=subprocess.STDOUT)
            flags = [*launch, "--node_rank", str(rank), *program]
            nodes.append(subprocess.Popen(flags, cwd=ROOT, **streams))
    ended = [node.wait(timeout=300) for node in nodes]
    assert ended == [0, 0], "\n".join(f"{log.name}: {log.read_text()[-4000:]}" for log in logs)
    two = metrics(tmp_path / "two")
    for name in SAME:
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-3, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("script", ["step.py", "rollout.py"])
def test_the_measurements_run(script):
    flags = ["--sampler", "hf", "--prompts", 4, "--group", 2, "--rounds", 1]
    done = command(f"bench/{script}", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
    assert all(v > 0 for k, v in seconds.items() if not isinstance(v, dict) and k != "sync")


@pytest.mark.slow
@pytest.mark.parametrize("first,then", [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(first, then, tmp_path):
    """Two steps on some processes and the third on others: the third is that of a run that stayed
    where it was."""
    whole = train_on(1, tmp_path / "whole", "--steps", 3)
    train_on(first, tmp_path / "moved", "--steps", 2)
    moved = train_on(then, tmp_path / "moved", "--steps", 3, "--resume")
    assert [m["step"] for m in moved] == [1, 2, 3]
    for name in SAME:
        assert moved[2][name] == pytest.approx(whole[2][name], rel=2e-2, abs=1e-4), name


@pytest.mark.slow
def test_a_run_without_any_picture_resumes(folder, tmp_path):
    """The vision tower has no part in it, and still has its place in the optimiser's state."""
    problems = [f"how many red objects are there ? {i}" for i in range(8)]
    rows = [json.dumps({"problem": p, "answer": "3", "images": []}) for p in problems]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    flags = ["--model", folder, "--data", tmp_path / "text.jsonl", "--max_response_tokens", 8]
    flags += ["--dtype", "float32", "--lr", "1e-4"]
    train_on(1, tmp_path / "run", *flags, "--steps", 1)
    lines = train_on(1, tmp_path / "run", *flags, "--steps", 2, "--resume")
    assert len(lines) == 2 and all(m["perception_kl"] == 0 for m in lines)


def test_an_annealed_run_ends_without_the_perception_loss(tmp_path):
    out = tmp_path / "run"
    train(out, "--gamma", 0.1, "--anneal_steps", 2, "--steps", 3)
    lines = metrics(out)
    assert [m["gamma"] for m in lines] == pytest.approx([0.1, 0.05, 0.0])
    assert ["perception_kl" in m for m in lines] == [True, True, False]
    first, second, _ = lines
    for m in (first, second):  # minus J holds the weight of its own step
        terms = m["policy_loss"] + 0.01 * m["ref_kl"] - m["gamma"] * m["perception_kl"]
        assert abs(m["loss"] - terms) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--credit vppo", "--credit pgpo", "--rollout_picture noisy"])
def test_micro_batches_are_memory_only(flags, tmp_path):
    flags = ["--steps", 1, *flags.split()]
    train(tmp_path / "small", *flags)
    train(tmp_path / "large", *flags, "--tokens_per_forward", 400)
    a, b = metrics(tmp_path / "small")[0], metrics(tmp_path / "large")[0]
    names = ["loss", "perception_kl", "ref_kl", "entropy", "grad_norm", "reward", "policy_loss"]
    for name in names + (["credit_weight"] if "--credit" in flags else []):
        assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tmp_path, folder, monkeypatch):
    """The real update, with an advantage that overflows."""
    parts, progress = one_run(tmp_path, folder, prompts_per_step=2), module.Progress()
    before = [p.detach().clone() for p in parts.policy.parameters()]
    monkeypatch.setattr(papo, "group_advantages", lambda r: torch.full_like(r, float("inf")))
    line = module.train_step(parts, progress)
    assert line["skipped_updates"] == 1 and unchanged(before, parts.policy)
    monkeypatch.undo()
    line = module.train_step(parts, progress)
    assert line["skipped_updates"] == 1 and not unchanged(before, parts.policy)


BAD = {
    "unknown flag": (["--gama", "1"], "unrecognized arguments: --gama"),
    "unknown value": (["--algo", "ppo"], "invalid choice"),
    "not a number": (["--steps", "many"], "invalid int value"),
    "batch arithmetic": (["--prompts_per_step", "5"], "not a multiple"),
    "group of one": (["--group_size", "1"], "at least 2"),
    "mask ratio": (["--mask_ratio", "1.5"], "between 0 and 1"),
    "no such model": (["--model", "/nowhere"], "there is no such folder"),
    "a run for a model": (["--model", "RUN"], "is a run and no model; give one of its checkpoints"),
    "resume of nothing": (["--resume"], "no run in"),
    "no such data": (["--data", "/nowhere.parquet"], "no such file"),
    "no such data here": (["--data", "rows.json", "--warm_steps", "479"], "no such file"),
    "no knob below zero": (["--lr", "-1"], "greater than 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence(case, tmp_path, monkeypatch):
    flags, words = BAD[case]
    (tmp_path / "other" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "other" / "config.json").write_text('{"config": {}}')
    flags = [str(tmp_path / "other") if flag == "RUN" else flag for flag in flags]
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "run"), *SMALL, *flags])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    message = stopped.value.code
    assert message.startswith("error: ") and words in message and "\n" not in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_bad_input_ends_the_command_without_a_traceback(tmp_path):
    done = command("train.py", "--out", tmp_path / "run", "--gama", 1)
    assert done.returncode == 1
    said = "unrecognized arguments: --gama 1; --gama may be meant to be --gamma; see --help"
    assert done.stderr.strip() == f"error: {said}"


def test_a_run_without_validation_ends_too(tmp_path):
    """It has measured nothing, so its last checkpoint says that it has ended."""
    settings = {"steps": 4, "val_data": ""}
    (tmp_path / "config.json").write_text(json.dumps({"config": settings}))
    for step in (2, 4):
        assert not checkpoint.is_finished(tmp_path)
        (tmp_path / f"checkpoint-{step}" / "trainer").mkdir(parents=True)
        (tmp_path / f"checkpoint-{step}" / "trainer" / "state.json").touch()
    assert checkpoint.is_finished(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"config": settings | {"val_data": "toy"}}))
    assert not checkpoint.is_finished(tmp_path)


def test_another_run_is_never_overwritten(finished):
    before = {p: p.stat().st_mtime_ns for p in finished[0].rglob("*") if p.is_file()}
    resume = ["--resume", "--gamma", "0.5", "--steps", "6"]
    for flags, words in [([], "holds a run that has ended"), (resume, "gamma (")]:
        done = command("train.py", "--out", finished[0], *SMALL, "--save_every", "2", *flags)
        assert done.returncode != 0 and words in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in finished[0].rglob("*") if p.is_file()}


def test_a_model_folder_without_processor_files(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    flags = ["--model", tmp_path / "model", "--data", "toy", "--out", tmp_path / "run"]
    done = command("train.py", *flags, *SMALL)
    assert done.returncode != 0 and "image processor files" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_full_disk_stops_with_a_sentence(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    parts = SimpleNamespace(
        cfg=SimpleNamespace(keep=2, lora_rank=0, merge=False),
        processes=SimpleNamespace(first=True),
        optimiser=SimpleNamespace(updates=6, skipped=0),
        policy=torch.nn.Linear(100, 100),
    )
    with pytest.raises(SystemExit, match="no disk space left"):
        checkpoint.save(tmp_path, {"step": 3, "cursor": 12}, parts)
    assert not list(tmp_path.iterdir())


def test_checkpoints_are_counted_before_a_run(tmp_path, monkeypatch):
    """100 trained and 50 frozen parameters, 16 and 4 bytes each, are 1,800 bytes a checkpoint."""
    frozen = torch.nn.Linear(50, 1, bias=False).requires_grad_(False)
    model, said = torch.nn.Sequential(torch.nn.Linear(100, 1, bias=False), frozen), []
    known = dict(full=(0, False, 1800), lora=(4, False, 1600), merged=(4, True, 1800))
    for rank, merged, size in known.values():  # an adapter alone leaves out what is frozen
        cfg = SimpleNamespace(lora_rank=rank, merge=merged)
        assert checkpoint.bytes_of(100, 50, cfg) == size

    def check(free, steps=20, **flags):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        settings = {"lora_rank": 0, "merge": False, "save_every": 5, "keep": 2, **flags}
        cfg = SimpleNamespace(out=str(tmp_path), **settings)
        checkpoint.check_space(model, steps, cfg, said.append)

    too_much = [
        (5399, {}),  # 2 and one more
        (7199, dict(keep=0)),  # steps 5, 10, 15, 20
        (3599, dict(keep=1)),
        (1799, dict(steps=3)),  # the last step only
    ]
    for free, flags in too_much:
        with pytest.raises(SystemExit, match="cannot hold this run's checkpoints.*--keep 1"):
            check(free, **flags)
        check(free + 1, **flags)
    assert [line.split(" at most ")[1].split()[0] for line in said] == ["3", "4", "2", "1"]
    for step in (5, 10):  # both are there: one more while the next is saved, or none to come
        (tmp_path / f"checkpoint-{step}" / "trainer").mkdir(parents=True)
        (tmp_path / f"checkpoint-{step}" / "trainer" / "state.json").touch()
    check(1800)
    check(0, steps=10)
    with pytest.raises(SystemExit, match="2 are there"):
        check(1799)


def test_a_checkpoint_is_as_large_as_was_said(finished):
    out, stdout = finished
    cfg = Config(**json.loads((out / "config.json").read_text())["config"])
    shape = shape_of(out / "checkpoint-6", cfg)
    size = sum(f.stat().st_size for f in (out / "checkpoint-6").rglob("*") if f.is_file())
    assert checkpoint.bytes_of(*count(shape), cfg) == pytest.approx(size, rel=0.1)
    assert re.search(r"checkpoints: 0.0\d+ GB each, at most 3 at a time", stdout)


def test_every_knob_has_a_help_line():
    text = command("train.py", "--help").stdout
    for f in dataclasses.fields(Config):
        assert f"--{f.name}" in text and len(f.metadata["help"]) > 5


# ------------------------------------------------------------------- one real step, in this process


def one_run(tmp_path, folder, **flags):
    small = {"sampler": "hf", "prompts_per_step": 4, "prompts_per_update": 2}
    small |= {"tokens_per_forward": 1, "group_size": 4}
    flags = {"model": str(folder), "data": "toy", "out": str(tmp_path), **small, **flags}
    cfg = resolve(flags, False)[0]
    check(cfg, 1, False)
    return setup(cfg)


def unchanged(before, policy):
    return all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))


VARIANTS = {
    "the paper's objective": dict(objective="paper"),
    "exact, differentiable, double entropy": dict(
        perception="exact", entropy="exact", masked_grad=True, eta1=0.03, eta2=0.03
    ),
    "the masked branch recomputed": dict(recompute_masked=True, eta2=0.03),
    "no reference": dict(no_ref_kl=True),
    "raw": dict(mask="raw"),
    "noise": dict(mask="noise"),
    "contrast": dict(mask="contrast"),
    "patches": dict(mask_unit="patch"),
    "absent": dict(mask="absent", masked_grad=True),
    "credit on the paper's objective": dict(credit="pgpo", objective="paper"),
    "credit and noised rollouts": dict(credit="vppo", rollout_picture="noisy"),
    "credit without an exact perception term": dict(
        credit="vppo", perception="exact", entropy="exact", gamma=0.0
    ),
    "cut-off responses": dict(mask_cut_off=True, overlong_buffer=16, max_response_tokens=24),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_takes_a_step(variant, tmp_path, folder):
    parts = one_run(tmp_path, folder, **VARIANTS[variant])
    before = [p.detach().clone() for p in parts.policy.parameters()]
    line = module.train_step(parts, module.Progress())
    assert all(v == v and abs(v) < 1e6 for v in line.values() if isinstance(v, float))
    assert line["skipped_updates"] == 0
    assert line["perception_kl"] > 0 and ("ref_kl" in line) == (variant != "no reference")
    assert not unchanged(before, parts.policy)


def test_the_first_updates_ratio_is_exactly_one(tmp_path, folder, monkeypatch):
    """pi_old is pi_theta until something was updated: rho = 1 to the last bit on the first update,
    and not on the second."""
    parts = one_run(tmp_path, folder, lr=1e-3)
    ratios, real = [], papo.objective

    def watched(said, *rest):
        ratios.append((said.seen.logp.detach() - said.old).exp())
        return real(said, *rest)

    monkeypatch.setattr(papo, "objective", watched)
    module.train_step(parts, module.Progress())
    assert len(ratios) == 4
    assert all((r == 1).all() for r in ratios[:2]) and all((r != 1).any() for r in ratios[2:])


@pytest.mark.parametrize(
    "algo, wanted",
    [
        ("grpo", {"seen, gradient": 4, "seen": 2}),  # pi_old before the second update
        ("noisy", {"seen, gradient": 4, "seen": 2}),
        ("papo_g", {"seen, gradient": 4, "seen": 2, "masked": 4}),
        ("vppo", {"seen, gradient": 4, "seen": 4, "masked": 4}),  # and before the first
    ],
)
def test_a_step_runs_no_pass_that_nothing_needs(algo, wanted, tmp_path, folder, monkeypatch):
    """Two updates of two micro-batches. Credit costs one pass on each picture, none of them with a
    gradient, and is free where it is off."""
    parts = one_run(tmp_path, folder, algo=algo, beta=0.0, dynamic_sampling=False)
    passes, forward = Counter(), parts.policy.forward

    def counted(rows, pixels, *rest, **more):
        kind = "masked" if pixels is rows.masked_pixels else "seen"
        passes[kind + (", gradient" if torch.is_grad_enabled() else "")] += 1
        return forward(rows, pixels, *rest, **more)

    monkeypatch.setattr(parts.policy, "forward", counted)
    module.train_step(parts, module.Progress())
    assert passes == wanted


def test_noised_rollouts_are_trained_on_the_clean_picture(tmp_path, folder, monkeypatch):
    """Every pass of the trainer is on the pixels of the data, pi_old included; only the sampler's
    own log-probs know of the noise."""
    parts = one_run(tmp_path, folder, algo="noisy", noise_anneal_steps=0, lr=1e-3)
    clean = torch.cat([parts.stream[i].pixels for i in range(4)])
    given, said, real = [], [], papo.objective
    forward = parts.policy.forward

    def watched(rows, pixels, *rest, **more):
        given.append(pixels)
        return forward(rows, pixels, *rest, **more)

    def heard(*arguments):
        said.append(arguments[0])
        return real(*arguments)

    monkeypatch.setattr(parts.policy, "forward", watched)
    monkeypatch.setattr(papo, "objective", heard)
    module.train_step(parts, module.Progress())
    for pixels in given:
        assert any(torch.equal(pixels, other) for other in clean.split(len(pixels)))
    for s in said[:2]:  # the first update: pi_old is pi_theta, on the clean picture
        assert torch.equal(s.old, s.seen.logp.detach())
        gap = (s.old - s.sampled).abs().amax(-1)  # (B, G)
        assert gap[:, :2].max() < 1e-3 < gap[:, 2:].max()


# -------------------------------------------------------------------------- whose folders these are


def files_of(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


@pytest.mark.slow
def test_only_what_the_run_wrote_is_deleted_or_continued(tmp_path):
    """A user's copies and folders beside the run's own checkpoints."""
    out = tmp_path / "run"
    train(out, "--steps", 2, "--save_every", 1, "--keep", 1)
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-2-best")
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-1.bak")
    for empty in ("checkpoint-3", "checkpoint-9", "checkpoint-x"):
        (out / empty).mkdir()
        (out / empty / "mine").touch()
    done = train(out, "--steps", 3, "--save_every", 1, "--keep", 1, "--resume")
    assert "checkpoint-9 is no whole checkpoint of a run, and is left alone" in done
    kept = [name for name in files_of(out) if name.startswith("checkpoint")]
    mine = ["checkpoint-1.bak", "checkpoint-2-best", "checkpoint-3-set-aside", "checkpoint-9"]
    assert kept == sorted([*mine, "checkpoint-3", "checkpoint-x"])
    assert files_of(out / "checkpoint-3-set-aside") == ["mine"]
    assert [m["step"] for m in metrics(out)] == [1, 2, 3]


@pytest.mark.parametrize("where", ["file/run", "link", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(where, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "else")
    cfg = resolve({"model": "toy", "out": str(tmp_path / where)}, False)[0]
    with pytest.raises(SystemExit, match="cannot be written .*; give another --out"):
        checkpoint.open_folder(tmp_path / where, cfg, print)
