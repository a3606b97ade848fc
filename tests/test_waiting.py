"""Threads of OpenMP that wait do not spin: whatever is started says so before it imports torch."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

# Runs a script or a module up to where it would import torch, and tells what torch would find.
CODE = """
import os, runpy, sys
class Torch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Torch())
(runpy.run_path if sys.argv[1].endswith(".py") else runpy.run_module)(sys.argv[1])
"""
STARTED = ["train.py", "eval.py", "tests/conftest.py", "fine_r1/sft.py", "fine_r1/tapo.py"]
STARTED += ["walkthrough.py", "fine_r1.triplets", "toy.lessons"]
STARTED += [f"variants/{name}.py" for name in ("blind_weight", "noisy_rollout", "pgpo", "vppo")]


@pytest.mark.parametrize("name", STARTED)
def test_who_imports_torch_says_first_how_its_threads_wait(name):
    kept = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    for asked, found in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        environment = kept | asked | {"PYTHONPATH": str(ROOT)}
        child = [sys.executable, "-c", CODE, name]
        done = subprocess.run(child, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.strip() == found, done.stderr[-2000:]
