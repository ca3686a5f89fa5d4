"""Which pages of a cache hold what: each seq_index's own, and those of prefixes that sequences share.

A page holds block_size positions. The full pages of a prompt stand in a tree: a node is one page of tokens after those of its parent, so
that a path from the root is a prefix. A sequence that begins like another takes the pages of their common path instead of computing them
again: keys and values depend on the tokens before alone. That holds for a prefix which is still being computed, too: whoever
came first computes it, and the others are ready once all of it is in a call (see `ready`).

Pages of the tree that nobody uses any more are kept for sequences to come, as long as there is room; those that nobody ever shared go
first, then those that have not been used for the longest time.

Knows: token ids and numbers of pages. Does not know: tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

IDLE_SHARE = 8  # at most one page in so many is kept without a user


class CacheAllocator(Protocol):
    """How a cache deals its room out. A seq_index is a sequence's place in it; it knows not whose."""

    def allocate(
        self, seq_index: int, token_ids: Sequence[int], length: int, *, share: bool
    ) -> int | None:
        """Give an empty seq_index to a sequence that begins with token_ids and grows to at most `length` positions.

        Returns how many of the tokens are there already, or will be when the seq_index is `ready` (never the last one, whose logits are
        logits_indices); None when there is no room now. share: whether it may take what others have computed and others its own; its tokens
        are then not to change.
        """

    def is_ready(self, seq_index: int) -> bool:
        """Whether what `admit` said is there, or in the call that comes next."""

    def mark_computed(self, seq_index: int, first: int, last: int) -> None:
        """The seq_index's tokens from position first to before last are in the call that comes next."""

    def move(self, source: int, target: int) -> None:
        """What is in one seq_index takes the place of another's, which must have been cleared."""

    def free(self, seq_index: int) -> None:
        """Forget a seq_index's sequence."""


@dataclass(slots=True, eq=False)
class Node:
    """A page of a prefix. users: seq_indices that hold it. shared: another sequence has taken it. ready: its tokens are in a call, or were."""

    page: int
    key: tuple[int, ...]
    parent: Node | None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    users: int = 0
    shared: bool = False
    ready: bool = False


@dataclass(slots=True)
class _SequenceBlocks:
    """pages: in order, the first len(nodes) of them in the tree. most: pages that it may come to. taken: of the nodes, not its own."""

    pages: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    most: int = 0
    taken: int = 0
    waiting: int = 0  # nodes before this one are ready


class BlockPool:
    """CacheAllocator that hold pages of block_size positions, n_blocks in all. One seq_index alone always gets what it needs."""

    def __init__(self, max_seqs: int, n_blocks: int, block_size: int) -> None:
        self.n_blocks, self.block_size = n_blocks, block_size
        self._sequences = [_SequenceBlocks() for _ in range(max_seqs)]
        self._root = Node(page=-1, key=(), parent=None, ready=True)
        self._free: list[int] = []  # used before
        self._n_touched = 0  # pages from here on have never been used
        self._idle_once: dict[
            Node, None
        ] = {}  # without a user and never shared, the longest idle first; a child before its parent
        self._idle_shared: dict[Node, None] = {}  # without a user, but shared once
        self._in_use = 0
        self._promised = 0  # pages that seq_indices have not taken yet, but may come to

    def allocate(
        self, seq_index: int, token_ids: Sequence[int], length: int, *, share: bool
    ) -> int | None:
        state = self._sequences[seq_index]
        assert not state.pages
        size = self.block_size
        keys = (
            [
                tuple(token_ids[first : first + size])
                for first in range(0, (len(token_ids) - 1) // size * size, size)
            ]
            if share
            else []
        )
        path = []
        node = self._root
        for key in keys:
            child = node.children.get(key)
            if child is None:
                break
            path.append(child)
            node = child
        most = blocks_for(length, size)
        idle = sum(node.users == 0 for node in path)
        if self._in_use + self._promised + idle + most - len(path) > self.n_blocks:
            return None
        self._in_use += idle
        self._promised += most - len(path)
        state.most, state.taken, state.waiting = most, len(path), 0
        for node in path:
            self._idle_once.pop(node, None)
            self._idle_shared.pop(node, None)
            node.users += 1
            node.shared = True
            self._hold(state, node)
        node = path[-1] if path else self._root
        for key in keys[len(path) :]:
            child = Node(page=self._new_page(), key=key, parent=node, users=1)
            node.children[key] = child
            self._hold(state, child)
            node = child
        return len(path) * size

    def is_ready(self, seq_index: int) -> bool:
        state = self._sequences[seq_index]
        while state.waiting < state.taken and state.nodes[state.waiting].ready:
            state.waiting += 1
        return state.waiting == state.taken

    def mark_computed(self, seq_index: int, first: int, last: int) -> None:
        for node in self._sequences[seq_index].nodes[
            first // self.block_size : last // self.block_size
        ]:
            node.ready = True

    def page_of(self, seq_index: int, position: int) -> tuple[int, bool]:
        """The page that holds the seq_index's position, and whether it is new. Positions come in order.

        A seq_index that nobody admitted takes what it needs, as long as there is any.
        """
        state = self._sequences[seq_index]
        number = position // self.block_size
        if number < len(state.pages):
            return state.pages[number], False
        assert number == len(state.pages), "positions come in order"
        if number >= state.most:
            state.most += 1
            self._promised += 1
        state.pages.append(self._new_page())
        return state.pages[number], True

    def pages(self, seq_index: int) -> list[int]:
        """The pages of a seq_index, in order."""
        return self._sequences[seq_index].pages

    def move(self, source: int, target: int) -> None:
        assert not self._sequences[target].pages
        self._sequences[target], self._sequences[source] = (
            self._sequences[source],
            _SequenceBlocks(),
        )

    def free(self, seq_index: int) -> None:
        state, self._sequences[seq_index] = self._sequences[seq_index], _SequenceBlocks()
        self._promised -= state.most - len(state.pages)
        own = state.pages[len(state.nodes) :]
        self._free += reversed(own)
        self._in_use -= len(own)
        for node in reversed(state.nodes):
            node.users -= 1
            if node.users:
                continue
            self._in_use -= 1
            if node.ready:
                (self._idle_shared if node.shared else self._idle_once)[node] = None
            else:
                self._forget(node)
        while len(self._idle_once) + len(self._idle_shared) > self.n_blocks // IDLE_SHARE:
            self._evict()

    @property
    def in_use(self) -> int:
        """Pages that seq_indices hold; a shared one counts once."""
        return self._in_use

    @property
    def idle(self) -> int:
        """Pages of prefixes that no seq_index holds."""
        return len(self._idle_once) + len(self._idle_shared)

    def _hold(self, state: _SequenceBlocks, node: Node) -> None:
        state.nodes.append(node)
        state.pages.append(node.page)

    def _new_page(self) -> int:
        self._in_use += 1
        self._promised -= 1
        if not self._free and self._n_touched < self.n_blocks:
            self._n_touched += 1
            return self._n_touched - 1
        if not self._free:
            self._evict()
        return self._free.pop()

    def _evict(self) -> None:
        idle = self._idle_once or self._idle_shared
        node = next(iter(idle))
        del idle[node]
        self._forget(node)

    def _forget(self, node: Node) -> None:
        assert not node.children
        assert node.parent is not None
        del node.parent.children[node.key]
        self._free.append(node.page)


def blocks_for(length: int, block_size: int) -> int:
    """How many pages hold so many positions."""
    return -(-length // block_size)
