"""Finds the known names that a misspelt name may stand for. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from gptbatch.pipeline.params.other_names import plain_name

_MIN_LETTERS = 4
_LETTERS_PER_ERROR = 5
# words that are one letter from `seed`, `stop` and `top_k`, and are names of their own
_WORDS = frozenset(("send", "shed", "shop", "slop", "speed", "step", "took"))


_plain_known = lru_cache(maxsize=256)(plain_name)


def meant_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names that a name is most probably a misspelling of.

    Case, separators and a plural s do not count. A name of four letters may have one error, and a
    longer one an error per five letters: a wrong letter, one too many, one missing, or two that are
    swapped. A wrong letter of four is neither the first nor the last: `min_x` is not `min_p`.

    Returns:
        The known names with the fewest errors, usually one; empty without any.
    """
    word = plain_name(name)
    if word in _WORDS:
        return []
    errors = {key: n for key in known if (n := _errors(word, _plain_known(key))) is not None}
    fewest = min(errors.values(), default=None)
    return [key for key, n in errors.items() if n == fewest]


def _errors(word: str, known: str) -> int | None:
    """Return the number of wrong letters; None where they are too many."""
    shorter = min(len(word), len(known))
    at_most = max(1, shorter // _LETTERS_PER_ERROR)
    if word == known:
        return 0
    if shorter < _MIN_LETTERS or abs(len(word) - len(known)) > at_most:
        return None
    if word.removesuffix("s") == known.removesuffix("s"):
        return 0
    if len(word) == len(known) == _MIN_LETTERS:
        keeps_ends = (word[0], word[-1]) == (known[0], known[-1])
        if not keeps_ends and sorted(word) != sorted(known):
            return None
    # each letter that the other lacks is an error; found much faster than the distance
    if len(set(word) - set(known)) > at_most:
        return None
    distance = edit_distance(word, known)
    return distance if distance <= at_most else None


def edit_distance(a: str, b: str) -> int:
    """Return the optimal string alignment distance (Damerau 1964).

    It is the number of letters to replace, to insert, to delete, or to swap with the next one.
    """
    before, last, row = [0], [0], list(range(len(b) + 1))
    for i, letter in enumerate(a):
        before, last, row = last, row, [i + 1]
        for j, other in enumerate(b):
            is_swap = i > 0 and j > 0 and (letter, a[i - 1]) == (b[j - 1], other)
            swapped = before[j - 1] + 1 if is_swap else len(a) + len(b)
            replaced = last[j] + (letter != other)
            row.append(min(last[j + 1] + 1, row[j] + 1, replaced, swapped))
    return row[-1]
