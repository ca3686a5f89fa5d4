"""Applies a function to many items in threads: on a network, most of the time is latency."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_THREADS = 8


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return the results in the order of the items. Without threads to be had, it goes on alone."""
    items = list(items)
    try:
        with ThreadPoolExecutor(min(MAX_THREADS, max(1, len(items)))) as pool:
            return list(pool.map(function, items))
    except RuntimeError:
        return [function(item) for item in items]
