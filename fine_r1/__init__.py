"""Fine-R1 (arXiv 2602.07605): chains of thought by SFT, then TAPO on triplets."""

import plumbing  # noqa: F401  before torch: how its threads wait
