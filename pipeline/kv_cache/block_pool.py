"""Assign blocks of the paged KV cache to sequences, with prefix caching.

Blocks and block tables are those of PagedAttention (vLLM, Kwon et al. 2023). The tree of cached
prefixes follows RadixAttention (SGLang, Zheng et al. 2024), in whole blocks.

A block holds block_size positions. The full blocks of prompts form a tree: a child holds the tokens
after those of its parent, so a path from the root is a prefix. Keys and values depend only on the
tokens before them, so a sequence reuses the blocks of its longest known prefix. This includes a
prefix that another sequence is still computing: `is_ready` tells when all of it is scheduled.

A cached block without a user is evictable. It stays for later sequences until its memory is needed:
a sequence takes free blocks first, then blocks that were never used, then evicts the least recently
used. A sequence frees its deepest block first, so a child is evicted before its parent.

A block takes memory when it is first written, so evictable blocks make the pool grow to n_blocks.
Several runs on one machine may each have measured the same free memory for their pools. So the
memory is checked again while the pool grows: where it is short, blocks are evicted instead.

Imports no torch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

# Blocks taken between two checks of the free memory. A check takes less than a millisecond.
BLOCKS_PER_MEMORY_CHECK = 64


class CacheAllocator(Protocol):
    """How a cache assigns its memory to sequences, by index in the running batch."""

    def allocate(
        self, seq_index: int, token_ids: Sequence[int], length: int, *, share_prefix: bool
    ) -> int | None:
        """Reserve memory for a sequence at an empty index.

        Args:
            seq_index: Index in the running batch.
            token_ids: The tokens that are known: the prompt.
            length: The most positions that the sequence may reach.
            share_prefix: Reuse blocks of other sequences and offer its own. The prompt tokens must
                then keep their positions.

        Returns:
            The number of tokens whose keys and values are cached, or will be once `is_ready`. It is
            less than len(token_ids), because the last token's logits are needed. None when the
            sequence does not fit now.
        """

    def is_ready(self, seq_index: int) -> bool:
        """Return whether the cached prefix is computed, or scheduled for the next forward pass."""

    def mark_scheduled(self, seq_index: int, first: int, end: int) -> None:
        """Record that the next forward pass computes positions first to end - 1."""

    def move(self, source: int, target: int) -> None:
        """Move a sequence to another index, which must be empty."""

    def free(self, seq_index: int) -> None:
        """Release the memory of a sequence."""


@dataclass(slots=True, eq=False)
class CachedBlock:
    """A full block of a prompt: a node of the prefix tree.

    Attributes:
        block: Index of the block.
        token_ids: The block_size tokens in it; the key among the parent's children.
        parent: The block before it; None for the root.
        children: Blocks that continue this prefix, by their tokens.
        n_users: Running sequences that hold the block.
        is_scheduled: The next forward pass, or an earlier one, computes its keys and values.
    """

    block: int
    token_ids: tuple[int, ...]
    parent: CachedBlock | None
    children: dict[tuple[int, ...], CachedBlock] = field(default_factory=dict)
    n_users: int = 0
    is_scheduled: bool = False


@dataclass(slots=True)
class _SequenceBlocks:
    """The blocks of one running sequence.

    Attributes:
        blocks: Block indices in order.
        cached: The leading blocks, those in the prefix tree.
        max_blocks: Blocks that the sequence may reach.
        n_reused: Leading cached blocks that another sequence computes.
        n_ready: Leading reused blocks that are known to be scheduled.
    """

    blocks: list[int] = field(default_factory=list)
    cached: list[CachedBlock] = field(default_factory=list)
    max_blocks: int = 0
    n_reused: int = 0
    n_ready: int = 0

    def add_cached(self, cached: CachedBlock) -> None:
        self.cached.append(cached)
        self.blocks.append(cached.block)


class BlockPool:
    """A CacheAllocator over n_blocks blocks. A sequence that runs alone always gets its blocks.

    Args:
        max_seqs: Number of sequences, indexed from 0.
        n_blocks: The most blocks in use and evictable.
        block_size: Positions per block.
        may_grow_to: Whether blocks may stay evictable while the pool grows to this number of
            blocks. Otherwise they are evicted first. None means always.
    """

    def __init__(
        self,
        max_seqs: int,
        n_blocks: int,
        block_size: int,
        *,
        may_grow_to: Callable[[int], bool] | None = None,
    ) -> None:
        self.n_blocks, self.block_size = n_blocks, block_size
        self._may_grow_to = may_grow_to
        self._may_grow = True
        self._n_taken_unchecked = 0
        self._sequences = [_SequenceBlocks() for _ in range(max_seqs)]
        self._root = CachedBlock(block=-1, token_ids=(), parent=None, is_scheduled=True)
        # Free blocks that were used before. Blocks from _n_touched on were never used.
        self._free: list[int] = []
        self._n_touched = 0
        # In order of eviction: least recently used first, a child before its parent. A dict would
        # search for its first key in linear time after many deletions.
        self._evictable: OrderedDict[CachedBlock, None] = OrderedDict()
        self._n_in_use = 0
        # Blocks that running sequences may still need.
        self._n_reserved = 0

    @property
    def n_in_use(self) -> int:
        """Blocks that running sequences hold; a shared block counts once."""
        return self._n_in_use

    @property
    def n_evictable(self) -> int:
        """Cached blocks that no running sequence holds."""
        return len(self._evictable)

    def allocate(
        self, seq_index: int, token_ids: Sequence[int], length: int, *, share_prefix: bool
    ) -> int | None:
        """Reserve blocks and reuse the longest cached prefix; see `CacheAllocator`."""
        sequence = self._sequences[seq_index]
        assert not sequence.blocks
        keys = self._full_blocks(token_ids) if share_prefix else []
        reused = self._find_prefix(keys)
        max_blocks = blocks_for(length, self.block_size)
        n_new = max_blocks - len(reused)
        n_reused_evictable = sum(block.n_users == 0 for block in reused)
        if self._n_in_use + self._n_reserved + n_reused_evictable + n_new > self.n_blocks:
            return None
        self._n_in_use += n_reused_evictable
        self._n_reserved += n_new
        sequence.max_blocks, sequence.n_reused, sequence.n_ready = max_blocks, len(reused), 0
        for cached in reused:
            if cached.n_users == 0:
                del self._evictable[cached]
            cached.n_users += 1
            sequence.add_cached(cached)
        parent = reused[-1] if reused else self._root
        for key in keys[len(reused) :]:
            cached = CachedBlock(block=self._take_block(), token_ids=key, parent=parent, n_users=1)
            parent.children[key] = cached
            sequence.add_cached(cached)
            parent = cached
        return len(reused) * self.block_size

    def is_ready(self, seq_index: int) -> bool:
        """Return whether all reused blocks are scheduled; see `CacheAllocator`."""
        sequence = self._sequences[seq_index]
        while (
            sequence.n_ready < sequence.n_reused and sequence.cached[sequence.n_ready].is_scheduled
        ):
            sequence.n_ready += 1
        return sequence.n_ready == sequence.n_reused

    def mark_scheduled(self, seq_index: int, first: int, end: int) -> None:
        """Mark the blocks of positions first to end - 1 as scheduled; see `CacheAllocator`."""
        cached = self._sequences[seq_index].cached
        for block in cached[first // self.block_size : end // self.block_size]:
            block.is_scheduled = True

    def ensure_block(self, seq_index: int, position: int) -> tuple[int, bool]:
        """Take the block of a position if there is none yet; return it and whether it is new.

        New positions must come in order. A sequence without `allocate` takes blocks while there
        are any.
        """
        sequence = self._sequences[seq_index]
        index = position // self.block_size
        if index < len(sequence.blocks):
            return sequence.blocks[index], False
        assert index == len(sequence.blocks), "positions come in order"
        if index >= sequence.max_blocks:
            sequence.max_blocks += 1
            self._n_reserved += 1
        sequence.blocks.append(self._take_block())
        return sequence.blocks[index], True

    def blocks(self, seq_index: int) -> list[int]:
        """Return the block indices of a sequence, in order."""
        return self._sequences[seq_index].blocks

    def move(self, source: int, target: int) -> None:
        """Move a sequence to an empty index; see `CacheAllocator`."""
        assert not self._sequences[target].blocks
        self._sequences[target] = self._sequences[source]
        self._sequences[source] = _SequenceBlocks()

    def free(self, seq_index: int) -> None:
        """Release the blocks of a sequence. Its scheduled prefix blocks become evictable."""
        sequence = self._sequences[seq_index]
        self._sequences[seq_index] = _SequenceBlocks()
        self._n_reserved -= sequence.max_blocks - len(sequence.blocks)
        uncached = sequence.blocks[len(sequence.cached) :]
        self._free += reversed(uncached)
        self._n_in_use -= len(uncached)
        for cached in reversed(sequence.cached):
            cached.n_users -= 1
            if cached.n_users:
                continue
            self._n_in_use -= 1
            if cached.is_scheduled:
                self._evictable[cached] = None
            else:
                self._remove(cached)

    def _full_blocks(self, token_ids: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the tokens of each full block, without the last token of the prompt."""
        size = self.block_size
        end = (len(token_ids) - 1) // size * size
        return [tuple(token_ids[first : first + size]) for first in range(0, end, size)]

    def _find_prefix(self, keys: list[tuple[int, ...]]) -> list[CachedBlock]:
        """Return the longest path of the tree that these blocks follow."""
        path: list[CachedBlock] = []
        node = self._root
        for key in keys:
            child = node.children.get(key)
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _take_block(self) -> int:
        """Turn one reserved block into a block in use."""
        self._n_in_use += 1
        self._n_reserved -= 1
        if self._free:
            return self._free.pop()
        if self._n_touched < self.n_blocks and (not self._evictable or self._has_memory()):
            self._n_touched += 1
            return self._n_touched - 1
        cached, _ = self._evictable.popitem(last=False)
        self._remove(cached)
        return self._free.pop()

    def _has_memory(self) -> bool:
        """Return whether the pool may grow instead of evicting; checked now and then."""
        if self._may_grow_to is None:
            return True
        if self._n_taken_unchecked == 0:
            self._may_grow = self._may_grow_to(self._n_touched + BLOCKS_PER_MEMORY_CHECK)
        self._n_taken_unchecked = (self._n_taken_unchecked + 1) % BLOCKS_PER_MEMORY_CHECK
        return self._may_grow

    def _remove(self, cached: CachedBlock) -> None:
        assert not cached.children
        assert cached.parent is not None
        del cached.parent.children[cached.token_ids]
        self._free.append(cached.block)


def blocks_for(length: int, block_size: int) -> int:
    """Return how many blocks hold `length` positions."""
    return -(-length // block_size)
