"""Grids of test cases: a pairwise covering array in `make test`, the rest in `make test-all`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def cover_pairs(*factors: Sequence[Hashable]) -> list[tuple[Any, ...]]:
    """Return cases in which each pair of values of two factors occurs.

    Greedy: each case added is the one that covers most of the pairs still missing.
    """
    cases = list(product(*factors))
    missing = {pair for case in cases for pair in _pairs(case)}
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(missing & _pairs(case)))
        missing -= _pairs(best)
        chosen.append(best)
    return chosen


def _pairs(case: tuple[Hashable, ...]) -> set[object]:
    return set(combinations(enumerate(case), 2))


def grid(*factors: Sequence[Hashable]) -> list[Any]:
    """Return all cases for `pytest.mark.parametrize`; those outside the covering array are slow."""
    fast = set(cover_pairs(*factors))
    return [
        pytest.param(
            *case,
            marks=() if case in fast else pytest.mark.slow,
            id="-".join(str(value).removeprefix("torch.") for value in case),
        )
        for case in product(*factors)
    ]
