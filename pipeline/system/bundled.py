"""Locates files of the package: the config, prompts and model of the demo."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

PREFIX = "bundled:"


def locate(name: str) -> Path:
    """Return the path that a setting names. `bundled:demo/model` is a path in the package.

    The path need not exist.
    """
    if not name.startswith(PREFIX):
        return Path(name)
    return Path(str(files("gptbatch.configs"))) / name.removeprefix(PREFIX)
