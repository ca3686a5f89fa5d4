"""The output folder: its files, the run that it holds, and what its parts hold.

    part-000000.parquet ...  the table
    _manifest.json           facts of the job, and its parts once they are all written
    _SUCCESS                 written last: the output is complete
    .gptbatch/
        config.yaml          the resolved config
        digests.json         hashes of files (file_hashes.py)
        input_index.parquet  digest and place of each part of the input (index_file.py)
        input_index.I-of-N.parquet  a shard's piece, of `gptbatch plan --index` (index_piece.py)
        errors.jsonl         the error rows (error_rows.py)
        lock                 held by a run, or by the runs of several shards (lock.py)
        runs/RUN/            the files of one run (run_folder.py)

The parts are the record of what is done. The manifest claims the folder for a job before the first
part is written (claim.py), and is rebuilt from the parts where it is lost. A folder without parts
holds no job. Only files whose name and footer are those of gptbatch are deleted.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import tempfile
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptbatch.pipeline.errors import OutputConflictError, OutputCreationError
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.index_file import INDEX
from gptbatch.pipeline.output.lock import LOCK
from gptbatch.pipeline.output.manifest import (
    MANIFEST,
    DamagedManifestError,
    read_manifest,
    rebuild_manifest,
)
from gptbatch.pipeline.output.part_file import PartFile, inspect_part, part_name, part_number
from gptbatch.pipeline.output.run_folder import RUNS, read_records
from gptbatch.pipeline.output.runs import list_runs
from gptbatch.pipeline.output.stray_tables import find_stray_tables
from gptbatch.pipeline.storage.atomic_write import Writer
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.system.threads import map_in_threads

SUCCESS = "_SUCCESS"
WORK = ".gptbatch"
CONFIG = "config.yaml"
DIGESTS = "digests.json"
ERRORS = "errors.jsonl"

# Missing parts that are looked up by name.
MAX_LOOKUPS = 100

logger = logging.getLogger("gptbatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderState:
    """The run that an output folder holds.

    Attributes:
        manifest: The manifest, or the footer that replaces a lost one. Holds the `identity` of the
            job.
        parts: Path of every file with a part's name, by part number.
        success: Whether `_SUCCESS` exists.
        marked_complete: Whether `_SUCCESS` exists and the manifest says complete.
        manifest_lost: Whether the manifest is missing or damaged.
        stray_tables: Tables that are not parts of the run (see stray_tables.py).
    """

    manifest: dict[str, Any]
    parts: dict[int, Location]
    success: bool
    marked_complete: bool
    manifest_lost: bool
    stray_tables: list[str]

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the job (see `job_identity`), with its input."""
        identity: dict[str, Any] = self.manifest["identity"]
        return identity

    @property
    def holds_job(self) -> bool:
        """Whether any row is done.

        A run that failed before its first part leaves a folder for any job.
        """
        return bool(self.parts) or self.success


