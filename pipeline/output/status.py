"""The status of an output: its rows, and the speed and remaining time of a run.

Reads small files and the footers of parts, not the rows. Footers of parts that have not changed are
not read either.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from gptbatch.pipeline.errors import InputNotFoundError, StorageError
from gptbatch.pipeline.output.folder import CONFIG, WORK, FolderState, OutputFolder
from gptbatch.pipeline.output.index_file import INDEX, read_index
from gptbatch.pipeline.output.json_models import Part, ProgressContent
from gptbatch.pipeline.output.lock import LOCK
from gptbatch.pipeline.output.manifest import MANIFEST
from gptbatch.pipeline.output.part_file import part_number
from gptbatch.pipeline.output.part_listing import PartListing, list_parts, read_run_state
from gptbatch.pipeline.output.part_plan import count_parts
from gptbatch.pipeline.output.progress_file import read_progress
from gptbatch.pipeline.output.runs import list_runs, live_runs
from gptbatch.pipeline.output.stray_tables import describe_stray_tables
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.system.file_lock import is_locked

MAX_NAMED = 3
MAX_MISSING_PARTS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputStatus:
    """The status of an output.

    Attributes:
        output: The output folder.
        state: "complete"; "running": a process holds its lock; "unfinished": no process does;
            "indexed": no run has begun, and `gptbatch plan --index` has checked the rows.
        runs: Number of runs that are going on: more than 1 with shards.
        rows_total: Rows of the input.
        rows_done: Rows in parts of the folder's job.
        rows_missing: Rows that are not done.
        rows_waiting: Rows among these that a run has finished, and that wait for their part. None
            unless one run is going on.
        parts_total: Parts of the whole output.
        parts_done: Parts that are written.
        n_parts_missing: Number of missing parts.
        parts_missing: Numbers of the missing parts, at most 1,000 of them (MAX_MISSING_PARTS).
        parts_damaged: Numbers of damaged parts.
        errors: Number of error rows by kind.
        prompt_tokens: Sum over the rows that are done.
        completion_tokens: Sum over the rows that are done.
        tokens_per_s: Speed of the current runs together, or of the last one. None before the first
            token.
        remaining_s: Estimated seconds until the last of the current runs ends. None when none is
            running.
        updated_at: When a run last recorded its progress, in UTC.
        config_hash: Hash of all settings that decide tokens.
        batch_invariance: "portable", "verified", "unverified" or "off"; None before the first run
            has loaded its model.
        last_state: State of the last run, as its `progress.json` says: "loading", "running",
            "complete", "stopped" or "failed". A killed run leaves one of the first two. None
            without a run.
        problems: Problems of the folder, a sentence each.
    """

    output: str
    state: Literal["complete", "running", "unfinished", "indexed"]
    runs: int
    rows_total: int
    rows_done: int
    rows_missing: int
    rows_waiting: int | None
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
    batch_invariance: str | None
    last_state: str | None
    problems: list[str]


def output_status(
    path: Location, found: tuple[FolderState, PartListing] | None = None
) -> OutputStatus:
    """Return the status of an output folder.

    Args:
        path: The folder.
        found: Its run and its parts, as a reader has found them; None reads them.

    Raises:
        InputNotFoundError: The folder holds no run.
        StorageError: It cannot be read.
    """
    folder = OutputFolder(path)
    progress = _progress(folder)
    try:
        state, listing = found or (read_run_state(path), None)
        if state is not None and listing is None:
            listing = list_parts(state, folder.read_hashes())
        problems = [] if state is None or listing is None else _problems(folder, state, listing)
    except OSError as error:
        raise StorageError(
            f"{error.filename or path}: cannot be read ({error.strerror or error})"
        ) from error
    if state is None and progress is None:
        if (index := _index(folder)) is not None:
            return index
        raise InputNotFoundError(
            f"{path}: holds no run of gptbatch; name the output folder of a run (a new run is "
            "shown after the check of its input)"
        )
    return _status(folder, state, listing, progress, problems)


def _index(folder: OutputFolder) -> OutputStatus | None:
    """Return the status of a folder with the index of an input and no run; None without one."""
    index = read_index(folder.work / INDEX)
    if index is None:
        return None
    n_parts = count_parts(index.part_rows, index.rows)
    return OutputStatus(
        output=str(folder.path),
        state="indexed",
        runs=0,
        rows_total=index.rows,
        rows_done=0,
        rows_missing=index.rows,
        rows_waiting=None,
        parts_total=n_parts,
        parts_done=0,
        n_parts_missing=n_parts,
        parts_missing=list(range(min(n_parts, MAX_MISSING_PARTS))),
        parts_damaged=[],
        errors={},
        prompt_tokens=0,
        completion_tokens=0,
        tokens_per_s=None,
        remaining_s=None,
        updated_at=None,
        config_hash=None,
        batch_invariance=None,
        last_state=None,
        problems=[],
    )


def _status(
    folder: OutputFolder,
    state: FolderState | None,
    listing: PartListing | None,
    progress: ProgressContent | None,
    problems: list[str],
) -> OutputStatus:
    identity: dict[str, Any] = {} if state is None else state.identity
    rows, part_rows = identity.get("rows"), identity.get("part_rows")
    if rows is None:
        rows = progress.rows_total if progress is not None else 0
    n_parts = count_parts(part_rows, rows) if part_rows is not None else 0
    parts = [] if listing is None else listing.parts
    unusable: dict[int, str] = {}
    for file in [] if listing is None else listing.unusable:
        if (number := part_number(file.path.name)) is not None:
            unusable[number] = file.state
    present = {part.number for part in parts} | unusable.keys()
    missing = (number for number in range(n_parts) if number not in present)
    rows_done = sum(part.rows for part in parts)
    complete = (
        (state is not None and state.marked_complete and listing is not None)
        and not (listing.other_jobs or listing.unusable or state.stray_tables)
        and (len(parts), rows_done) == (n_parts, rows)
    )
    running = not complete and _is_running(folder)
    runs = len(live_runs(folder.work)) if running else 0
    # It has no folder yet, and the progress is that of the run before it.
    is_checking = running and not runs
    return OutputStatus(
        output=str(folder.path),
        state="complete" if complete else "running" if running else "unfinished",
        runs=runs,
        rows_total=rows,
        rows_done=rows_done,
        rows_missing=max(0, rows - rows_done),
        rows_waiting=max(0, progress.rows_done - rows_done)
        if runs == 1 and progress is not None and progress.rows_total == rows
        else None,
        parts_total=n_parts,
        parts_done=len(parts),
        n_parts_missing=n_parts - sum(number < n_parts for number in present),
        parts_missing=list(islice(missing, MAX_MISSING_PARTS)),
        parts_damaged=sorted(
            number
            for number, file_state in unusable.items()
            if number < n_parts and file_state == "damaged"
        ),
        errors=_error_kinds(parts),
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        completion_tokens=sum(part.completion_tokens for part in parts),
        tokens_per_s=progress.tokens_per_s if progress is not None and not is_checking else None,
        remaining_s=progress.remaining_s if progress is not None and runs else None,
        updated_at=progress.updated_at if progress is not None else None,
        config_hash=identity.get("config_hash"),
        batch_invariance=None if state is None else state.manifest.get("batch_invariance"),
        last_state=progress.state if progress is not None else None,
        problems=problems,
    )


def _is_running(folder: OutputFolder) -> bool:
    if isinstance(folder.work, Path):
        return is_locked(folder.work / LOCK)
    return bool(live_runs(folder.work))


def _progress(folder: OutputFolder) -> ProgressContent | None:
    """Return the progress of the live runs together; without any, that of the latest run."""
    found = [(run.is_live(), read_progress(run.path)) for run in list_runs(folder.work)]
    every = [progress for _, progress in found if progress is not None]
    live = [progress for is_live, progress in found if is_live and progress is not None]
    latest = max(every, key=lambda progress: progress.updated_at or "", default=None)
    if latest is None or not live:
        return latest
    speeds = [progress.tokens_per_s for progress in live if progress.tokens_per_s is not None]
    remaining = [progress.remaining_s for progress in live]
    return latest.model_copy(
        update={
            "tokens_per_s": sum(speeds) if speeds else None,
            # None while one of them does not know.
            "remaining_s": max((s for s in remaining if s is not None), default=None)
            if None not in remaining
            else None,
        }
    )


def _error_kinds(parts: list[Part]) -> dict[str, int]:
    errors: Counter[str] = Counter()
    for part in parts:
        errors.update(part.error_kinds)
    return dict(sorted(errors.items()))


def _problems(folder: OutputFolder, state: FolderState, listing: PartListing) -> list[str]:
    problems = [listing.other_jobs] if listing.other_jobs else []
    if state.stray_tables:
        problems.append(describe_stray_tables(state.stray_tables))
    foreign = [file for file in listing.unusable if file.state == "foreign"]
    problems += [
        f"{file.path.name}: is not a part of gptbatch ({file.problem})"
        for file in foreign[:MAX_NAMED]
    ]
    if len(foreign) > MAX_NAMED:
        problems.append(f"{len(foreign) - MAX_NAMED} more files under names of parts are none")
    damaged = [file for file in listing.unusable if file.state == "damaged"]
    problems += [f"{file.path.name}: {file.problem}" for file in damaged[:MAX_NAMED]]
    if state.manifest_lost:
        problems.append(
            f"{MANIFEST} is missing or damaged: its facts are taken from the footers of the parts"
        )
    if os.path.lexists(str(folder.work)) and not folder.work.is_dir():
        problems.append(f"{WORK} is not a folder: verify and replay need the settings in it")
    elif state.parts and not (folder.work / CONFIG).exists():
        problems.append(f"a copy without {WORK}/{CONFIG}: verify and replay need it")
    return problems
