"""Measures the memory and CPU time that this process may use. Imports no torch."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_MEMINFO = Path("/proc/meminfo")
_LOADAVG = Path("/proc/loadavg")
_STAT = Path("/proc/stat")
_PROCESSES = Path("/proc")
_CPUINFO = Path("/proc/cpuinfo")
# limit, usage, and file cache in memory.stat; of version 2 and 1
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
# CPUs that other programs use; below it the cores count as unshared
MIN_OTHER_CPUS = 0.5
# share of CPU time; below it steal is not reported
MIN_STEAL = 0.05
# digits of a number in a file of the kernel
MAX_DIGITS = 20
# ticks (1/100 s) of all CPUs; a shorter interval gives no reliable share
MIN_TICKS = 20
# fields of /proc/PID/stat after the name: CPU time of a process and of its children that have ended
PROCESS_TICKS = slice(11, 15)
# columns of /proc/stat in which nothing of this system ran; and the one of steal
NOT_USED = (3, 4, 7)
STEAL = 7


@dataclass(frozen=True, slots=True)
class Cores:
    """The CPU time of this process.

    Attributes:
        cpus: Number of CPUs that it may run on (affinity, cpuset).
        quota: CPU time that its control group may use, in CPUs. None without a limit.
    """

    cpus: int
    quota: float | None

    @property
    def threads(self) -> int:
        """Number of threads that can run in parallel without throttling."""
        return self.cpus if self.quota is None else max(1, min(self.cpus, int(self.quota)))


def cores() -> Cores:
    """Return the CPUs of this process and the smallest quota of its control group and parents."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in cgroup_folders("cpu") if (quota := _quota(folder)) is not None]
    return Cores(cpus, min(quotas, default=None))


class CpuUse:
    """The use of the CPUs of this process, from the creation of the object on.

    It counts ticks of the CPUs, unlike the load average, in which a run that has ended counts for
    minutes.

    Args:
        processes: Numbers of processes that do not count as other programs, besides this one.
    """

    def __init__(self, processes: Iterable[int] = ()) -> None:
        self._processes = tuple(processes)
        self._ticks, self._own = _cpu_ticks(), self._own_ticks()

    def describe(self, own_threads: int | None = None) -> str:
        """Describe which CPU time other programs and the host took; "" where it costs no speed.

        Other programs cost speed where they and the own threads need more CPUs than there are.

        Args:
            own_threads: Threads of the own programs; at most `Cores.threads` of them count. None is
                that number.
        """
        ticks = [now - then for now, then in zip(_cpu_ticks(), self._ticks, strict=True)]
        total, count = sum(ticks), _n_cpus()
        if total < MIN_TICKS:
            return ""
        used = total - sum(ticks[column] for column in NOT_USED) - (self._own_ticks() - self._own)
        usable = cores().threads
        threads = usable if own_threads is None else min(usable, own_threads)
        reasons = []
        others = used / total * count
        if others >= MIN_OTHER_CPUS and others + threads > count:
            seconds = total / count / os.sysconf("SC_CLK_TCK")
            reasons.append(
                f"other programs used {others:.1f} of {count} CPUs in the last {seconds:.1f} s"
            )
        if (steal := ticks[STEAL] / total) >= MIN_STEAL:
            reasons.append(f"the host takes {steal:.0%} of their time (steal)")
        return "; ".join(reasons)

    def _own_ticks(self) -> float:
        return _own_ticks() + sum(map(_process_ticks, self._processes))


def describe_cores(own_threads: int | None = None, use: CpuUse | None = None) -> str:
    """Describe why this process does not have its CPUs for itself, "" where it does.

    Args:
        own_threads: As in `CpuUse.describe`.
        use: The use of the CPUs to describe; None is that since the start of the process.
    """
    found = cores()
    reasons = []
    if found.quota is not None and found.quota < found.cpus:
        reasons.append(f"the control group may use {found.quota:g} of {found.cpus} CPUs")
    if used := (use or _SINCE_IMPORT).describe(own_threads):
        reasons.append(used)
    return "; ".join(reasons)


def load_average() -> float:
    """Return the number of processes that run or wait for a CPU, averaged over a minute."""
    try:
        return float(_read(_LOADAVG).split()[0])
    except (ValueError, IndexError):
        return 0.0


def processor_name() -> str:
    """Return the name of the CPU; its architecture where it has no name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Return the names that the kernel gives to the features of the CPU, such as avx512f."""
    # Features: on ARM
    return frozenset((_cpuinfo("flags") or _cpuinfo("Features")).split())


def _n_cpus() -> int:
    """Return the number of CPUs that `_cpu_ticks` counts."""
    return max(1, len(_own_cpu_lines()))


def _cpu_ticks() -> list[int]:
    """Return the first 8 columns of /proc/stat, summed over the CPUs of this process."""
    columns = [0] * 8
    for line in _own_cpu_lines():
        for column, word in enumerate(line.split()[1:9]):
            columns[column] += _number(word) or 0
    return columns


