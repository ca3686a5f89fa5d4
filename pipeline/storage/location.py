"""Location: a file or folder on this machine, or an object or folder of an object store."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from gptbatch.pipeline.storage.object_path import ObjectPath
from gptbatch.pipeline.system.bundled import locate
from gptbatch.pipeline.system.paths import OBJECT_URL

Location: TypeAlias = Path | ObjectPath


def location_of(name: str) -> Location:
    """Return the location that a setting names: a path, `bundled:...`, or a URL of a store.

    It need not exist.

    Raises:
        ConfigError: The object store cannot be used.
    """
    return ObjectPath.parse(name) if OBJECT_URL.fullmatch(name) else locate(name)
