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
from gptbatch.pipeline.kv_cache.block_pool import PagePool, n_pages_of
from gptbatch.pipeline.kv_cache.quantization import PAGE_SIZES, CacheDtype, bytes_a_head
from gptbatch.pipeline.model.config import GPTConfig

CACHE_LINE = 64


class PagedCache:
    """Per layer (H, P, page): P pages of keys and values, laid out as full_pages.h and int8_pages.h say; PagePool deals them out.

    All pages are there from the start, but the system gives memory for a page only when it is first written; pages that have been
    used are used again before others are.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        n_slots: int,
        capacity: int | None,
        dtype: torch.dtype,
        cache_dtype: CacheDtype,
        device: torch.device,
    ) -> None:
        assert device.type == "cpu"
        assert dtype in (torch.float32, torch.bfloat16)
        load_kernels()
        size = PAGE_SIZES[cache_dtype]
        full = n_pages_of(config.n_positions, size)  # of one full context
        n_pages = (
            n_slots * full if capacity is None else min(n_slots * full, max(full, capacity // size))
        )
        self.pool = PagePool(n_slots, n_pages, size)
        # 0 everywhere, as the rest of a page's depth must be
        stored = torch.uint8 if cache_dtype == "int8" else dtype
        page = 2 * size * bytes_a_head(config, dtype, cache_dtype) // stored.itemsize
        self.layers = [
            _lazy_zeros((config.n_head, n_pages, page), stored) for _ in range(config.n_layer)
        ]
        self.table = torch.zeros(n_slots, full, dtype=torch.int32)
        self._table = self.table.numpy()  # the same memory, quicker to write

    def admit(self, slot: int, token_ids: Sequence[int], length: int, *, share: bool) -> int | None:
        there = self.pool.admit(slot, token_ids, length, share=share)
        if there is not None:
            pages = self.pool.pages(slot)
            self._table[slot, : len(pages)] = pages
        return there

    def ready(self, slot: int) -> bool:
        return self.pool.ready(slot)

    def computed(self, slot: int, first: int, last: int) -> None:
        self.pool.computed(slot, first, last)

    def step(self, slots: Sequence[int], positions: Sequence[int]) -> RaggedAttention:
        for slot, position in zip(slots, positions, strict=True):
            page, new = self.pool.page_of(slot, position)
            if new:
                self._table[slot, position // self.pool.page_size] = page
        return RaggedAttention(self, torch.tensor(slots), torch.tensor(positions))

    def move(self, source: int, target: int) -> None:
        self.pool.move(source, target)
        self._table[target] = self._table[source]

    def clear(self, slot: int) -> None:
        self.pool.clear(slot)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only as they are written; torch would write them all. Raises MemoryError when there is no room for them.

    They begin where a cache line does, so that no vector of the kernel lies in two.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(n_bytes + CACHE_LINE, np.uint8)
    first = -memory.ctypes.data % CACHE_LINE
    return torch.from_numpy(memory[first : first + n_bytes]).view(dtype).view(shape)


class RaggedAttention:
    """Attention of one call. slots and positions are (N,). A kernel that computes more than attention takes what it needs from here."""

    def __init__(self, cache: PagedCache, slots: Tensor, positions: Tensor) -> None:
        self.cache, self.slots, self.positions = cache, slots, positions

    def __call__(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        out: Tensor = torch.ops.gptbatch.attend(
            qkv, self.cache.layers[layer], self.cache.table, self.slots, self.positions, scale
        )
        return out
