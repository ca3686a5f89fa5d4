"""Memory on huge pages, for packed weights and the KV cache.

Each decode step reads all weights. A huge page takes one entry of the TLB for 2 MiB of them instead
of 4 KiB, which saves a few percent of a step (docs/performance.md). Linux gives huge pages to a
range that a program marks by madvise, as numpy does for arrays of 4 MiB and more. Most weights are
smaller than that, so they share arrays. Without huge pages nothing else changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gptbatch.pipeline.kernels.constants import CACHE_LINE_BYTES

HUGE_PAGE_BYTES = 2**21
# Weights per array. Memory is taken when it is written, so an array may end empty.
ARRAY_BYTES = 2**26


class HugePages:
    """Tensors one behind the other in a few large arrays, which live while one of them does."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def pack(self, weight: Tensor) -> Tensor:
        """Return a weight (out, in) in the layout of the C++ linear."""
        packed = self.empty(torch.ops.gptbatch.packed_shape(weight), weight.dtype)
        torch.ops.gptbatch.pack_weight_out(weight, packed)
        return packed

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor that starts at a cache line, with any content."""
        n_bytes = math.prod(shape) * dtype.itemsize
        padded = -(-n_bytes // CACHE_LINE_BYTES) * CACHE_LINE_BYTES
        if padded > len(self._free):
            self._free = lazy_zeros((max(padded, ARRAY_BYTES),), torch.uint8)
        memory, self._free = self._free[:n_bytes], self._free[padded:]
        return memory.view(dtype).view(*shape)


def lazy_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros that take memory only when written; torch.zeros would write all of it.

    The tensor starts at a huge page. In a KV cache, the blocks that are written first then take one
    huge page of each head instead of two.

    Raises:
        MemoryError: The allocation fails.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(n_bytes + HUGE_PAGE_BYTES, np.uint8)
    first = -memory.ctypes.data % HUGE_PAGE_BYTES
    return torch.from_numpy(memory[first : first + n_bytes]).view(dtype).view(*shape)
