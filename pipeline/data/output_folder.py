"""The output folder as a whole: what is in it, whose it is, and when a run is complete.

    part-00000.parquet ...  the table
    _manifest.json          facts of the run and its parts
    _SUCCESS                written last: the run is complete
    .gptbatch/              all else: config.yaml, digests.json, progress.json, errors.jsonl, attempts.json, lock, temporary files

The parts are the record of what is done; the manifest is for readers, and is made again from the parts where it is lost.
Knows: file names and the manifest. Does not know: what the rows mean. Deletes nothing that is not ours by name and footer.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.data.attempts import ATTEMPTS
from pipeline.data.digests import DigestMemory
from pipeline.data.durable import Writer
from pipeline.data.parts import PART_NAME, FoundPart, Part, inspect_part, part_number, read_footer
from pipeline.errors import OutputConflictError, OutputCreationError

FORMAT = "gptbatch-1"
MANIFEST = "_manifest.json"
SUCCESS = "_SUCCESS"
WORK = ".gptbatch"
CONFIG = "config.yaml"
DIGESTS = "digests.json"
_NOT_FACTS = {"format", "identity", "complete", "parts", "rows", "errors", *(field.name for field in fields(Part))}


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderState:
    """The run that an output folder holds.

    manifest: what the folder says of it, its `identity` among that; where it is lost, what the footers of its parts say. parts:
    paths of all files under parts' names, by number. marked_complete: whether `_SUCCESS` is there, and the manifest that goes with it.
    """

    manifest: dict[str, Any]
    parts: dict[int, Path]
    marked_complete: bool

    @property
    def identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = self.manifest["identity"]
        return identity


class OutputFolder:
    """One output folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / WORK

    def refuse_links(self) -> None:
        """Raises OutputConflictError when what is to be written is, or has in its place, a symbolic link. Reading through one is fine."""
        for entry in (self.path, self.work, self.path / MANIFEST, self.path / SUCCESS):
            if entry.is_symlink():
                raise OutputConflictError(f"{entry}: is a symbolic link; name the real folder, so that nothing else is written over")

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
        parts = dict(sorted((part_number(entry.name), entry) for entry in self.path.iterdir() if PART_NAME.fullmatch(entry.name)))
        try:
            manifest = self._read_manifest()
        except _DamagedManifest:
            if (manifest := self._manifest_from(parts)) is None:
                raise
            return FolderState(manifest=manifest, parts=parts, marked_complete=False)
        complete = manifest is not None and manifest.get("complete") is True and (self.path / SUCCESS).is_file()
        if manifest is None:
            manifest = self._manifest_from(parts)
        if manifest is None:
            if all(entry.name == WORK for entry in self.path.iterdir()):
                return None
            raise OutputConflictError(f"{self.path}: holds something that gptbatch did not write; name another output")
        return FolderState(manifest=manifest, parts=parts, marked_complete=complete)

    def inspect_parts(self, state: FolderState, memory: DigestMemory) -> dict[int, FoundPart]:
        """Look at every part, and read those whose size or times are not as remembered."""
        found = {}
        for number, path in state.parts.items():
            found[number] = inspect_part(path, content=not memory.same_part(path))
            if found[number].state == "sound" and not memory.same_part(path) and memory.other_part(path):
                found[number] = replace(found[number], state="damaged")
        return found

    def create(self) -> None:
        """Create the folder if it is missing, and find out whether it can be written."""
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.work):
                pass
        except OSError as error:
            raise OutputCreationError(f"{self.path}: cannot be created or written ({error.strerror or error})") from error

    def begin(self, config_yaml: str, manifest: dict[str, Any], parts: Iterable[Part]) -> None:
        """Say whose folder this is, before the first part is written. manifest: facts of the run, its identity among them."""
        self.writer.remove(self.path / SUCCESS)
        self.writer.write_text(self.work / CONFIG, config_yaml)
        self.write_manifest(manifest, parts, complete=False)

    def complete(self, manifest: dict[str, Any], parts: Iterable[Part], memory: DigestMemory) -> None:
        """Write the last manifest, then `_SUCCESS`; and remember the files, so that the next look at them is short."""
        parts = list(parts)
        self.write_manifest(manifest, parts, complete=True)
        self.writer.write_text(self.path / SUCCESS, "")
        self.writer.remove(self.work / ATTEMPTS)
        memory.settle_parts(self.path / part.name for part in parts)
        self.remember(memory)

    def remember(self, memory: DigestMemory) -> None:
        self.writer.write_text(self.work / DIGESTS, memory.to_json(), durable=False)

    def memory(self) -> DigestMemory:
        return DigestMemory.load(self.work / DIGESTS)

    def write_manifest(self, manifest: dict[str, Any], parts: Iterable[Part], *, complete: bool) -> None:
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
            "parts": [asdict(part) for part in ordered],
        }
        self.writer.write_text(self.path / MANIFEST, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def clear(self, state: FolderState) -> None:
        """Delete the run in this folder: its success mark, its parts, what it noted of its deaths.

        Other files stay, and so does its manifest, until that of the run which replaces it: the folder is ours all the time.
        """
        self.writer.remove(self.path / SUCCESS)
        self.writer.remove(self.work / ATTEMPTS)
        for path in state.parts.values():
            if read_footer(path) is not None:
                self.writer.remove(path)

    def _read_manifest(self) -> dict[str, Any] | None:
        """None when there is none. Raises OutputConflictError for one that is not ours."""
        try:
            content = json.loads((self.path / MANIFEST).read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise _DamagedManifest(
                f"{self.path / MANIFEST}: damaged, or not ours ({error}); name another output, or delete the folder if it is an old run"
            ) from error
        if _is_manifest(content):
            manifest: dict[str, Any] = content
            return manifest
        raise OutputConflictError(f"{self.path}: holds something that gptbatch did not write; name another output")

    def _manifest_from(self, parts: dict[int, Path]) -> dict[str, Any] | None:
        """What the footers say of their run: that of the part written for the longest input, as later ones may be of a larger limit."""
        footers = [footer for path in parts.values() if (footer := read_footer(path)) is not None and _is_manifest(footer)]
        return max(footers, key=lambda footer: int(footer["identity"].get("rows", 0)), default=None)


class _DamagedManifest(OutputConflictError):  # noqa: N818
    """A manifest that is no JSON. With parts of ours beside it, it is a lost one."""


def facts_of(content: dict[str, Any]) -> dict[str, Any]:
    """What a manifest or a footer says of the run: all that is neither of the one file nor of its rows."""
    return {key: value for key, value in content.items() if key not in _NOT_FACTS}


def _is_manifest(content: Any) -> bool:
    return isinstance(content, dict) and content.get("format") == FORMAT and isinstance(content.get("identity"), dict)
