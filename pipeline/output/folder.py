"""The output folder: its files, the run that it holds, and when the run is complete.

    part-00000.parquet ...  the table
    _manifest.json          facts of the run, and its parts
    _SUCCESS                written last: the run is complete
    .gptbatch/
        config.yaml         the resolved config
        digests.json        hashes of files (file_hashes.py)
        progress.json       state and speed of the run (progress_file.py)
        errors.jsonl        the error rows (error_rows.py)
        crash_journal.json  the parts in flight (crash_journal.py)
        lock, holder.json   the lock, and the process that holds it (lock.py)
        *.tmp               temporary files (atomic_write.py)

The parts are the record of what is done. The manifest claims the folder for a job before the first
part is written, and is rebuilt from the parts where it is lost. A folder without parts holds no
job. Only files whose name and footer are those of gptbatch are deleted.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gptbatch.pipeline.errors import OutputConflictError, OutputCreationError, StorageError
from gptbatch.pipeline.output.atomic_write import Writer
from gptbatch.pipeline.output.crash_journal import CRASH_JOURNAL
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.lock import HOLDER, LOCK
from gptbatch.pipeline.output.manifest import (
    MANIFEST,
    DamagedManifestError,
    manifest_text,
    read_manifest,
    rebuild_manifest,
)
from gptbatch.pipeline.output.part_file import PartFile, inspect_part, part_number
from gptbatch.pipeline.output.part_plan import PartPlan, differing_keys
from gptbatch.pipeline.output.progress_file import PROGRESS
from gptbatch.pipeline.output.stray_tables import find_stray_tables, refuse_stray_tables

SUCCESS = "_SUCCESS"
WORK = ".gptbatch"
CONFIG = "config.yaml"
DIGESTS = "digests.json"
ERRORS = "errors.jsonl"
# Tries to write the manifest while another program creates and deletes it.
MAX_CLAIM_TRIES = 3

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
    parts: dict[int, Path]
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
        path: The folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / WORK

    @cached_property
    def writer(self) -> Writer:
        """Writes files of this folder atomically."""
        return Writer(self.work)

    # -- inspection --------------------------------------------------------------------------------

    def refuse_links(self) -> None:
        """Check the names that a run writes. Readers follow links, but a run does not.

        Raises:
            OutputConflictError: A name is a link, FIFO, socket or device.
            OutputCreationError: The folder's name is too long for the file system.
        """
        files = [self.path / MANIFEST, self.path / SUCCESS]
        files += [
            self.work / name
            for name in (CONFIG, DIGESTS, PROGRESS, ERRORS, CRASH_JOURNAL, LOCK, HOLDER)
        ]
        for entry in (self.path, self.work, *files):
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
            if entry == self.work and not stat.S_ISDIR(mode):
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
        parts = self._list_parts()
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

    def inspect_parts(self, state: FolderState, hashes: FileHashes) -> dict[int, PartFile]:
        """Inspect every part; read those whose size or times differ from the recorded ones.

        Returns:
            The files by part number, without those that are gone by now.
        """
        files = {}
        for number, path in state.parts.items():
            unchanged = hashes.is_unchanged(path)
            file = inspect_part(path, content=not unchanged)
            if file.state == "sound" and not unchanged and hashes.is_altered(path):
                problem = "its bytes are not those that were written (SHA-256 differs)"
                file = replace(file, state="damaged", problem=problem)
            if file.state == "damaged":
                logger.info("%s: damaged (%s); its rows are generated again", path, file.problem)
            if file.state != "missing":
                files[number] = file
        return files

    # -- creation and completion -------------------------------------------------------------------

    def create(self) -> None:
        """Create the folder if it is missing, and check that it is writable.

        Raises:
            OutputCreationError: It cannot be created or written.
        """
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.work):
                pass
        except OSError as error:
            raise OutputCreationError(
                f"{self.path}: cannot be created or written ({error.strerror or error})"
            ) from error

    def check_creatable(self) -> None:
        """Check, without writing, that `create` can succeed.

        Raises:
            OutputCreationError: `create` is sure to fail.
        """
        nearest = next(
            folder
            for folder in (self.path, *self.path.absolute().parents)
            if os.path.lexists(folder)
        )
        if nearest != self.path and not (
            nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
        ):
            raise OutputCreationError(
                f"{self.path}: cannot be created: {nearest} is not a writable folder"
            )

    def claim(
        self,
        config_yaml: str,
        facts: dict[str, Any],
        parts: Iterable[Part],
        *,
        replaces: dict[str, Any] | None = None,
    ) -> None:
        """Claim the folder for a job, before the first part is written.

        Args:
            config_yaml: The resolved config.
            facts: Facts of the run, its identity among them.
            parts: The parts that are kept.
            replaces: The identity of the run that this one replaces; None when it replaces none.

        Raises:
            OutputConflictError: Another job has claimed the folder since it was inspected.
        """
        self._write_manifest(manifest_text(facts, parts, complete=False), facts, replaces)
        self.writer.remove(self.path / SUCCESS)
        self.writer.write_text(self.work / CONFIG, config_yaml)

    def write_manifest(
        self, facts: dict[str, Any], parts: Iterable[Part], *, complete: bool
    ) -> None:
        """Replace the manifest.

        Raises:
            OutputConflictError: Another job has claimed the folder since `claim`.
        """
        self._write_manifest(manifest_text(facts, parts, complete=complete), facts, None)

    def complete(
        self, facts: dict[str, Any], parts: dict[int, Part], hashes: FileHashes, plan: PartPlan
    ) -> None:
        """Write the final manifest, then `_SUCCESS`, and record the hashes of the parts.

        Raises:
            OutputConflictError: The folder holds other parts or tables than `parts`.
            StorageError: A file cannot be written, or a part is gone.
        """
        self._check_parts(parts, hashes, plan)
        self.write_manifest(facts, parts.values(), complete=True)
        self.writer.write_text(self.path / SUCCESS, "")
        self.writer.remove(self.work / CRASH_JOURNAL)
        hashes.confirm_parts(self.path / part.name for part in parts.values())
        self.write_hashes(hashes)

    def delete_run(self, state: FolderState, *, keep_journal: bool = False) -> None:
        """Delete the run in this folder: its `_SUCCESS`, its parts and its crash journal.

        Other files stay. The manifest stays until the next run replaces it, so that the folder is
        never unclaimed.

        Args:
            state: The run.
            keep_journal: Keep the crash journal.
        """
        self.writer.remove(self.path / SUCCESS)
        if not keep_journal:
            self.writer.remove(self.work / CRASH_JOURNAL)
        for path in state.parts.values():
            if inspect_part(path, content=False).footer is not None:
                self.writer.remove(path)

    def read_hashes(self) -> FileHashes:
        """Read `digests.json`; a missing or damaged file gives no hashes."""
        return FileHashes.load(self.work / DIGESTS)

    def write_hashes(self, hashes: FileHashes) -> None:
        """Write `digests.json`."""
        self.writer.write_text(self.work / DIGESTS, hashes.to_json(), durable=False)

    def _list_parts(self) -> dict[int, Path]:
        """Return every entry with a part's name, by number."""
        numbers = ((part_number(entry.name), entry) for entry in self.path.iterdir())
        return dict(sorted((number, entry) for number, entry in numbers if number is not None))

    def _write_manifest(
        self, text: str, facts: dict[str, Any], replaces: dict[str, Any] | None
    ) -> None:
        """Write the manifest, unless that of another job is in place."""
        target = self.path / MANIFEST
        identity = facts["identity"]
        for _ in range(MAX_CLAIM_TRIES):
            try:
                current = read_manifest(target)
            except DamagedManifestError:
                # It was damaged when the folder was inspected, and is rebuilt now.
                current = {"identity": identity}
            if current is not None:
                keys = differing_keys(identity, current["identity"])
                if keys and current["identity"] != replaces:
                    raise OutputConflictError(
                        f"{self.path}: another job has begun there since ({', '.join(keys)} "
                        "differ); its files stay as they are; name another output"
                    )
            if self.writer.write_text(target, text, only_if_absent=current is None):
                return
        raise StorageError(
            f"{target}: appears and disappears; is another program working in this folder?"
        )

    def _check_parts(self, parts: dict[int, Part], hashes: FileHashes, plan: PartPlan) -> None:
        """Check that the folder holds exactly these parts of this job, and no other table."""
        refuse_stray_tables(self.path, find_stray_tables(self.path))
        expected = {number: self.path / part.name for number, part in parts.items()}
        for number, path in (self._list_parts() | expected).items():
            if number in parts and hashes.is_unchanged(path):
                continue
            file = inspect_part(path, content=False)
            if file.state == "missing":
                raise StorageError(
                    f"{path}: is gone since it was written; run the same command again"
                )
            plan.check_part(file)
            if file.part is None or file.part != parts.get(number):
                raise OutputConflictError(
                    f"{path}: another run has changed it "
                    f"({file.problem or 'it holds other rows'}); run the same command again"
                )
