"""The output folder: what is in it, whose it is, and when a run is complete.

    part-00000.parquet ...  the table
    _manifest.json          facts of the run and its parts
    _SUCCESS                written last: the run is complete
    .gptbatch/              all else: config.yaml, digests.json, progress.json, errors.jsonl, crash_journal.json, lock, temporary files

The parts are the record of what is done. The manifest claims the folder for a job before its first part, and is made again from the
parts where it is lost. A folder without a part holds no job. Only files that are ours by name and footer are deleted.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gptbatch.pipeline.errors import OutputConflictError, OutputCreationError, StorageError
from gptbatch.pipeline.output.atomic_write import Writer
from gptbatch.pipeline.output.crash_journal import CRASH_JOURNAL
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.json_models import Manifest, Part, validated
from gptbatch.pipeline.output.lock import HOLDER, LOCK
from gptbatch.pipeline.output.old_formats import translate_facts
from gptbatch.pipeline.output.parts import (
    FORMAT,
    PartFile,
    PartPlan,
    differing_keys,
    inspect_part,
    part_number,
)
from gptbatch.pipeline.output.progress_file import PROGRESS
from gptbatch.pipeline.output.stray_tables import describe_stray_tables, stray_tables
from gptbatch.pipeline.system.regular_file import read_json

MANIFEST = "_manifest.json"
SUCCESS = "_SUCCESS"
WORK = ".gptbatch"
CONFIG = "config.yaml"
DIGESTS = "digests.json"
ERRORS = "errors.jsonl"
FORMAT_PREFIX = "gptbatch-"
MAX_CLAIM_TRIES = 3
_NOT_FACTS = {"format", "identity", "complete", "parts", "rows", "errors", *Part.model_fields}

logger = logging.getLogger("gptbatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderState:
    """The run that an output folder holds.

    manifest: what the folder says of it, its `identity` among that; where it is lost, what the footers of its parts say. parts:
    paths of all files under parts' names, by number. success: whether `_SUCCESS` is there. marked_complete: whether the manifest that
    goes with it is, too. manifest_lost: whether it is missing or damaged. stray_tables: tables that are not its parts (stray_tables.py).
    """

    manifest: dict[str, Any]
    parts: dict[int, Path]
    success: bool
    marked_complete: bool
    manifest_lost: bool
    stray_tables: list[str]

    @property
    def identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = self.manifest["identity"]
        return identity

    @property
    def holds_job(self) -> bool:
        """Whether anything is done: a run that failed before its first part leaves a folder for any job."""
        return bool(self.parts) or self.success


class OutputFolder:
    """One output folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / WORK

    def refuse_links(self) -> None:
        """Raises OutputConflictError when a name that is to be written is a link, FIFO, socket or device. Readers follow links."""
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
                    f"{name[:200]}... ({len(name)} characters): cannot be created: the name is too long"
                ) from error
            if stat.S_ISLNK(mode):
                raise OutputConflictError(
                    f"{entry}: is a symbolic link; name the real folder, so that nothing else is written over"
                )
            if entry in files and not stat.S_ISREG(mode):
                raise OutputConflictError(
                    f"{entry}: is not a regular file; move it away, or name another output"
                )
            if entry == self.work and not stat.S_ISDIR(mode):
                raise OutputConflictError(
                    f"{entry}: is not a folder; move it away, or name another output"
                )

    @cached_property
    def writer(self) -> Writer:
        return Writer(self.work)

    def state(self) -> FolderState | None:
        """What is in the folder; None when there is no folder, or nothing of a run in it.

        Raises OutputConflictError when the folder holds something else.
        """
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise OutputConflictError(f"{self.path}: exists and is no folder; name another output")
        parts = self._list_parts()
        success = (self.path / SUCCESS).is_file()
        try:
            manifest = self._read_manifest()
        except DamagedManifestError:
            if (manifest := self._manifest_from(parts)) is None:
                raise
            return FolderState(
                manifest=manifest,
                parts=parts,
                success=success,
                marked_complete=False,
                manifest_lost=True,
                stray_tables=stray_tables(self.path),
            )
        complete = manifest is not None and manifest.get("complete") is True and success
        if lost := manifest is None:
            manifest = self._manifest_from(parts)
        if manifest is None:
            if all(entry.name == WORK for entry in self.path.iterdir()):
                return None
            raise OutputConflictError(
                f"{self.path}: holds something that gptbatch did not write; name another output"
            )
        return FolderState(
            manifest=manifest,
            parts=parts,
            success=success,
            marked_complete=complete,
            manifest_lost=lost,
            stray_tables=stray_tables(self.path),
        )

    def inspect_parts(self, state: FolderState, memory: FileHashes) -> dict[int, PartFile]:
        """Look at every part, and read those whose size or times are not as remembered."""
        found = {}
        for number, path in state.parts.items():
            known = memory.is_unchanged(path)
            part = inspect_part(path, content=not known)
            if part.state == "sound" and not known and memory.is_altered(path):
                part = replace(
                    part,
                    state="damaged",
                    problem="its bytes are not those that were written (SHA-256 differs)",
                )
            if part.state == "damaged":
                logger.info("%s: damaged (%s): it is done again", path, part.problem)
            if part.state != "missing":
                found[number] = part
        return found

    def create(self) -> None:
        """Create the folder if it is missing, and find out whether it can be written."""
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.work):
                pass
        except OSError as error:
            raise OutputCreationError(
                f"{self.path}: cannot be created or written ({error.strerror or error})"
            ) from error

    def check_creatable(self) -> None:
        """Raises OutputCreationError when `create` is sure to fail. Writes nothing."""
        nearest = next(
            folder
            for folder in (self.path, *self.path.absolute().parents)
            if os.path.lexists(folder)
        )
        if nearest != self.path and not (
            nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
        ):
            raise OutputCreationError(
                f"{self.path}: cannot be created: {nearest} is no folder that can be written"
            )

    def begin(
        self,
        config_yaml: str,
        manifest: dict[str, Any],
        parts: Iterable[Part],
        *,
        replaces: dict[str, Any] | None = None,
    ) -> None:
        """Claim the folder for a job, before the first part is written.

        Args:
            config_yaml: The resolved config.
            manifest: Facts of the run, its identity among them.
            parts: Those that are there already.
            replaces: The identity of the run that this one is to replace, None for none.

        Raises:
            OutputConflictError: Another job has claimed the folder since it was looked at.
        """
        self._claim(_manifest_text(manifest, parts, complete=False), manifest["identity"], replaces)
        self.writer.remove(self.path / SUCCESS)
        self.writer.write_text(self.work / CONFIG, config_yaml)

    def complete(
        self, manifest: dict[str, Any], parts: dict[int, Part], memory: FileHashes, plan: PartPlan
    ) -> None:
        """Write the last manifest, then `_SUCCESS`, unless the folder holds anything but these parts.

        The files are remembered, so that the next look at them is short. Raises OutputConflictError, StorageError.
        """
        self._check_parts(parts, memory, plan)
        self.write_manifest(manifest, parts.values(), complete=True)
        self.writer.write_text(self.path / SUCCESS, "")
        self.writer.remove(self.work / CRASH_JOURNAL)
        memory.confirm_parts(self.path / part.name for part in parts.values())
        self.remember(memory)

    def remember(self, memory: FileHashes) -> None:
        self.writer.write_text(self.work / DIGESTS, memory.to_json(), durable=False)

    def memory(self) -> FileHashes:
        return FileHashes.load(self.work / DIGESTS)

    def write_manifest(
        self, manifest: dict[str, Any], parts: Iterable[Part], *, complete: bool
    ) -> None:
        """Replace the manifest. Raises OutputConflictError when another job has claimed the folder since `begin`."""
        self._claim(_manifest_text(manifest, parts, complete=complete), manifest["identity"], None)

    def clear(self, state: FolderState, *, keep_journal: bool = False) -> None:
        """Delete the run in this folder: its success mark, its parts, its crash journal.

        Other files stay, and so does its manifest, until that of the run which replaces it: the folder is ours all the time.
        """
        self.writer.remove(self.path / SUCCESS)
        if not keep_journal:
            self.writer.remove(self.work / CRASH_JOURNAL)
        for path in state.parts.values():
            if inspect_part(path, content=False).footer is not None:
                self.writer.remove(path)

    def _list_parts(self) -> dict[int, Path]:
        """Everything under a part's name, by number."""
        numbers = ((part_number(entry.name), entry) for entry in self.path.iterdir())
        return dict(sorted((number, entry) for number, entry in numbers if number is not None))

    def _claim(self, text: str, identity: dict[str, Any], replaces: dict[str, Any] | None) -> None:
        """Write the manifest, unless another job's is there."""
        target = self.path / MANIFEST
        for _ in range(MAX_CLAIM_TRIES):
            try:
                current = self._read_manifest()
            except DamagedManifestError:
                current = {"identity": identity}  # it was so when the run looked, and is made again
            if current is not None:
                keys = differing_keys(identity, current["identity"])
                if keys and current["identity"] != replaces:
                    raise OutputConflictError(
                        f"{self.path}: another job has begun there since ({', '.join(keys)} differ); its files stay as they are; "
                        "name another output"
                    )
            if self.writer.write_text(target, text, only_if_absent=current is None):
                return
        raise StorageError(
            f"{target}: appears and disappears; is another program working in this folder?"
        )

    def _check_parts(self, parts: dict[int, Part], memory: FileHashes, plan: PartPlan) -> None:
        """Raises unless the folder holds these parts of this job, and no other table."""
        refuse_stray_tables(self.path, stray_tables(self.path))
        for number, path in (
            self._list_parts() | {number: self.path / part.name for number, part in parts.items()}
        ).items():
            if number in parts and memory.is_unchanged(path):
                continue
            found = inspect_part(path, content=False)
            if found.state == "missing":
                raise StorageError(
                    f"{path}: is gone since it was written; run the same command again"
                )
            plan.check_ours(found)
            if found.part is None or found.part != parts.get(number):
                raise OutputConflictError(
                    f"{path}: another run has changed it ({found.problem or 'it holds other rows'}); run the same command again"
                )

    def _read_manifest(self) -> dict[str, Any] | None:
        """None when there is none. Raises OutputConflictError for one that is not ours, StorageError when it cannot be read."""
        path = self.path / MANIFEST
        try:
            content = translate_facts(read_json(path))
            if isinstance(content, dict) and str(content.get("format")).startswith(FORMAT_PREFIX):
                validated(Manifest, content)
                return content
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            raise DamagedManifestError(path, str(error)) from error
        raise OutputConflictError(
            f"{self.path}: holds something that gptbatch did not write; name another output"
        )

    def _manifest_from(self, parts: dict[int, Path]) -> dict[str, Any] | None:
        """What the footers say of their run: of the job with most parts, and of it the one for the longest input."""
        found = (inspect_part(path, content=False, follow_links=True) for path in parts.values())
        jobs = group_by_job([part.footer for part in found if part.footer is not None])
        largest = max(jobs, key=len, default=[])
        return max(largest, key=lambda footer: footer["identity"].get("rows") or 0, default=None)


