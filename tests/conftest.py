"""Shared by all tests: the toy's policy, and the commands, in this process or in their own."""

import contextlib
import copy
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Before torch is imported, here and in every child: these tensors are too small to be shared out,
# and threads that wait for work must not take the cores from whoever has some.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.pop("TQDM_MININTERVAL", None)  # lines of progress are tested at tqdm's own pace
# `datasets` keeps a copy of every file it reads; those of the tests go when the tests end.
COPIES = tempfile.TemporaryDirectory(prefix="papo-tests-")
os.environ["HF_DATASETS_CACHE"] = COPIES.name  # before anything imports it, and for every process

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import plumbing  # noqa: E402, F401  before torch: how its threads wait

import torch  # noqa: E402

import papo  # noqa: E402
import train  # noqa: E402
from plumbing.data.prompts import encode  # noqa: E402
from plumbing.grading.workers import Grader  # noqa: E402
from plumbing.models.families import TOYS  # noqa: E402
from plumbing.models.weights import banned_tokens, load_processors, load_vlm  # noqa: E402
from plumbing.run.config import Config, resolve  # noqa: E402
from plumbing.run.setup import model_folder, setup  # noqa: E402
from policy import Policy  # noqa: E402
from toy.task import ToyData  # noqa: E402

SMALL = (
    "--sampler hf --prompts_per_step 4 --prompts_per_update 2 "
    "--tokens_per_forward 1 --group_size 4 --eval_questions 4 --eval_n 1 --eval_every 0"
).split()

TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node".split()


# For tests of what differs between the families: patch size, positions, where the picture enters.
both_families = pytest.mark.parametrize("toy_name", TOYS, indirect=True, scope="session")


def command(script, *flags, **more):
    """Run a script of the project as a user would -> CompletedProcess with text output."""
    settings = dict(cwd=ROOT, text=True, capture_output=True, timeout=300) | more
    return subprocess.run([sys.executable, *map(str, (script, *flags))], **settings)


def call(script, *flags, **kwargs):
    """As command, which has to succeed -> what it said on standard output"""
    done = command(script, *flags, **kwargs)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def run_here(main, *flags):
    """The main() of a script in this process, with these flags -> what it said on standard output.
    Raises SystemExit as the command would end."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", ["main", *map(str, flags)])
        main()
    return said.getvalue()


def train_here(*flags, settings=Config):
    """train.main(settings) as run_here, with SMALL and then these flags"""
    return run_here(lambda: train.main(settings), *SMALL, *flags)


def train_on(processes, out, *flags, script="train.py"):
    """A script on so many processes, with SMALL and then these flags -> its metrics"""
    asked = [*TORCHRUN, processes, script, "--out", out, *SMALL, *flags]
    done = command(*asked)
    if "(SIGSEGV)" in done.stderr and "--resume" not in flags:
        # Seen twice in some 150 launches on a busy machine, not since: a thread of gloo's own, in
        # torch 2.13, finds its heap broken. Whoever trains would start again; so does this, once.
        print(done.stderr, file=sys.stderr)
        shutil.rmtree(out)
        done = command(*asked)
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(out)


def lines_of(path):
    """The rows of a JSONL file"""
    return [json.loads(line) for line in path.read_text().splitlines()]


def jsonl(path, rows):
    """Write a JSONL file -> its path"""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def metrics(out):
    """The lines of a run's metrics.jsonl"""
    return lines_of(out / "metrics.jsonl")


def one_run(out, folder, settings=Config, **flags):
    """A run on the toy's data: two updates of two prompts a step, one group a pass -> Parts"""
    small = dict(sampler="hf", prompts_per_step=4, prompts_per_update=2, group_size=4)
    small |= dict(tokens_per_forward=1, val_data="", max_response_tokens=24)
    given = {"model": str(folder), "data": "toy", "out": str(out), **small, **flags}
    return setup(resolve(given, False, settings)[0])


@pytest.fixture(scope="session", params=["toy"])
def toy_name(request):
    return request.param


@pytest.fixture(scope="session")
def folder(toy_name):
    return model_folder(toy_name)


@pytest.fixture(scope="session")
def cfg(folder):
    return resolve({"model": str(folder), "data": "toy", "sampler": "hf"}, cuda=False)[0]


@pytest.fixture(scope="session")
def processors(folder, cfg):
    return load_processors(folder, cfg)


@pytest.fixture(scope="session")
def dino(tmp_path_factory):
    """A real DINOv2, very small, with random weights -> its folder"""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    small = dict(hidden_size=24, num_hidden_layers=11, num_attention_heads=3, mlp_ratio=1)
    config = Dinov2Config(image_size=56, patch_size=14, initializer_range=0.4, **small)
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def grader():
    made = Grader(seconds=20)
    yield made
    made.close()


@pytest.fixture(scope="session")
def loaded(folder, processors):
    return Policy(load_vlm(folder), banned_tokens(folder, processors[0]))


@pytest.fixture
def policy(loaded):
    return copy.deepcopy(loaded)


@pytest.fixture(scope="session")
def prompts(processors):
    data = ToyData("train", 8)
    return [encode(data[i], *processors) for i in range(8)]


def random_responses(prompts, tok, G=3, seed=0):
    """Ragged token ids, with EOS at the end of every other response."""
    g, groups = torch.Generator().manual_seed(seed), []
    low = tok.convert_tokens_to_ids("<unk>") + 1
    for _ in prompts:
        lengths = torch.randint(1, 12, (G,), generator=g).tolist()
        groups.append([torch.randint(low, len(tok), (n,), generator=g) for n in lengths])
        for tokens in groups[-1][1::2]:
            tokens[-1] = tok.eos_token_id
    return groups


def watch_a_step(parts, monkeypatch):
    """A step -> (of each scored picture, is it a prompt's own? papo.terms_of's arguments; of the
    first update, where pi_old has the sampler's weights, the (G,) gaps between the two)"""
    own = [parts.stream[i].pixels for i in range(4)]
    seen, heard, real, forward = [], [], papo.terms_of, parts.policy.forward

    def watched(rows, pixels, *rest, **more):
        if pixels is rows.pixels:
            seen.append(any(torch.equal(pixels, one) for one in own))
        return forward(rows, pixels, *rest, **more)

    monkeypatch.setattr(parts.policy, "forward", watched)
    monkeypatch.setattr(papo, "terms_of", lambda *x: heard.append(x) or real(*x))
    train.train_step(parts, train.Progress())
    first = [logprobs for logprobs, *_ in heard[: len(heard) // 2]]
    return seen, heard, [(x.old - x.sampled).abs().amax(-1).flatten() for x in first]
