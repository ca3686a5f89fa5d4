"""The ragged backend: a cache in pages, and the C++ kernel that reads of each sequence just what is there.

Knows: pages, and which slot holds which. Does not know: what the tokens mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.gpt.config import GPTConfig
from pipeline.gpt.kernels.build import load_kernels

PAGE = 16  # positions of a page, and
DEPTH_MULTIPLE = 32  # numbers of a head that are stored, rounded up to a multiple of this: the layout that ragged.cpp reads


class PagedCache:
    """Per layer keys (H, P, depth, 16) and values (H, P, 16, depth): P pages of 16 positions.

    A slot's pages stand in its row of the table; a page belongs to one slot or is free. All pages are there from the start, but the
    system gives memory for a page only when it is first written; pages that have been used are used again before others are.
    """

    def __init__(self, config: GPTConfig, *, n_slots: int, capacity: int | None, dtype: torch.dtype, device: torch.device) -> None:
        assert device.type == "cpu"
        assert dtype in (torch.float32, torch.bfloat16)
        load_kernels()
        self.n_head = config.n_head
        depth = -(-config.head_size // DEPTH_MULTIPLE) * DEPTH_MULTIPLE
        full = pages(config.n_positions)  # of one full context
        self.n_pages = n_slots * full if capacity is None else min(n_slots * full, max(full, capacity // PAGE))
        # 0 everywhere, as the rest of a page's depth must be
        self.keys = [_lazy_zeros((self.n_head, self.n_pages, depth, PAGE), dtype) for _ in range(config.n_layer)]
        self.values = [_lazy_zeros((self.n_head, self.n_pages, PAGE, depth), dtype) for _ in range(config.n_layer)]
        self.table = torch.zeros(n_slots, full, dtype=torch.int32)
        self._pages: list[list[int]] = [[] for _ in range(n_slots)]  # of each slot, in order
        self._free: list[int] = []  # used before
        self._n_used = 0  # pages from here on have never been used

    def fits(self, lengths: Sequence[int]) -> bool:
        return sum(map(pages, lengths)) <= self.n_pages

    def reserve(self, lengths: Sequence[int]) -> None:
        pass

    def step(self, slots: Sequence[int], positions: Sequence[int]) -> RaggedAttention:
        for slot, position in zip(slots, positions, strict=True):
            if position // PAGE >= len(self._pages[slot]):
                self._add_page(slot)
        return RaggedAttention(self, torch.tensor(slots), torch.tensor(positions))

    def move(self, source: int, target: int) -> None:
        assert not self._pages[target]
        self._pages[target], self._pages[source] = self._pages[source], []
        self.table[target] = self.table[source]

    def clear(self, slot: int) -> None:
        self._free += reversed(self._pages[slot])
        self._pages[slot] = []

    def _add_page(self, slot: int) -> None:
        if self._free:
            page = self._free.pop()
        else:
            assert self._n_used < self.n_pages, "the caller admits no more than fits"
            page = self._n_used
            self._n_used += 1
        self.table[slot, len(self._pages[slot])] = page
        self._pages[slot].append(page)


def pages(length: int) -> int:
    """How many pages hold so many positions."""
    return -(-length // PAGE)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only as they are written; torch would write them all. Raises MemoryError when there is no room for them."""
    width = np.float32 if dtype == torch.float32 else np.uint16
    return torch.from_numpy(np.zeros(shape, width)).view(dtype)


class RaggedAttention:
    """Attention of one call. slots and positions are (N,)."""

    def __init__(self, cache: PagedCache, slots: Tensor, positions: Tensor) -> None:
        self.cache, self.slots, self.positions = cache, slots, positions

    def __call__(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        cache = self.cache
        out: Tensor = torch.ops.gptbatch.attend(qkv, cache.keys[layer], cache.values[layer], cache.table, self.slots, self.positions, scale)
        return out
