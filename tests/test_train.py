"""A run from first to last: what it leaves, resume, two processes, bad input; and one step."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, TORCHRUN, command, jsonl, metrics, one_run, train_here, train_on
from safetensors.torch import load_file
from torch.optim import AdamW

import papo
import train as module
from plumbing.base.common import damaged, hold, takes_no_more
from plumbing.base.processes import Processes
from plumbing.models.lora import count
from plumbing.models.weights import find_model, shape_of
from plumbing.run import checkpoint
from plumbing.run.config import Config
from rollout import TransformersSampler
from toy.task import ToyData

NUMBERS = (
    "reward accuracy format loss policy_loss entropy clip_high_fraction clip_low_fraction "
    "response_tokens cut_off grad_norm lr seconds tokens_per_second peak_memory_gb perception_kl "
    "masked_entropy ref_kl"
).split()
RUN = ["--algo", "papo_g", "--max_response_tokens", 24, "--save_every", 1, "--keep", 3]
RUN += ["--steps", 4]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps, with all that belongs to one -> (its folder, what it said)"""
    out = tmp_path_factory.mktemp("run") / "whole"
    return out, train_here("--out", out, *RUN, "--eval_every", 4)


def test_what_a_run_leaves(finished):
    out, stdout = finished
    logged = json.loads((out / "config.json").read_text())
    cfg = Config(**logged["config"])
    assert (cfg.algo, cfg.steps, cfg.save_every) == ("papo_g", 4, 1)
    assert "torch" in logged["versions"]
    # Checkpoints are whole, and three are kept.
    assert not list(out.glob(".making*"))
    assert checkpoint.whole(out) == [out / f"checkpoint-{step}" for step in (2, 3, 4)]
    lines = metrics(out)
    assert [m["step"] for m in lines] == [1, 2, 3, 4]
    for m in lines:
        for name in NUMBERS:
            assert isinstance(m[name], float) and m[name] == m[name], name
        assert m["perception_kl"] > 0 and m["entropy"] > 0
        phases = {"rollout", "reward", "masked", "reference", "old", "update", "sync"}
        assert phases <= set(m["phases"])
    assert ["val_accuracy" in m for m in lines] == [False, False, False, True]
    assert lines[0]["lr"] == lines[3]["lr"] == cfg.lr == 2e-4  # not 0 on the first step
    assert all(word in stdout for word in ("general", "vision", "blind", str(out / "report.html")))
    first = "model toy (default where there is no CUDA device), data toy, validation on toy, "
    assert stdout.startswith(first + "algorithm papo_g")
    after = json.loads((out / "evaluation.json").read_text())["after"]["vision"]["accuracy"]
    page = (out / "report.html").read_text()
    assert f"{100 * after:.1f}" in page and "after step 4" in page and "boxed" in page


def test_checkpoints_load_elsewhere(finished):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    folder = finished[0] / "checkpoint-4"
    load = Qwen2_5_VLForConditionalGeneration.from_pretrained
    model, info = load(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tok = AutoTokenizer.from_pretrained(folder)
    assert tok.chat_template and (folder / "preprocessor_config.json").exists()
    assert model.generation_config.eos_token_id == tok.eos_token_id


def same_weights(a, b, load=lambda folder: load_file(folder / "model.safetensors"), **tolerance):
    """Of two checkpoints; to the last bit, unless a tolerance is given."""
    x, y = load(a), load(b)
    same = (lambda *pair: torch.allclose(*pair, **tolerance)) if tolerance else torch.equal
    return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)


def training(out):
    """What metrics.jsonl says of it, without times, memory and validation."""
    drop = "seconds phases tokens_per_second peak_memory_gb host_memory_gb".split()
    lines = metrics(out)
    return [{k: v for k, v in m.items() if k not in drop and "val_" not in k} for m in lines]


def interrupted(step):
    if step == 1:  # in the second one the run finds that it was asked to stop
        signal.raise_signal(signal.SIGINT)


