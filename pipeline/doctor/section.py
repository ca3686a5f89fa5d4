"""Section: what one probe found, and how a probe that fails becomes a section."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gptbatch.pipeline.system.error_text import first_line


@dataclass(slots=True, kw_only=True)
class Section:
    """What one probe found.

    Attributes:
        facts: Values for JSON. `error` is the only key where the probe failed.
        warnings: What makes runs slower or not batch-invariant, and what to do.
        problems: What makes runs fail, and what to do.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run_probe(name: str, probe: Callable[[], Section]) -> Section:
    """Run a probe; an error of it becomes a section with a warning."""
    try:
        return probe()
    except (KeyboardInterrupt, SystemExit):
        raise
    # A Rust panic is no Exception, and a broken library may raise anything.
    except BaseException as error:  # noqa: BLE001
        text = f"{type(error).__name__}: {first_line(error)}"
        return Section(facts={"error": text}, warnings=[f"{name}: cannot be examined ({text})"])