def group_by_job(footers: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The footers of each job, in the order that they came."""
    jobs: list[list[dict[str, Any]]] = []
    for footer in footers:
        for job in jobs:
            if job[0]["format"] == footer["format"] and not differing_keys(
                job[0]["identity"], footer["identity"]
            ):
                job.append(footer)
                break
        else:
            jobs.append([footer])
    return jobs


def refuse_stray_tables(path: Path, names: list[str]) -> None:
    """Raises OutputConflictError for tables that readers of the folder would add to the run's."""
    if names:
        raise OutputConflictError(f"{path}: {describe_stray_tables(names)}, or name another output")


def run_facts(content: dict[str, Any]) -> dict[str, Any]:
    """What a manifest or a footer says of the run: all that is neither of the one file nor of its rows."""
    return {key: value for key, value in content.items() if key not in _NOT_FACTS}


class DamagedManifestError(OutputConflictError):
    """A manifest that cannot be read. With parts of ours beside it, it is a lost one. why: without advice for a run."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(
            f"{path}: damaged, or not ours ({why}); name another output, or delete the folder if it is an old run"
        )
        self.why = why


def _manifest_text(manifest: dict[str, Any], parts: Iterable[Part], *, complete: bool) -> str:
    ordered = sorted(parts, key=lambda part: part.first_row)
    kinds: Counter[str] = Counter()
    for part in ordered:
        kinds.update(part.error_kinds)
    content = {
        "format": FORMAT,
        **manifest,
        "complete": complete,
        "rows": sum(part.rows for part in ordered),
        "errors": kinds.total(),
        "error_kinds": dict(sorted(kinds.items())),
        "parts": [part.model_dump() for part in ordered],
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
