"""The parts in a folder, for reading: those of its job, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from gptbatch.pipeline.errors import InputNotFoundError, OutputConflictError
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.folder import (
    MANIFEST,
    DamagedManifestError,
    FolderState,
    OutputFolder,
    group_by_job,
)
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.parts import PartFile, differing_keys, inspect_part, rows_of_part

READING_THREADS = 8
MAX_NAMED = 3


class PartListing:
    """What stands under the names of parts.

    parts: those of the folder's job that hold the rows that their names say, in order. footers: theirs, as far as they were read.
    unusable: damaged ones, files that are no parts, and parts with other rows than their names say; each says why. other_jobs: one
    line when the folder holds parts of more than one job, else "".

    memory: what a complete run has remembered of its parts. Those that look as they did then are not read.
    """

    def __init__(self, state: FolderState, memory: FileHashes | None = None) -> None:
        listed = (
            {part["name"]: part for part in state.manifest.get("parts", [])}
            if state.marked_complete and memory
            else {}
        )
        known = {
            path: listed[path.name]
            for path in state.parts.values()
            if path.name in listed and memory and memory.is_unchanged(path)
        }
        found = _each(
            inspect_part_footer, [path for path in state.parts.values() if path not in known]
        )
        identity = state.identity
        self.parts: list[Part] = [Part.model_validate(part) for part in known.values()]
        self.footers: list[dict[str, Any]] = []
        self.unusable: list[PartFile] = []
        strangers: list[PartFile] = []
        for file in found:
            if file.state == "missing":
                continue
            if file.footer is None or file.part is None or file.state != "sound":
                self.unusable.append(file)
            elif file.footer["format"] != state.manifest["format"] or differing_keys(
                identity, file.footer["identity"]
            ):
                strangers.append(file)
            elif problem := _misplaced(file.part, identity):
                self.unusable.append(
                    PartFile(
                        path=file.path,
                        state="damaged",
                        problem=problem,
                        footer=file.footer,
                        part=file.part,
                    )
                )
            else:
                self.parts.append(file.part)
                self.footers.append(file.footer)
        self.parts.sort(key=lambda part: part.number)
        self.other_jobs = _describe(state.manifest, self.parts, strangers) if strangers else ""


def read_run_state(path: Path) -> FolderState | None:
    """The run in a folder, for readers; None for a folder without one. Raises InputNotFoundError when it holds something else."""
    if not path.exists():
        raise InputNotFoundError(f"{path}: no such folder; name the output folder of a run")
    if not path.is_dir():
        raise InputNotFoundError(f"{path}: is no folder; name the output folder of a run")
    try:
        return OutputFolder(path).state()
    except DamagedManifestError as error:
        what = f"{MANIFEST} is damaged, or not ours: {error.why}"
        raise InputNotFoundError(
            f"{path}: holds no run of gptbatch ({what}); name the output folder of a run"
        ) from error
    except OutputConflictError as error:
        what = f"{MANIFEST} is not ours" if (path / MANIFEST).exists() else f"no {MANIFEST}"
        raise InputNotFoundError(
            f"{path}: holds no run of gptbatch ({what}); name the output folder of a run"
        ) from error


def inspect_part_footer(path: Path) -> PartFile:
    """Without the rows; through a link, as a download from a hub leaves it."""
    return inspect_part(path, content=False, follow_links=True)


def _misplaced(part: Part, identity: dict[str, Any]) -> str:
    """Why a part cannot be at its place, "" when it can. A part of a smaller limit holds the first of its rows."""
    part_rows, rows = identity.get("part_rows"), identity.get("rows")
    if part_rows is None or rows is None:
        return ""
    number = part.number
    first, most = number * part_rows, rows_of_part(number, part_rows, rows)
    if part.first_row == first and part.rows <= most:
        return ""
    return f"it holds rows {part.first_row} to {part.first_row + part.rows - 1} of its run, not {first} to {first + most - 1}"


def _describe(manifest: dict[str, Any], parts: list[Part], strangers: list[PartFile]) -> str:
    """`holds parts of 2 jobs: 8 of its own, 2 of 1a2b3c4d (part-00003.parquet, part-00007.parquet; seed 0 / 1)`."""
    identity = manifest["identity"]
    names = {id(file.footer): file.path.name for file in strangers}
    jobs = group_by_job([file.footer for file in strangers if file.footer is not None])
    described = []
    for job in jobs:
        theirs = job[0]["identity"]
        pairs: dict[str, tuple[str, str]] = (
            {"format": (manifest["format"], job[0]["format"])}
            if job[0]["format"] != manifest["format"]
            else {}
        )
        keys = [key for key in differing_keys(identity, theirs) if key != "config_hash"]
        pairs |= {key: (_short(identity.get(key)), _short(theirs.get(key))) for key in keys}
        differences = ", ".join(
            f"{key} {ours} / {others}" for key, (ours, others) in islice(pairs.items(), MAX_NAMED)
        )
        shown = ", ".join(names[id(footer)] for footer in job[:MAX_NAMED]) + (
            ", ..." if len(job) > MAX_NAMED else ""
        )
        described.append(
            f"{len(job)} of job {theirs['config_hash'][:8]} ({shown}{f'; {differences}' if differences else ''})"
        )
    own = identity["config_hash"][:8]
    if parts:
        return f"holds parts of {len(jobs) + 1} jobs: {len(parts)} of job {own}, {', '.join(described)}"
    return f"holds no part of job {own}, which {MANIFEST} names, but {', '.join(described)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:8]}..."


def _each(look: Callable[[Path], PartFile], paths: Iterable[Path]) -> list[PartFile]:
    """Look at each, several at a time: on a network disk, waiting takes most of the time."""
    paths = list(paths)
    try:
        with ThreadPoolExecutor(min(READING_THREADS, max(1, len(paths)))) as pool:
            return list(pool.map(look, paths))
    except RuntimeError:  # no thread can be started
        return [look(path) for path in paths]
