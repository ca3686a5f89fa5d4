"""Files that travel with the package: the demo's config, prompts and model."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

PREFIX = "bundled:"


def locate(name: str) -> Path:
    """The path that a setting names: `bundled:demo/model` is in the package, all else is taken as it is.

    Whether anything is there is for the caller to find out.
    """
    if not name.startswith(PREFIX):
        return Path(name)
    return Path(str(files("gptbatch.configs"))) / name.removeprefix(PREFIX)
