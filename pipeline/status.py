"""What an output holds: which rows are there, which are missing, how fast a run is and how long it has to go.

Reads footers and small files, not the rows. Knows: the output folder. Does not print.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.data.lock import is_held
from pipeline.data.output_folder import OutputFolder
from pipeline.data.parts import count_parts, inspect_part
from pipeline.data.progress_file import PROGRESS
from pipeline.errors import InputNotFoundError, OutputConflictError, StorageError


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputStatus:
    """state: complete; running, a process holds it now; unfinished, none does. rows_done: in parts that are written.

    parts_missing and parts_damaged: numbers of parts. errors: error rows by kind. tokens_per_s and seconds_left: of the run that is
    going on, or the last; None when it has not said.
    """

    output: str
    state: Literal["complete", "running", "unfinished"]
    rows_total: int
    rows_done: int
    rows_missing: int
    parts_total: int
    parts_done: int
    parts_missing: list[int]
    parts_damaged: list[int]
    errors: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    tokens_per_s: float | None
    seconds_left: float | None
    updated_at: str | None
    fingerprint: str | None


def output_status(path: Path) -> OutputStatus:
    """Raises InputNotFoundError when there is no run of ours, StorageError when it cannot be read."""
    folder = OutputFolder(path)
    try:
        state = folder.state()
        progress = _progress(folder)
    except OutputConflictError as error:
        raise InputNotFoundError(f"{path}: holds no run of gptbatch; name the output folder of a run") from error
    except OSError as error:
        raise StorageError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error
    if state is None:
        if progress is None:
            raise InputNotFoundError(f"{path}: holds no run of gptbatch; name the output folder of a run")
        identity: dict[str, Any] = {}
        files = {}
    else:
        identity, files = state.identity, state.parts
    rows, part_rows = int(identity.get("rows") or (progress or {}).get("rows_total") or 0), int(identity.get("part_rows") or 0)
    n_parts = count_parts(part_rows, rows) if part_rows else 0
    found = {number: inspect_part(file, content=False) for number, file in files.items()}
    parts = [file.part for file in found.values() if file.state == "sound" and file.part is not None]
    numbers = {part.number for part in parts}
    errors: Counter[str] = Counter()
    for part in parts:
        errors.update(part.error_kinds)
    done = sum(part.rows for part in parts)
    complete = state is not None and state.marked_complete and len(parts) == n_parts and done == rows
    running = not complete and is_held(folder.work)
    return OutputStatus(
        output=str(path),
        state="complete" if complete else "running" if running else "unfinished",
        rows_total=rows,
        rows_done=done,
        rows_missing=rows - done,
        parts_total=n_parts,
        parts_done=len(parts),
        parts_missing=[number for number in range(n_parts) if number not in numbers and number not in found],
        parts_damaged=sorted(set(found) - numbers),
        errors=dict(sorted(errors.items())),
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        completion_tokens=sum(part.completion_tokens for part in parts),
        tokens_per_s=(progress or {}).get("tokens_per_s"),
        seconds_left=(progress or {}).get("seconds_left") if running else None,
        updated_at=(progress or {}).get("updated_at"),
        fingerprint=identity.get("fingerprint"),
    )


def _progress(folder: OutputFolder) -> dict[str, Any] | None:
    try:
        content = json.loads((folder.work / PROGRESS).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
