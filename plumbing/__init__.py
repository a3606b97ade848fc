"""What makes the method run, in rooms; each says in a sentence what it holds.

It is imported before torch, by train.py and all else that is started: threads of OpenMP that wait
for work would keep a core busy, and beside other programs a run takes many times as long. libgomp,
libomp and libiomp read the setting as they are loaded, with torch.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
