"""What makes the method run, in rooms; each says in a sentence what it holds.

It is imported before torch, by train.py and all else that is started: threads of OpenMP that wait
for work would keep a core busy, and beside other programs a run takes many times as long. libgomp,
libomp and libiomp read the setting as they are loaded, with torch.
"""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Some containers and schedulers set a part of what torchrun sets, or set it to nothing.
LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for name in LAUNCH:
    if not os.environ.get(name, "0"):
        del os.environ[name]
if missing := [name for name in LAUNCH if name not in os.environ]:
    if os.environ.get("RANK", "0") != "0" or os.environ.get("WORLD_SIZE", "1") != "1":
        told = ", ".join(f"{name}={os.environ[name]}" for name in LAUNCH if name in os.environ)
        lacks = f"error: {told} without {', '.join(missing)}"
        sys.exit(f"{lacks}: start several processes with torchrun, or one with none of these set")
