"""Which tokens the next step computes: continuous batching with chunked prefill.

A step takes one token of every sequence that decodes, and fills up to its budget of tokens with prefill: first of the sequences
that are under way, in the order in which they were admitted, then of those that it admits. Rows wait in a window of bounded size, and
of these the longest is admitted first, so that no long row is left over at the end; but none is passed over for ever.

What a row gets does not depend on any of this, since its tokens follow from its own tokens alone.

Knows: sequences, seq_indices, and how the cache deals its room out. Does not know: tensors, clocks, how tokens are chosen.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field

from gptbatch.pipeline.kv_cache.block_pool import CacheAllocator
from gptbatch.pipeline.types import RowError, StopReason, TokenizedPrompt

LEAST_PREFILL_TOKENS = 32  # of a step, however many sequences decode: new ones must come in
CHUNK_MULTIPLE = (
    16  # of a prefill that does not end in this step: attention takes four queries at a time
)
MOST_PASSES = 4  # times the seq_indices: rows that may be admitted before one that waits


@dataclass(slots=True, eq=False)
class Sequence:
    """One row on its way. tokens: the prompt and what has been generated; `cached` of them (from the front) are in the cache.

    cached_tokens: of the prompt, what another row had computed. passed_over: rows that came later and were admitted while this
    one waited. order: 1 for the first row that was admitted, and so on. The clocks and counters are the engine's.
    """

    source: TokenizedPrompt
    tokens: list[int]
    cached: int = 0
    cached_tokens: int = 0
    passed_over: int = 0
    order: int = 0
    admitted_s: float | None = None
    started_at_s: float = 0.0
    steps_before: int = 0
    rows_before: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    min_decision_margin: float = math.inf
    logits_hash: hashlib._Hash | None = None
    stop_reason: StopReason | None = None
    error: RowError | None = None

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - len(self.source.token_ids)

    @property
    def ended(self) -> bool:
        return self.stop_reason is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence that a step computes, the first of them at position `first`. ends: the next token is chosen after them."""

    sequence: Sequence
    seq_index: int
    first: int
    tokens: list[int]
    ends: bool


@dataclass(kw_only=True)
class Scheduler:
    """Sequences wait, run in seq_indices 0 to B-1 (`running`, sequence i in seq_index i) and are retired.

    max_seqs: most sequences that run. step_tokens: of a step, at most; a few more where nearly all are decoding. spread: whether the
    prefill of many sequences advances side by side (padded attention takes one token of each at a time) or one after the other.
    share: whether rows share prefixes. slide: whether a row may go on beyond n_positions.
    """

    cache: CacheAllocator
    max_seqs: int
    n_positions: int
    step_tokens: int
    spread: bool = False
    share: bool = True
    slide: bool = False
    running: list[Sequence] = field(default_factory=list)
    waiting: list[Sequence] = field(default_factory=list)

    _n_admitted: int = 0

    def add(self, source: TokenizedPrompt) -> None:
        self.waiting.append(Sequence(source=source, tokens=list(source.token_ids)))

    def plan(self) -> list[Chunk]:
        """The chunks of the next step, which the caller must compute; none when nothing runs or waits."""
        chunks = [
            chunk
            for seq_index in range(len(self.running))
            if self.pending(seq_index) == 1 and (chunk := self._chunk(seq_index, 1))
        ]
        left = max(self.step_tokens - len(chunks), LEAST_PREFILL_TOKENS)
        seq_indices = [
            seq_index for seq_index in range(len(self.running)) if self.pending(seq_index) > 1
        ]
        seq_indices.sort(key=lambda seq_index: self.running[seq_index].order)
        if self.spread:
            while (seq_index := self._admit()) is not None:
                seq_indices.append(seq_index)
            share = -(-left // max(1, len(seq_indices)))
            return chunks + [
                chunk for seq_index in seq_indices if (chunk := self._chunk(seq_index, share))
            ]
        while left > 0:
            seq_index = seq_indices.pop(0) if seq_indices else self._admit()
            if seq_index is None:
                break
            if chunk := self._chunk(seq_index, left):
                chunks.append(chunk)
                left -= len(chunk.tokens)
        return chunks

    def pending(self, seq_index: int) -> int:
        """Tokens of the seq_index's sequence that are not in the cache; at least one, the latest."""
        sequence = self.running[seq_index]
        return min(len(sequence.tokens), self.n_positions) - sequence.cached

    def length(self, source: TokenizedPrompt) -> int:
        """The most positions that a row comes to."""
        return min(self.n_positions, len(source.token_ids) + source.prompt.params.max_new_tokens)

    def _chunk(self, seq_index: int, most: int) -> Chunk | None:
        """The seq_index's next tokens, at most so many; None while it waits for a prefix that another seq_index computes."""
        if not self.cache.is_ready(seq_index):
            return None
        sequence, pending = self.running[seq_index], self.pending(seq_index)
        count = pending
        if count > most:
            count = most // CHUNK_MULTIPLE * CHUNK_MULTIPLE or most
        window = max(0, len(sequence.tokens) - self.n_positions)  # where the context begins
        first = sequence.cached
        sequence.cached += count
        self.cache.mark_computed(seq_index, first, sequence.cached)
        return Chunk(
            sequence,
            seq_index,
            first,
            sequence.tokens[window + first : window + first + count],
            ends=count == pending,
        )

    def _admit(self) -> int | None:
        """Give a seq_index to the next of the rows that wait. None when there is none, or no seq_index, or no room in the cache."""
        if not self.waiting or len(self.running) == self.max_seqs:
            return None
        overdue = self.waiting[0].passed_over >= MOST_PASSES * self.max_seqs
        # the first of the longest
        place = (
            0
            if overdue
            else max(
                range(len(self.waiting)), key=lambda i: (self.length(self.waiting[i].source), -i)
            )
        )
        sequence, seq_index = self.waiting[place], len(self.running)
        length = self.length(sequence.source)
        outgrows = (
            self.slide
            and len(sequence.tokens) + sequence.source.prompt.params.max_new_tokens
            > self.n_positions
        )
        there = self.cache.allocate(
            seq_index, sequence.tokens, length, share=self.share and not outgrows
        )
        if there is None:
            return None
        for earlier in self.waiting[:place]:
            earlier.passed_over += 1
        del self.waiting[place]
        self.running.append(sequence)
        self._n_admitted += 1
        sequence.order, sequence.cached, sequence.cached_tokens = self._n_admitted, there, there
        return seq_index

    def retire(self) -> list[Sequence]:
        """Take the sequences that ended out of their seq_indices; the last seq_indices move into the gaps."""
        ended = []
        for seq_index in reversed(range(len(self.running))):
            sequence = self.running[seq_index]
            if not sequence.ended:
                continue
            self.cache.free(seq_index)
            last = self.running.pop()
            if last is not sequence:
                self.cache.move(len(self.running), seq_index)
                self.running[seq_index] = last
            ended.append(sequence)
        return ended
