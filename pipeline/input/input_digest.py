"""SHA-256 digests of an input: of all rows, of each part, and of prefixes."""

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
        self._all, self._part = hashlib.sha256(), hashlib.sha256()
        self.prefixes = {0: self._all.hexdigest()}

    def add(self, content: bytes) -> None:
        """Add a row by the bytes that represent it."""
        self.rows += 1
        self._all.update(content)
        self._part.update(content)
        if self.rows % self._part_rows == 0:
            self.parts.append(self._part.hexdigest())
            self._part = hashlib.sha256()
        if self.rows in self._prefix_rows:
            self.prefixes[self.rows] = self._all.hexdigest()

    def finish(self) -> str:
        """Close the last part and return the digest of all rows. No rows are one empty part."""
        if self.rows % self._part_rows or self.rows == 0:
            self.parts.append(self._part.hexdigest())
        self.prefixes[self.rows] = self._all.hexdigest()
        return self.prefixes[self.rows]
