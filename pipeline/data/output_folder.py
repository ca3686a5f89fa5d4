"""The output folder as a whole: what is in it, whose it is, and when a run is complete.

    part-00000.parquet ...  the table
    _manifest.json          facts of the run and its parts
    _SUCCESS                written last: the run is complete
    .gptbatch/              all else: the resolved config, temporary files

Knows: file names and the manifest. Does not know: what the rows mean. Deletes nothing that is not ours by name and footer.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.data.parts import PART_NAME, Part, read_footer
from pipeline.errors import OutputConflictError, OutputCreationError, StorageError

FORMAT = "gptbatch-1"
MANIFEST = "_manifest.json"
SUCCESS = "_SUCCESS"
WORK = ".gptbatch"


class OutputFolder:
    """One output folder. `identity` in its methods is what makes two runs the same job: fingerprint, input, part size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / WORK

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of the run in this folder; None when there is no folder, or an empty one.

        Raises OutputConflictError when the folder holds something else.
        """
        if not self.path.exists() and not self.path.is_symlink():
            return None
        if not self.path.is_dir():
            raise OutputConflictError(f"{self.path}: exists and is no folder; name another output")
        try:
            content = json.loads((self.path / MANIFEST).read_bytes())
            if isinstance(content, dict) and content.get("format") == FORMAT and isinstance(content.get("identity"), dict):
                return content
        except FileNotFoundError:
            if all(entry.name == WORK for entry in self.path.iterdir()):
                return None
        except ValueError as error:
            raise OutputConflictError(
                f"{self.path / MANIFEST}: damaged, or not ours ({error}); name another output, or delete the folder if it is an old run"
            ) from error
        raise OutputConflictError(f"{self.path}: holds something that gptbatch did not write; name another output")

    def is_complete(self, manifest: dict[str, Any]) -> bool:
        """Whether the run has ended and all of its parts are still there, by their footers."""
        if not (self.path / SUCCESS).is_file():
            return False
        footers = [(part, read_footer(self.path / part["name"])) for part in manifest["parts"]]
        return all(footer is not None and footer.get("content_digest") == part["content_digest"] for part, footer in footers)

    def check_identity(self, manifest: dict[str, Any], identity: dict[str, Any]) -> None:
        """Raises OutputConflictError, naming what differs, unless the folder's run is the same job."""
        differing = [key for key, value in identity.items() if manifest["identity"].get(key) != value]
        if differing:
            raise OutputConflictError(
                f"{self.path}: holds a run of another job ({', '.join(differing)} differ); name another output, or use --overwrite"
            )

    def create(self) -> None:
        """Create the folder if it is missing, and find out whether it can be written."""
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.work):
                pass
        except OSError as error:
            raise OutputCreationError(f"{self.path}: cannot be created or written ({error.strerror or error})") from error

    def begin(self, config_yaml: str, identity: dict[str, Any]) -> None:
        """Say in a first manifest whose folder this is."""
        (self.path / SUCCESS).unlink(missing_ok=True)
        self._write(self.work / "config.yaml", config_yaml)
        self.write_manifest({"identity": identity, "complete": False, "parts": []})

    def complete(self, manifest: dict[str, Any], parts: list[Part]) -> None:
        """Write the last manifest, then `_SUCCESS`."""
        self.write_manifest({**manifest, "complete": True, "parts": [asdict(part) for part in sorted(parts, key=lambda p: p.first_row)]})
        self._write(self.path / SUCCESS, "")

    def write_manifest(self, content: dict[str, Any]) -> None:
        self._write(self.path / MANIFEST, json.dumps({"format": FORMAT, **content}, indent=2, ensure_ascii=False) + "\n")

    def clear(self) -> None:
        """Delete the run in this folder: its parts, manifest and success mark. Other files stay."""
        (self.path / SUCCESS).unlink(missing_ok=True)
        for path in self.path.iterdir():
            if PART_NAME.fullmatch(path.name) and read_footer(path) is not None:
                path.unlink()
        (self.path / MANIFEST).unlink(missing_ok=True)

    def _write(self, path: Path, text: str) -> None:
        temporary = self.work / f"{path.name}.{os.getpid()}.tmp"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StorageError(f"{path}: cannot be written ({error.strerror or error})") from error
