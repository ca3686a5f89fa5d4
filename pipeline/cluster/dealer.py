"""Dealer: deals out the missing parts of a job to many workers.

A worker gets consecutive parts, so that it reads its input in one pass. Then it takes half of what
is left to another worker. When all parts are dealt, it gets a copy of the part that has been in
flight longest, and of each part at most one, so that a slow worker does not delay the end. A part
is copied only when it has been in flight for longer than written parts were: most parts end by
themselves, and a copy of them is work for nothing. Both write the same rows, and the first one
keeps the name.

A dealer is a plain object without threads, for one process. It keeps nothing on disk: the parts in
the output folder are the record of what is done.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

# A part that was in flight at this number of crashes is not dealt again.
MAX_CRASHES = 3
# A part is copied when its time in flight is this multiple of the mean of written parts; the
# multiplier of speculative execution in Spark. Parts of equal size differ by less.
COPY_AGE = 1.5


@dataclass(frozen=True, slots=True)
class DealerCounts:
    """What a dealer has counted.

    Attributes:
        written: Parts that are written.
        missing: Parts that are not.
        copies: Copies of parts in flight that were dealt.
        steals: Times that a worker took parts of another one.
    """

    written: int
    missing: int
    copies: int
    steals: int


class Dealer:
    """Deals out part numbers.

    Args:
        missing: The numbers of the parts to generate.
        workers: The number of workers that are expected. Others may come and go.
        clock: Returns seconds.
    """

    def __init__(
        self,
        missing: Iterable[int],
        workers: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._numbers = sorted(missing)
        # Ranges of indices in _numbers that have not begun: those without a worker, and of workers.
        self._free = deque(_split(len(self._numbers), workers))
        self._ranges: dict[str, range] = {}
        self._returned: deque[int] = deque()
        # part -> worker -> when it was dealt; parts in the order in which they were dealt first
        self._in_flight: dict[int, dict[str, float]] = {}
        self._written: set[int] = set()
        self._crashes: Counter[int] = Counter()
        self._set_aside: set[int] = set()
        self._copies = self._steals = 0
        # Written parts, and their seconds from the deal to the commit.
        self._timed, self._seconds = 0, 0.0

    def next(self, worker: str) -> int | None:
        """Return the next part of a worker; None when there is none for it now."""
        number = self._next_returned()
        if number is None:
            number = self._next_in_range(worker)
        if number is None:
            number = self._copy(worker)
        if number is not None:
            self._in_flight.setdefault(number, {})[worker] = self._clock()
        return number

    def committed(self, number: int) -> bool:
        """Take a part that is written. Returns whether it was missing until now."""
        holders = self._in_flight.pop(number, None)
        is_new = number not in self._written
        self._written.add(number)
        if holders and is_new:
            self._seconds += self._clock() - min(holders.values())
            self._timed += 1
        return is_new

    def given_up(self, worker: str, number: int) -> None:
        """Take back a part that a worker does not write."""
        holders = self._in_flight.get(number, {})
        holders.pop(worker, None)
        if not holders and self._in_flight.pop(number, None) is not None:
            self._returned.append(number)

    def lost(self, worker: str, *, crashed: bool) -> list[int]:
        """Take back all parts of a worker that has ended without a word.

        Args:
            worker: The worker.
            crashed: Whether its process has crashed, which may be due to a row. The loss of a
                machine is not.

        Returns:
            The parts that it had in flight.
        """
        if left := self._ranges.pop(worker, None):
            self._free.append(left)
        held = [number for number, holders in self._in_flight.items() if worker in holders]
        for number in held:
            self._crashes[number] += crashed
            if self._crashes[number] < MAX_CRASHES:
                self.given_up(worker, number)
            else:
                self._in_flight.pop(number)
                self._set_aside.add(number)
        return held

    @property
    def is_done(self) -> bool:
        """Whether each part is written or set aside."""
        return self.counts.missing == len(self.set_aside)

    @property
    def set_aside(self) -> list[int]:
        """Parts that were in flight at MAX_CRASHES crashes, in order. They are not dealt again."""
        return sorted(self._set_aside - self._written)

    @property
    def has_parts(self) -> bool:
        """Whether a worker without parts would get one now."""
        return bool(
            self._returned
            or self._free
            or any(self._ranges.values())
            or any(True for _ in self._due_for_a_copy())
        )

    @property
    def counts(self) -> DealerCounts:
        """What the dealer has counted."""
        return DealerCounts(
            written=len(self._written),
            missing=len(self._numbers) - len(self._written),
            copies=self._copies,
            steals=self._steals,
        )

    def _next_returned(self) -> int | None:
        while self._returned:
            number = self._returned.popleft()
            if number not in self._written:
                return number
        return None

    def _next_in_range(self, worker: str) -> int | None:
        while left := self._ranges.get(worker) or self._take_range(worker):
            self._ranges[worker] = left[1:]
            number = self._numbers[left[0]]
            if number not in self._written:
                return number
        return None

    def _take_range(self, worker: str) -> range:
        """Take parts that no worker has, else half of the most that another worker has left."""
        if self._free:
            return self._free.popleft()
        other = max(self._ranges, key=lambda name: len(self._ranges[name]), default=None)
        if other is None or not self._ranges[other]:
            return range(0)
        left = self._ranges[other]
        self._ranges[other], taken = left[: len(left) // 2], left[len(left) // 2 :]
        self._steals += 1
        return taken

    def _copy(self, worker: str) -> int | None:
        for number in self._due_for_a_copy():
            if worker not in self._in_flight[number]:
                self._copies += 1
                return number
        return None

    def _due_for_a_copy(self) -> Iterator[int]:
        """Yield the parts that one worker has had in flight for too long, the oldest first."""
        if not self._timed:
            return
        dealt_before = self._clock() - COPY_AGE * self._seconds / self._timed
        for number, holders in self._in_flight.items():
            if len(holders) == 1 and min(holders.values()) <= dealt_before:
                yield number


def _split(count: int, workers: int) -> Iterable[range]:
    """Divide indices among workers."""
    bounds = [count * worker // max(1, workers) for worker in range(max(1, workers) + 1)]
    ranges = (range(first, end) for first, end in pairwise(bounds))
    return [part for part in ranges if part]
