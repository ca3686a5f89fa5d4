"""The ragged backend: a cache in pages, and the C++ kernel that reads of each sequence just what is there.

Knows: pages, and which slot holds which. Does not know: what the tokens mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.gpt.config import GPTConfig
from pipeline.gpt.kernels.build import load_kernels

PAGE = 16  # positions of a page, and
DEPTH_MULTIPLE = 32  # numbers of a head that are stored, rounded up to a multiple of this: the layout that ragged.cpp reads


class PagedCache:
    """Per layer keys (H, P, depth, 16) and values (H, P, 16, depth): P pages of 16 positions.

    A slot's pages stand in its row of the table; a page belongs to one slot or is free. More pages are made on demand.
    """

    def __init__(self, config: GPTConfig, *, n_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        assert device.type == "cpu"
        assert dtype in (torch.float32, torch.bfloat16)
        load_kernels()
        self.n_head, self.dtype = config.n_head, dtype
        self.depth = -(-config.head_size // DEPTH_MULTIPLE) * DEPTH_MULTIPLE
        empty = torch.empty(self.n_head, 0, self.depth, PAGE, dtype=dtype)
        self.keys: list[Tensor] = [empty] * config.n_layer
        self.values: list[Tensor] = [empty.view(self.n_head, 0, PAGE, self.depth)] * config.n_layer
        self.table = torch.zeros(n_slots, -(-config.n_positions // PAGE), dtype=torch.int32)
        self._pages: list[list[int]] = [[] for _ in range(n_slots)]  # of each slot, in order
        self._free: list[int] = []
        self._n_pages = 0

    def reserve(self, lengths: Sequence[int]) -> None:
        wanted = sum(-(-length // PAGE) for length in lengths)
        if wanted > len(self._free):
            self._grow(wanted - len(self._free))

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
        if not self._free:
            self._grow(8)
        page = self._free.pop()
        self.table[slot, len(self._pages[slot])] = page
        self._pages[slot].append(page)

    def _grow(self, count: int) -> None:
        """At least so many more pages, all 0: the rest of a page's depth must be 0, and what is touched now faults in no later step.

        Growing copies what there is, so that it pays to grow by a part of it.
        """
        count = max(count, self._n_pages // 4)
        for layer in range(len(self.keys)):
            for tensors in (self.keys, self.values):
                old = tensors[layer]
                grown = old.new_zeros(old.shape[0], self._n_pages + count, *old.shape[2:])
                grown[:, : self._n_pages] = old
                tensors[layer] = grown
        self._free = [*reversed(range(self._n_pages, self._n_pages + count)), *self._free]
        self._n_pages += count


class RaggedAttention:
    """Attention of one call. slots and positions are (N,)."""

    def __init__(self, cache: PagedCache, slots: Tensor, positions: Tensor) -> None:
        self.cache, self.slots, self.positions = cache, slots, positions

    def __call__(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        cache = self.cache
        out: Tensor = torch.ops.gptbatch.attend(qkv, cache.keys[layer], cache.values[layer], cache.table, self.slots, self.positions, scale)
        return out
