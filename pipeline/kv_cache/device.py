"""The paged KV cache on a device, and attention by the Triton kernels that read it.

A block is 64 positions, the keys of one step of attention. All blocks of a sequence are dealt when
it starts, because its longest length is known: its table does not change while it decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gptbatch.pipeline.kv_cache.block_pool import BlockPool, blocks_for

if TYPE_CHECKING:
    from gptbatch.pipeline.kernels.cuda.store import LayerCache
    from gptbatch.pipeline.kv_cache.spec import KVCacheSpec


class DeviceKVCache:
    """KV cache in blocks of 64. `BlockPool` assigns the blocks.

    Attributes:
        pool: Assigns the blocks.
        layers: Keys and values, see kernels/cuda/store.py.
        tables: The blocks of each sequence (max_seqs, blocks per context) int64, on the host.
    """

    def __init__(self, spec: KVCacheSpec, max_seqs: int, capacity: int | None = None) -> None:
        """Create an empty cache; see `new_cache` for capacity."""
        from gptbatch.pipeline.kernels.cuda.store import LayerCache

        config, block_size = spec.config, spec.block_size
        per_context = blocks_for(config.n_positions, block_size)
        n_blocks = spec.n_blocks(max_seqs, capacity)
        self.pool = BlockPool(max_seqs, n_blocks, block_size)
        self.device = spec.device
        self.tables = np.zeros((max_seqs, per_context), np.int64)
        shape = (n_blocks, 2, config.n_head, block_size)
        is_int8 = spec.cache_dtype == "int8"
        dtype = torch.int8 if is_int8 else spec.dtype

        def layer() -> LayerCache:
            data = torch.empty(*shape, config.head_size, dtype=dtype, device=spec.device)
            scales = torch.empty(shape, device=spec.device) if is_int8 else None
            return LayerCache(data, scales)

        self.layers = [layer() for _ in range(config.n_layer)]

    def allocate(
        self, seq_index: int, token_ids: Sequence[int], length: int, *, share_prefix: bool
    ) -> int | None:
        """Take all blocks of a sequence and fill in its table; see `CacheAllocator`."""
        cached = self.pool.allocate(seq_index, token_ids, length, share_prefix=share_prefix)
        if cached is not None:
            for position in range(0, length, self.pool.block_size):
                self.pool.ensure_block(seq_index, position)
            blocks = self.pool.blocks(seq_index)
            self.tables[seq_index, : len(blocks)] = blocks
        return cached

    def is_ready(self, seq_index: int) -> bool:
        """Return whether the cached prefix of the sequence is scheduled; see `CacheAllocator`."""
        return self.pool.is_ready(seq_index)

    def mark_scheduled(self, seq_index: int, first: int, end: int) -> None:
        """Mark positions first to end - 1 as scheduled; see `CacheAllocator`."""
        self.pool.mark_scheduled(seq_index, first, end)

    def move(self, source: int, target: int) -> None:
        """Move a sequence to an empty index; see `CacheAllocator`."""
        self.pool.move(source, target)
        self.tables[target] = self.tables[source]

    def free(self, seq_index: int) -> None:
        """Release the blocks of a sequence; see `CacheAllocator`."""
        self.pool.free(seq_index)

    def attention_for(
        self, seq_indices: Sequence[int], positions: Sequence[int]
    ) -> DeviceAttention:
        """Return the attention of one forward pass; see `KVCache`."""
        for seq_index, position in zip(seq_indices, positions, strict=True):
            block, is_new = self.pool.ensure_block(seq_index, position)
            if is_new:
                self.tables[seq_index, position // self.pool.block_size] = block
        # Copies: the tables may change before the device has read them.
        tables = torch.tensor(self.tables, device=self.device)
        # Two tensors: kernels are compiled for addresses of a multiple of 16 bytes.
        rows = (torch.tensor([*each], dtype=torch.int32) for each in (seq_indices, positions))
        return DeviceAttention(self, tables, *(each.to(self.device) for each in rows))


class DeviceAttention:
    """Attention of one forward pass over the cache of a device. seq_indices, positions: (N,)."""

    def __init__(
        self, cache: DeviceKVCache, tables: Tensor, seq_indices: Tensor, positions: Tensor
    ) -> None:
        self.cache, self.tables = cache, tables
        self.seq_indices, self.positions = seq_indices, positions

    def __call__(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        """Write keys and values, then attend: qkv (>= N, 3, H, D) -> (>= N, C)."""
        from gptbatch.pipeline.kernels.cuda.attend import attend
        from gptbatch.pipeline.kernels.cuda.store import store

        count, cache = len(self.positions), self.cache.layers[layer]
        rows = (cache, self.tables, self.seq_indices, self.positions)
        flat = qkv.flatten(1).contiguous()
        out = torch.zeros(len(qkv), flat.shape[1] // 3, dtype=qkv.dtype, device=qkv.device)
        store(flat[:count], *rows)
        attend(flat[:count], *rows, out[:count], scale)
        return out
