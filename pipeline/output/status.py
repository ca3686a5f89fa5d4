"""What an output holds: which rows are there, which are missing, how fast a run is and how long it has to go.

Reads small files and footers, not the rows; of parts that are as the folder remembers them, not even the footers.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from gptbatch.pipeline.errors import InputNotFoundError, StorageError
from gptbatch.pipeline.output.folder import CONFIG, MANIFEST, WORK, FolderState, OutputFolder
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.lock import is_held
from gptbatch.pipeline.output.part_listing import PartListing, read_run_state
from gptbatch.pipeline.output.parts import count_parts, part_number
from gptbatch.pipeline.output.progress_file import read_progress
from gptbatch.pipeline.output.stray_tables import describe_stray_tables

MAX_NAMED = 3
MAX_LISTED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputStatus:
    """state: complete; running, a process holds it now; unfinished, none does. rows_done: in parts of the folder's job.

    parts_missing: numbers of the first MAX_LISTED of the `n_parts_missing`. parts_damaged: numbers. errors: error rows by kind.
    tokens_per_s and remaining_s: of the run that is going on, or the last; None when it has not said. problems: what is wrong with
    the folder, a line each.
    """

    output: str
    state: Literal["complete", "running", "unfinished"]
    rows_total: int
    rows_done: int
    rows_missing: int
    parts_total: int
    parts_done: int
    n_parts_missing: int
    parts_missing: list[int]
    parts_damaged: list[int]
    errors: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    tokens_per_s: float | None
    remaining_s: float | None
    updated_at: str | None
    config_hash: str | None
    problems: list[str]


def output_status(path: Path) -> OutputStatus:
    """Raises InputNotFoundError when there is no run of ours, StorageError when it cannot be read."""
    folder = OutputFolder(path)
    progress = read_progress(folder.work)
    try:
        state = read_run_state(path)
        found = None if state is None else PartListing(state, folder.memory())
        problems = [] if state is None or found is None else _problems(folder, state, found)
    except OSError as error:
        raise StorageError(
            f"{error.filename or path}: cannot be read ({error.strerror or error})"
        ) from error
    if state is None and progress is None:
        raise InputNotFoundError(
            f"{path}: holds no run of gptbatch; name the output folder of a run"
        )
    identity: dict[str, Any] = {} if state is None else state.identity
    rows, part_rows = identity.get("rows"), identity.get("part_rows")
    if rows is None:
        rows = progress.rows_total if progress is not None else 0
    n_parts = count_parts(part_rows, rows) if part_rows is not None else 0
    parts = [] if found is None else found.parts
    numbers = {part.number for part in parts}
    unusable = (
        [] if found is None else [(part_number(file.path.name), file) for file in found.unusable]
    )
    damaged = sorted(
        number
        for number, file in unusable
        if number is not None and number < n_parts and file.state == "damaged"
    )
    there = numbers | {number for number, _ in unusable if number is not None}
    missing = (number for number in range(n_parts) if number not in there)
    done = sum(part.rows for part in parts)
    complete = (
        (state is not None and state.marked_complete and found is not None)
        and not (found.other_jobs or found.unusable or state.stray_tables)
        and (len(parts), done) == (n_parts, rows)
    )
    running = not complete and is_held(folder.work)
    return OutputStatus(
        output=str(path),
        state="complete" if complete else "running" if running else "unfinished",
        rows_total=rows,
        rows_done=done,
        rows_missing=max(0, rows - done),
        parts_total=n_parts,
        parts_done=len(parts),
        n_parts_missing=n_parts - sum(number < n_parts for number in there),
        parts_missing=list(islice(missing, MAX_LISTED)),
        parts_damaged=damaged,
        errors=_error_kinds(parts),
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        completion_tokens=sum(part.completion_tokens for part in parts),
        tokens_per_s=progress.tokens_per_s if progress is not None else None,
        remaining_s=progress.remaining_s if progress is not None and running else None,
        updated_at=progress.updated_at if progress is not None else None,
        config_hash=identity.get("config_hash"),
        problems=problems,
    )


def _error_kinds(parts: list[Part]) -> dict[str, int]:
    errors: Counter[str] = Counter()
    for part in parts:
        errors.update(part.error_kinds)
    return dict(sorted(errors.items()))


def _problems(folder: OutputFolder, state: FolderState, found: PartListing) -> list[str]:
    problems = [found.other_jobs] if found.other_jobs else []
    if state.stray_tables:
        problems.append(describe_stray_tables(state.stray_tables))
    strangers = [file for file in found.unusable if file.state == "foreign"]
    problems += [
        f"{file.path.name}: is not a part of gptbatch ({file.problem})"
        for file in strangers[:MAX_NAMED]
    ]
    if len(strangers) > MAX_NAMED:
        problems.append(f"{len(strangers) - MAX_NAMED} more files under names of parts are none")
    problems += [
        f"{file.path.name}: {file.problem}" for file in found.unusable if file.state == "damaged"
    ][:MAX_NAMED]
    if state.manifest_lost:
        problems.append(
            f"{MANIFEST} is missing or damaged: this is what the footers of the parts say"
        )
    if os.path.lexists(folder.work) and not folder.work.is_dir():
        problems.append(f"{WORK} is not a folder: verify and replay need the settings in it")
    elif state.parts and not (folder.work / CONFIG).exists():
        problems.append(f"a copy without {WORK}/{CONFIG}: verify and replay need it")
    return problems
