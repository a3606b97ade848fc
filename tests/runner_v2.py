"""A plugin of pytest: vLLM's model runner V2, which CUDA has by default, on a CPU.

Its kernels are written in Triton, and run in Triton's interpreter; but for top-k and top-p, which
the interpreter cannot do, and for which vLLM has a way without Triton.
"""

import os
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}

from triton.backends import backends  # noqa: E402

# vLLM's CPU build asks for this before it takes Triton, and compiles nothing with it.
driver = SimpleNamespace(is_active=lambda: True)
backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)

from vllm.v1.sample.ops import topk_topp_sampler  # noqa: E402

topk_topp_sampler.HAS_TRITON = False
