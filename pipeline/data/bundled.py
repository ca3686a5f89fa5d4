"""Files that travel with the package: the demo's config, prompts and model."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from pipeline.errors import InputNotFoundError

PREFIX = "bundled:"


def locate(name: str) -> Path:
    """The path that a setting names: `bundled:demo/model` is a file of the package, all else is taken as it is."""
    if not name.startswith(PREFIX):
        return Path(name)
    path = Path(str(files("configs"))) / name.removeprefix(PREFIX)
    if not path.exists():
        raise InputNotFoundError(f"{name}: the package has no such file")
    return path
