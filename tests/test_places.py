"""Where students are: another folder, a path with a space, a read-only checkout, no Linux."""

import contextlib
import os
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL, call, metrics

from plumbing.base.common import make_once, may_write
from plumbing.base.processes import Processes


def test_a_folder_that_another_machine_made_meanwhile_stays(tmp_path):
    """Two that make the same folder on one disk: the second rename meets one that is not empty."""
    folder = tmp_path / "set"

    def fill(making, text, meanwhile=None):
        making.mkdir()
        if meanwhile:
            make_once(folder, meanwhile)
        (making / "picture").write_text(text)

    def no_room(making):
        making.mkdir()
        raise OSError("no room")

    first = make_once(folder, lambda making: fill(making, "b", lambda other: fill(other, "a")))
    assert first == folder and (folder / "picture").read_text() == "a"
    assert make_once(folder, lambda making: fill(making, "c")) == folder
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("picture", "a")]
    with pytest.raises(OSError, match="no room"):
        make_once(tmp_path / "other", no_room)
    assert list(tmp_path.iterdir()) == [folder]


def test_many_may_look_whether_they_can_write_at_the_same_time(tmp_path):
    """Processes of several machines may even have the same number."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: may_write(tmp_path / "new" / "run"), range(400)))
    assert list((tmp_path / "new" / "run").iterdir()) == []


@pytest.mark.slow
def test_papo_alone_from_another_folder_and_a_read_only_checkout(tmp_path):
    """Without its annexes, a space in its path, it passes its tests, trains and evaluates."""
    project, elsewhere, out = tmp_path / "my papo", tmp_path / "here", tmp_path / "here" / "a run"
    ignored = shutil.ignore_patterns(".*", "out", "__pycache__", "variants", "fine_r1", "bench")
    shutil.copytree(ROOT, project, ignore=ignored)
    elsewhere.mkdir()
    before = {project, *project.rglob("*")}
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    here = dict(cwd=elsewhere, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    try:
        names = "loss theory papo config masking examples fork rollout variants".split()
        files = [project / "tests" / f"test_{name}.py" for name in names]
        tested = call("-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *files, **here)
        assert "passed" in tested and "failed" not in tested
        train = ["-m", "torch.distributed.run", "--standalone", project / "train.py"]
        call(*train, "--algo", "papo_g", "--steps", 1, "--out", out, *SMALL, **here)
        asked = ["--model", out / "checkpoint-1", "--n", 1, "--questions", 2, "--sampler", "hf"]
        assert "vision" in call(project / "eval.py", *asked, **here)
        assert list(elsewhere.iterdir()) == [out]
        new = {path.name for path in {*project.rglob("*")} - before if path.suffix != ".pyc"}
        assert new <= {"__pycache__"}  # which only one who may write anywhere can leave behind
    finally:
        for path in before:
            path.chmod(0o755)


# What Python runs in every process of the test below before anything else: the parts of the
# standard library that macOS or Windows lack are taken away, and /proc with them. psutil comes
# first, and may go on using /proc: it knows each platform's own way.
WITHOUT_LINUX = """
import builtins, io, os, signal, sys

import psutil

sys.modules["resource"] = None  # importing it raises ImportError
for name in ("SIGALRM", "alarm", "setitimer", "getitimer"):
    delattr(signal, name)
whole = io.open

def guarded(file, *args, **kwargs):
    caller = sys._getframe(1).f_globals.get("__name__", "")
    if str(file).startswith("/proc") and not caller.startswith("psutil"):
        raise FileNotFoundError(f"no {file} here; asked by {caller}")
    return whole(file, *args, **kwargs)

builtins.open = io.open = guarded
with whole(os.environ["TAKEN_AWAY"], "a") as log:
    log.write(" ".join(sys.orig_argv) + chr(10))
"""


@pytest.mark.slow
def test_a_short_training_without_what_only_linux_has(tmp_path, folder):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT_LINUX)
    out, log = tmp_path / "run", tmp_path / "log"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "TAKEN_AWAY": str(log)}
    environment["PATH"] = ""  # there is no git
    call(ROOT / "train.py", "--out", out, *SMALL, "--steps", 2, cwd=tmp_path, env=environment)
    lines = metrics(out)
    assert len(lines) == 2 and all(m["host_memory_gb"] > 0.1 for m in lines)
    # An answer that is settled by a worker, which lacks it too.
    graded = r"from reward import compute_score; print(compute_score(r'\boxed{1/2}', '0.5'))"
    assert "'accuracy': 1.0" in call("-c", graded, env=environment)
    started = log.read_text()
    assert "train.py" in started and "plumbing.grading.answers" in started


@pytest.mark.parametrize("local, expected", [("2", "lo0"), ("1", None)])
def test_on_a_mac_gloo_meets_on_loopback(monkeypatch, local, expected):
    """Where all processes are on this machine; a cluster of Macs meets as it is told to."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "so that it is put back")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setenv("WORLD_SIZE", "2")
    Processes()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == expected


def test_a_lone_process_takes_no_port():
    """Two runs may share a machine. What one process of a GPU opens, opened here with gloo."""
    mine = Processes(alone=True)
    with socket.socket() as other:
        with contextlib.suppress(OSError):  # whoever has it has it
            other.bind(("localhost", 29500))
        mine._meet("gloo")
    try:
        total = torch.ones(2)
        dist.all_reduce(total)
        assert dist.get_world_size() == 1 and total.tolist() == [1, 1]
    finally:
        mine.leave()
