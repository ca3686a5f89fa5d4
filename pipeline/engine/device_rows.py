"""What the host knows of the rows that run on a device, in arrays, so that a step needs no loop.

A handle numbers a sequence while tokens of it may arrive. Its index in the batch may change, and
others may take it before all tokens are there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gptbatch.pipeline.engine.device_logprobs import token_logprobs
from gptbatch.pipeline.engine.sequence import Sequence

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class DeviceRows:
    """Sequences by index in the batch and by handle.

    Attributes:
        handle_at: The handle at each index; -1 where the sequence has none yet.
        decodes: Indices that decode on the device in the next step.
        has_prompt: Indices whose prompts are scheduled to the end.
        sequences: By handle, as all that follow; None for a free handle.
        index_of: Index in the batch; -1 where another sequence may have it.
        needs_host: The host samples the row.
        keeps_all: The row keeps the full vocabulary.
        has_top_p: The row has a top_p.
        adjustments: The place of its bias, penalties and masks; -1 for none.
        has_logprobs: The device finds its log probabilities.
        logprobs: What the device found, per new token (WIDTH,); see kernels/cuda/logprobs.py.
        is_watched: The host looks at each token, for stop strings and stop tokens.
        is_done: The sequence is finished, or the handle is free.
        n_prompt: Tokens of the prompt.
        budgets: New tokens with which the row ends.
        n_launched: New tokens that were launched.
        n_read: New tokens that have arrived.
        first_s: Monotonic clock of the first one.
        margins: Smallest decision margin so far.
        tokens: The new tokens (handles, n_positions).
    """

    def __init__(
        self, max_seqs: int, max_in_flight: int, *, n_positions: int, vocab_size: int
    ) -> None:
        # Each step in flight may hold other sequences, and others that are finished wait for it.
        count = max_seqs * 2 * (max_in_flight + 1)
        self.handle_at = np.full(max_seqs, -1, np.int64)
        self.decodes, self.has_prompt = np.zeros((2, max_seqs), np.bool_)
        self.sequences: list[Sequence | None] = [None] * count
        self.index_of = np.full(count, -1, np.int64)
        self.needs_host, self.keeps_all, self.is_watched = np.zeros((3, count), np.bool_)
        self.has_top_p = np.zeros(count, np.bool_)
        self.has_logprobs = np.zeros(count, np.bool_)
        self.logprobs: list[list[Int64s]] = [[] for _ in range(count)]
        self.is_done = np.ones(count, np.bool_)
        self.adjustments = np.full(count, -1, np.int64)
        self.n_prompt, self.budgets, self.n_launched, self.n_read = np.zeros((4, count), np.int64)
        self.first_s, self.margins = np.zeros((2, count))
        self.tokens = np.zeros((count, n_positions), np.int32)
        self._free, self._vocab_size = list(range(count)), vocab_size

    @property
    def n_free(self) -> int:
        """Handles without a sequence."""
        return len(self._free)

    @property
    def n_draining(self) -> int:
        """Sequences that have left the batch, and whose last tokens are to arrive."""
        return int(np.count_nonzero(~self.is_done & (self.index_of < 0)))

    def sequence(self, handle: int) -> Sequence:
        """Return the sequence of a handle that is not free."""
        sequence = self.sequences[handle]
        assert sequence is not None
        return sequence

    def start(self, index: int, sequence: Sequence) -> int:
        """Give a sequence at an index a handle."""
        handle = self._free.pop()
        params = sequence.params
        self.handle_at[index], self.index_of[handle] = handle, index
        self.sequences[handle], self.is_done[handle] = sequence, False
        self.is_watched[handle] = bool(params.stop or params.stop_token_ids)
        # The last token needs no place in the context.
        window = self.tokens.shape[1] - sequence.n_prompt_tokens + 1
        self.n_prompt[handle] = sequence.n_prompt_tokens
        self.budgets[handle] = min(params.max_new_tokens, window)
        self.n_launched[handle] = self.n_read[handle] = 0
        self.margins[handle] = np.inf
        self.adjustments[handle] = -1
        return handle

    def move(self, source: int, target: int) -> None:
        """Move a sequence to another index."""
        handle = self.handle_at[source]
        self.handle_at[target], self.handle_at[source] = handle, -1
        if handle >= 0:
            self.index_of[handle] = target
        for flags in (self.decodes, self.has_prompt):
            flags[target], flags[source] = flags[source], False

    def leave(self, index: int) -> None:
        """Let others have an index."""
        self.index_of[self.handle_at[index]] = self.handle_at[index] = -1
        self.decodes[index] = self.has_prompt[index] = False

    def append(self, handles: Int64s, tokens: Int64s, margins: npt.NDArray[np.float64]) -> None:
        """Append one new token to each of these sequences."""
        self.tokens[handles, self.n_read[handles]] = tokens
        self.n_read[handles] += 1
        self.margins[handles] = margins

    def keep_logprobs(self, handles: Int64s, found: Int64s) -> None:
        """Keep what log probabilities take, until a row ends: most of their cost is objects."""
        requests = self.has_logprobs[handles]
        # Copies: the buffer is another step's soon, and a view of one row keeps those of all.
        for handle, own in zip(handles[requests].tolist(), found[requests], strict=True):
            self.logprobs[handle].append(own.copy())

    def read_tokens(self, handle: int) -> list[int]:
        """Return the new tokens that have arrived."""
        tokens: list[int] = self.tokens[handle, : self.n_read[handle]].tolist()
        return tokens

    def write_to(self, sequence: Sequence, handle: int, last_s: float) -> None:
        """Give a sequence the new tokens that have arrived, the last one at this time."""
        sequence.tokens = [*sequence.tokens, *self.read_tokens(handle)]
        n_top = sequence.params.logprobs
        if self.logprobs[handle] and n_top is not None:
            found = np.stack(self.logprobs[handle])
            sequence.logprobs = token_logprobs(found, n_top, self._vocab_size)
        sequence.min_decision_margin = float(self.margins[handle])
        sequence.first_token_s, sequence.last_token_s = float(self.first_s[handle]), last_s

    def release(self, handle: int) -> None:
        """Free a handle, which no step holds any more."""
        self.sequences[handle] = None
        self.logprobs[handle] = []
        self._free.append(handle)

    def live(self) -> list[int]:
        """Return the handles of sequences that are not finished."""
        handles: list[int] = np.flatnonzero(~self.is_done).tolist()
        return handles
