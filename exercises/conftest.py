"""The exercises look at the project beside them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import plumbing  # noqa: F401  before torch: how its threads wait
