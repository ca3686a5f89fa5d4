"""`_manifest.json`: the facts of a run, and the list of its parts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from gptbatch.pipeline.errors import OutputConflictError, StorageError
from gptbatch.pipeline.output.json_models import Manifest, Part, validated
from gptbatch.pipeline.output.old_formats import translate_facts
from gptbatch.pipeline.output.part_file import read_footer
from gptbatch.pipeline.output.part_plan import group_by_job
from gptbatch.pipeline.output.schema import FORMAT
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.storage.regular_file import read_json

MANIFEST = "_manifest.json"
FORMAT_PREFIX = "gptbatch-"
_FILE_KEYS = {"format", "identity", "complete", "parts", "rows", "errors", *Part.model_fields}


class DamagedManifestError(OutputConflictError):
    """A manifest that cannot be parsed. Where parts of a run stand beside it, it can be rebuilt.

    Attributes:
        why: The problem, without advice.
    """

    def __init__(self, path: Location, why: str) -> None:
        super().__init__(
            f"{path}: damaged, or not written by gptbatch ({why}); name another output, or delete "
            "the folder if it is an old run"
        )
        self.why = why


def read_manifest(path: Location) -> dict[str, Any] | None:
    """Read a manifest, with names of earlier formats translated; None where there is no file.

    Raises:
        DamagedManifestError: The file is not valid.
        OutputConflictError: Another program wrote it.
        StorageError: It cannot be read.
    """
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
        f"{path.parent}: holds something that gptbatch did not write; name another output"
    )


def rebuild_manifest(parts: Iterable[Location]) -> dict[str, Any] | None:
    """Rebuild a lost manifest from the footers of the parts.

    Returns:
        The footer of the job with the most parts, and of this job the one with the longest input.
        None without footers.
    """
    footers = [footer for path in parts if (footer := read_footer(path)) is not None]
    largest_job = max(group_by_job(footers), key=len, default=[])
    return max(largest_job, key=lambda footer: footer["identity"].get("rows") or 0, default=None)


def manifest_text(facts: dict[str, Any], parts: Iterable[Part] | None = None) -> str:
    """Return the content of a manifest.

    Args:
        facts: The facts of the run, its identity among them.
        parts: All parts of a complete output. None while it is not complete.
    """
    ordered = sorted(parts or (), key=lambda part: part.first_row)
    kinds: Counter[str] = Counter()
    for part in ordered:
        kinds.update(part.error_kinds)
    content = {
        "format": FORMAT,
        **facts,
        "complete": parts is not None,
        "rows": sum(part.rows for part in ordered),
        "errors": kinds.total(),
        "error_kinds": dict(sorted(kinds.items())),
        "parts": [part.model_dump() for part in ordered],
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def facts_of(content: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of the run in a manifest or footer, without keys about its rows."""
    return {key: value for key, value in content.items() if key not in _FILE_KEYS}
