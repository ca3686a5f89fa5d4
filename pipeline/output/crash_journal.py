"""What a run was at when it died: `crash_journal.json`, kept up to date while parts are in flight and empty after a clean end.

    {"parts_in_flight": [3, 4], "prompt_id": null, "crashes_per_part": {"3": 1, "4": 1}}

A run that finds parts in flight knows that the last one died of something that it could not see (a kill, memory, power). Parts that
were in flight at two crashes are run with one slot: whatever a row among them does to the process, it then does alone, by its name.
"""

from __future__ import annotations

import json
from pathlib import Path

from gptbatch.pipeline.output.atomic_write import Writer
from gptbatch.pipeline.output.json_models import CrashJournalContent, validated
from gptbatch.pipeline.system.regular_file import read_json

CRASH_JOURNAL = "crash_journal.json"
MIN_CRASHES_TO_SUSPECT = 2


class CrashJournal:
    """crashes: of each part that was in flight at one and has not been written since. last_prompt_id: that ran alone when the last run died."""

    def __init__(self, work: Path, writer: Writer) -> None:
        self._path, self._writer = work / CRASH_JOURNAL, writer
        self.crashes, in_flight, self.last_prompt_id = _read(self._path)
        for number in in_flight:
            self.crashes[number] = self.crashes.get(number, 0) + 1
        self._in_flight: list[int] = []
        self._row: str | None = None

    @property
    def suspect_parts(self) -> set[int]:
        """Parts that are to be run with one slot."""
        return {
            number for number, crashes in self.crashes.items() if crashes >= MIN_CRASHES_TO_SUSPECT
        }

    def note(self, in_flight: list[int], row: str | None = None) -> None:
        """Say what is in flight from now on; row: the id of one that runs alone."""
        if (in_flight, row) != (self._in_flight, self._row):
            self._in_flight, self._row = in_flight, row
            self._save()

    def written(self, number: int) -> None:
        """A part is written: whatever it was, it has passed."""
        self.crashes.pop(number, None)

    def end(self) -> None:
        """The run ends in a way that it knows."""
        self._in_flight, self._row = [], None
        if self.crashes:
            self._save()
        else:
            self._path.unlink(missing_ok=True)

    def _save(self) -> None:
        content = {
            "parts_in_flight": self._in_flight,
            "prompt_id": self._row,
            "crashes_per_part": {
                str(number): crashes for number, crashes in sorted(self.crashes.items())
            },
        }
        self._writer.write_text(self._path, json.dumps(content) + "\n", durable=False)


def _read(path: Path) -> tuple[dict[int, int], list[int], str | None]:
    """A damaged file is an empty one."""
    try:
        note = validated(CrashJournalContent, read_json(path))
    except (OSError, ValueError):
        return {}, [], None
    return (
        {int(number): crashes for number, crashes in note.crashes_per_part.items()},
        note.parts_in_flight,
        note.prompt_id,
    )
