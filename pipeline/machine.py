"""What this machine has to give: memory. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")


def free_memory_bytes() -> int | None:
    """Memory that this process may still take: what the system has, or what its control group (a container, a Slurm job) leaves.

    None where the system does not say.
    """
    amounts = [amount for amount in (_system_free(), _cgroup_free()) if amount is not None]
    return min(amounts, default=None)


def _system_free() -> int | None:
    for line in _read(_MEMINFO).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _cgroup_free() -> int | None:
    """What the limits of this process's control group, and of those around it, leave. Version 2, then version 1."""
    folders = []
    for line in _read(_OWN_CGROUP).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folders += _up(_CGROUPS, path)
        elif "memory" in controllers.split(","):
            folders += _up(_CGROUPS / "memory", path)
    amounts = [amount for folder in folders if (amount := _left_in(folder)) is not None]
    return min(amounts, default=None)


def _up(root: Path, path: str) -> list[Path]:
    """The folder of a control group and those around it, up to the root; inside a container the root is what there is to see."""
    folder = root / path.strip("/")
    return [folder, *(parent for parent in folder.parents if parent == root or root in parent.parents)]


def _left_in(folder: Path) -> int | None:
    """The limit less what is in use; what caches files can be had back. None without a limit."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, used = int(_read(folder / limit)), int(_read(folder / usage))
            stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
            return max(0, most - used + int(stat.get(cache, 0)))
        except ValueError:  # "max", or no such file
            continue
    return None


def _read(path: Path) -> str:
    """The text of a file of the kernel's; "" when it is not there."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
