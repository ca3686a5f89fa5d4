"""The automata of bad words that rows on a device follow, each of them once.

Rows with equal bad words share one. Together they have at most MAX_STATES states; a row that finds
no space for its own is sampled by the host.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gptbatch.pipeline.engine.bad_words import automaton_table, count_states
from gptbatch.pipeline.kernels.cuda.adjustments import MAX_STATES, AdjustmentLayout

Int32s = npt.NDArray[np.int32]


@dataclass(slots=True)
class _Automaton:
    """One automaton.

    Attributes:
        first: Its first state on the device.
        table: (states, 256) int16, as `Adjustments.automata`.
        n_rows: Rows that use it.
        is_written: The device has it.
    """

    first: int
    table: npt.NDArray[np.int16]
    n_rows: int = field(default=0, init=False)
    is_written: bool = field(default=False, init=False)


class DeviceAutomata:
    """The automata of an engine.

    Args:
        layout: Where the device keeps them.
        token_bytes: The bytes of each token's text.
    """

    def __init__(self, layout: AdjustmentLayout, token_bytes: abc.Sequence[bytes]) -> None:
        self._layout, self._token_bytes = layout, token_bytes
        self._automata: dict[tuple[str, ...], _Automaton] = {}
        self._has_token_bytes = False

    def hold(self, words: tuple[str, ...]) -> bool:
        """Take space for an automaton, until `release`; return whether there is enough."""
        if words not in self._automata:
            encoded_words = [word.encode() for word in words]
            # Before the automaton is made: of rows that find no space there may be many.
            first = self._first_fit(count_states(encoded_words))
            if first is None:
                return False
            table, accepts = automaton_table(encoded_words)
            encoded = np.where(accepts[table], -1 - table, table).astype(np.int16)
            self._automata[words] = _Automaton(first, encoded)
        self._automata[words].n_rows += 1
        return True

    def release(self, words: tuple[str, ...]) -> None:
        """Undo a `hold`."""
        automaton = self._automata[words]
        automaton.n_rows -= 1
        if automaton.n_rows == 0:
            del self._automata[words]

    def first(self, words: tuple[str, ...]) -> int:
        """Return the first state of an automaton that is held."""
        return self._automata[words].first

    def unwritten(self, words: tuple[str, ...]) -> list[tuple[int, Int32s]]:
        """Return what the device lacks of an automaton: places in `Adjustments.flat`, numbers."""
        automaton, layout = self._automata[words], self._layout
        pieces: list[tuple[int, Int32s]] = []
        if not self._has_token_bytes:
            data = b"".join(self._token_bytes)
            ends = np.cumsum([len(each) for each in self._token_bytes])
            starts = np.concatenate([[0], ends]).astype(np.int32)
            padded = np.frombuffer(data + b"\0" * (-len(data) % 4), np.int32)
            pieces += [(layout.first("token_starts"), starts)]
            pieces += [(layout.first("token_bytes"), padded)]
        if not automaton.is_written:
            place = layout.first("automata", automaton.first)
            pieces.append((place, automaton.table.view(np.int32).ravel()))
        self._has_token_bytes = automaton.is_written = True
        return pieces

    def _first_fit(self, n_states: int) -> int | None:
        """Return where the first gap of n_states states begins; None where there is none."""
        first = 0
        for automaton in sorted(self._automata.values(), key=lambda each: each.first):
            if automaton.first - first >= n_states:
                break
            first = automaton.first + len(automaton.table)
        return first if first + n_states <= MAX_STATES else None
