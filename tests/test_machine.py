"""Memory and CPU time of the system and of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptbatch.pipeline.system import machine

GIB = 2**30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate a system with 16 GiB free and no limits. Returns its folder of control groups."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(
        f"MemTotal:       33554432 kB\nMemFree:         1000 kB\nMemAvailable:   {16 * 2**20} kB\n"
    )
    groups = tmp_path / "cgroup"
    groups.mkdir()
    monkeypatch.setattr(machine, "_MEMINFO", meminfo)
    monkeypatch.setattr(machine, "_CGROUPS", groups)
    monkeypatch.setattr(machine, "_OWN_CGROUP", tmp_path / "own")
    return groups


def limit(folder: Path, most: str, used: int, cached: int = 0, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    (folder / names[0]).write_text(f"{most}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon 5\n{'' if version == 2 else 'total_'}inactive_file {cached}\n"
    )


def test_a_system_without_limits(system: Path) -> None:
    assert machine.free_memory_bytes() == 16 * GIB


def test_a_container(system: Path) -> None:
    """Its own group is the root of the visible groups."""
    (system.parent / "own").write_text("0::/\n")
    limit(system, str(4 * GIB), 3 * GIB, GIB)
    assert machine.free_memory_bytes() == 2 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_a_slurm_job(system: Path, version: int) -> None:
    """The limit is that of a parent group."""
    path = "system.slice/slurmstepd.scope/job_17"
    (system.parent / "own").write_text(
        f"0::/{path}/step_0\n" if version == 2 else f"5:cpu:/\n9:memory,hugetlb:/{path}/step_0\n"
    )
    root = system if version == 2 else system / "memory"
    limit(root / path, str(8 * GIB), 2 * GIB, version=version)
    limit(
        root / path / "step_0",
        "max" if version == 2 else str(2**63 - 4096),
        2 * GIB,
        version=version,
    )
    assert machine.free_memory_bytes() == 6 * GIB


def test_a_limit_above_the_free_memory(system: Path) -> None:
    (system.parent / "own").write_text("0::/job\n")
    limit(system / "job", str(64 * GIB), 0)
    assert machine.free_memory_bytes() == 16 * GIB


ODD = [
    b"",
    b"\n",
    b"nonsense",
    b"0::",
    b"0:",
    b"::::",
    b"0::relative/path",
    b"0::/caf\xc3\xa9",
    b"0::/caf\xe9/\xff",
    b"0::/a\0b",
    b"\xff\xfe0\0:\0",
]
ODD += [b"0::/" + b"x" * 5000, b"9:memory,cpu\n5\n\n:x", b"0::/../../..", "٣:memory:/x".encode()]


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize("content", ODD)
def test_malformed_cgroup_lines_are_no_limit(system: Path, content: bytes) -> None:
    (system.parent / "own").write_bytes(content)
    assert machine.free_memory_bytes() == 16 * GIB
    assert machine.cores() == machine.Cores(8, None)


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        b"\xff",
        b"-1 -1",
        b"0 0",
        b"5 0",
        b"9" * 5000,
        b"1e9 x",
        b"nan",
        "٣ ٣".encode(),
    ],
)
def test_malformed_kernel_files_are_no_limit(
    system: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (system.parent / "own").write_text("0::/\n9:memory:/\n5:cpu:/\n")
    for folder in (system, system / "memory", system / "cpu"):
        folder.mkdir(exist_ok=True)
        for name in (
            "cpu.max",
            "cpu.cfs_quota_us",
            "cpu.cfs_period_us",
            "memory.max",
            "memory.current",
            "memory.limit_in_bytes",
        ):
            (folder / name).write_bytes(content)
    assert machine.free_memory_bytes() == 16 * GIB
    assert machine.cores() == machine.Cores(8, None)
    for name in ("_LOADAVG", "_STAT", "_MEMINFO"):
        (system.parent / name).write_bytes(
            b"cpu MemAvailable: " + content + b" kB\nMemAvailable: " + content + b" kB\n"
        )
        monkeypatch.setattr(machine, name, system.parent / name)
    machine.describe_cores()
    machine.free_memory_bytes()


def test_a_cgroup_name_that_is_not_utf8(system: Path) -> None:
    (system.parent / "own").write_bytes(b"0::/caf\xe9\n")
    limit(system / os.fsdecode(b"caf\xe9"), str(4 * GIB), GIB)
    assert machine.free_memory_bytes() == 3 * GIB


def test_a_limit_without_its_statistics(system: Path) -> None:
    (system.parent / "own").write_text("0::/job\n")
    limit(system / "job", str(4 * GIB), GIB)
    for content in (b"", b"odd", b"inactive_file x\nanon", b"\xff\xff"):
        (system / "job" / "memory.stat").write_bytes(content)
        assert machine.free_memory_bytes() == 3 * GIB


def test_a_full_cgroup(system: Path) -> None:
    (system.parent / "own").write_text("0::/job\n")
    limit(system / "job", str(GIB), 2 * GIB)
    assert machine.free_memory_bytes() == 0


# -- CPU time --


def quota(folder: Path, quota_us: str, period_us: int = 100_000, *, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (folder / "cpu.max").write_text(f"{quota_us} {period_us}\n")
    else:
        (folder / "cpu.cfs_quota_us").write_text(f"{-1 if quota_us == 'max' else quota_us}\n")
        (folder / "cpu.cfs_period_us").write_text(f"{period_us}\n")


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


@pytest.mark.usefixtures("eight_cpus")
def test_cpus_without_a_quota(system: Path) -> None:
    assert (machine.cores().quota, machine.cores().threads) == (None, 8)


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("quotas", "threads"),
    [(["200000"], 2), (["150000"], 1), (["50000"], 1), (["max"], 8), (["1600000"], 8)],
)
@pytest.mark.parametrize("place", ["/", "/docker/0123"])
def test_a_container_with_a_quota(
    system: Path, version: int, quotas: list[str], threads: int, place: str
) -> None:
    """The own group is the root of the visible groups under every name in /proc/self/cgroup."""
    (system.parent / "own").write_text(
        f"0::{place}\n" if version == 2 else f"9:memory:{place}\n5:cpu,cpuacct:{place}\n"
    )
    quota(system if version == 2 else system / "cpu", quotas[0], version=version)
    assert machine.cores().threads == threads


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize("version", [1, 2])
def test_the_smallest_nested_quota(system: Path, version: int) -> None:
    root = system if version == 2 else system / "cpu"
    path = "kubepods/burstable/pod7"
    (system.parent / "own").write_text(
        f"0::/{path}/main\n" if version == 2 else f"5:cpu:/{path}/main\n"
    )
    quota(root / path, "300000", version=version)
    quota(root / path / "main", "max", version=version)
    assert (machine.cores().quota, machine.cores().threads) == (3.0, 3)
    quota(root / path / "main", "250000", 50_000, version=version)
    assert machine.cores().quota == 3.0
    quota(root / path / "main", "100000", 50_000, version=version)
    assert machine.cores().threads == 2


def test_affinity_limits_cpus(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    quota(system, "400000")
    (system.parent / "own").write_text("0::/\n")
    assert machine.cores().threads == 1


def cpu_lines(count: int, *, user: int, idle: int, steal: int = 0) -> str:
    """Return /proc/stat after these ticks of each CPU."""
    each = f"{100 + user} 0 50 {800 + idle} 7 0 0 {7 + steal} 0 0"
    return "".join(f"{name} {each}\n" for name in ("cpu", *(f"cpu{i}" for i in range(count))))


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize(
    ("ticks", "own", "own_threads", "quota_us", "said"),
    [
        ({"user": 5, "idle": 95}, 0, 0, "max", ""),
        ({"user": 90, "idle": 10}, 700, 0, "max", ""),
        ({"user": 90, "idle": 10}, 200, 8, "max", "other programs used 5.2 of 8 CPUs in the last"),
        ({"user": 50, "idle": 50}, 0, 5, "max", "other programs used 4.0 of 8 CPUs in the last"),
        ({"user": 50, "idle": 50}, 0, None, "max", "other programs used 4.0 of 8 CPUs in the last"),
        # enough CPUs for both
        ({"user": 50, "idle": 50}, 0, 4, "max", ""),
        ({"user": 50, "idle": 50}, 0, 5, "400000", "the control group may use 4 of 8 CPUs"),
        ({"user": 90, "idle": 0, "steal": 10}, 720, 0, "max", "the host takes 10% of their time"),
        ({"user": 2, "idle": 0}, 0, 0, "max", ""),
        ({"user": 0, "idle": 99}, 0, 0, "150000", "the control group may use 1.5 of 8 CPUs"),
    ],
)
def test_shared_cores_are_described(
    system: Path,
    monkeypatch: pytest.MonkeyPatch,
    ticks: dict[str, int],
    own: int,
    own_threads: int | None,
    quota_us: str,
    said: str,
) -> None:
    (system.parent / "own").write_text("0::/\n")
    quota(system, quota_us)
    stat = system.parent / "stat"
    monkeypatch.setattr(machine, "_STAT", stat)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    stat.write_text(cpu_lines(8, user=0, idle=0))
    monkeypatch.setattr(os, "times", lambda: (1.0, 0.0, 0.0, 0.0, 5.0))
    use = machine.CpuUse()
    stat.write_text(cpu_lines(8, **ticks))
    monkeypatch.setattr(os, "times", lambda: (1.0 + own / 100, 0.0, 0.0, 0.0, 6.0))
    found = machine.describe_cores(own_threads, use)
    assert found.startswith(said) if said else found == ""
    if quota_us == "400000":
        assert "other programs" not in found


@pytest.mark.usefixtures("eight_cpus")
@pytest.mark.parametrize("said", ["", "other programs used 3.6 of 8 CPUs in the last 1.0 s"])
def test_the_time_of_a_watched_run_is_not_that_of_other_programs(
    system: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    """The run uses 4 CPUs; eight are in use, or four."""
    stat, process = system.parent / "stat", system.parent / "17" / "stat"
    process.parent.mkdir()
    monkeypatch.setattr(machine, "_STAT", stat)
    monkeypatch.setattr(machine, "_PROCESSES", system.parent)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    monkeypatch.setattr(os, "times", lambda: (0.0,) * 5)
    stat.write_text(cpu_lines(8, user=0, idle=0))
    process.write_text("17 (a) b) S 1 2 3 4 5 6 7 8 9 10 50 30 20 0 20 0\n")
    use = machine.CpuUse([17])
    stat.write_text(cpu_lines(8, user=95 if said else 50, idle=5 if said else 50))
    process.write_text("17 (a) b) S 1 2 3 4 5 6 7 8 9 10 350 130 20 0 20 0\n")
    assert use.describe(8) == said


def test_only_the_cpus_of_this_process_count(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = system.parent / "stat"
    monkeypatch.setattr(machine, "_STAT", stat)
    monkeypatch.setattr(os, "times", lambda: (0.0,) * 5)
    for allowed, said in (({1}, ""), ({0, 1}, "used 1.0 of 2 CPUs"), ({40, 41}, "used 1.0 of 2")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cpus=allowed: cpus)
        stat.write_text("cpu0 0 0 0 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0\n")
        use = machine.CpuUse()
        stat.write_text("cpu0 100 0 0 0 0 0 0 0\ncpu1 0 0 0 100 0 0 0 0\n")
        found = use.describe()
        assert said in found if said else found == ""
