"""The ragged backend: a paged KV cache and the C++ attention kernel that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from gptbatch.pipeline.kernels.build import load_kernels
from gptbatch.pipeline.kernels.huge_pages import lazy_zeros
from gptbatch.pipeline.kv_cache.block_pool import BlockPool, blocks_for
from gptbatch.pipeline.kv_cache.quantization import bytes_per_head
from gptbatch.pipeline.kv_cache.spec import KVCacheSpec
from gptbatch.pipeline.system.machine import free_memory_bytes


class PagedKVCache:
    """KV cache in blocks. `BlockPool` assigns the blocks; the block table maps positions to them.

    Each layer is a tensor (H, n_blocks, elements of a block); the kernels define the layout of a
    block. All blocks exist from the start, but the operating system provides memory only when a
    block is first written. Blocks of finished sequences are kept for their prefixes while at least
    as much memory is free as the cache takes; see `BlockPool`.
    """

    def __init__(self, spec: KVCacheSpec, max_seqs: int, capacity: int | None = None) -> None:
        """Create an empty cache on the CPU.

        Args:
            spec: The layout; dtype float32 or bfloat16.
            max_seqs: Number of sequences.
            capacity: Positions in total; None is max_seqs full contexts. See `new_cache`.
        """
        assert spec.device.type == "cpu"
        assert spec.dtype in (torch.float32, torch.bfloat16)
        load_kernels()
        config, block_size = spec.config, spec.block_size
        blocks_per_context = blocks_for(config.n_positions, block_size)
        n_blocks = spec.n_blocks(max_seqs, capacity)
        stored = torch.uint8 if spec.cache_dtype == "int8" else spec.dtype
        block_bytes = 2 * block_size * bytes_per_head(config, spec.dtype, spec.cache_dtype)
        # Not a method: the memory of the cache must be freed with its last reference.
        has_memory = partial(_has_memory, block_bytes * config.n_head * config.n_layer)
        self.pool = BlockPool(max_seqs, n_blocks, block_size, may_grow_to=has_memory)
        # Zeros: the kernels read the padding of a head, which nothing ever writes.
        self.layers = [
            lazy_zeros((config.n_head, n_blocks, block_bytes // stored.itemsize), stored)
            for _ in range(config.n_layer)
        ]
        self.block_table = torch.zeros(max_seqs, blocks_per_context, dtype=torch.int32)
        # The same memory; numpy writes single elements faster.
        self._block_table = self.block_table.numpy()

    def allocate(
        self, seq_index: int, token_ids: Sequence[int], length: int, *, share_prefix: bool
    ) -> int | None:
        """Reserve blocks for a sequence and fill in its block table; see `CacheAllocator`."""
        cached = self.pool.allocate(seq_index, token_ids, length, share_prefix=share_prefix)
        if cached is not None:
            blocks = self.pool.blocks(seq_index)
            self._block_table[seq_index, : len(blocks)] = blocks
        return cached

    def is_ready(self, seq_index: int) -> bool:
        """Return whether the cached prefix of the sequence is scheduled; see `CacheAllocator`."""
        return self.pool.is_ready(seq_index)

    def mark_scheduled(self, seq_index: int, first: int, end: int) -> None:
        """Mark positions first to end - 1 as scheduled; see `CacheAllocator`."""
        self.pool.mark_scheduled(seq_index, first, end)

    def attention_for(self, seq_indices: Sequence[int], positions: Sequence[int]) -> PagedAttention:
        """Return the attention of one forward pass; see `KVCache`."""
        for seq_index, position in zip(seq_indices, positions, strict=True):
            block, is_new = self.pool.ensure_block(seq_index, position)
            if is_new:
                self._block_table[seq_index, position // self.pool.block_size] = block
        return PagedAttention(self, torch.tensor(seq_indices), torch.tensor(positions))

    def move(self, source: int, target: int) -> None:
        """Move a sequence to an empty index; see `CacheAllocator`."""
        self.pool.move(source, target)
        self._block_table[target] = self._block_table[source]

    def free(self, seq_index: int) -> None:
        """Release the blocks of a sequence; see `CacheAllocator`."""
        self.pool.free(seq_index)


class PagedAttention:
    """Attention of one forward pass over a paged cache. seq_indices, positions: (N,).

    Kernels that fuse attention with other work read the fields directly.
    """

    def __init__(self, cache: PagedKVCache, seq_indices: Tensor, positions: Tensor) -> None:
        self.cache, self.seq_indices, self.positions = cache, seq_indices, positions

    def __call__(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        """Attend: qkv (>= N, 3, H, D) -> (>= N, C)."""
        cache = self.cache
        out: Tensor = torch.ops.gptbatch.paged_attention(
            qkv, cache.layers[layer], cache.block_table, self.seq_indices, self.positions, scale
        )
        return out


def _has_memory(bytes_per_block: int, n_blocks: int) -> bool:
    """Return whether at least as much memory is free as n_blocks blocks take.

    Of k runs that grow at once, each stops at 1 / (k + 1) of the memory that was free before.
    """
    free = free_memory_bytes()
    return free is None or free >= n_blocks * bytes_per_block
