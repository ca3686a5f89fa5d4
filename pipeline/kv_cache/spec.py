"""What each attention backend can do, and the layout of a KV cache.

Imports torch for types only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from gptbatch.pipeline.kv_cache.block_pool import blocks_for
from gptbatch.pipeline.kv_cache.quantization import BLOCK_SIZES, CacheDtype, bytes_per_head

if TYPE_CHECKING:
    import torch

    from gptbatch.pipeline.model.config import GPTConfig

BackendName = Literal["ragged", "padded"]
ReductionOrder = Literal["matmul", "pairwise"]

GRAIN_WIDTH = 16
# Positions per block of the cache of the Triton kernels: the keys of one step of attention.
TRITON_BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """An attention backend and what it can do.

    Attributes:
        name: Value of `engine.attention`; recorded in the environment.
        native: Every operation that has a C++ kernel uses it, not only attention.
        triton: Every operation that has a Triton kernel uses it.
        paged: Memory is taken block by block, and sequences share prefixes.
        interleaves_prefill: A forward pass takes one prefill token of every sequence at a time, so
            prefill advances side by side.
        stores_int8: An int8 cache saves memory. Otherwise elements are only rounded to int8.
        reduction_orders: Orders in which attention can sum, the fastest first. At least one.
    """

    name: BackendName
    native: bool
    triton: bool
    paged: bool
    interleaves_prefill: bool
    stores_int8: bool
    reduction_orders: tuple[ReductionOrder, ...]


RAGGED = Backend(
    name="ragged",
    native=True,
    triton=False,
    paged=True,
    interleaves_prefill=False,
    stores_int8=True,
    # The kernel has one fixed order and does not read this name. With one entry the self-test has
    # no choice, and the environment records null.
    reduction_orders=("matmul",),
)
# Ragged attention on a CUDA device. `device_class` in the environment tells it from that of a CPU.
TRITON = replace(RAGGED, native=False, triton=True)
PADDED = Backend(
    name="padded",
    native=False,
    triton=False,
    paged=False,
    interleaves_prefill=True,
    stores_int8=False,
    reduction_orders=("matmul", "pairwise"),
)
BACKENDS: dict[BackendName, Backend] = {backend.name: backend for backend in (RAGGED, PADDED)}


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheSpec:
    """Everything that decides the layout of a model's KV caches.

    Attributes:
        dtype: The model's own dtype.
        cache_dtype: `auto` stores `dtype`; `int8` quantizes (see quantization.py).
        reduction_order: How padded attention sums. `matmul` uses torch's matrix products;
            `pairwise` adds neighbours two by two.
    """

    backend: Backend
    config: GPTConfig
    dtype: torch.dtype
    cache_dtype: CacheDtype
    reduction_order: ReductionOrder
    device: torch.device

    @property
    def block_size(self) -> int:
        """Positions per block."""
        return TRITON_BLOCK_SIZE if self.backend.triton else BLOCK_SIZES[self.cache_dtype]

    @property
    def bytes_per_token(self) -> int:
        """Bytes that the keys and values of one token take in all layers, at most."""
        cache_dtype: CacheDtype = self.cache_dtype if self.backend.stores_int8 else "auto"
        n_heads = self.config.n_layer * self.config.n_head
        return 2 * n_heads * bytes_per_head(self.config, self.dtype, cache_dtype)

    def capacity_for(self, lengths: Iterable[int]) -> int:
        """Return the capacity that holds sequences of these lengths, in positions."""
        return sum(blocks_for(length, self.block_size) * self.block_size for length in lengths)

    def n_blocks(self, max_seqs: int, capacity: int | None) -> int:
        """Return the blocks of a paged cache; one full context always fits.

        Args:
            max_seqs: Number of sequences.
            capacity: Positions in total; None is max_seqs full contexts.
        """
        per_context = blocks_for(self.config.n_positions, self.block_size)
        n_blocks = max_seqs * per_context
        if capacity is None:
            return n_blocks
        return min(n_blocks, max(per_context, capacity // self.block_size))

    def max_seqs(self, capacity: int | None) -> int | None:
        """Return how many sequences a cache of this capacity may hold; None for any number.

        A paged cache bounds its blocks. A padded one grows up to a full context per sequence, so
        the number of sequences must be bounded instead.
        """
        if self.backend.paged or capacity is None:
            return None
        return max(1, capacity // round_up(self.config.n_positions))


def round_up(size: int) -> int:
    """Return the next multiple of 16."""
    return -(-size // GRAIN_WIDTH) * GRAIN_WIDTH
