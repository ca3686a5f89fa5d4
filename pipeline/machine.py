"""What this machine has to give: memory. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_PROC_MEMINFO = Path("/proc/meminfo")


def free_memory_bytes() -> int | None:
    """Memory that this process may still take: what the system has, or what its control group (a container, a Slurm job) leaves.

    None where the system does not say.
    """
    amounts = [amount for amount in (_system_free(), _cgroup_free()) if amount is not None]
    return min(amounts, default=None)


def _system_free() -> int | None:
    try:
        for line in _PROC_MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _cgroup_free() -> int | None:
    """Of the control group's limit, what is not in use; the cache of files can be had back. Version 2, then version 1."""
    for folder, limit, usage, inactive in (
        (_CGROUP, "memory.max", "memory.current", "inactive_file"),
        (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        return max(0, most - used + int(stat.get(inactive, 0)))
    return None
