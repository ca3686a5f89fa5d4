"""What of an output can be trusted: whether it is the same job's, and which of its parts need not be done again.

A part is trusted when its footer is of this job, it holds the rows that its name says, the input says in these rows what it said,
and its content has the digest that it had. A damaged part is done again; a part of another job is refused and left alone. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import OutputConflictError
from gptbatch.pipeline.input.prompt_reader import InputSummary
from gptbatch.pipeline.output.folder import FolderState, OutputFolder, refuse_stray_tables
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.parts import FORMAT, PartFile, PartPlan, count_parts
from gptbatch.pipeline.types import DEFAULT_PART_ROWS

_ELSE = "name another output, or use --overwrite"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptParts:
    """The parts that stay, by number, and what the footer of the latest of them says, {} without any."""

    parts: dict[int, Part]
    footer: dict[str, Any]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts.values())

    @property
    def errors(self) -> int:
        return sum(part.errors for part in self.parts.values())


def is_same_job(state: FolderState, identity: dict[str, Any]) -> bool:
    return state.manifest["format"] == FORMAT and not _differing(state, identity)


def is_replaced(config: JobConfig, state: FolderState, identity: dict[str, Any]) -> bool:
    """Whether nothing that is there stays.

    A folder without a part holds no job. overwrite replaces what is complete or another job's; what it has begun itself goes on.
    """
    return not state.holds_job or (
        config.overwrite and (state.marked_complete or not is_same_job(state, identity))
    )


def find_continued_run(
    config: JobConfig, folder: OutputFolder, identity: Callable[[], dict[str, Any]]
) -> FolderState | None:
    """The run in the output that this job goes on with; None where it starts anew.

    identity: of this job; it hashes the weights, and is asked for where there is a run to compare with.
    Raises OutputConflictError when the folder holds something else.
    """
    folder.refuse_links()
    state = folder.state()
    if state is not None:
        refuse_stray_tables(folder.path, state.stray_tables)
    if state is None or not state.holds_job or is_replaced(config, state, identity()):
        return None
    check_same_job(config, state, identity())
    return state


def check_same_job(config: JobConfig, state: FolderState, identity: dict[str, Any]) -> None:
    """Raises OutputConflictError, naming what differs, unless the folder's run is the same job, by all but its input."""
    if state.manifest["format"] != FORMAT:
        raise OutputConflictError(
            f"{config.output}: holds a run of format {state.manifest['format']}, and this version writes {FORMAT}, which cannot be mixed; "
            f"go on with the version that began it ({_version(state)}), {_ELSE}"
        )
    differing = _differing(state, identity)
    recorded = state.identity.get("part_rows")
    if config.part_rows is not None and config.part_rows != recorded:
        differing.append("part_rows")
    if differing:
        raise OutputConflictError(
            f"{config.output}: holds a run of another job ({', '.join(differing)} differ); {_ELSE}"
        )
    machine = state.manifest.get("environment")
    if (
        isinstance(machine, dict)
        and config.engine.attention not in ("auto", machine.get("attention"))
        and not config.allow_other_environment
    ):
        raise OutputConflictError(
            f"{config.output}: holds a run with engine.attention {machine.get('attention')}, not {config.engine.attention}; {_ELSE}"
        )
    batch_invariance = state.manifest.get("batch_invariance")
    if config.batch_invariance == "require" and batch_invariance not in (None, "verified"):
        raise OutputConflictError(
            f"{config.output}: holds a run whose batch_invariance is {batch_invariance}, not verified; {_ELSE}"
        )


def part_rows_of(config: JobConfig, state: FolderState | None) -> int:
    """Rows a part: the output's where there is one, since a part's name follows from it."""
    recorded = None if state is None else state.identity.get("part_rows")
    return int(recorded or config.part_rows or DEFAULT_PART_ROWS)


