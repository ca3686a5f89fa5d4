"""What the host changes in the state of a device before a step: moves, ends, new rows.

Between two steps, sequences end, others move into the gaps, and new ones start, in any order.
`PendingChanges` keeps what all of it comes to, so that three copies do it:

    state[targets] = state[sources]     all at once: sources are those of before
    state[empty, POSITION] = -1
    state[indices] = rows

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


@dataclass(slots=True)
class PendingChanges:
    """Changes of the state, by index of the sequence.

    Attributes:
        moves: Target index to the source index.
        empty: Indices without a sequence.
        rows: Rows of the state that the host writes.
        adjustments: What it writes to `Adjustments.flat`: indices and numbers (2, n) per row.
    """

    moves: dict[int, int] = field(default_factory=dict)
    empty: set[int] = field(default_factory=set)
    rows: dict[int, Int64s] = field(default_factory=dict)
    adjustments: list[Int64s] = field(default_factory=list)

    def set(self, index: int, row: Int64s) -> None:
        """Write a row."""
        self.moves.pop(index, None)
        self.empty.discard(index)
        self.rows[index] = row

    def stop(self, index: int) -> None:
        """Make a row empty."""
        self.moves.pop(index, None)
        self.rows.pop(index, None)
        self.empty.add(index)

    def move(self, source: int, target: int) -> None:
        """Move a row to an index that is empty."""
        row, origin = self.rows.get(source), self.moves.get(source, source)
        self.stop(source)
        if row is not None:
            self.set(target, row)
        else:
            self.empty.discard(target)
            self.moves[target] = origin
