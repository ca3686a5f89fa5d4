"""SHA-256 of files, remembered: a file whose size, times and inode are as they were is not read again.

digests.json    {"files": {path: {"stat": [...], "sha256": "..."}}, "input": {...}, "parts": {name: {"stat", "sha256"}}}
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptbatch.pipeline.output.json_models import Digests, validated
from gptbatch.pipeline.system.redact import redact
from gptbatch.pipeline.system.regular_file import file_sha256, read_json

Stat = list[int]  # size, mtime in ns, ctime in ns, inode


def stat_of(path: Path) -> Stat:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


class FileHashes:
    """What is known of files, from an earlier run and from this one. A damaged memory is an empty one."""

    def __init__(self, content: dict[str, Any] | None = None) -> None:
        content = content or {}
        self._files: dict[str, Any] = content.get("files", {})
        self._parts: dict[str, Any] = content.get("parts", {})
        self._input: dict[str, Any] | None = content.get("input")

    @classmethod
    def load(cls, path: Path) -> FileHashes:
        try:
            content = read_json(path)
            validated(Digests, content)
        except (OSError, ValueError):
            return cls()
        return cls(content)

    def to_json(self) -> str:
        return (
            json.dumps(
                {"files": self._files, "input": self._input, "parts": self._parts},
                indent=1,
                ensure_ascii=False,
            )
            + "\n"
        )

    def sha256(self, path: Path) -> str:
        """Hexadecimal. Raises OSError when the file cannot be read."""
        key = _key(path)
        before = stat_of(path)
        known = self._files.get(key)
        if known is not None and known["stat"] == before:
            return str(known["sha256"])
        began_ns = time.time_ns()
        digest = file_sha256(path)
        self._files.pop(key, None)
        if _settled([before], began_ns) and stat_of(path) == before:
            self._files[key] = {"stat": before, "sha256": digest}
        return digest

    def find_input(
        self, settings: dict[str, Any], files: list[Path] | None
    ) -> dict[str, Any] | None:
        """What was remembered of the input that these settings name, if its files are as they were; else None.

        files: None when it cannot be known whether they are.
        """
        known = self._input
        if (
            files is None
            or known is None
            or known["settings"] != _hash(settings)
            or known["files"] != _stats(files)
        ):
            return None
        found: dict[str, Any] = known["found"]
        return found

    def record_input(
        self,
        settings: dict[str, Any],
        files: list[Path] | None,
        began_ns: int,
        found: dict[str, Any],
    ) -> None:
        """found: what a reading that began then (nanoseconds since 1970) found in the input."""
        self._input = None
        stats = None if files is None else _stats(files)
        if stats is not None and _settled(stats.values(), began_ns):
            self._input = {"settings": _hash(settings), "files": stats, "found": found}

    def is_unchanged(self, path: Path) -> bool:
        """Whether the file looks as it did when `confirm_parts` saw it."""
        known = self._parts.get(path.name)
        try:
            return known is not None and bool(known["stat"] == stat_of(path))
        except OSError:
            return False

    def is_altered(self, path: Path) -> bool:
        """Whether the file is known and not, to the bit, the one that was written. Reads all of it. Raises OSError."""
        known = self._parts.get(path.name)
        return known is not None and bool(known["sha256"] != file_sha256(path))

    def record_part(self, name: str, sha256: str) -> None:
        """A part that has just been written."""
        self._parts[name] = {"stat": None, "sha256": sha256}

    def keep_parts(self, names: Iterable[str]) -> None:
        """Forget all parts but these: others are about to be written."""
        self._parts = {name: self._parts[name] for name in names if name in self._parts}

    def confirm_parts(self, paths: Iterable[Path]) -> None:
        """Parts that are as they should be. One that was written a moment ago is looked at again the next time."""
        now_ns = time.time_ns()
        for path in paths:
            stat, known = stat_of(path), self._parts.get(path.name)
            if known is not None:
                known["stat"] = stat if _settled([stat], now_ns) else None
            else:
                self._parts[path.name] = {
                    "stat": stat if _settled([stat], now_ns) else None,
                    "sha256": file_sha256(path),
                }


def _hash(settings: dict[str, Any]) -> str:
    """Settings may hold secrets."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _key(path: Path) -> str:
    return redact(str(path.resolve()))


def _stats(files: list[Path]) -> dict[str, Stat] | None:
    try:
        return {_key(path): stat_of(path) for path in files}
    except OSError:
        return None


def _settled(stats: Iterable[Stat], began_ns: int) -> bool:
    """Whether a later change would show in the times: clocks of file systems tick every few milliseconds, some every second or two."""
    margins = (
        (ctime, 2_000_000_000 if ctime % 1_000_000_000 == 0 else 50_000_000)
        for _, _, ctime, _ in stats
    )
    return all(ctime + margin < began_ns for ctime, margin in margins)
