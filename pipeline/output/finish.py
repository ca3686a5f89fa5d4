"""Finishing an output: the final manifest and `_SUCCESS`, once all parts are written.

The result is a function of the parts. Any run may finish an output, also several at once: they
write the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptbatch.pipeline.errors import IncompleteError, OutputConflictError, StorageError
from gptbatch.pipeline.input.input_digest import input_digest
from gptbatch.pipeline.input.rows import RowDefaults
from gptbatch.pipeline.output.claim import write_manifest
from gptbatch.pipeline.output.error_limit import ErrorLimit
from gptbatch.pipeline.output.error_rows import write_error_rows
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.folder import SUCCESS, OutputFolder
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.manifest import facts_of, manifest_text
from gptbatch.pipeline.output.part_file import PartFile, inspect_part, part_name, read_footer
from gptbatch.pipeline.output.part_plan import PartPlan, count_parts
from gptbatch.pipeline.output.schema import FORMAT
from gptbatch.pipeline.output.stray_tables import find_stray_tables, refuse_stray_tables
from gptbatch.pipeline.storage.atomic_write import Writer
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.system.threads import map_in_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The parts of a complete output.

    Attributes:
        manifest: The facts in its manifest.
        parts: The parts, in order.
    """

    manifest: dict[str, Any]
    parts: list[Part]


def finish(
    folder: OutputFolder,
    writer: Writer,
    identity: dict[str, Any],
    hashes: FileHashes,
    known: Mapping[int, Part],
    defaults: RowDefaults,
    max_row_errors: str | None = None,
) -> Finished:
    """Check that the folder holds exactly the parts of a job, and record their hashes.

    Afterwards the records of runs that were killed are not needed any more.

    Args:
        folder: The output folder. No part is missing.
        writer: Writes files atomically.
        identity: The identity of the job, its input included.
        hashes: The recorded hashes of the parts.
        known: Parts whose content has been checked, by number. The content of others is read if
            no hash is recorded, and that of any part whose size or times have changed.
        defaults: The names of the input's fields, for errors.jsonl.
        max_row_errors: The setting of the job.

    Raises:
        OutputConflictError: The folder holds other parts or tables.
        InputRowsError: The parts of all runs together hold more error rows than `max_row_errors`.
        IncompleteError: A part is damaged, or lacks rows.
        StorageError: A file cannot be written, or a part is gone.
    """
    refuse_stray_tables(folder.path, find_stray_tables(folder.path))

    def inspect(entry: tuple[int, Location]) -> PartFile:
        number, path = entry
        if number in known and (hashes.is_unchanged(path) or writer.wrote(path)):
            return PartFile(path=path, state="sound", part=known[number])
        sha256 = hashes.recorded_sha256(path)
        # A run reads back what it writes, and records the hash.
        is_read = hashes.has_changed(path) or (number not in known and sha256 is None)
        return inspect_part(path, content=is_read, sha256=sha256)

    # Not by a listing, which may be older than the last parts.
    n_parts = count_parts(identity["part_rows"], identity["rows"])
    paths = {number: folder.path / part_name(number) for number in range(n_parts)}
    paths |= folder.list_parts()
    files = map_in_threads(inspect, paths.items())
    plan = PartPlan(
        identity=identity,
        input_digests=[file.part.input_rows_digest if file.part else "" for file in files],
    )
    parts = [_whole_part(plan, file, known) for file in files]
    if input_digest(plan.input_digests) != identity["input_digest"] or len(parts) != plan.n_parts:
        raise OutputConflictError(
            f"{folder.path}: its parts are not those of one input (input_digest differs); name "
            "another output"
        )
    write_error_rows(folder, writer, parts, defaults)
    ErrorLimit(max_row_errors, plan.total_rows).check(sum(part.errors for part in parts))
    footer = read_footer(files[0].path)
    assert footer is not None
    try:
        hashes.confirm_parts(file.path for file in files)
    except OSError as error:
        raise StorageError(f"{error.filename}: is gone since it was checked") from error
    folder.write_hashes(writer, hashes)
    facts = {**facts_of(footer), "format": FORMAT, "identity": identity}
    return Finished(manifest=facts, parts=parts)


def mark_complete(folder: OutputFolder, writer: Writer, done: Finished) -> None:
    """Write the final manifest and `_SUCCESS`, the last files: a complete run is not touched again.

    Raises:
        StorageError: A file cannot be written.
    """
    write_manifest(folder, writer, done.manifest, manifest_text(done.manifest, done.parts))
    writer.write_text(folder.path / SUCCESS, "")


def _whole_part(plan: PartPlan, file: PartFile, known: Mapping[int, Part]) -> Part:
    """Return the part in a file.

    Raises:
        StorageError: The file is gone.
        IncompleteError: It is damaged, or lacks rows.
        OutputConflictError: It is of another job, or changed by another run.
    """
    if file.state == "missing":
        raise StorageError(f"{file.path}: is gone since it was written; run the same command again")
    plan.check_part(file)
    if file.state != "sound" or file.part is None or not plan.is_whole(file.part):
        raise IncompleteError(
            f"{file.path}: is not whole ({file.problem or 'it lacks rows'}); run the job again "
            "without --shard, which generates the part"
        )
    if file.part != known.get(file.part.number, file.part):
        raise OutputConflictError(
            f"{file.path}: another run has changed it (it holds other rows); run the same command "
            "again"
        )
    return file.part
