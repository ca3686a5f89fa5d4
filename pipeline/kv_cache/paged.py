"""The ragged backend: a cache in pages, and the C++ kernel that reads of each sequence just what is there.

Knows: where the keys and values are. Does not know: which pages are shared, and why (pages.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gptbatch.pipeline.kernels.build import load_kernels
from gptbatch.pipeline.kv_cache.block_pool import BlockPool, blocks_for
from gptbatch.pipeline.kv_cache.quantization import BLOCK_SIZES, CacheDtype, bytes_a_head
from gptbatch.pipeline.model.config import GPTConfig

CACHE_LINE = 64


class PagedKVCache:
    """Per layer (H, P, page): P pages of keys and values, laid out as kv_blocks_full.h and kv_blocks_int8.h say; BlockPool deals them out.

    All pages are there from the start, but the system gives memory for a page only when it is first written; pages that have been
    used are used again before others are.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        max_seqs: int,
        capacity: int | None,
        dtype: torch.dtype,
        cache_dtype: CacheDtype,
        device: torch.device,
    ) -> None:
        assert device.type == "cpu"
        assert dtype in (torch.float32, torch.bfloat16)
        load_kernels()
        size = BLOCK_SIZES[cache_dtype]
        full = blocks_for(config.n_positions, size)  # of one full context
        n_blocks = (
            max_seqs * full
            if capacity is None
            else min(max_seqs * full, max(full, capacity // size))
        )
        self.pool = BlockPool(max_seqs, n_blocks, size)
        # 0 everywhere, as the rest of a page's depth must be
        stored = torch.uint8 if cache_dtype == "int8" else dtype
        page = 2 * size * bytes_a_head(config, dtype, cache_dtype) // stored.itemsize
        self.layers = [
            _lazy_zeros((config.n_head, n_blocks, page), stored) for _ in range(config.n_layer)
        ]
        self.table = torch.zeros(max_seqs, full, dtype=torch.int32)
        self._table = self.table.numpy()  # the same memory, quicker to write

    def allocate(
        self, seq_index: int, token_ids: Sequence[int], length: int, *, share: bool
    ) -> int | None:
        there = self.pool.allocate(seq_index, token_ids, length, share=share)
        if there is not None:
            pages = self.pool.pages(seq_index)
            self._table[seq_index, : len(pages)] = pages
        return there

    def is_ready(self, seq_index: int) -> bool:
        return self.pool.is_ready(seq_index)

    def mark_computed(self, seq_index: int, first: int, last: int) -> None:
        self.pool.mark_computed(seq_index, first, last)

    def step(self, seq_indices: Sequence[int], positions: Sequence[int]) -> PagedAttention:
        for seq_index, position in zip(seq_indices, positions, strict=True):
            page, new = self.pool.page_of(seq_index, position)
            if new:
                self._table[seq_index, position // self.pool.block_size] = page
        return PagedAttention(self, torch.tensor(seq_indices), torch.tensor(positions))

    def move(self, source: int, target: int) -> None:
        self.pool.move(source, target)
        self._table[target] = self._table[source]

    def free(self, seq_index: int) -> None:
        self.pool.free(seq_index)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only as they are written; torch would write them all. Raises MemoryError when there is no room for them.

    They begin where a cache line does, so that no vector of the kernel lies in two.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(n_bytes + CACHE_LINE, np.uint8)
    first = -memory.ctypes.data % CACHE_LINE
    return torch.from_numpy(memory[first : first + n_bytes]).view(dtype).view(shape)


class PagedAttention:
    """Attention of one call. seq_indices and positions are (N,). A kernel that computes more than attention takes what it needs from here."""

    def __init__(self, cache: PagedKVCache, seq_indices: Tensor, positions: Tensor) -> None:
        self.cache, self.seq_indices, self.positions = cache, seq_indices, positions

    def __call__(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        out: Tensor = torch.ops.gptbatch.paged_attention(
            qkv, self.cache.layers[layer], self.cache.table, self.seq_indices, self.positions, scale
        )
        return out