def broken(step):
    if step == 3:
        raise RuntimeError("power cut")


def test_stopped_twice_and_resumed_ends_bit_identical(finished, tmp_path, monkeypatch):
    """By Ctrl-C, which saves step 2, and by a power cut after step 3 was logged, which is run
    again. At last, the optimizer's state is made while the engine sleeps: torch makes it by a real
    step, whose memory an awake engine would have, and the first sync wakes it."""
    out, measure, events = tmp_path / "run", module.measure, []
    flags = ["--out", out, *RUN, "--val_data", "", "--save_every", 1000]
    ends = (interrupted, SystemExit, "130"), (broken, RuntimeError, "power cut")
    for stop, error, words in ends:
        with monkeypatch.context() as patch, pytest.raises(error, match=words):
            then = lambda *x, stop=stop, **y: measure(*x, **y) or stop(x[1]["step"])
            patch.setattr(module, "measure", then)
            train_here(*flags)
        flags += ["--resume"]
    assert checkpoint.whole(out) == [out / "checkpoint-2"]
    assert [m["step"] for m in metrics(out)] == [1, 2, 3]
    assert not checkpoint.is_finished(out)
    sampler = TransformersSampler
    for kind, name in ((sampler, "sleep"), (sampler, "sync"), (AdamW, "step")):
        real = getattr(kind, name)
        noted = lambda *x, real=real, name=name, **y: events.append(name) or real(*x, **y)
        monkeypatch.setattr(kind, name, noted)
    train_here(*flags)
    assert events[:3] == ["sleep", "step", "sync"]
    assert same_weights(out / "checkpoint-4", finished[0] / "checkpoint-4")
    assert training(out) == training(finished[0])
    assert checkpoint.is_finished(out)  # though nothing was measured at its end


def test_a_run_that_goes_on_from_a_checkpoint_leaves_whole_ones(finished, tmp_path):
    start = checkpoint.whole(finished[0])[-1]
    train_here("--model", start, "--data", "toy", "--val_data", "", "--steps", 1, "--out", tmp_path)
    assert damaged(tmp_path / "checkpoint-1") == []


