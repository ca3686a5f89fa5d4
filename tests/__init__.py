"""Tests of gptbatch.

The package is imported first: it sets how OpenMP threads wait, before torch is imported.
"""

import os
from pathlib import Path

import gptbatch.pipeline  # noqa: F401

# Read when triton is imported, which transformers does: without a GPU, kernels run on CPU tensors.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
