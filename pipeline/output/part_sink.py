"""PartSink: passes rows to the PartWriter, and keeps crash journal and manifest up to date.

PartRunner fills it. PartWriter turns rows into files.
"""

from __future__ import annotations

import time

from gptbatch.pipeline.output.crash_journal import CrashJournal
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.folder import OutputFolder
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.part_writer import PartWriter
from gptbatch.pipeline.types import Completion

MANIFEST_INTERVAL_S = 5.0


class PartSink:
    """Writes parts, and keeps crash journal, manifest and hashes up to date.

    Args:
        folder: The output folder, claimed for this job.
        hashes: The hashes of its files.
        writer: Writes the parts.
        journal: The crash journal; None where the folder has no working lock.
        parts: The parts that are kept, by number.

    Attributes:
        parts: All written parts, by number.
    """

    def __init__(
        self,
        folder: OutputFolder,
        hashes: FileHashes,
        writer: PartWriter,
        journal: CrashJournal | None,
        parts: dict[int, Part],
    ) -> None:
        self._folder, self._hashes, self._writer, self._journal = folder, hashes, writer, journal
        self.parts = dict(parts)
        self._in_flight: set[int] = set()
        self._manifest_written_s = time.monotonic()
        if journal is not None:
            for number in parts:
                journal.clear_part(number)

    @property
    def n_in_flight(self) -> int:
        """Number of parts that have begun and are not written."""
        return len(self._in_flight)

    @property
    def suspect_parts(self) -> set[int]:
        """Numbers of the parts that were in flight at several crashes."""
        return set() if self._journal is None else self._journal.suspect_parts

    @property
    def last_prompt_id(self) -> str | None:
        """Id of the row that ran alone at the last crash."""
        return None if self._journal is None else self._journal.last_prompt_id

    def is_in_flight(self, number: int) -> bool:
        """Return whether a part has begun and is not written."""
        return number in self._in_flight

    def begin_part(self, number: int) -> None:
        """Record that a part is in flight, before its first row runs."""
        self._in_flight.add(number)
        self._record()

    def record_lone_row(self, prompt_id: str) -> None:
        """Record the row that is about to run alone."""
        self._record(prompt_id)

    def add(self, completion: Completion, text: str | None) -> Part | None:
        """Add one row, and commit the part that it completes.

        Args:
            completion: The result of the row.
            text: The decoded new tokens; None for an error.

        Returns:
            The part, now written; None while it lacks rows.

        Raises:
            StorageError: The part cannot be written.
            OutputConflictError: A part of another job has its name.
        """
        part = self._writer.add(completion, text)
        if part is not None:
            self._finish_part(part)
        return part

    def add_empty(self) -> None:
        """Commit the part of an input without rows."""
        self._finish_part(self._writer.add_empty())

    def close_journal(self) -> None:
        """Record that the run ends without a crash."""
        if self._journal is not None:
            self._journal.close()

    def _record(self, prompt_id: str | None = None) -> None:
        if self._journal is not None:
            self._journal.record(sorted(self._in_flight), prompt_id)

    def _finish_part(self, part: Part) -> None:
        self.parts[part.number] = part
        self._in_flight.discard(part.number)
        if self._journal is not None:
            self._journal.clear_part(part.number)
        self._record()
        if time.monotonic() - self._manifest_written_s >= MANIFEST_INTERVAL_S:
            self._folder.write_manifest(self._writer.facts, self.parts.values(), complete=False)
            self._folder.write_hashes(self._hashes)
            self._manifest_written_s = time.monotonic()