class OutputFolder:
    """One output folder.

    Args:
        path: The folder, on a file system or in an object store. It need not exist.
    """

    def __init__(self, path: Location) -> None:
        self.path = path
        self.work = path / WORK

    # -- inspection --------------------------------------------------------------------------------

    def refuse_links(self) -> None:
        """Check the names that a run writes. Readers follow links, but a run does not.

        Raises:
            OutputConflictError: A name is a link, FIFO, socket or device.
            OutputCreationError: The folder's name is too long for the file system.
        """
        if not isinstance(self.path, Path) or not isinstance(self.work, Path):
            return
        files = [self.path / MANIFEST, self.path / SUCCESS]
        files += [self.work / name for name in (CONFIG, DIGESTS, ERRORS, INDEX, LOCK)]
        folders = [self.path, self.work, self.work / RUNS]
        for entry in (*folders, *files):
            try:
                mode = entry.lstat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                name = str(self.path)
                raise OutputCreationError(
                    f"{name[:200]}... ({len(name)} characters): cannot be created: the name is too "
                    "long"
                ) from error
            if stat.S_ISLNK(mode):
                raise OutputConflictError(
                    f"{entry}: is a symbolic link; name the real folder, so that nothing else is "
                    "written over"
                )
            if entry in files and not stat.S_ISREG(mode):
                raise OutputConflictError(
                    f"{entry}: is not a regular file; move it away, or name another output"
                )
            if entry in folders[1:] and not stat.S_ISDIR(mode):
                raise OutputConflictError(
                    f"{entry}: is not a folder; move it away, or name another output"
                )

    def state(self) -> FolderState | None:
        """Return the run in the folder; None when the folder is missing, or holds nothing of a run.

        Raises:
            OutputConflictError: The folder holds other files.
        """
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise OutputConflictError(
                f"{self.path}: exists and is not a folder; name another output"
            )
        parts = self.list_parts()
        damaged: DamagedManifestError | None = None
        manifest = None
        try:
            manifest = read_manifest(self.path / MANIFEST)
        except DamagedManifestError as error:
            damaged = error
        manifest_lost = manifest is None
        if manifest is None:
            manifest = rebuild_manifest(parts.values())
        if manifest is None:
            if damaged is not None:
                raise damaged
            if all(entry.name == WORK for entry in self.path.iterdir()):
                return None
            raise OutputConflictError(
                f"{self.path}: holds something that gptbatch did not write; name another output"
            )
        success = (self.path / SUCCESS).is_file()
        return FolderState(
            manifest=manifest,
            parts=parts,
            success=success,
            marked_complete=not manifest_lost and manifest.get("complete") is True and success,
            manifest_lost=manifest_lost,
            stray_tables=find_stray_tables(self.path),
        )

    def inspect_parts(
        self, state: FolderState, hashes: FileHashes, numbers: Container[int]
    ) -> dict[int, PartFile]:
        """Inspect parts; read those whose size or times differ from the recorded ones.

        Args:
            state: The run in the folder.
            hashes: The recorded hashes.
            numbers: The parts to inspect, as far as they exist.

        Returns:
            The files by part number, without those that are gone by now.
        """

        def inspect(path: Location) -> PartFile:
            content = not hashes.is_unchanged(path)
            return inspect_part(path, content=content, sha256=hashes.recorded_sha256(path))

        paths = {number: path for number, path in state.parts.items() if number in numbers}
        files = dict(zip(paths, map_in_threads(inspect, paths.values()), strict=True))
        for file in files.values():
            if file.state == "damaged":
                logger.info(
                    "%s: damaged (%s); its rows are generated again", file.path, file.problem
                )
        return {number: file for number, file in files.items() if file.state != "missing"}

    # -- creation ----------------------------------------------------------------------------------

    def create(self) -> None:
        """Create the folder if it is missing, and check that it is writable.

        An object store has no folders. The first object of the run shows whether it is writable.

        Raises:
            OutputCreationError: It cannot be created or written.
        """
        if not isinstance(self.path, Path) or not isinstance(self.work, Path):
            return
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            for folder in (self.work, self.path):
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except OSError as error:
            raise OutputCreationError(
                f"{self.path}: cannot be created or written ({error.strerror or error})"
            ) from error

    def check_creatable(self) -> None:
        """Check that `create` can succeed, unless `_SUCCESS` exists. Leaves nothing behind.

        A complete output need not be writable.

        Raises:
            OutputCreationError: `create` is sure to fail.
        """
        # False where the name is too long, as opposed to Path.exists
        if not isinstance(self.path, Path) or not os.path.exists(self.path / SUCCESS):
            self.check_writable()

    def check_writable(self) -> None:
        """Check that `create` can succeed. Leaves nothing behind.

        A file without a name is created in the folder and in `.gptbatch`, or in the nearest folder
        that exists: permissions do not tell of read-only file systems and of `/proc`.

        Raises:
            OutputCreationError: `create` is sure to fail.
        """
        if not isinstance(self.path, Path) or not isinstance(self.work, Path):
            return
        existing = [folder for folder in (self.work, self.path) if os.path.lexists(folder)]
        # `state` names files, and `refuse_links` links
        if not all(folder.is_dir() for folder in existing):
            return
        parents = (folder for folder in self.path.absolute().parents if os.path.lexists(folder))
        for folder in existing or [next(parents)]:
            try:
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                problem = f"cannot be created: {folder} is not a writable folder"
                if existing:
                    problem = "cannot be written"
                raise OutputCreationError(
                    f"{self.path}: {problem} ({error.strerror or error})"
                ) from error

    def list_parts(self) -> dict[int, Location]:
        """Return every entry with a part's name, by number, in order."""
        parts: dict[int, Location] = {}
        for entry in self.path.iterdir():
            number = part_number(entry.name)
            # The name of an earlier format counts where there is none of this one.
            if number is not None and (number not in parts or entry.name == part_name(number)):
                parts[number] = entry
        return dict(sorted(parts.items()))

    def missing_parts(self, n_parts: int) -> list[int]:
        """Return the numbers below `n_parts` whose parts are not there."""
        present = self.list_parts()
        missing = [number for number in range(n_parts) if number not in present]
        # Listings of object stores are up to date.
        if len(missing) > MAX_LOOKUPS or not isinstance(self.path, Path):
            return missing
        # A listing of NFS may be older than the last parts.
        return [number for number in missing if not (self.path / part_name(number)).exists()]

    def read_hashes(self) -> FileHashes:
        """Read the hashes in `digests.json` and in the records of runs; skip damaged ones."""
        hashes = FileHashes.load(self.work / DIGESTS)
        hashes.add_records(read_records(list_runs(self.work)))
        return hashes

    def write_hashes(self, writer: Writer, hashes: FileHashes) -> None:
        """Write `digests.json`."""
        writer.write_text(self.work / DIGESTS, hashes.to_json(), durable=False)
