"""Helpers for tests that start and observe processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from tests.paths import PYTHONPATH

# Far above what any step takes on a busy machine, so that only a process that hangs reaches it.
LIMIT_S = 900.0
POLL_S = 0.01


def child_environment(**changes: str) -> dict[str, str]:
    """Return this process's environment with `changes`, offline, with the package's path."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": PYTHONPATH, **changes}


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Poll until the condition is true.

    Args:
        condition: Called every 10 ms.
        what: The text of the AssertionError after `LIMIT_S` seconds.
    """
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not true after {LIMIT_S:.0f} s"
        time.sleep(POLL_S)


def is_running(pid: int) -> bool:
    """Return whether the process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
