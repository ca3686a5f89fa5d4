"""The dealer: every part is dealt until it is written, through deaths of workers in any order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbatch.pipeline.cluster.dealer import COPY_AGE, MAX_CRASHES, Dealer


def drain(dealer: Dealer, worker: str) -> list[int]:
    """Take and commit parts until none is left for the worker."""
    taken = []
    while (number := dealer.next(worker)) is not None:
        taken.append(number)
        dealer.committed(number)
    return taken


def test_workers_get_consecutive_parts_and_then_half_of_the_rest() -> None:
    dealer = Dealer(range(100, 120), 2)
    assert [dealer.next("a"), dealer.next("b"), dealer.next("a")] == [100, 110, 101]
    for number in (100, 101, 110):
        dealer.committed(number)
    assert drain(dealer, "b")[:14] == [*range(111, 120), *range(106, 110), 104][:14]
    assert dealer.is_done
    assert dealer.counts.steals >= 2


class Clock:
    """A clock that stands still until it is set."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_slow_worker_is_copied_once_at_the_end() -> None:
    clock = Clock()
    dealer = Dealer([1, 2, 3], 1, clock=clock)
    assert [dealer.next("slow"), dealer.next("slow"), dealer.next("a")] == [1, 2, 3]
    clock.now_s = 100.0
    assert (dealer.next("b"), dealer.has_parts) == (None, False), "no part is written yet"
    clock.now_s = 10.0
    assert dealer.committed(3)
    clock.now_s = COPY_AGE * 10.0 - 0.1
    assert (dealer.next("a"), dealer.has_parts) == (None, False)
    clock.now_s = COPY_AGE * 10.0
    assert dealer.has_parts
    assert [dealer.next("a"), dealer.next("b"), dealer.next("c")] == [1, 2, None]
    assert not dealer.has_parts
    assert dealer.committed(1)
    assert not dealer.committed(1), "its copy"
    assert dealer.next("slow") is None, "its own part is not copied to itself"
    assert dealer.committed(2)
    assert dealer.is_done
    assert dealer.counts.copies == 2


def test_parts_that_take_about_the_same_time_are_not_copied() -> None:
    """A job of one part per worker: each worker without a part waits for the others."""
    clock = Clock()
    dealer = Dealer(range(4), 4, clock=clock)
    workers = ["a", "b", "c", "d"]
    held = {worker: dealer.next(worker) for worker in workers}
    for worker, now_s in zip(workers, (8.0, 9.0, 11.0, 11.9), strict=True):
        clock.now_s = now_s
        number = held[worker]
        assert number is not None
        dealer.committed(number)
        assert dealer.next(worker) is None
    assert dealer.is_done
    assert dealer.counts.copies == 0


def test_parts_of_a_lost_worker_are_dealt_again() -> None:
    dealer = Dealer(range(10), 1)
    assert [dealer.next("a"), dealer.next("a")] == [0, 1]
    assert dealer.lost("a", crashed=False) == [0, 1]
    assert dealer.has_parts
    assert sorted(drain(dealer, "b")) == list(range(10))
    assert dealer.is_done
    assert not dealer.has_parts


def test_a_part_that_is_given_up_is_dealt_again() -> None:
    clock = Clock()
    dealer = Dealer([7, 8], 2, clock=clock)
    assert (dealer.next("a"), dealer.next("b")) == (7, 8)
    clock.now_s = 1.0
    dealer.committed(8)
    clock.now_s = 2.0
    assert dealer.next("b") == 7
    dealer.given_up("a", 7)
    assert not dealer.has_parts, "the copy is still in flight"
    dealer.given_up("b", 7)
    assert dealer.next("c") == 7


def test_a_part_of_many_crashes_is_set_aside() -> None:
    dealer = Dealer(range(3), 1)
    for attempt in range(MAX_CRASHES):
        worker = f"w{attempt}"
        while dealer.next(worker) != 1:
            pass
        for number in (0, 2):
            dealer.committed(number)
        assert dealer.set_aside == []
        dealer.lost(worker, crashed=True)
    assert dealer.set_aside == [1]
    assert dealer.next("a") is None
    assert dealer.is_done
    assert dealer.counts.missing == 1


def test_lost_machines_set_no_part_aside() -> None:
    dealer = Dealer([1], 1)
    for attempt in range(10):
        assert dealer.next(f"w{attempt}") == 1
        dealer.lost(f"w{attempt}", crashed=False)
    assert dealer.set_aside == []


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    n_parts=st.integers(0, 60),
    expected=st.integers(1, 8),
    names=st.integers(1, 6),
)
def test_no_part_is_lost_and_few_are_dealt_twice(
    data: st.DataObject, n_parts: int, expected: int, names: int
) -> None:
    """Workers take, write, give up and vanish in any order; then one worker does the rest."""
    clock = Clock()
    dealer = Dealer(range(n_parts), expected, clock=clock)
    held: dict[str, set[int]] = {f"w{index}": set() for index in range(names)}
    dealt: Counter[int] = Counter()
    written: set[int] = set()
    losses = 0
    for _ in range(data.draw(st.integers(0, 120))):
        worker = data.draw(st.sampled_from(sorted(held)))
        clock.now_s += data.draw(st.sampled_from([0.0, 1.0, 10.0]))
        match data.draw(st.sampled_from(["next", "next", "commit", "give up", "vanish"])):
            case "next":
                had_parts = dealer.has_parts
                if (number := dealer.next(worker)) is not None:
                    assert had_parts
                    assert number not in written
                    assert number not in held[worker]
                    dealt[number] += 1
                    held[worker].add(number)
            case "commit" if held[worker]:
                number = data.draw(st.sampled_from(sorted(held[worker])))
                held[worker].remove(number)
                assert dealer.committed(number) == (number not in written)
                written.add(number)
            case "give up" if held[worker]:
                number = data.draw(st.sampled_from(sorted(held[worker])))
                held[worker].remove(number)
                dealer.given_up(worker, number)
                losses += 1
            case "vanish":
                lost = dealer.lost(worker, crashed=False)
                assert set(lost) == held[worker] - written
                losses += len(held[worker])
                held[worker].clear()
    for worker in held:
        dealer.lost(worker, crashed=False)
        losses += len(held[worker])
    rest = drain(dealer, "last")
    assert written | set(rest) == set(range(n_parts))
    assert len(rest) == len(set(rest))
    assert dealer.is_done
    assert sum(dealt.values()) + len(rest) <= n_parts + losses + dealer.counts.copies


@pytest.mark.parametrize("workers", [0, 1, 3, 50])
def test_any_number_of_workers_may_be_expected(workers: int) -> None:
    dealer = Dealer([5, 6], workers)
    assert sorted(drain(dealer, "a")) == [5, 6]