def _own_cpu_lines() -> list[str]:
    """Return the lines of /proc/stat of the CPUs that this process may run on.

    A container may show its CPUs under other numbers; then these are all lines.
    """
    lines = {
        line.split()[0]: line
        for line in _read(_STAT).splitlines()
        if line.startswith("cpu") and line[3:4].isdigit()
    }
    has_affinity = hasattr(os, "sched_getaffinity")
    allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)} if has_affinity else set()
    return [line for name, line in lines.items() if name in allowed or not allowed <= lines.keys()]


def _own_ticks() -> float:
    """Return the CPU time of this process and of its children that have ended, in ticks."""
    return sum(os.times()[:4]) * os.sysconf("SC_CLK_TCK")


def _process_ticks(process: int) -> int:
    """Return the CPU time of another process and of its children that have ended, in ticks."""
    # The name of the program stands in parentheses, and may hold any character.
    fields = _read(_PROCESSES / str(process) / "stat").rpartition(")")[2].split()
    return sum(_number(field) or 0 for field in fields[PROCESS_TICKS])


def _cpuinfo(key: str) -> str:
    """Return a value of the first CPU in /proc/cpuinfo, "" where there is none."""
    for line in _read(_CPUINFO).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def total_memory_bytes() -> int | None:
    """Return the memory of the system, in bytes. None where it is unknown."""
    return _meminfo("MemTotal")


def memory_limit_bytes() -> int | None:
    """Return the smallest memory limit of this process's control group and its parents, in bytes.

    None without a limit below the memory of the system.
    """
    total = total_memory_bytes()
    limits = [
        limit
        for folder in cgroup_folders("memory")
        for name, _, _ in _MEMORY_FILES
        if (limit := _number(_read(folder / name))) is not None and (total is None or limit < total)
    ]
    return min(limits, default=None)


def free_memory_bytes() -> int | None:
    """Return the memory that this process may still allocate, in bytes. None where it is unknown.

    It is the smaller of the free memory of the system and of the control group, which limits a
    container or a Slurm job.
    """
    amounts = [amount for amount in (_system_free(), _cgroup_free()) if amount is not None]
    return min(amounts, default=None)


def _system_free() -> int | None:
    if (available := _meminfo("MemAvailable")) is not None:
        return available
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _meminfo(name: str) -> int | None:
    """Return a value of /proc/meminfo, in bytes. None where there is none."""
    for line in _read(_MEMINFO).splitlines():
        key, _, value = line.partition(":")
        if key == name and (kib := _number(value.removesuffix("kB"))) is not None:
            return kib * 1024
    return None


def cgroup_folders(controller: str) -> list[Path]:
    """Return the folders of this process's control group and its parents, of version 2 and 1."""
    folders = []
    for line in _read(_OWN_CGROUP).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not path.startswith("/"):
            continue
        if controllers == "":
            folders += _with_parents(_CGROUPS, path)
        elif controller in controllers.split(","):
            folders += _with_parents(_CGROUPS / controller, path)
    return folders


def _cgroup_free() -> int | None:
    """Return the smallest free memory of this process's control group and its parents."""
    amounts = [
        amount for folder in cgroup_folders("memory") if (amount := _free_in(folder)) is not None
    ]
    return min(amounts, default=None)


def _quota(folder: Path) -> float | None:
    """Return the CPU time that a control group may use, in CPUs. None without a limit."""
    words = _read(folder / "cpu.max").split() or [
        _read(folder / "cpu.cfs_quota_us"),
        _read(folder / "cpu.cfs_period_us"),
    ]
    # "max" or -1 without a limit
    quota, period = [*map(_number, words), None, None][:2]
    return quota / period if quota and period else None


def _with_parents(root: Path, path: str) -> list[Path]:
    """Return the folder of a control group and its parents, up to the root that is visible."""
    folder = root / path.strip("/")
    return [
        folder,
        *(parent for parent in folder.parents if parent == root or root in parent.parents),
    ]


def _free_in(folder: Path) -> int | None:
    """Return limit - usage + reclaimable file cache of a control group. None without a limit."""
    for limit, usage, cache in _MEMORY_FILES:
        limit_bytes, used = _number(_read(folder / limit)), _number(_read(folder / usage))
        if limit_bytes is not None and used is not None:
            cached = re.search(
                rf"^{cache} (\d{{1,{MAX_DIGITS}}})$",
                _read(folder / "memory.stat"),
                re.ASCII | re.MULTILINE,
            )
            return max(0, limit_bytes - used + (int(cached[1]) if cached else 0))
    return None


def _read(path: Path) -> str:
    """Return the text of a file of the kernel, "" where it is missing.

    Names of control groups may hold any byte.
    """
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    # ValueError: the name is not a valid file name
    except (OSError, ValueError):
        return ""


def _number(text: str) -> int | None:
    """Parse a count without a sign. None for other text."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS else None


_SINCE_IMPORT = CpuUse()
