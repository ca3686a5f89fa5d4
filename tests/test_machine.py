"""How much memory there is to take: the system's, and what control groups leave of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import machine

GIB = 2**30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system with 16 GiB to take and no limits; its folder of control groups."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal:       33554432 kB\nMemFree:         1000 kB\nMemAvailable:   {16 * 2**20} kB\n")
    groups = tmp_path / "cgroup"
    groups.mkdir()
    monkeypatch.setattr(machine, "_MEMINFO", meminfo)
    monkeypatch.setattr(machine, "_CGROUPS", groups)
    monkeypatch.setattr(machine, "_OWN_CGROUP", tmp_path / "own")
    return groups


def limit(folder: Path, most: str, used: int, cached: int = 0, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{most}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{'' if version == 2 else 'total_'}inactive_file {cached}\n")


def test_a_system_without_limits(system: Path) -> None:
    assert machine.free_memory_bytes() == 16 * GIB


def test_a_container(system: Path) -> None:
    """Its own group is the root of what it sees."""
    (system.parent / "own").write_text("0::/\n")
    limit(system, str(4 * GIB), 3 * GIB, GIB)
    assert machine.free_memory_bytes() == 2 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_a_slurm_job(system: Path, version: int) -> None:
    """The limit is that of a group around the process's own."""
    path = "system.slice/slurmstepd.scope/job_17"
    (system.parent / "own").write_text(f"0::/{path}/step_0\n" if version == 2 else f"5:cpu:/\n9:memory,hugetlb:/{path}/step_0\n")
    root = system if version == 2 else system / "memory"
    limit(root / path, str(8 * GIB), 2 * GIB, version=version)
    limit(root / path / "step_0", "max" if version == 2 else str(2**63 - 4096), 2 * GIB, version=version)
    assert machine.free_memory_bytes() == 6 * GIB


def test_a_limit_above_what_there_is(system: Path) -> None:
    (system.parent / "own").write_text("0::/job\n")
    limit(system / "job", str(64 * GIB), 0)
    assert machine.free_memory_bytes() == 16 * GIB


def test_a_group_that_is_full(system: Path) -> None:
    (system.parent / "own").write_text("0::/job\n")
    limit(system / "job", str(GIB), 2 * GIB)
    assert machine.free_memory_bytes() == 0
