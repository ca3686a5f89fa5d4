"""The parts in a folder, for readers: those of its job, and the problems of the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from gptbatch.pipeline.errors import InputNotFoundError, OutputConflictError
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.folder import FolderState, OutputFolder
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.manifest import MANIFEST, DamagedManifestError
from gptbatch.pipeline.output.part_file import PartFile, inspect_footer
from gptbatch.pipeline.output.part_plan import differing_keys, group_by_job, rows_of_part
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.system.excerpt import value_excerpts
from gptbatch.pipeline.system.threads import map_in_threads

MAX_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PartListing:
    """The files with parts' names in a folder.

    Attributes:
        parts: The parts of the folder's job that hold the rows of their numbers, in order.
        footers: The footers of these parts, as far as they were read.
        unusable: Damaged parts, files that are no parts, and parts with the rows of another number.
        other_jobs: A sentence when the folder holds parts of more than one job; else "".
    """

    parts: list[Part]
    footers: list[dict[str, Any]]
    unusable: list[PartFile]
    other_jobs: str


def list_parts(state: FolderState, hashes: FileHashes | None = None) -> PartListing:
    """Inspect the footers of all parts in a folder.

    Args:
        state: The run in the folder.
        hashes: Hashes of a complete run; a part that has not changed since is not read. None reads
            all.
    """
    unchanged = _unchanged_parts(state, hashes) if state.marked_complete and hashes else {}
    parts = list(unchanged.values())
    footers: list[dict[str, Any]] = []
    unusable: list[PartFile] = []
    of_other_jobs: list[PartFile] = []
    paths = [path for path in state.parts.values() if path not in unchanged]
    for file in map_in_threads(inspect_footer, paths):
        if file.state == "missing":
            continue
        if file.footer is None or file.part is None or file.state != "sound":
            unusable.append(file)
        elif file.footer["format"] != state.manifest["format"] or differing_keys(
            state.identity, file.footer["identity"]
        ):
            of_other_jobs.append(file)
        elif problem := _misplaced(file.part, state.identity):
            unusable.append(replace(file, state="damaged", problem=problem))
        else:
            parts.append(file.part)
            footers.append(file.footer)
    parts.sort(key=lambda part: part.number)
    other_jobs = _describe_jobs(state.manifest, len(parts), of_other_jobs) if of_other_jobs else ""
    return PartListing(parts=parts, footers=footers, unusable=unusable, other_jobs=other_jobs)


def read_run_state(path: Location) -> FolderState | None:
    """Return the run in a folder, for readers; None for a folder without one.

    Raises:
        InputNotFoundError: There is no folder, or it holds other files.
    """
    if not path.exists():
        raise InputNotFoundError(
            f"{path}: no such folder; name the output folder of a run (a new run creates it after "
            "the check of its input)"
        )
    if not path.is_dir():
        raise InputNotFoundError(f"{path}: is not a folder; name the output folder of a run")
    try:
        return OutputFolder(path).state()
    except DamagedManifestError as error:
        problem = f"{MANIFEST} is damaged, or not written by gptbatch: {error.why}"
        raise InputNotFoundError(
            f"{path}: holds no run of gptbatch ({problem}); name the output folder of a run"
        ) from error
    except OutputConflictError as error:
        exists = (path / MANIFEST).exists()
        problem = f"{MANIFEST} is not written by gptbatch" if exists else f"no {MANIFEST}"
        raise InputNotFoundError(
            f"{path}: holds no run of gptbatch ({problem}); name the output folder of a run"
        ) from error


def _unchanged_parts(state: FolderState, hashes: FileHashes) -> dict[Location, Part]:
    """Return the parts of the manifest whose files have not changed."""
    listed = {part["name"]: part for part in state.manifest.get("parts", [])}
    return {
        path: Part.model_validate(listed[path.name])
        for path in state.parts.values()
        if path.name in listed and hashes.is_unchanged(path)
    }


def _misplaced(part: Part, identity: dict[str, Any]) -> str:
    """Return why a part cannot have its number; "" when it can.

    A part of a smaller limit may hold fewer rows.
    """
    part_rows, rows = identity.get("part_rows"), identity.get("rows")
    if part_rows is None or rows is None:
        return ""
    first_row = part.number * part_rows
    max_rows = rows_of_part(part.number, part_rows, rows)
    if part.first_row == first_row and part.rows <= max_rows:
        return ""
    last_row = part.first_row + part.rows - 1
    return (
        f"it holds rows {part.first_row} to {last_row} of its run, not {first_row} to "
        f"{first_row + max_rows - 1}"
    )


def _describe_jobs(manifest: dict[str, Any], n_parts: int, files: list[PartFile]) -> str:
    """Describe the parts of other jobs.

    `holds parts of 2 jobs: 8 of job 5e6f7a8b, 2 of job 1a2b3c4d (part-000003.parquet,
    part-000007.parquet; seed 0 / 1)`
    """
    names = {id(file.footer): file.path.name for file in files}
    jobs = group_by_job([file.footer for file in files if file.footer is not None])
    described = []
    for job in jobs:
        differences = ", ".join(
            f"{key} {value} / {other}"
            for key, (value, other) in islice(_differences(manifest, job[0]).items(), MAX_NAMED)
        )
        shown = ", ".join(names[id(footer)] for footer in job[:MAX_NAMED]) + (
            ", ..." if len(job) > MAX_NAMED else ""
        )
        config_hash = job[0]["identity"]["config_hash"]
        detail = f"{shown}; {differences}" if differences else shown
        described.append(f"{len(job)} of job {config_hash[:8]} ({detail})")
    config_hash = manifest["identity"]["config_hash"][:8]
    others = ", ".join(described)
    if n_parts:
        return f"holds parts of {len(jobs) + 1} jobs: {n_parts} of job {config_hash}, {others}"
    return f"holds no part of job {config_hash}, which {MANIFEST} names, but {others}"


def _differences(manifest: dict[str, Any], footer: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the values of the settings in which a footer differs from the manifest."""
    identity, other = manifest["identity"], footer["identity"]
    pairs = {}
    if footer["format"] != manifest["format"]:
        pairs["format"] = (manifest["format"], footer["format"])
    for key in differing_keys(identity, other):
        pairs[key] = value_excerpts(identity.get(key), other.get(key))
    return pairs
