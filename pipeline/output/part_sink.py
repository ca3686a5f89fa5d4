"""PartSink: collects rows, has parts written in a thread, and keeps crash journal and records.

PartRunner fills it. A part whose last row is there is decoded, encoded and written by the thread
while the engine goes on. Everything else stays with the caller: a part counts as in flight until
`written` has returned it, and an error of the thread is raised there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial

from gptbatch.pipeline.output.crash_journal import CrashJournal
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.part_plan import PartPlan
from gptbatch.pipeline.output.part_writer import PartWriter
from gptbatch.pipeline.output.run_folder import RunFolder
from gptbatch.pipeline.system.threads import Worker
from gptbatch.pipeline.types import Completion, Sample

# While more complete parts are not written, the engine starts no step: they take memory, and a
# crash loses them.
MAX_UNWRITTEN_PARTS = 2


class PartSink:
    """Collects rows in any order, and has each part written when its last row arrives.

    Args:
        run: The folder of the run.
        writer: Writes the parts.
        journal: The crash journal.
        parts: The parts that are kept, by number.
        plan: The parts of the job.
        text_of: Decodes a completion; None for an error.
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
        plan: PartPlan,
        text_of: Callable[[Completion], str | None],
        rows_total: int,
    ) -> None:
        self._run, self._writer, self._journal = run, writer, journal
        self._plan, self._text_of = plan, text_of
        self.parts, self.rows_total = dict(parts), rows_total
        self._worker = Worker("parts")
        self._unwritten: deque[Future[Part]] = deque()
        # The samples of each input row, by part.
        self._rows: dict[int, list[Sequence[Completion]]] = {}
        self._is_ending = False
        self._in_flight: set[int] = set()
        self._reserved: set[int] = set()
        for number in parts:
            journal.clear_part(number)

    @property
    def n_in_flight(self) -> int:
        """Number of parts that have begun and are not written."""
        return len(self._in_flight)

    @property
    def n_unwritten(self) -> int:
        """Number of complete parts that `written` has not yielded."""
        return len(self._unwritten)

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

    def add(self, samples: Sequence[Completion]) -> None:
        """Add one row of the input. If it completes its part, the thread writes the part.

        Args:
            samples: All samples of the row, in order.
        """
        number = samples[0].prompt.index // self._plan.part_rows
        rows = self._rows.setdefault(number, [])
        rows.append(samples)
        if len(rows) == self._plan.rows_of(number):
            self._unwritten.append(
                self._worker.submit(partial(self._write, number, self._rows.pop(number)))
            )

    def add_empty(self) -> None:
        """Have the part of an input without rows written, so that readers find the schema."""
        assert self._plan.total_rows == 0
        self._unwritten.append(self._worker.submit(partial(self._write, 0, [])))

    def written(self, *, wait: bool = False) -> Iterator[Part]:
        """Yield the parts that were written since the last call, in the order of their last rows.

        Waits while more than MAX_UNWRITTEN_PARTS are not written.

        Args:
            wait: Wait for all.

        Raises:
            StorageError: A part cannot be written.
            OutputConflictError: A part of another job has its name.
        """
        unwritten = self._unwritten
        while unwritten and (wait or len(unwritten) > MAX_UNWRITTEN_PARTS or unwritten[0].done()):
            part = unwritten.popleft().result()
            self.parts[part.number] = part
            self._in_flight.discard(part.number)
            self._reserved.discard(part.number)
            self._journal.clear_part(part.number)
            self._record()
            yield part

    def close(self) -> None:
        """End the thread, after it has written what it was given."""
        self._worker.close()

    def close_journal(self) -> None:
        """Record that the run ends without a crash. Nothing is recorded afterwards."""
        self._is_ending = True
        self._journal.close()

    def _write(self, number: int, rows: list[Sequence[Completion]]) -> Part:
        """Write a part and record it; runs in the thread."""
        rows.sort(key=lambda samples: samples[0].prompt.index)
        part = self._writer.write(
            number,
            [[Sample(done, self._text_of(done)) for done in samples] for samples in rows],
        )
        self._run.record(part, self._writer.sha256_of(part))
        return part

    def _record(self, prompt_id: str | None = None) -> None:
        if self._is_ending:
            return
        self._journal.record(sorted(self._in_flight), prompt_id, reserved=sorted(self._reserved))
