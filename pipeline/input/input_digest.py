"""SHA-256 digests of an input: of each part, and of all rows, made of those of the parts.

Parts are read and checked apart from each other, on several machines. So the digest of the input is
the digest of the digests of its parts. It does not depend on how rows are divided among files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


class InputDigests:
    """Digests of rows that are added in order.

    Args:
        part_rows: Rows per part.
        prefix_rows: Row counts whose prefix digest is needed.

    Attributes:
        rows: Rows added.
        parts: Digest of each part, complete after `finish`.
        prefixes: Digest of the first n rows, for 0, the counts in `prefix_rows` and all rows.
    """

    def __init__(self, part_rows: int, prefix_rows: Iterable[int] = ()) -> None:
        self.rows = 0
        self.parts: list[str] = []
        self._part_rows, self._prefix_rows = part_rows, frozenset(prefix_rows)
        self._part = hashlib.sha256()
        self.prefixes = {0: input_digest([self._part.hexdigest()])}

    def add(self, content: bytes) -> None:
        """Add a row by the bytes that represent it."""
        self.rows += 1
        self._part.update(content)
        if self.rows % self._part_rows == 0:
            self.parts.append(self._part.hexdigest())
            self._part = hashlib.sha256()
        if self.rows in self._prefix_rows:
            self.prefixes[self.rows] = input_digest(self._all_parts())

    def finish(self) -> str:
        """Close the last part and return the digest of all rows. No rows are one empty part."""
        self.parts = self._all_parts()
        self.prefixes[self.rows] = input_digest(self.parts)
        return self.prefixes[self.rows]

    def _all_parts(self) -> list[str]:
        """Return the digests of the parts, the last one of which may lack rows."""
        is_open = self.rows % self._part_rows or self.rows == 0
        return [*self.parts, self._part.hexdigest()] if is_open else self.parts


def input_digest(parts: Iterable[str]) -> str:
    """Return the digest of an input, from the digests of its parts in order."""
    return hashlib.sha256("".join(parts).encode()).hexdigest()
