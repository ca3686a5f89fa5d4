"""SHA-256 hashes of files, recorded in `digests.json`.

A file with the recorded size, times and inode is not read again.

    {
        "files": {path: {"stat": [size, mtime_ns, ctime_ns, inode], "sha256": ...}},
        "input": {
            "settings_sha256": ...,
            "files": {path: stat},
            "summary": {"rows": ..., "digest": ...}
        },
        "parts": {name: {"stat": ..., "sha256": ...}}
    }
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gptbatch.pipeline.output.json_models import DigestsContent, PartRecord, validated
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.storage.regular_file import file_sha256, read_json
from gptbatch.pipeline.system.redact import redact

# size, mtime in ns, ctime in ns, inode
Stat = list[int]

# A file that was changed within this time may be changed again without a visible change of its
# times.
CLOCK_TICK_NS = 50_000_000
# The same for file systems whose times are in whole seconds.
COARSE_CLOCK_TICK_NS = 2_000_000_000


def stat_of(path: Location) -> Stat:
    """Return the size, times and inode of a file.

    For an object: the size, when it was written, 0, and a number that changes with its version.
    """
    if not isinstance(path, Path):
        info = path.info()
        version = hashlib.sha256(info.version.encode()).digest()[:6]
        return [info.size, int(info.modified_s * 1e9), 0, int.from_bytes(version)]
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


class FileHashes:
    """Hashes of the checkpoint's files, the input and the parts, from all runs of an output.

    Args:
        content: The content of `digests.json`, validated; None for no hashes.
    """

    def __init__(self, content: dict[str, Any] | None = None) -> None:
        content = content or {}
        self._files: dict[str, Any] = content.get("files", {})
        self._parts: dict[str, Any] = content.get("parts", {})
        self._input: dict[str, Any] | None = content.get("input")

    @classmethod
    def load(cls, path: Location) -> FileHashes:
        """Read the hashes of a file; a missing or damaged file gives none."""
        try:
            content = read_json(path)
            validated(DigestsContent, content)
        except (OSError, ValueError):
            return cls()
        return cls(content)

    def to_json(self) -> str:
        """Return the content of `digests.json`."""
        content = {"files": self._files, "input": self._input, "parts": self._parts}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def sha256(self, path: Location) -> str:
        """Return the hash of a file in hexadecimal; read the file only if it has changed.

        Raises:
            OSError: The file cannot be read.
        """
        key = _key(path)
        before = stat_of(path)
        recorded = self._files.get(key)
        if recorded is not None and recorded["stat"] == before:
            return str(recorded["sha256"])
        began_ns = time.time_ns()
        digest = file_sha256(path)
        self._files.pop(key, None)
        if _is_stable([before], began_ns) and stat_of(path) == before:
            self._files[key] = {"stat": before, "sha256": digest}
        return digest

    # -- input -------------------------------------------------------------------------------------

    def find_input(
        self, settings: dict[str, Any], files: Sequence[Location] | None, *, exactly: bool = True
    ) -> dict[str, Any] | None:
        """Return the recorded summary of an input whose files have not changed.

        Args:
            settings: The settings that name the input.
            files: The files of the input. None when they are not known, as for a dataset on the
                hub.
            exactly: Compare inodes and all times, which may differ between hosts. Otherwise sizes
                and times of change are compared.

        Returns:
            The summary given to `record_input`; None when none is recorded for these settings, or a
            file has changed.
        """
        recorded = self._input
        if files is None or recorded is None or recorded["settings_sha256"] != _hash(settings):
            return None
        compared = slice(None if exactly else 2)
        now, before = _stats(files) or {}, recorded["files"]
        if now.keys() != before.keys() or any(
            now[key][compared] != before[key][compared] for key in now
        ):
            return None
        summary: dict[str, Any] = recorded["summary"]
        return summary

    def record_input(
        self,
        settings: dict[str, Any],
        files: Sequence[Location] | None,
        began_ns: int,
        summary: dict[str, Any],
    ) -> None:
        """Record the summary of an input, for `find_input`.

        Args:
            settings: The settings that name the input.
            files: The files of the input; None records nothing.
            began_ns: When reading them began, in nanoseconds since 1970.
            summary: A JSON value.
        """
        self._input = None
        stats = None if files is None else _stats(files)
        if stats is not None and _is_stable(stats.values(), began_ns):
            self._input = {"settings_sha256": _hash(settings), "files": stats, "summary": summary}

    # -- parts -------------------------------------------------------------------------------------

    def is_unchanged(self, path: Location) -> bool:
        """Return whether a part has the size, times and inode that `confirm_parts` recorded."""
        recorded = self._parts.get(path.name)
        if recorded is None or recorded["stat"] is None:
            return False
        try:
            return bool(recorded["stat"] == stat_of(path))
        except OSError:
            return False

    def has_changed(self, path: Location) -> bool:
        """Return whether a part has another size, times or inode than `confirm_parts` recorded."""
        recorded = self._parts.get(path.name)
        has_stat = recorded is not None and recorded["stat"] is not None
        return has_stat and not self.is_unchanged(path)

    def recorded_sha256(self, path: Location) -> str | None:
        """Return the recorded hash of a part; None for none."""
        recorded = self._parts.get(path.name)
        return None if recorded is None else str(recorded["sha256"])

    def add_records(self, records: Iterable[PartRecord]) -> None:
        """Add what runs have recorded of their parts since the file was written."""
        for record in records:
            if self._parts.get(record.name, {}).get("sha256") != record.sha256:
                self.record_part(record.name, record.sha256)

    def record_part(self, name: str, sha256: str) -> None:
        """Record the hash of a part that has just been written."""
        self._parts[name] = {"stat": None, "sha256": sha256}

    def sha256_of_part(self, name: str) -> str:
        """Return the recorded hash of a part.

        Raises:
            KeyError: None is recorded.
        """
        return str(self._parts[name]["sha256"])

    def keep_parts(self, names: Iterable[str]) -> None:
        """Delete the records of all parts but these: the others are about to be written."""
        self._parts = {name: self._parts[name] for name in names if name in self._parts}

    def confirm_parts(self, paths: Iterable[Location]) -> None:
        """Record size and times of parts that are known to be whole.

        A part that was written a moment ago gets no times, so that the next run reads it.
        """
        now_ns = time.time_ns()
        for path in paths:
            stat = stat_of(path)
            recorded = self._parts.get(path.name)
            self._parts[path.name] = {
                "stat": stat if _is_stable([stat], now_ns) else None,
                "sha256": file_sha256(path) if recorded is None else recorded["sha256"],
            }


def input_key(settings: dict[str, Any], files: Sequence[Location]) -> str:
    """Return a hash of settings, and of sizes and times of change of files, in hexadecimal.

    Two hosts compute the same hash for an unchanged input.

    Raises:
        OSError: A file is gone.
    """
    stats = [[_key(path), *stat_of(path)[:2]] for path in files]
    return _hash({"settings": settings, "files": stats})


def wait_for_clock_tick(files: Iterable[Location]) -> None:
    """Wait until a later change of files would change their times; two seconds at most."""
    now_ns = time.time_ns()
    ticks = [_tick_end(stat_of(path)[2]) for path in files]
    wait_ns = max((end - now_ns for end in ticks), default=0)
    # A clock of another host may be ahead.
    if wait_ns >= 0:
        time.sleep((min(wait_ns, COARSE_CLOCK_TICK_NS) + 1_000_000) / 1e9)


def _hash(settings: dict[str, Any]) -> str:
    """Hash settings: they may hold secrets, and are not stored."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _key(path: Location) -> str:
    return redact(str(path.resolve() if isinstance(path, Path) else path))


def _stats(files: Sequence[Location]) -> dict[str, Stat] | None:
    try:
        return {_key(path): stat_of(path) for path in files}
    except OSError:
        return None


def _is_stable(stats: Iterable[Stat], began_ns: int) -> bool:
    """Return whether a change after `began_ns` would change the times of these files.

    The clocks of file systems tick every few milliseconds, or every one or two seconds. The version
    of an object changes in any case.
    """
    return all(_tick_end(ctime) < began_ns for _, _, ctime, _ in stats)


def _tick_end(ctime: int) -> int:
    """Return the time from which on a change of a file shows in its times, in nanoseconds."""
    is_coarse = ctime % 1_000_000_000 == 0
    return ctime + (COARSE_CLOCK_TICK_NS if is_coarse else CLOCK_TICK_NS)