def check_same_input(config: JobConfig, state: FolderState, summary: InputSummary) -> None:
    """Raises OutputConflictError unless the input says what it said, and has more rows only where a larger limit lets more in."""
    rows, digest, limit = (state.identity.get(key) for key in ("rows", "input_digest", "limit"))
    if not isinstance(rows, int):
        raise OutputConflictError(
            f"{config.output}: another version wrote it, which did not say how many rows it has; {_ELSE}"
        )
    if rows > summary.rows:
        raise OutputConflictError(
            f"{config.output}: holds a run of {rows} rows, but the input has {summary.rows}; {_ELSE}"
        )
    if summary.prefix_digests.get(rows) != digest:
        raise OutputConflictError(
            f"{config.output}: holds a run of another input (input_digest differs in its {rows} rows); {_ELSE}"
        )
    grown = isinstance(limit, int) and (config.limit is None or config.limit > limit)
    if rows < summary.rows and not grown:
        raise OutputConflictError(
            f"{config.output}: holds a run of {rows} rows, but the input has {summary.rows} now; only a larger --limit adds rows; {_ELSE}"
        )


def find_kept_parts(found: dict[int, PartFile], plan: PartPlan) -> KeptParts:
    """The parts that need not be done again. found: every file under a part's name, looked at.

    Raises OutputConflictError for files under parts' names that no run of this job can have written, or that it has no rows for.
    """
    check_no_foreign_parts(found, plan.n_parts)
    parts: dict[int, Part] = {}
    footer: dict[str, Any] = {}
    for number, file in found.items():
        plan.check_ours(file)
        if (
            file.state == "sound"
            and file.part is not None
            and file.footer is not None
            and plan.is_whole(file.part)
        ):
            parts[number], footer = file.part, file.footer
    return KeptParts(parts=parts, footer=footer)


def check_no_foreign_parts(found: dict[int, PartFile], n_parts: int) -> None:
    """Raises OutputConflictError for files under parts' names that a run of so many parts cannot have written."""
    for number, file in found.items():
        if file.state == "foreign":
            raise OutputConflictError(
                f"{file.path}: is not a part that gptbatch wrote ({file.problem}); move it away, or name another output"
            )
        if number >= n_parts:
            raise OutputConflictError(
                f"{file.path}: this run has {n_parts} parts, and no such one; move it away, or name another output"
            )


def check_replaceable(state: FolderState, found: dict[int, PartFile]) -> None:
    """Raises OutputConflictError for files under parts' names that are not those of the run which is to be replaced."""
    rows, part_rows = state.identity.get("rows"), state.identity.get("part_rows")
    known = (
        count_parts(part_rows, rows) if isinstance(rows, int) and isinstance(part_rows, int) else 0
    )
    check_no_foreign_parts(
        {number: file for number, file in found.items() if file.footer is None}, known
    )


def check_same_environment(
    config: JobConfig, trusted: KeptParts, environment: dict[str, Any], batch_invariance: str
) -> None:
    """Raises OutputConflictError, naming both, when the rows to come would be made in another way than those that are there."""
    recorded = {
        **trusted.footer.get("environment", {}),
        "batch_invariance": trusted.footer.get("batch_invariance"),
    }
    now = {**environment, "batch_invariance": batch_invariance}
    differing = [
        f"{key} was {recorded.get(key)}, is {now.get(key)}"
        for key in now
        if recorded.get(key) != now.get(key)
    ]
    if trusted.parts and differing and not config.allow_other_environment:
        raise OutputConflictError(
            f"{config.output}: holds rows of another environment ({'; '.join(differing)}), whose bits these may not match; go on where it was "
            "begun, name another output, or use --allow-other-environment"
        )


def _differing(state: FolderState, identity: dict[str, Any]) -> list[str]:
    return [key for key, value in identity.items() if state.identity.get(key) != value]


def _version(state: FolderState) -> str:
    version = state.manifest.get("versions", {}).get("gptbatch")
    return f"gptbatch {version}" if version else "its version is not recorded"
