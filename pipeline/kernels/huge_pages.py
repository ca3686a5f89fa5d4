"""Memory on huge pages, for packed weights and the KV cache.

Each decode step reads all weights. A huge page takes one entry of the TLB for 2 MiB of them instead
of 4 KiB, which saves a few percent of a step (docs/performance.md). Linux gives huge pages to a
range that a program marks by madvise, as numpy does for arrays of 4 MiB and more. Most weights are
smaller than that, so they share arrays. Without huge pages nothing else changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptbatch.pipeline.kernels.constants import CACHE_LINE_BYTES

HUGE_PAGE_BYTES = 2**21
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
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

    The tensor starts at a huge page. In a KV cache whose heads are a multiple of 2 MiB apart, the
    blocks that are written first then take one huge page of each head instead of two.

    Raises:
        MemoryError: The allocation fails.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(n_bytes + HUGE_PAGE_BYTES, np.uint8)
    first = -memory.ctypes.data % HUGE_PAGE_BYTES
    return torch.from_numpy(memory[first : first + n_bytes]).view(dtype).view(*shape)


def are_offered() -> bool:
    """Return whether this system gives huge pages to ranges that are marked."""
    try:
        return "[never]" not in _SETTING.read_text(encoding="ascii")
    except OSError:
        return False


def memory_of_ranges(n_bytes: int, stride: int, n_ranges: int) -> int:
    """Return the memory that a tensor of `lazy_zeros` takes once its ranges are written.

    Args:
        n_bytes: Bytes that are written from the start of each range.
        stride: Bytes from one range to the next.
        n_ranges: Number of ranges.
    """
    # numpy marks arrays of 4 MiB, and `lazy_zeros` allocates a huge page more than it needs.
    if not n_bytes or stride * n_ranges < HUGE_PAGE_BYTES or not are_offered():
        return n_bytes * n_ranges
    count = end = 0
    for start in range(0, stride * n_ranges, stride):
        first = max(end, start // HUGE_PAGE_BYTES)
        end = max(first, -(-(start + n_bytes) // HUGE_PAGE_BYTES))
        count += end - first
    return count * HUGE_PAGE_BYTES
