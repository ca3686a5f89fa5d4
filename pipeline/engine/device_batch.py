"""The batch of an engine on a device: which sequence has which index, and what the host changes.

A sequence of the batch has a handle (device_rows.py), a row in the state of the device and, where
it needs one, a place for its adjustments (device_adjustments.py). They change together here. What
the device must be told of it is collected until the next step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from gptbatch.pipeline.engine.device_adjustments import DeviceAdjustments
from gptbatch.pipeline.engine.device_changes import PendingChanges
from gptbatch.pipeline.engine.device_rows import Bools, DeviceRows
from gptbatch.pipeline.engine.device_sampling import has_top_p, keeps_full_vocab, state_row
from gptbatch.pipeline.engine.row_adjustments import RowAdjustments
from gptbatch.pipeline.engine.sequence import ScheduledChunk, Sequence
from gptbatch.pipeline.model.device_step import StepShape, padded_chunk_rows, padded_decode_rows
from gptbatch.pipeline.params.sampling_params import SamplingParams

Int64s = npt.NDArray[np.int64]


class DeviceBatch:
    """The sequences that prefill and decode.

    Args:
        rows: What the host knows of them.
        adjustments: The places for bias, penalties and masks.
        tables: The blocks of each index (sequences, blocks).
        vocab_size: V.
    """

    def __init__(
        self, rows: DeviceRows, adjustments: DeviceAdjustments, tables: Int64s, vocab_size: int
    ) -> None:
        self._rows, self._adjustments = rows, adjustments
        self._tables, self._vocab_size = tables, vocab_size
        self._changes = PendingChanges()

    def hold(self, params: SamplingParams) -> bool:
        """Take space for the bad words of a row that will start; return whether there is enough."""
        return self._adjustments.hold(params.bad_words)

    def take_chunks(
        self, chunks: list[ScheduledChunk], needs_host: Callable[[Sequence], bool]
    ) -> Int64s:
        """Start the sequences of chunks on the device.

        Args:
            chunks: Of prompts.
            needs_host: Whether the host samples a sequence.

        Returns:
            Tokens, positions and sequences of the prompt tokens but the last of each, (3, n).
        """
        rows = self._rows
        tokens: list[int] = []
        positions: list[int] = []
        seq_indices: list[int] = []
        for chunk in chunks:
            sequence, index = chunk.sequence, chunk.seq_index
            count = len(chunk.tokens) - chunk.needs_logits
            tokens += chunk.tokens[:count]
            positions += range(chunk.first, chunk.first + count)
            seq_indices += [index] * count
            handle = int(rows.handle_at[index])
            if rows.sequences[handle] is not sequence:
                handle = rows.start(index, sequence)
                self._set_sampler(handle, sequence.params, needs_host(sequence))
                if not chunk.needs_logits:
                    self._changes.set(index, state_row(self._tables[index]))
            if chunk.needs_logits:
                self.decode(handle)
        return np.array([tokens, positions, seq_indices], np.int64)

    def decode(self, handle: int) -> None:
        """Let a sequence decode from its last token on, in the next step."""
        rows, sequence = self._rows, self._rows.sequence(handle)
        index = int(rows.index_of[handle])
        if not rows.needs_host[handle] and RowAdjustments.are_needed(sequence.params):
            rows.adjustments[handle], numbers = self._adjustments.start(sequence)
            self._changes.adjustments.append(numbers)
        row = state_row(
            self._tables[index],
            sequence,
            budget=int(rows.budgets[handle]),
            vocab_size=self._vocab_size,
            host_samples=bool(rows.needs_host[handle]),
            adjustments=int(rows.adjustments[handle]),
        )
        self._changes.set(index, row)
        rows.decodes[index] = rows.has_prompt[index] = True

    def leave(self, seq_indices: list[int]) -> None:
        """Make rows empty; others may have their indices and places."""
        for index in seq_indices:
            place = int(self._rows.adjustments[self._rows.handle_at[index]])
            if place >= 0:
                self._adjustments.free(place)
            self._rows.leave(index)
            self._changes.stop(index)

    def move(self, moves: list[tuple[int, int]]) -> None:
        """Move sequences from one index to another, in this order."""
        for source, target in moves:
            self._rows.move(source, target)
            self._changes.move(source, target)

    def take_changes(self) -> PendingChanges:
        """Return what has changed since the last call."""
        changes, self._changes = self._changes, PendingChanges()
        return changes

    def shape(self, decodes: Bools, n_running: int, n_prefilled: int) -> StepShape:
        """Return the shape of a step.

        Args:
            decodes: Which of the first indices decode; empty for none.
            n_running: Sequences in the batch.
            n_prefilled: Prompt tokens.
        """
        rows, handles = self._rows, self._rows.handle_at[: len(decodes)][decodes]
        return StepShape(
            decode_rows=padded_decode_rows(n_running) if len(decodes) else 0,
            chunk_rows=padded_chunk_rows(n_prefilled),
            full_vocab=bool(rows.keeps_all[handles].any()),
            adjusts=bool((rows.adjustments[handles] >= 0).any()),
            logprobs=bool(rows.has_logprobs[handles].any()),
            top_p=bool(rows.has_top_p[handles].any()),
        )

    def _set_sampler(self, handle: int, params: SamplingParams, needs_host: bool) -> None:
        rows = self._rows
        rows.needs_host[handle] = needs_host
        rows.has_logprobs[handle] = params.logprobs is not None and not needs_host
        rows.keeps_all[handle] = keeps_full_vocab(params, self._vocab_size)
        rows.has_top_p[handle] = has_top_p(params)
