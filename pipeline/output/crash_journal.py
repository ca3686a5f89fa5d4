"""`crash_journal.json`: the parts in flight, so that the next run can tell which one crashes.

    {
        "parts_in_flight": [3, 4],
        "parts_reserved": [5],
        "prompt_id": null,
        "crashes_per_part": {"3": 1, "4": 1}
    }

The file is updated while parts are in flight, and deleted by a run that ends without a crash. Parts
in flight in the journal of a dead run mean that it was killed. After a loss of power the file may
be an older one, because it is not synced to the disk. Parts that were in flight at two crashes run
with a batch size of 1: the journal then names the row that runs alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

from gptbatch.pipeline.output.json_models import CrashJournalContent, validated
from gptbatch.pipeline.storage.atomic_write import Writer
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.storage.regular_file import read_json

CRASH_JOURNAL = "crash_journal.json"
MIN_CRASHES_TO_SUSPECT = 2


class CrashJournal:
    """The crash journal of this run.

    Args:
        run: The folder of the run.
        writer: Writes files atomically.
        dead: The journals of dead runs, whose crashes count.

    Attributes:
        crashes_per_part: Number of crashes while a part was in flight, by part number. Written
            parts are left out.
        last_prompt_id: Id of the row that ran alone at the last crash; None where none did.
    """

    def __init__(
        self, run: Location, writer: Writer, dead: Iterable[CrashJournalContent] = ()
    ) -> None:
        self._path, self._writer = run / CRASH_JOURNAL, writer
        self.last_prompt_id: str | None = None
        crashes: Counter[int] = Counter()
        carried: Counter[int] = Counter()
        for journal in dead:
            self.last_prompt_id = journal.prompt_id or self.last_prompt_id
            crashes.update(journal.parts_in_flight)
            # Several may have taken over the counts of one run, where there are no locks.
            carried |= Counter({int(k): count for k, count in journal.crashes_per_part.items()})
        crashes += carried
        self.crashes_per_part: dict[int, int] = dict(crashes)
        self._parts_in_flight: list[int] = []
        self._prompt_id: str | None = None
        self._reserved: list[int] = []
        if self.crashes_per_part:
            self._save()

    @property
    def suspect_parts(self) -> set[int]:
        """Numbers of the parts that run with a batch size of 1."""
        return {
            number
            for number, crashes in self.crashes_per_part.items()
            if crashes >= MIN_CRASHES_TO_SUSPECT
        }

    def record(
        self,
        parts_in_flight: list[int],
        prompt_id: str | None = None,
        *,
        reserved: list[int] | None = None,
    ) -> None:
        """Record the parts that are in flight from now on.

        Args:
            parts_in_flight: Their numbers.
            prompt_id: Id of a row that runs alone; None where rows share a batch.
            reserved: Parts that are about to begin. A crash does not count for them.
        """
        state = (parts_in_flight, prompt_id, reserved or [])
        if state != (self._parts_in_flight, self._prompt_id, self._reserved):
            self._parts_in_flight, self._prompt_id, self._reserved = state
            self._save()

    def clear_part(self, number: int) -> None:
        """Forget the crashes of a part that is written."""
        self.crashes_per_part.pop(number, None)

    def close(self) -> None:
        """Record that the run ends without a crash."""
        self._parts_in_flight, self._prompt_id, self._reserved = [], None, []
        if self.crashes_per_part:
            self._save()
        else:
            self._path.unlink(missing_ok=True)

    def _save(self) -> None:
        content = {
            "parts_in_flight": self._parts_in_flight,
            "parts_reserved": self._reserved,
            "prompt_id": self._prompt_id,
            "crashes_per_part": {
                str(number): crashes for number, crashes in sorted(self.crashes_per_part.items())
            },
        }
        self._writer.write_text(self._path, json.dumps(content) + "\n", durable=False)


def read_crash_journal(run: Location) -> CrashJournalContent:
    """Read the journal of a run; a missing or damaged one is read as empty."""
    try:
        return validated(CrashJournalContent, read_json(run / CRASH_JOURNAL))
    except (OSError, ValueError):
        return CrashJournalContent(parts_in_flight=[], prompt_id=None, crashes_per_part={})