def cut(data):
    return data[: len(data) // 2]


def zeros(data):
    return bytes(len(data))


def flipped(data):
    """One bit, in the middle of the file."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x40]) + data[middle + 1 :]


def spoil(checkpoint, name, change):
    data = (checkpoint / name).read_bytes()
    assert change(data) != data
    (checkpoint / name).write_bytes(change(data))


FILES = ["trainer/__0_0.distcp", "trainer/.metadata", "trainer/state.json", "model.safetensors"]


@pytest.mark.parametrize("name", [*FILES, "manifest.json", "config.json"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(name, finished, tmp_path, capsys):
    alone = Processes(alone=True)
    for change in (cut, zeros, flipped, None):
        out = tmp_path / getattr(change, "__name__", "missing")
        shutil.copytree(finished[0], out)
        sound = out / "checkpoint-3"
        if change:
            spoil(out / "checkpoint-4", name, change)
        else:
            (out / "checkpoint-4" / name).unlink()
        assert checkpoint.newest_sound(out, alone, print) == sound
        if name != "manifest.json" or change:  # without one it is no checkpoint of a run
            said = capsys.readouterr().out
            assert "is damaged" in said and (name in said or "manifest.json" in said)
            assert (out / "checkpoint-4-damaged").is_dir()
        for other in (2, 3):
            spoil(out / f"checkpoint-{other}", "trainer/__0_0.distcp", flipped)
        with pytest.raises(SystemExit, match="no checkpoint in .* is sound; begin again"):
            checkpoint.newest_sound(out, alone, print)


def test_a_run_goes_on_from_what_is_sound_and_eval_refuses_what_is_not(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    for name in ("trainer/__0_0.distcp", "model.safetensors"):
        spoil(out / "checkpoint-4", name, flipped)
    with pytest.raises(SystemExit, match="model.safetensors is not what manifest.json says"):
        find_model(out / "checkpoint-4")
    assert find_model(out / "checkpoint-3") == out / "checkpoint-3"
    said = train_here("--out", out, *RUN, "--eval_every", 4, "--resume")
    assert "checkpoint-4-damaged" in said
    assert same_weights(out / "checkpoint-4", finished[0] / "checkpoint-4")
    assert not damaged(out / "checkpoint-4") and training(out) == training(finished[0])


@pytest.mark.slow
def test_workers_end_when_their_launcher_is_killed(tmp_path):
    """With what they had done saved, and without a word of somebody else's in the folder."""
    launch = [sys.executable, *TORCHRUN, 2]
    flags = ["train.py", *SMALL, *RUN, "--val_data", "", "--steps", 500, "--out", tmp_path]
    asked = list(map(str, [*launch, *flags]))
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    with subprocess.Popen(asked, **quiet) as launcher:
        until(lambda: (tmp_path / "metrics.jsonl").exists() and len(metrics(tmp_path)) > 1)
        launcher.kill()
    until(lambda: not subprocess.run(["pgrep", "-f", str(tmp_path)], **quiet).returncode == 0)
    steps = [m["step"] for m in metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < 500
    assert checkpoint.whole(tmp_path)[-1].name == f"checkpoint-{steps[-1]}"
    hold(tmp_path)


def until(what, seconds=120):
    """Wait until what() holds."""
    for _ in range(seconds * 5):
        if what():
            return
        time.sleep(0.2)
    raise TimeoutError(what)


def test_other_rows_other_code_and_other_versions_are_said_on_resume(tmp_path):
    out, asked = tmp_path / "run", [f"how many {c} objects are there ?" for c in ("red", "blue")]
    rows = [{"problem": problem, "answer": "1", "images": []} for problem in asked]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    flags = ["--out", out, *RUN, "--algo", "grpo", "--data", data, "--val_data", ""]
    train_here(*flags, "--steps", 1)
    about = json.loads((out / "config.json").read_text())
    assert re.fullmatch(r"2 rows \w{12}", about["rows"]) and about["versions"]["sympy"]
    about |= {"commit": "0000000", "versions": about["versions"] | {"torch": "1.0"}}
    (out / "config.json").write_text(json.dumps(about))
    said = train_here(*flags, "--steps", 2, "--resume")
    assert "have changed: commit 0000000 then" in said and "torch 1.0 then" in said
    now = json.loads((out / "config.json").read_text())
    assert [h["commit"] for h in now["history"]] == ["0000000"] and now["commit"] != "0000000"
    jsonl(data, rows[:1])
    with pytest.raises(SystemExit, match="holds 1 rows .*, and 2 rows .* when this run began"):
        train_here(*flags, "--steps", 3, "--resume")
    said = train_here(*flags, "--steps", 3, "--resume", "--other_rows")
    history = json.loads((out / "config.json").read_text())["history"]
    assert "rows 2 rows" in said and len(history) == 2


def test_a_folder_has_one_run_at_a_time(tmp_path):
    code = "import sys, pathlib, plumbing.base.common as c; c.hold(pathlib.Path(sys.argv[1]))"
    code += "; print(flush=True); sys.stdin.read()"
    asked = [sys.executable, "-c", code, tmp_path]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    with subprocess.Popen(asked, **pipes) as holder:
        holder.stdout.readline()
        for flags in ([], ["--resume"]):
            with pytest.raises(SystemExit, match=f"written by process {holder.pid} on .*; wait"):
                train_here("--out", tmp_path, *RUN, *flags)
        holder.kill()
    hold(tmp_path)  # whoever is gone holds nothing, however it went
    hold(tmp_path)


@pytest.mark.slow
def test_a_few_blows_lose_nothing(tmp_path):
    """bench/kill.py, of which a night's rounds are in results/kill.json."""
    where = ["--work", tmp_path / "work", "--out", tmp_path / "kill.json"]
    done = command("bench/kill.py", "--blows", 4, "--cases", "grpo,lora", *where)
    assert done.returncode == 0 and "runs: none lost anything" in done.stdout, done.stdout


# ------------------------------------------------------------------------------ many processes

SAME = (
    "reward accuracy loss policy_loss ref_kl perception_kl entropy masked_entropy grad_norm "
    "token_weight"
).split()


def two_are_one(one, two, **how):
    """The same losses, rewards and gradient norms at every step of the second of two runs, and the
    same weights at its end? one, two: their folders; how: as of same_weights"""
    wanted, found = metrics(one), metrics(two)
    for step, (a, b) in enumerate(zip(wanted, found), 1):
        close = dict(rel=1e-3, abs=1e-6) if step == 1 else dict(rel=2e-2, abs=1e-4)
        for name in (name for name in SAME if name in a):
            assert b[name] == pytest.approx(a[name], **close), (step, name)
    last = f"checkpoint-{len(found)}"
    assert same_weights(one / last, two / last, atol=1e-3, **how)


@pytest.mark.slow
def test_two_processes_are_one(finished, tmp_path):
    """FSDP2 over gloo."""
    train_on(2, tmp_path, *RUN, "--steps", 2, "--val_data", "")
    two_are_one(finished[0], tmp_path)


SETTINGS = {
    "paper": "--objective paper",
    "exact": "--perception exact --entropy exact --masked_branch grad --eta2 0.03",
    "fresh": "--perception exact --masked_branch fresh --eta1 0.03",
    "qwen3": "--model toy-qwen3 --activation_checkpointing --tokens_per_forward 400",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_are_one_with_other_settings(name, tmp_path):
    flags = [*SETTINGS[name].split(), "--steps", 2, "--val_data", ""]
    train_here("--out", tmp_path / "1", *flags)
    train_on(2, tmp_path / "2", *flags)
    two_are_one(tmp_path / "1", tmp_path / "2")


@pytest.mark.slow
def test_two_nodes_are_one(finished, tmp_path):
    """Two launchers with a shared folder, by the lines that docs/gpus.md gives."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    launch = f"-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --master_port {port} "
    launch += "--master_addr localhost --node_rank"
    flags = ["train.py", "--out", tmp_path, *SMALL, *RUN, "--steps", 2, "--val_data", ""]
    with ThreadPoolExecutor(2) as pool:
        nodes = [pool.submit(command, *launch.split(), rank, *flags) for rank in (0, 1)]
    for node in nodes:
        assert node.result().returncode == 0, node.result().stderr[-4000:]
    two_are_one(finished[0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first,then", [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(first, then, finished, tmp_path):
    """A step on some processes and another on others: that of a run that stayed where it was."""
    train_on(first, tmp_path, *RUN, "--steps", 1, "--val_data", "")
    train_on(then, tmp_path, *RUN, "--steps", 2, "--val_data", "", "--resume")
    two_are_one(finished[0], tmp_path)


@pytest.mark.slow
def test_prompts_without_a_picture(folder, tmp_path):
    """Of two prompts one has a picture and one has none: each of two processes gets one of them,
    and the vision tower needs both. And where none has one, the tower has no part in the run, and
    still has its place in the optimizer's state when that is resumed."""
    question, picture = "how many red objects are there ?", str(tmp_path / "a.png")
    ToyData("train", 1)[0].images[0].save(picture)
    text = [{"problem": f"{question} {i}", "answer": "3", "images": []} for i in range(2)]
    mixed = [text[0], {"problem": f"<image> {question}", "answer": "3", "images": [picture]}]
    flags = ["--model", folder, "--prompts_per_step", 2, "--max_response_tokens", 16]
    for name, rows in (("text", text), ("mixed", mixed)):
        file, out = jsonl(tmp_path / f"{name}.jsonl", rows), tmp_path / name
        train_here("--out", out, "--data", file, *flags, "--steps", 1)
        train_here("--out", out, "--data", file, *flags, "--steps", 2, "--resume")
        assert (metrics(out)[1]["perception_kl"] == 0) == (name == "text")
    train_on(2, tmp_path / "two", "--data", tmp_path / "mixed.jsonl", *flags, "--steps", 2)
    two_are_one(tmp_path / "mixed", tmp_path / "two")


# ----------------------------------------------------------------------- bad input, other folders

BAD = {
    "unknown flag": (["--gama", "1"], "--gama may be meant to be --gamma; see --help"),
    "not a number": (["--steps", "many"], "invalid int value"),
    "a run for a model": (["--model", "RUN"], "is a run and no model; give one of its checkpoints"),
    "no image processor": (["--model", "MODEL", "--data", "toy"], "image processor files"),
    "resume of nothing": (["--resume"], "no run in"),
    "a model for a run": (["--out", "MODEL"], "holds a model, or something else that is no run"),
    "damaged settings": (["--out", "RUN", "--resume"], "config.json cannot be read"),
    "below a file": (["--out", "FILE"], "cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence(case, folder, tmp_path):
    flags, words = BAD[case]
    places = {"RUN": tmp_path / "other", "MODEL": tmp_path / "model"}
    places |= {"FILE": tmp_path / "model" / "config.json" / "run"}
    (places["RUN"] / "checkpoint-5").mkdir(parents=True)
    (places["RUN"] / "config.json").write_text('{"config": {}}'[: 9 if "--out" in flags else None])
    shutil.copytree(folder, places["MODEL"])
    (places["MODEL"] / "checkpoint-500").mkdir()  # as other trainers leave beside their model
    (places["MODEL"] / "preprocessor_config.json").unlink()
    with pytest.raises(SystemExit) as stopped:
        train_here("--out", tmp_path / "run", *(places.get(flag, flag) for flag in flags))
    message = stopped.value.code
    assert message.startswith("error: ") and words in message and "\n" not in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_another_run_is_never_overwritten(finished):
    before = {p: p.stat().st_mtime_ns for p in finished[0].rglob("*") if p.is_file()}
    resume = ["--resume", "--gamma", 0.5]
    for flags, words in [([], "holds a run that has ended"), (resume, r"gamma \(0.3 then, 0.5")]:
        with pytest.raises(SystemExit, match=words):
            train_here("--out", finished[0], *RUN, *flags)
    assert before == {p: p.stat().st_mtime_ns for p in finished[0].rglob("*") if p.is_file()}


def test_only_what_the_run_wrote_is_deleted_or_continued(finished, tmp_path):
    """A user's copies and folders beside the run's own checkpoints."""
    out = shutil.copytree(finished[0], tmp_path / "run")
    shutil.copytree(out / "checkpoint-4", out / "checkpoint-4-best")
    shutil.copytree(out / "checkpoint-4", out / "checkpoint-1.bak")
    for empty in ("checkpoint-5", "checkpoint-9", "checkpoint-x"):
        (out / empty).mkdir()
        (out / empty / "mine").touch()
    said = train_here("--out", out, *RUN, "--steps", 5, "--keep", 1, "--resume")
    assert "checkpoint-9 is no whole checkpoint of a run, and is left alone" in said
    kept = [p.name for p in out.iterdir() if p.name.startswith("checkpoint")]
    mine = ["checkpoint-1.bak", "checkpoint-4-best", "checkpoint-5-set-aside", "checkpoint-9"]
    assert sorted(kept) == sorted([*mine, "checkpoint-5", "checkpoint-x"])
    assert [p.name for p in (out / "checkpoint-5-set-aside").iterdir()] == ["mine"]
    assert [m["step"] for m in metrics(out)] == [1, 2, 3, 4, 5]


def test_what_libraries_say_of_a_full_disk_is_known():
    short = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    said = [takes_no_more(x) for x in (short, full, Exception(f"a\n  b {full}"), OSError("?"))]
    assert all(said[:3]) and not said[3]


def test_a_full_disk_stops_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    parts = SimpleNamespace(
        cfg=SimpleNamespace(keep=2, lora_rank=0),
        processes=SimpleNamespace(first=True),
        optimizer=SimpleNamespace(updates=6, skipped=0),
        policy=torch.nn.Linear(100, 100),
    )
    with pytest.raises(SystemExit, match="cannot be written .*No space left"):
        checkpoint.save(tmp_path, {"step": 3, "cursor": 12}, parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("most, where", [(1, "config.json"), (1000, "1 can"), (6000, "1 can")])
def test_a_file_that_can_grow_no_further_is_one_sentence(most, where, tmp_path):
    """As under a quota: at config.json, the weights, the optimizer's state. The run can go on."""
    resource = pytest.importorskip("resource")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * most, hard))
    flags = ["--out", tmp_path, *SMALL, "--steps", 1, "--val_data", ""]
    done = command("train.py", *flags, preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert where in last and "File too large" in last and "--resume" in last
    assert not [p for p in tmp_path.iterdir() if "checkpoint" in p.name or p.name.startswith(".c")]
    train_here("--out", tmp_path, *flags[2:], *(["--resume"] if most > 1 else []))


def test_checkpoints_are_counted_before_a_run(tmp_path, monkeypatch):
    """100 parameters, 16 bytes each, are 1,600 bytes a checkpoint."""
    model, said = torch.nn.Linear(100, 1, bias=False), []

    def check(free, steps=20, keep=2):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        settings = dict(lora_rank=0, save_every=5, keep=keep, out=str(tmp_path))
        checkpoint.check_space(model, steps, SimpleNamespace(**settings), said.append)

    # Two and one more; all of steps 5, 10, 15 and 20; one and one more; the last step only.
    for most, flags in ((3, {}), (4, dict(keep=0)), (2, dict(keep=1)), (1, dict(steps=3))):
        with pytest.raises(SystemExit, match="cannot hold this run's checkpoints.*--keep 1"):
            check(1600 * most - 1, **flags)
        check(1600 * most, **flags)
        assert f"at most {most} at a time" in said[-1]
    for step in (5, 10):  # both are there: one more while the next is saved, or none to come
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "manifest.json").touch()
    check(1600)
    check(0, steps=10)
    with pytest.raises(SystemExit, match="2 are there"):
        check(1599)


def test_a_checkpoint_is_as_large_as_was_said(finished):
    out, stdout = finished
    cfg = Config(**json.loads((out / "config.json").read_text())["config"])
    size = sum(f.stat().st_size for f in (out / "checkpoint-4").rglob("*") if f.is_file())
    shape = shape_of(out / "checkpoint-4", cfg)
    assert checkpoint.bytes_of(*count(shape), cfg) == pytest.approx(size, rel=0.1)
    for rank, size in ((0, 1800), (4, 1600)):  # an adapter leaves out what is frozen
        assert checkpoint.bytes_of(100, 50, SimpleNamespace(lora_rank=rank)) == size
    assert re.search(r"checkpoints: 0.0\d+ GB each, at most 4 at a time", stdout)


# ---------------------------------------------------------------------- one step, looked at inside


def unchanged(before, policy):
    return all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))


KEPT, GRAD = {"masked": 4}, {"masked, gradient": 4}
WAYS = {  # flags, and the passes on the masked picture: four groups, once a rollout or an update
    "grpo": (dict(algo="grpo"), {}),
    "papo_g": (dict(), KEPT),
    "papo_d": (dict(algo="papo_d"), KEPT),
    "papo_g_no_ref_kl": (dict(algo="papo_g_no_ref_kl"), KEPT),
    "fresh": (dict(masked_branch="fresh"), KEPT),
    "the paper's objective": (dict(objective="paper"), GRAD),
    "exact": (dict(perception="exact", entropy="exact", masked_branch="grad", eta2=0.03), GRAD),
    "raw": (dict(mask="raw"), KEPT),
    "patches": (dict(mask_unit="patch", importance_cap=2.0), KEPT),
}


@pytest.mark.parametrize("name", WAYS)
def test_every_way_takes_a_step_and_runs_no_pass_that_nothing_needs(
    name, tmp_path, folder, monkeypatch
):
    """Two updates of two micro-batches; pi_old is scored before the second update only."""
    flags, masked = WAYS[name]
    parts = one_run(tmp_path, folder, **flags)
    before = [p.detach().clone() for p in parts.policy.parameters()]
    passes, forward = Counter(), parts.policy.forward

    def counted(rows, pixels, exact=False, grad=True):
        kind = "masked" if pixels is rows.masked_pixels else "seen"
        passes[kind + (", gradient" if grad and torch.is_grad_enabled() else "")] += 1
        return forward(rows, pixels, exact, grad)

    monkeypatch.setattr(parts.policy, "forward", counted)
    line = module.train_step(parts, module.Progress())
    assert passes == {"seen, gradient": 4, "seen": 2, **masked}
    assert all(v == v and abs(v) < 1e6 for v in line.values() if isinstance(v, float))
    assert line["skipped_updates"] == 0 and not unchanged(before, parts.policy)
    assert ("perception_kl" in line) == (name != "grpo")
    assert ("ref_kl" in line) == (name not in ("papo_d", "papo_g_no_ref_kl"))
    if name == "papo_d":  # dynamic sampling kept informative groups only
        assert line["equal_groups"] == 0 and line["generated_prompts"] >= 4


def test_an_annealed_run_ends_without_the_perception_loss(tmp_path, folder):
    parts, progress = one_run(tmp_path, folder, gamma=0.1, anneal_steps=2), module.Progress()
    lines = [module.train_step(parts, progress) for _ in range(3)]
    assert [m["gamma"] for m in lines] == pytest.approx([0.1, 0.05, 0.0])
    assert ["perception_kl" in m for m in lines] == [True, True, False]
    for m in lines[:2]:  # minus J holds the weight of its own step; all are means over the tokens
        terms = m["policy_loss"] + 0.01 * m["ref_kl"] - m["gamma"] * m["perception_kl"]
        assert abs(m["loss"] - terms) < 1e-6


def test_micro_batches_are_memory_only(tmp_path, folder):
    runs = [one_run(tmp_path, folder, tokens_per_forward=n) for n in (1, 400)]
    one, other = (module.train_step(parts, module.Progress()) for parts in runs)
    names = [name for name in SAME if name in one]
    assert [one[k] for k in names] == pytest.approx([other[k] for k in names], rel=1e-4, abs=1e-6)


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


def test_the_first_updates_ratio_is_exactly_one(tmp_path, folder, monkeypatch):
    """pi_old is pi_theta until something was updated: rho = 1 to the last bit on the first update,
    and not on the second. And every token is scored that was sampled, the end of a response
    included."""
    parts = one_run(tmp_path, folder, lr=1e-3)
    ratios, packed, real = [], [], papo.terms_of

    def watched(logprobs, *rest):
        ratios.append((logprobs.seen.logp.detach() - logprobs.old).exp())
        return real(logprobs, *rest)

    monkeypatch.setattr(papo, "terms_of", watched)
    pack, eos = parts.policy.pack, parts.processors[0].eos_token_id
    monkeypatch.setattr(parts.policy, "pack", lambda *x: packed.append(pack(*x)) or packed[-1])
    line = module.train_step(parts, module.Progress())
    assert len(ratios) == 4
    assert all((r == 1).all() for r in ratios[:2]) and all((r != 1).any() for r in ratios[2:])
    assert sum(rows.scored.sum() for rows in packed) == line["response_tokens"] * 16
    ends = sum((rows.targets[rows.scored] == eos).sum() for rows in packed)
    assert ends == round(16 * (1 - line["cut_off"])) > 0
