"""What this machine has to give: memory and CPU time. Imports no torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")
_LOADAVG = Path("/proc/loadavg")
_STAT = Path("/proc/stat")
MIN_OTHER_LOAD = 0.5  # processes beside our own threads, below which the cores count as ours
MIN_STEAL = 0.05
MAX_DIGITS = 20  # of a number of the kernel's
MIN_TICKS = 20  # hundredths of a second of all CPUs, below which a share says nothing


@dataclass(frozen=True, slots=True)
class Cores:
    """CPU time of this process.

    cpus: CPUs that it may run on (affinity, cpuset). quota: CPUs' worth of time that its control
    group may use, None without a limit.
    """

    cpus: int
    quota: float | None

    @property
    def threads(self) -> int:
        """Threads that can run at a time all the time."""
        return self.cpus if self.quota is None else max(1, min(self.cpus, int(self.quota)))


def cores() -> Cores:
    """The CPUs of this process and the least quota of its control group and of those around it."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in cgroup_folders("cpu") if (quota := _quota(folder)) is not None]
    return Cores(cpus, min(quotas, default=None))


def describe_cores(own_threads: int = 0) -> str:
    """Why the cores are not this run's own, for a person; "" when they are.

    own_threads: Threads of the run that is going on, which are part of the load.
    """
    found = cores()
    reasons = []
    if found.quota is not None and found.quota < found.cpus:
        reasons.append(f"the control group may use {found.quota:g} of {found.cpus} CPUs")
    load = _load()
    if load - own_threads >= MIN_OTHER_LOAD:
        reasons.append(
            f"other processes run or wait for them (load {load:.2f} on {os.cpu_count()} CPUs)"
        )
    if (steal := _steal()) >= MIN_STEAL:
        reasons.append(f"the host takes {steal:.0%} of their time (steal)")
    return "; ".join(reasons)


def free_memory_bytes() -> int | None:
    """Memory that this process may still take: what the system has, or what its control group (a container, a Slurm job) leaves.

    None where the system does not say.
    """
    amounts = [amount for amount in (_system_free(), _cgroup_free()) if amount is not None]
    return min(amounts, default=None)


def _system_free() -> int | None:
    for line in _read(_MEMINFO).splitlines():
        if (
            line.startswith("MemAvailable:")
            and (kib := _number(line.removeprefix("MemAvailable:").removesuffix("kB"))) is not None
        ):
            return kib * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def cgroup_folders(controller: str) -> list[Path]:
    """Folders of this process's control group and of those around it: version 2, then version 1."""
    folders = []
    for line in _read(_OWN_CGROUP).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not path.startswith("/"):
            continue
        if controllers == "":
            folders += _up(_CGROUPS, path)
        elif controller in controllers.split(","):
            folders += _up(_CGROUPS / controller, path)
    return folders


def _cgroup_free() -> int | None:
    """What the limits of this process's control group, and of those around it, leave."""
    amounts = [
        amount for folder in cgroup_folders("memory") if (amount := _left_in(folder)) is not None
    ]
    return min(amounts, default=None)


def _quota(folder: Path) -> float | None:
    """CPUs' worth of time that a control group may use; None without a limit."""
    words = _read(folder / "cpu.max").split() or [
        _read(folder / "cpu.cfs_quota_us"),
        _read(folder / "cpu.cfs_period_us"),
    ]
    quota, period = [*map(_number, words), None, None][:2]  # "max" or -1 without a limit
    return quota / period if quota and period else None


def _load() -> float:
    """Processes that run or wait for a CPU, over the last minute."""
    try:
        return float(_read(_LOADAVG).split()[0])
    except (ValueError, IndexError):
        return 0.0


def _steal() -> float:
    """The share of CPU time that the host has given to others since this module was imported."""
    passed = [now - then for now, then in zip(_cpu_times(), _TIMES_AT_IMPORT, strict=False)]
    return passed[7] / sum(passed) if len(passed) == 8 and sum(passed) >= MIN_TICKS else 0.0


def _cpu_times() -> list[int]:
    """User, nice, system, idle, iowait, irq, softirq and steal of all CPUs, in ticks."""
    return [_number(word) or 0 for word in _read(_STAT).partition("\n")[0].split()[1:9]]


def _up(root: Path, path: str) -> list[Path]:
    """The folder of a control group and those around it, up to the root; inside a container the root is what there is to see."""
    folder = root / path.strip("/")
    return [
        folder,
        *(parent for parent in folder.parents if parent == root or root in parent.parents),
    ]


def _left_in(folder: Path) -> int | None:
    """The limit less what is in use; what caches files can be had back. None without a limit."""
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, used = _number(_read(folder / limit)), _number(_read(folder / usage))
        if most is not None and used is not None:
            cached = re.search(
                rf"^{cache} (\d{{1,{MAX_DIGITS}}})$",
                _read(folder / "memory.stat"),
                re.ASCII | re.MULTILINE,
            )
            return max(0, most - used + (int(cached[1]) if cached else 0))
    return None


def _read(path: Path) -> str:
    """The text of a file of the kernel's; "" when it is not there. Names of control groups may hold any byte."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except (OSError, ValueError):  # ValueError: no name that a file can have
        return ""


def _number(text: str) -> int | None:
    """A count without a sign; None for anything else."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS else None


_TIMES_AT_IMPORT = _cpu_times()
