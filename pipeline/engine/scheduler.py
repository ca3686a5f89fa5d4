"""Which tokens the next step computes: continuous batching with chunked prefill.

Scheduling changes no result, because a sequence's tokens depend only on its own tokens.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gptbatch.pipeline.engine.sequence import ScheduledChunk, Sequence
from gptbatch.pipeline.kv_cache.block_pool import CacheAllocator
from gptbatch.pipeline.types import TokenizedPrompt

Int64s = npt.NDArray[np.int64]

# Prefill tokens of a step, even if all of its budget decodes: waiting sequences must start.
MIN_PREFILL_TOKENS = 32
# Chunks that do not finish a prefill are a multiple of this, unless less than this is left of the
# budget. The attention kernel shares loads of KV blocks among four consecutive queries, so a
# multiple of 4 leaves no query alone. 16 positions are a block of the full cache.
GRAIN_PREFILL_TOKENS = 16
# The first size of the array of the lengths of waiting sequences.
MIN_LENGTHS = 64
# A waiting sequence is passed over at most this many times max_seqs.
MAX_PASSED_OVER_PER_SEQ = 4


@dataclass(kw_only=True)
class Scheduler:
    """Sequences wait, run and finish. `running[i]` has index i in the batch and in the cache.

    Attributes:
        cache: Assigns cache memory to sequences.
        max_seqs: The most sequences that run at once.
        n_positions: Length of the context.
        max_step_tokens: The most tokens of a step. With many sequences a step may have max_seqs +
            MIN_PREFILL_TOKENS tokens, if that is more.
        interleave_prefill: Prefill of several sequences advances side by side, not one after the
            other (see `Backend.interleaves_prefill`).
        share_prefixes: Use prefix caching.
        slide: Sequences may grow beyond n_positions.
    """

    cache: CacheAllocator
    max_seqs: int
    n_positions: int
    max_step_tokens: int
    interleave_prefill: bool = False
    share_prefixes: bool = True
    slide: bool = False
    running: list[Sequence] = field(default_factory=list, init=False)
    waiting: list[Sequence] = field(default_factory=list, init=False)
    # The most positions of each waiting sequence; then unused entries.
    _waiting_lengths: Int64s = field(
        default_factory=lambda: np.zeros(MIN_LENGTHS, np.int64), init=False
    )
    _n_scheduled: int = field(default=0, init=False)
    _n_added: int = field(default=0, init=False)

    def add(self, source: TokenizedPrompt) -> None:
        """Append a prompt to the waiting sequences."""
        sequence = Sequence(source)
        sequence.arrival_order = self._n_added
        self._n_added += 1
        place = len(self.waiting)
        if place == len(self._waiting_lengths):
            self._waiting_lengths = np.resize(self._waiting_lengths, 2 * place)
        self._waiting_lengths[place] = sequence.max_length(self.n_positions)
        self.waiting.append(sequence)

    # The scheduling algorithm. A step takes one token of every decoding sequence. The rest of its
    # token budget goes to prefill: first to running sequences, in the order in which they were
    # scheduled, then to waiting ones. Of the waiting sequences, the one with the most prompt + new
    # tokens, at most n_positions, starts first: longest job first, so that no long one is left over
    # at the end. A sequence that was passed over too often starts before it. A sequence starts only
    # if its longest possible length fits the cache, so a running sequence is never preempted.
    def schedule(self) -> list[ScheduledChunk]:
        """Return the chunks of the next step, which the caller must compute.

        Empty only when nothing is running or waiting.
        """
        chunks = [
            chunk
            for seq_index in range(len(self.running))
            if self.n_pending_tokens(seq_index) == 1 and (chunk := self._chunk(seq_index, 1))
        ]
        budget = max(self.max_step_tokens - len(chunks), MIN_PREFILL_TOKENS)
        prefilling = [
            seq_index
            for seq_index in range(len(self.running))
            if self.n_pending_tokens(seq_index) > 1
        ]
        prefilling.sort(key=lambda seq_index: self.running[seq_index].schedule_order)
        if self.interleave_prefill:
            return chunks + self._interleaved_prefill(prefilling, budget)
        return chunks + self._prefill(prefilling, budget)

    def schedule_prefill(self, prefilling: list[int], budget: int) -> list[ScheduledChunk]:
        """Return chunks of prompts, for an engine whose sequences decode on the device.

        The last chunk of a prompt has `needs_logits`.

        Args:
            prefilling: Indices of the running sequences whose prompts are not scheduled to the end.
            budget: The most tokens.
        """
        prefilling.sort(key=lambda seq_index: self.running[seq_index].schedule_order)
        return self._prefill(prefilling, budget)

    def free_finished(self) -> list[Sequence]:
        """Remove finished sequences from the batch; the last ones move into the gaps."""
        indices = [index for index, sequence in enumerate(self.running) if sequence.is_finished]
        return self.free(indices)[0]

    def free(self, seq_indices: Iterable[int]) -> tuple[list[Sequence], list[tuple[int, int]]]:
        """Remove sequences from the batch; the last ones move into the gaps.

        Args:
            seq_indices: Their indices, ascending.

        Returns:
            The sequences, the last index first; (old index, new index) of each move, in order.
        """
        freed, moves = [], []
        for seq_index in reversed([*seq_indices]):
            sequence = self.running[seq_index]
            self.cache.free(seq_index)
            last = self.running.pop()
            if last is not sequence:
                self.cache.move(len(self.running), seq_index)
                self.running[seq_index] = last
                moves.append((len(self.running), seq_index))
            freed.append(sequence)
        return freed, moves

    def n_pending_tokens(self, seq_index: int) -> int:
        """Return how many tokens of a running sequence are not in the cache: at least its last."""
        sequence = self.running[seq_index]
        return min(len(sequence.tokens), self.n_positions) - sequence.n_computed_tokens

    def _prefill(self, prefilling: list[int], budget: int) -> list[ScheduledChunk]:
        """Schedule chunks of sequences that prefill, then of waiting ones."""
        chunks: list[ScheduledChunk] = []
        while budget > 0:
            seq_index = prefilling.pop(0) if prefilling else self._start_next()
            if seq_index is None:
                break
            if chunk := self._chunk(seq_index, budget):
                chunks.append(chunk)
                budget -= len(chunk.tokens)
        return chunks

    def _interleaved_prefill(self, prefilling: list[int], budget: int) -> list[ScheduledChunk]:
        """Start all sequences that fit and share the budget equally among those that prefill."""
        while (seq_index := self._start_next()) is not None:
            prefilling.append(seq_index)
        share = -(-budget // max(1, len(prefilling)))
        return [chunk for seq_index in prefilling if (chunk := self._chunk(seq_index, share))]

    def _chunk(self, seq_index: int, max_tokens: int) -> ScheduledChunk | None:
        """Schedule the next tokens of a running sequence.

        None while another sequence still has to compute its cached prefix.
        """
        if not self.cache.is_ready(seq_index):
            return None
        sequence, n_pending = self.running[seq_index], self.n_pending_tokens(seq_index)
        count = n_pending
        if count > max_tokens:
            count = max_tokens // GRAIN_PREFILL_TOKENS * GRAIN_PREFILL_TOKENS or max_tokens
        first = sequence.n_computed_tokens
        sequence.n_computed_tokens += count
        self.cache.mark_scheduled(seq_index, first, sequence.n_computed_tokens)
        start = sequence.context_start(self.n_positions) + first
        return ScheduledChunk(
            sequence,
            seq_index,
            first,
            sequence.tokens[start : start + count],
            needs_logits=count == n_pending,
        )

    def _start_next(self) -> int | None:
        """Move a waiting sequence to the running ones and return its index.

        None if nothing is waiting, max_seqs are running, or the cache is full.
        """
        if not self.waiting or len(self.running) == self.max_seqs:
            return None
        place = self._next_waiting()
        sequence, seq_index = self.waiting[place], len(self.running)
        n_tokens = sequence.n_prompt_tokens + sequence.params.max_new_tokens
        # A sliding window changes the position of every token, so its blocks cannot be shared.
        slides = self.slide and n_tokens > self.n_positions
        n_cached_tokens = self.cache.allocate(
            seq_index,
            sequence.tokens,
            sequence.max_length(self.n_positions),
            share_prefix=self.share_prefixes and not slides,
        )
        if n_cached_tokens is None:
            return None
        del self.waiting[place]
        lengths = self._waiting_lengths[: len(self.waiting) + 1]
        lengths[place:-1] = lengths[place + 1 :]
        self.running.append(sequence)
        self._n_scheduled += 1
        sequence.schedule_order = self._n_scheduled
        sequence.n_computed_tokens = sequence.n_cached_tokens = n_cached_tokens
        return seq_index

    def _next_waiting(self) -> int:
        """Return the index of the sequence to start: the first with the most prompt + new tokens.

        The first of all if it was passed over too often.
        """
        # All that arrived before the first one have started. The others that have, passed it over.
        times_passed_over = self._n_scheduled - self.waiting[0].arrival_order
        if times_passed_over >= MAX_PASSED_OVER_PER_SEQ * self.max_seqs:
            return 0
        # Of equal lengths, the first.
        return int(self._waiting_lengths[: len(self.waiting)].argmax())
