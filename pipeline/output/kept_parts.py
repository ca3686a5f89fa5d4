"""Which parts of an output are kept when its run is continued.

A part is kept when its footer is of this job, it holds the rows of its number, these rows of the
input have not changed, and its content has the recorded digest. The rows of a damaged part are
generated again. A part of another job is refused, and stays. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gptbatch.pipeline.errors import OutputConflictError
from gptbatch.pipeline.output.folder import FolderState
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.part_file import PartFile
from gptbatch.pipeline.output.part_plan import PartPlan, count_parts, refuse_foreign


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptParts:
    """The parts of an output that are kept.

    Attributes:
        parts: The parts by number.
        footer: The footer of the last of them; {} without parts.
    """

    parts: dict[int, Part]
    footer: dict[str, Any]

    @property
    def rows(self) -> int:
        """Rows in these parts."""
        return sum(part.rows for part in self.parts.values())

    @property
    def errors(self) -> int:
        """Error rows in these parts."""
        return sum(part.errors for part in self.parts.values())


def numbers_to_inspect(state: FolderState, share: range, n_parts: int) -> set[int]:
    """Return the numbers of the files that a run inspects.

    These are its share, and those beyond the last part, which `find_kept_parts` refuses.

    Args:
        state: The run in the folder.
        share: The parts of this run.
        n_parts: Parts of the job.
    """
    return {number for number in state.parts if number in share or number >= n_parts}


def find_kept_parts(files: dict[int, PartFile], plan: PartPlan) -> KeptParts:
    """Return the parts that are kept.

    Args:
        files: Every file with a part's name, by number.
        plan: The parts of the job.

    Raises:
        OutputConflictError: No run of this job can have written one of the files.
    """
    check_no_foreign_parts(files, plan.n_parts)
    parts: dict[int, Part] = {}
    footer: dict[str, Any] = {}
    for number, file in files.items():
        plan.check_part(file)
        if (
            file.state == "sound"
            and file.part is not None
            and file.footer is not None
            and plan.is_whole(file.part)
        ):
            parts[number], footer = file.part, file.footer
    return KeptParts(parts=parts, footer=footer)


def check_no_foreign_parts(files: dict[int, PartFile], n_parts: int) -> None:
    """Check that a run of `n_parts` parts can have written these files.

    Raises:
        OutputConflictError: A file is not a part, or its number is too large.
    """
    for number, file in files.items():
        refuse_foreign(file)
        if number >= n_parts:
            raise OutputConflictError(
                f"{file.path}: this run has {n_parts} part{'s' * (n_parts != 1)}, and no such one; "
                "move it away, or name another output"
            )


def check_replaceable(state: FolderState, files: dict[int, PartFile]) -> None:
    """Check that all files with parts' names are parts of the run that is replaced.

    Raises:
        OutputConflictError: Another program wrote one of them.
    """
    rows, part_rows = state.identity.get("rows"), state.identity.get("part_rows")
    n_parts = (
        count_parts(part_rows, rows) if isinstance(rows, int) and isinstance(part_rows, int) else 0
    )
    without_footer = {number: file for number, file in files.items() if file.footer is None}
    check_no_foreign_parts(without_footer, n_parts)
