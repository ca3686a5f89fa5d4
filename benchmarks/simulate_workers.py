"""Simulation of many workers on many parts, with losses and stragglers, on a virtual clock.

    python benchmarks/simulate_workers.py [--workers 1000] [--parts 1000000] [--part-s 20]
                                          [--deaths 100] [--stragglers 0.01] [--seed 0]

Runs the real Dealer and the real ShardParts. A worker has one part in flight. Times of parts vary
by 20 %; a straggler takes 4 times as long. A dead worker is replaced after 60 s. The driver on Ray
looks once per second whether the dealer has parts for workers that have none. With shards, a part
is seen as in flight by others at once, and a dead shard comes back with the same index.

Prints a line per kind: the time of the job against that of equal shares without losses, the share
of worker time in which a worker had nothing to do, copies of parts in flight, parts that were
written twice, calls of `next` per second of the job, and how many of them one process can serve.
The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from gptbatch.pipeline.cluster.dealer import Dealer
from gptbatch.pipeline.output.shards import Shard, ShardParts

RESTART_S = 60.0
SLOWDOWN = 4.0
SPREAD = 0.2
# of the driver on Ray
POLL_S = 1.0


class Parts(Protocol):
    """What the simulation asks of a way to divide the work.

    Attributes:
        calls_again: Whether workers without a part are called again. A shard has ended then.
    """

    calls_again: bool

    @property
    def has_parts(self) -> bool:
        """Whether a worker without a part would get one now."""

    @property
    def copies(self) -> int:
        """Parts that were dealt while another worker had them in flight."""

    def next(self, worker: int) -> int | None:
        """Return the next part of a worker."""

    def committed(self, number: int) -> None:
        """Take a part that is written."""

    def lost(self, worker: int) -> None:
        """Take the loss of a worker."""


class Dealt:
    """Parts from one dealer."""

    calls_again = True

    def __init__(self, n_parts: int, workers: int, clock: Callable[[], float]) -> None:
        self._dealer = Dealer(range(n_parts), workers, clock=clock)

    @property
    def has_parts(self) -> bool:
        return self._dealer.has_parts

    @property
    def copies(self) -> int:
        return self._dealer.counts.copies

    def next(self, worker: int) -> int | None:
        return self._dealer.next(str(worker))

    def committed(self, number: int) -> None:
        self._dealer.committed(number)

    def lost(self, worker: int) -> None:
        self._dealer.lost(str(worker), crashed=False)


class Sharded:
    """Parts of shards that see one folder."""

    calls_again = False
    has_parts = False
    copies = 0

    def __init__(self, n_parts: int, workers: int, clock: Callable[[], float]) -> None:
        self._n_parts, self._count, self._clock = n_parts, workers, clock
        self._written = bytearray(n_parts)
        self._missing = list(range(n_parts))
        self._n_stale = 0
        self._in_flight: dict[int, set[int]] = {}
        self._sources = {worker: self._source(worker) for worker in range(workers)}

    def _source(self, worker: int) -> ShardParts:
        own = (k for k in Shard(worker, self._count).parts(self._n_parts) if not self._written[k])
        return ShardParts(
            own,
            self._find_free,
            lambda number: bool(self._written[number]),
            seed=f"{worker} {self._clock()}",
            clock=self._clock,
        )

    def _find_free(self) -> list[int]:
        if self._n_stale > len(self._missing) // 10:
            self._missing = [number for number in self._missing if not self._written[number]]
            self._n_stale = 0
        return [
            number
            for number in self._missing
            if not self._written[number] and number not in self._in_flight
        ]

    def next(self, worker: int) -> int | None:
        source = self._sources[worker]
        number = source.next()
        if number is None:
            # Its own parts are written, and it helps.
            number = source.next()
        if number is not None:
            self._in_flight.setdefault(number, set()).add(worker)
        return number

    def committed(self, number: int) -> None:
        self._n_stale += not self._written[number]
        self._written[number] = 1
        self._in_flight.pop(number, None)

    def lost(self, worker: int) -> None:
        for number, holders in list(self._in_flight.items()):
            holders.discard(worker)
            if not holders:
                del self._in_flight[number]
        self._sources[worker] = self._source(worker)


@dataclass
class Outcome:
    """What a simulation counts."""

    calls: int = 0
    twice: int = 0
    written: int = 0


def simulate(
    make: Callable[[int, int, Callable[[], float]], Parts], args: argparse.Namespace
) -> dict[str, Any]:
    """Run the simulation with one way to divide the work."""
    rng = random.Random(args.seed)
    now = [0.0]
    parts = make(args.parts, args.workers, lambda: now[0])
    slow = set(rng.sample(range(args.workers), int(args.stragglers * args.workers)))
    expected_s = args.parts / args.workers * args.part_s
    # (time, serial number, kind, worker, part, life of the worker)
    events: list[tuple[float, int, str, int, int, int]] = []
    serial, lives, done = 0, [0] * args.workers, bytearray(args.parts)
    found = Outcome()
    waiting: list[int] = []

    def push(at_s: float, kind: str, worker: int, part: int = -1) -> None:
        nonlocal serial
        serial += 1
        heapq.heappush(events, (at_s, serial, kind, worker, part, lives[worker]))

    def pull(worker: int) -> None:
        found.calls += 1
        number = parts.next(worker)
        if number is None:
            if parts.calls_again and not waiting:
                push(now[0] + POLL_S, "poll", worker)
            insort(waiting, worker)
            return
        taken_s = args.part_s * rng.uniform(1 - SPREAD, 1 + SPREAD)
        taken_s *= SLOWDOWN if worker in slow else 1.0
        push(now[0] + taken_s, "written", worker, number)

    for worker in range(args.workers):
        push(0.0, "begin", worker)
    for _ in range(args.deaths):
        push(rng.uniform(0, expected_s), "death", rng.randrange(args.workers))
    began = time.perf_counter()
    while found.written < args.parts:
        at_s, _, kind, worker, part, life = heapq.heappop(events)
        now[0] = at_s
        if kind == "death":
            lives[worker] += 1
            parts.lost(worker)
            push(at_s + RESTART_S, "begin", worker)
            if worker in waiting:
                waiting.remove(worker)
        elif kind == "poll":
            if waiting and not parts.has_parts:
                push(at_s + POLL_S, "poll", worker)
                continue
            woken, waiting[:] = list(waiting), []
            for other in woken:
                pull(other)
        elif life == lives[worker]:
            if kind == "written":
                found.twice += done[part]
                found.written += not done[part]
                done[part] = 1
                parts.committed(part)
            pull(worker)
    wall_s = time.perf_counter() - began
    total_s = now[0] * args.workers
    useful_s = args.part_s * args.parts
    return {
        "parts": args.parts,
        "workers": args.workers,
        "time_against_equal_shares": round(now[0] / expected_s, 4),
        "worker_time_not_used": round(1 - useful_s / total_s, 4),
        "parts_copied": parts.copies,
        "parts_written_twice": found.twice,
        "calls_per_virtual_s": round(found.calls / now[0], 1),
        "calls_per_s_served": round(found.calls / wall_s),
    }


def main() -> None:
    """Simulate both kinds and print what they give."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--parts", type=int, default=1_000_000)
    parser.add_argument("--part-s", type=float, default=20.0)
    parser.add_argument("--deaths", type=int, default=100)
    parser.add_argument("--stragglers", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kinds: dict[str, Callable[[int, int, Callable[[], float]], Parts]] = {
        "dealer": Dealt,
        "shards": Sharded,
    }
    results = {}
    for name, make in kinds.items():
        results[name] = simulate(make, args)
        print(name, results[name], flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
