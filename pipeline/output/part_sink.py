"""PartSink: passes rows to the PartWriter, and keeps crash journal and records up to date.

PartRunner fills it. PartWriter turns rows into files.
"""

from __future__ import annotations

from collections.abc import Sequence

from gptbatch.pipeline.output.crash_journal import CrashJournal
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.part_writer import PartWriter
from gptbatch.pipeline.output.run_folder import RunFolder
from gptbatch.pipeline.types import Sample


class PartSink:
    """Writes parts, and keeps crash journal and records up to date.

    Args:
        run: The folder of the run.
        writer: Writes the parts.
        journal: The crash journal.
        parts: The parts that are kept, by number.
        rows_total: Rows of the parts of this run.

    Attributes:
        parts: All written parts, by number.
        rows_total: Rows of the parts of this run.
    """

    def __init__(
        self,
        run: RunFolder,
        writer: PartWriter,
        journal: CrashJournal,
        parts: dict[int, Part],
        *,
        rows_total: int,
    ) -> None:
        self._run, self._writer, self._journal = run, writer, journal
        self.parts, self.rows_total = dict(parts), rows_total
        self._in_flight: set[int] = set()
        self._reserved: set[int] = set()
        for number in parts:
            journal.clear_part(number)

    @property
    def n_in_flight(self) -> int:
        """Number of parts that have begun and are not written."""
        return len(self._in_flight)

    @property
    def suspect_parts(self) -> set[int]:
        """Numbers of the parts that were in flight at several crashes."""
        return self._journal.suspect_parts

    @property
    def last_prompt_id(self) -> str | None:
        """Id of the row that ran alone at the last crash."""
        return self._journal.last_prompt_id

    def is_in_flight(self, number: int) -> bool:
        """Return whether a part has begun and is not written."""
        return number in self._in_flight

    def reserve(self, number: int) -> None:
        """Record that this run is about to generate a part, so that no other shard takes it."""
        self._reserved.add(number)
        self._record()

    def begin_part(self, number: int) -> None:
        """Record that a part is in flight, before its first row runs."""
        self._reserved.discard(number)
        self._in_flight.add(number)
        self._record()

    def record_lone_row(self, prompt_id: str) -> None:
        """Record the row that is about to run alone."""
        self._record(prompt_id)

    def add(self, samples: Sequence[Sample]) -> Part | None:
        """Add one row of the input, and commit the part that it completes.

        Args:
            samples: All samples of the row, in order.

        Returns:
            The part, now written; None while it lacks rows.

        Raises:
            StorageError: The part cannot be written.
            OutputConflictError: A part of another job has its name.
        """
        part = self._writer.add(samples)
        if part is not None:
            self._finish_part(part)
        return part

    def add_empty(self) -> Part:
        """Commit the part of an input without rows."""
        part = self._writer.add_empty()
        self._finish_part(part)
        return part

    def close_journal(self) -> None:
        """Record that the run ends without a crash."""
        self._journal.close()

    def _record(self, prompt_id: str | None = None) -> None:
        self._journal.record(sorted(self._in_flight), prompt_id, reserved=sorted(self._reserved))

    def _finish_part(self, part: Part) -> None:
        self.parts[part.number] = part
        self._in_flight.discard(part.number)
        self._reserved.discard(part.number)
        self._journal.clear_part(part.number)
        self._run.record(part, self._writer.sha256_of(part))
        self._record()
