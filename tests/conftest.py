"""Shared by all tests: the real toy policy after a short warm start, and the command line as a user
runs it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

# `datasets` keeps a copy of every file it reads; those of the tests go when the tests end.
COPIES = tempfile.TemporaryDirectory(prefix="papo-tests-")
os.environ["HF_DATASETS_CACHE"] = COPIES.name  # before anything imports it, and for every process

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plumbing.config import resolve  # noqa: E402
from plumbing.data import encode  # noqa: E402
from plumbing.families import TOYS  # noqa: E402
from plumbing.policy import Policy, banned_tokens, load_processors, load_vlm  # noqa: E402
from toy.lessons import build  # noqa: E402
from toy.task import ToyData  # noqa: E402

WARM = 60  # enough that responses are well formed and some are right; about 20 s, then cached
SMALL = (
    f"--sampler hf --warm_steps {WARM} --prompts_per_step 4 --prompts_per_update 2 "
    "--tokens_per_forward 1 --group_size 4 --eval_questions 4 --eval_n 2 --eval_every 0"
).split()


# For tests of what differs between the families: patch size, positions, where the picture enters.
both_families = pytest.mark.parametrize("toy_name", TOYS, indirect=True, scope="session")


def command(script, *flags, cwd=ROOT, **kwargs):
    """Run a script of the project as a user would -> CompletedProcess with text output."""
    return subprocess.run(
        [sys.executable, script, *map(str, flags)],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=300,
        **kwargs,
    )


@pytest.fixture(scope="session", params=["toy"])
def toy_name(request):
    return request.param


@pytest.fixture(scope="session")
def folder(toy_name):
    return build(WARM, toy_name)


@pytest.fixture(scope="session")
def cfg(folder):
    return resolve({"model": str(folder), "data": "toy", "sampler": "hf"}, cuda=False)[0]


@pytest.fixture(scope="session")
def processors(folder, cfg):
    return load_processors(folder, cfg)


@pytest.fixture
def policy(folder, processors):
    vlm = load_vlm(folder)
    return Policy(vlm, banned_tokens(folder, processors[0]))


@pytest.fixture(scope="session")
def prompts(processors):
    data = ToyData("train", 8)
    return [encode(data[i], *processors) for i in range(8)]


def random_responses(prompts, tok, G=3, seed=0):
    """Ragged token ids, with EOS at the end of every other response."""
    g = torch.Generator().manual_seed(seed)
    low = tok.convert_tokens_to_ids("<unk>") + 1
    groups = []
    for _ in prompts:
        group = []
        for i in range(G):
            tokens = torch.randint(
                low, len(tok), (int(torch.randint(1, 12, (), generator=g)),), generator=g
            )
            if i % 2:
                tokens[-1] = tok.eos_token_id
            group.append(tokens)
        groups.append(group)
    return groups
