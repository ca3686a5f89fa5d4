"""`gptbatch doctor`: the real command, and its probes on machines that lack something."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from gptbatch.jobs import doctor as command
from gptbatch.jobs.cli import run_command
from gptbatch.pipeline.config.sources import check_environment
from gptbatch.pipeline.doctor import host, kernels, libraries, self_tests
from gptbatch.pipeline.doctor.section import Section, run_probe
from gptbatch.pipeline.errors import ConfigError
from gptbatch.pipeline.kernels import build
from gptbatch.pipeline.model import golden, self_test
from gptbatch.pipeline.model.self_test import SelfTestReport
from gptbatch.pipeline.system import machine
from tests.conftest import Ran, has_kernels, run_fresh, run_gptbatch
from tests.paths import PYTHONPATH
from tests.processes import LIMIT_S, child_environment

NOT_AVAILABLE = {"available": False, "reason": "no compiler"}


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables that these tests set."""
    for name in [*os.environ]:
        if name.startswith(("GPTBATCH_", "OMP_NUM_THREADS", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)


@pytest.fixture
def in_process(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `gptbatch doctor ARGUMENTS...` in this process."""

    def run(*arguments: str) -> Ran:
        capfd.readouterr()
        code = run_command(["doctor", *arguments])
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


# -- the command -----------------------------------------------------------------------------------


def test_a_machine_that_is_set_up_well() -> None:
    if not has_kernels():
        pytest.skip("no C++ compiler")
    ran = run_fresh("doctor", "--json")
    assert ran.code == 0, ran.stderr
    found = ran.summary
    assert (found["ok"], found["problems"]) == (True, [])
    assert found["torch"]["version"] == torch.__version__
    assert found["cpu"]["cpus_allowed"] == machine.cores().cpus
    assert found["kernels"]["available"] is True
    assert Path(found["kernels"]["library"]).is_file()
    tests = {
        (test["attention"], test["dtype"]): test for test in found["batch_invariance"]["tests"]
    }
    for attention in ("ragged", "padded"):
        for dtype in ("float32", "bfloat16"):
            is_portable = (attention, dtype) == ("ragged", "float32")
            test = tests[attention, dtype]
            assert test["batch_invariance"] == ("portable" if is_portable else "verified")
            assert (test["why_not_portable"] is None) == is_portable
    assert found["arithmetic"] == {"version": 1, "portable": True, "differing": []}
    assert found["defaults"]["attention"] == ("padded" if found["gpu"]["devices"] else "ragged")
    assert found["extras"].keys() == libraries.EXTRAS.keys()


def test_the_screen_has_a_line_for_every_section(in_process: Callable[..., Ran]) -> None:
    ran = in_process()
    assert ran.code == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("gptbatch: ready")
    assert all(len(line) <= command.WIDTH or len(line.split()) == 1 for line in lines)
    names = {line[: command.NAME_WIDTH].strip().replace(" ", "_") for line in lines[1:]}
    assert set(command._TEXTS) <= names <= {*command._TEXTS, "", "warning"}


def test_a_machine_without_a_compiler(tmp_path: Path) -> None:
    """Runs use padded attention. Asking for ragged attention by a variable makes them fail."""
    environment = {"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    ran = run_gptbatch("doctor", "--json", env=environment)
    assert ran.code == 0, ran.stderr
    found = ran.summary
    assert found["compiler"] | {"version": None} == {
        "command": "no-such-compiler",
        "path": None,
        "version": None,
        "CXX": "no-such-compiler",
    }
    assert found["kernels"]["available"] is False
    assert "install g++ or clang++" in found["kernels"]["reason"]
    assert any("install g++ or clang++" in warning for warning in found["warnings"])
    results = {
        (test["attention"], test["dtype"]): test["batch_invariance"]
        for test in found["batch_invariance"]["tests"]
        if test["device"] == "cpu"
    }
    assert results == {
        ("ragged", "float32"): "not available",
        ("ragged", "bfloat16"): "not available",
        ("padded", "float32"): "verified",
        ("padded", "bfloat16"): "verified",
    }
    assert found["defaults"]["attention"] == "padded"
    refused = run_gptbatch("doctor", env=environment | {"GPTBATCH_ENGINE_ATTENTION": "ragged"})
    assert refused.code == 78
    assert refused.stdout.startswith("gptbatch: runs fail here, 1 problem, ")
    assert "engine.attention is ragged, but the C++ kernels are not available" in refused.stderr


def test_wrong_variables_make_runs_fail(in_process: Callable[..., Ran]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTBATCH_TOPK", "5")
        patch.setenv("GPTBATCH_TOP_P", "3")
        patch.setenv("GPTBATCH_SEED", "7")
        ran = in_process("--json")
    assert ran.code == 78
    found = ran.summary
    assert found["ok"] is False
    names = ["GPTBATCH_SEED", "GPTBATCH_TOPK", "GPTBATCH_TOP_P"]
    assert found["settings"] == {"variables": names}
    first, second = found["problems"]
    assert "GPTBATCH_TOPK: no such setting" in first
    assert "GPTBATCH_TOP_P" in second
    assert "runs fail here (and 1 more)" in ran.stderr


BROKEN = "raise ImportError('libtorch_cpu.so: cannot open shared object file')\n"


def test_a_broken_torch_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(BROKEN)
    done = subprocess.run(
        [sys.executable, "-m", "gptbatch", "doctor"],
        env=child_environment(PYTHONPATH=os.pathsep.join((str(tmp_path), PYTHONPATH))),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 78, done.stderr
    assert "torch             unknown: ImportError: libtorch_cpu.so: cannot open" in done.stdout
    assert "kernels           unknown: needs torch" in done.stdout
    assert "torch cannot be imported" in done.stderr
    assert "Traceback" not in done.stderr
    assert "memory            " in done.stdout, "other probes go on"


def test_limits_that_forbid_torch_are_a_problem(
    in_process: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*, computes: bool) -> None:
        raise ConfigError("the address space is limited to 1.00 GiB (ulimit -v)")

    monkeypatch.setattr(command, "check_limits", refuse)
    ran = in_process()
    assert ran.code == 78
    assert "torch             unknown: the address space is limited" in ran.stdout
    assert "gpu               unknown: needs torch" in ran.stdout


def test_a_probe_that_fails_is_a_warning(
    in_process: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Section:
        raise PermissionError(13, "Permission denied", "/proc/meminfo")

    monkeypatch.setattr(host, "probe_memory", fail)
    ran = in_process("--json")
    assert ran.code == 0
    assert "Permission denied" in ran.summary["memory"]["error"]
    assert any(text.startswith("memory: cannot be examined") for text in ran.summary["warnings"])


def test_an_interrupt_is_no_result_of_a_probe() -> None:
    def interrupt() -> Section:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_probe("memory", interrupt)


# -- kernels ---------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache folder of the kernels, with a compiler that compiles nothing."""
    folder = tmp_path / "gptbatch" / "kernels"
    folder.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(build, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(build, "load_kernels", build.load_kernels.__wrapped__)
    monkeypatch.setattr(build, "_load", lambda library: None)
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "fake 1.0" && exit\n'
        'while [ "$1" != -o ]; do shift; done; echo ok > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return folder


def test_kernels_are_built_once_and_their_compiler_is_recorded(cache: Path) -> None:
    assert kernels.probe_kernel_cache().facts["libraries"] == 0
    built, again = kernels.probe_kernels().facts, kernels.probe_kernels().facts
    assert built["available"]
    assert (built["built_now"], again["built_now"]) == (True, False)
    for facts in (built, again):
        assert facts["compiler"] == "fake 1.0"
        assert 0 < facts["build_s"] < LIMIT_S
        assert Path(facts["library"]).parent == cache
    assert kernels.probe_compiler().facts["version"] == "fake 1.0"
    assert kernels.probe_kernel_cache().facts["libraries"] == 1
    (record,) = cache.glob("*.json")
    for damage in ("", "[]", '{"compiler": '):
        record.write_text(damage)
        assert kernels.probe_kernels().facts["compiler"] is None


def test_a_build_of_another_process_is_not_awaited(cache: Path) -> None:
    with FileLock(build.lock_path(cache)):
        section = kernels.probe_kernel_cache()
        assert section.facts["locked"] is True
        assert "another process holds the lock" in section.warnings[0]
        facts = kernels.probe_kernels().facts
    assert facts == {"available": False, "reason": "another process builds them"}
    section = kernels.probe_kernel_cache()
    assert (section.facts["locked"], section.warnings) == (False, [])
    kernels.probe_kernels()
    with FileLock(build.lock_path(cache)):
        assert kernels.probe_kernel_cache().warnings == []
        assert kernels.probe_kernels().facts["available"], "built kernels need no lock"


def test_a_cache_that_other_users_may_write(cache: Path) -> None:
    cache.chmod(0o777)
    section = kernels.probe_kernel_cache()
    assert "other users may write it (mode 777)" in section.facts["not_trusted"]
    assert "set XDG_CACHE_HOME" in section.warnings[0]
    facts = kernels.probe_kernels().facts
    assert (facts["available"], facts["library"]) == (True, None)


@pytest.mark.usefixtures("cache")
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc, where no folder can be made")
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "user_cache_path", lambda name: Path("/proc") / name)
    assert kernels.probe_kernel_cache().facts["exists"] is False
    section = kernels.probe_kernels()
    assert section.facts["available"] is False
    assert "/proc/gptbatch/kernels: cannot be written" in section.warnings[0]
    assert "XDG_CACHE_HOME" in section.warnings[0]


@pytest.mark.usefixtures("cache")
def test_a_file_in_place_of_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels are built for one run."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(build, "user_cache_path", lambda name: tmp_path / "file" / name)
    section = kernels.probe_kernel_cache()
    assert (section.facts["exists"], section.facts["writable"]) == (False, False)
    assert "Not a directory" in section.warnings[0]
    assert kernels.probe_kernels().facts["available"] is True


def test_a_full_disk_is_reported_before_a_build(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = types.SimpleNamespace(total=2**40, used=2**40, free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "1 MiB are free, too few to build" in kernels.probe_kernel_cache().warnings[0]
    kernels.probe_kernels()
    assert kernels.probe_kernel_cache().warnings == [], "they are built"


# -- the host --------------------------------------------------------------------------------------


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate 8 CPUs and 32 GiB in a control group of 2.5 CPUs and 4 GiB."""
    (tmp_path / "meminfo").write_text("MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n")
    (tmp_path / "own").write_text("0::/job\n")
    (tmp_path / "loadavg").write_text("0.00 0.00 0.00 1/100 1\n")
    (tmp_path / "cpuinfo").write_text("model name : Some CPU\nflags : avx2 avx512f avx512_bf16\n")
    group = tmp_path / "cgroup" / "job"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("250000 100000\n")
    (group / "memory.max").write_text(f"{4 * 2**30}\n")
    (group / "memory.current").write_text(f"{2**30}\n")
    for name, file in (
        ("_MEMINFO", "meminfo"),
        ("_OWN_CGROUP", "own"),
        ("_LOADAVG", "loadavg"),
        ("_CPUINFO", "cpuinfo"),
        ("_CGROUPS", "cgroup"),
    ):
        monkeypatch.setattr(machine, name, tmp_path / file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    return group


def test_quotas_and_limits_of_the_control_group(system: Path) -> None:
    section = host.probe_cpu()
    assert (section.facts["name"], section.facts["quota"]) == ("Some CPU", 2.5)
    assert "may use 2.5 of 8 CPUs" in section.warnings[0]
    assert "a quota of 2.5 CPUs" in command._cpu(section.facts)[0]
    memory = host.probe_memory().facts
    assert (memory["total_bytes"], memory["limit_bytes"]) == (32 * 2**30, 4 * 2**30)
    assert memory["free_bytes"] == 3 * 2**30
    assert "limited to 4.0 GiB by the control group" in command._memory(memory)[0]
    for unlimited in ("max", str(2**63 - 4096)):
        (system / "memory.max").write_text(unlimited)
        assert host.probe_memory().facts["limit_bytes"] is None


@pytest.mark.parametrize(
    ("threads", "advice"), [("1", "limits a run to 1 of 2 CPUs"), ("8", "more than the 2 CPUs")]
)
def test_a_number_of_threads_that_does_not_fit(
    system: Path, monkeypatch: pytest.MonkeyPatch, threads: str, advice: str
) -> None:
    (system / "cpu.max").write_text("250000 100000\n")
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert advice in host.probe_cpu().warnings[0]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert not any("OMP_NUM_THREADS" in text for text in host.probe_cpu().warnings)


def test_instruction_sets_that_the_kernels_do_not_use(
    system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["-mavx512f", "-mavx512bf16"]
    monkeypatch.setattr(build, "compile_flags", lambda: flags)
    section = host.probe_instruction_sets()
    assert section.facts == {
        "cpu": ["AVX2", "AVX512", "AVX512_BF16"],
        "kernels": ["AVX512", "AVX512_BF16"],
    }
    assert section.warnings == []
    flags[:] = ["-mavx2"]
    assert "the CPU has AVX512, AVX512_BF16, but" in host.probe_instruction_sets().warnings[0]
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert "ATEN_CPU_CAPABILITY=avx2 is set" in host.probe_instruction_sets().warnings[0]


def test_the_kernels_of_this_machine_name_their_instruction_sets() -> None:
    """Each capability of torch, but for none, has a flag that the probe finds."""
    expected = {"AVX2": ["AVX2"], "AVX512": ["AVX512"]}
    capability = torch.backends.cpu.get_cpu_capability()
    assert host.probe_instruction_sets().facts["kernels"][:1] == expected.get(capability, [])


def test_a_gpu_that_torch_does_not_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(host, "NVIDIA_DRIVER", tmp_path / "version")
    section = host.probe_gpu()
    assert (section.facts["driver"], section.warnings) == (False, [])
    (tmp_path / "version").touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in host.probe_gpu().warnings[0]
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "update the driver" in host.probe_gpu().warnings[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' hides it" in host.probe_gpu().warnings[0]


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(name="H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    facts = host.probe_gpu().facts
    assert command._gpu(facts) == ["H100, 80.0 GiB, capability 9.0"] * 2


# -- packages, batch invariance, variables ---------------------------------------------------------


def test_packages_that_are_missing_too_old_or_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("raise OSError('no symbol')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        libraries, "REQUIRED", {"torch": "torch", "no-such": "no_such", "broken": "broken_package"}
    )
    monkeypatch.setattr(libraries, "IMPORTED", ("broken",))
    monkeypatch.setattr(libraries, "minimum_versions", lambda: {"torch": ">=99", "no-such": ">=1"})
    missing = "no-such is not installed; install it: pip install 'no-such>=1'"
    too_old, second, third = libraries.probe_versions(imports=True).problems
    assert too_old.startswith(f"torch {libraries.installed_version('torch')} is too old")
    assert second == missing
    assert third.startswith("broken cannot be imported (OSError: no symbol)")
    assert libraries.probe_versions(imports=False).problems == [too_old, missing]


def test_the_packages_of_this_machine_are_those_that_the_project_needs() -> None:
    minimums = libraries.minimum_versions()
    if not minimums:
        pytest.skip("gptbatch is not installed")
    assert libraries.REQUIRED.keys() <= minimums.keys()
    assert libraries.EXTRAS.keys() <= minimums.keys()


def test_extras_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "EXTRAS", {"no-such": ("no_such", "stars", "pip install stars")})
    section = libraries.probe_extras()
    assert command._extras(section.facts) == [
        "none",
        "no-such (stars): not installed; pip install stars",
    ]


def test_kernels_of_another_arithmetic_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_kernels():
        pytest.skip("no C++ compiler")
    monkeypatch.setitem(golden.GOLDEN_DIGESTS, "int8", "0" * 64)
    monkeypatch.setitem(golden.DEMO_DIGESTS, "auto", "0" * 64)
    section = self_tests.probe_arithmetic({"available": True})
    assert not section.facts["portable"]
    assert command._arithmetic(section.facts) == [
        "not that of version 1: demo, cache_dtype auto; golden, cache_dtype int8"
    ]
    assert "the demo model has other logits here" in section.warnings[0]
    assert "build them with another compiler (CXX)" in section.warnings[1]
    section = self_tests.probe_arithmetic(NOT_AVAILABLE)
    assert command._arithmetic(section.facts) == ["not portable: it needs the C++ kernels"]


def test_a_self_test_that_fails_or_crashes_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    report = SelfTestReport(failures=("rows of mlp_in",), padding_plan="as_is", self_test_digest="")
    monkeypatch.setattr(self_test, "select_batch_invariant_kernels", lambda model: report)
    section = self_tests.probe_batch_invariance(NOT_AVAILABLE)
    padded = [test for test in section.facts["tests"] if test["attention"] == "padded"]
    assert {test["batch_invariance"] for test in padded} == {"unverified"}
    assert padded[0]["reason"] == "rows of mlp_in differ"
    assert "--batch-invariance require refuses them" in section.warnings[0]

    def crash(model: object) -> SelfTestReport:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(self_test, "select_batch_invariant_kernels", crash)
    section = self_tests.probe_batch_invariance(NOT_AVAILABLE)
    padded = [test for test in section.facts["tests"] if test["attention"] == "padded"]
    assert {test["batch_invariance"] for test in padded} == {"not available"}
    assert "could not create a primitive" in padded[0]["reason"]
    assert "the self-test of padded attention in float32" in section.warnings[0]


@pytest.mark.parametrize(
    ("variables", "names", "problems"),
    [
        ({}, (), []),
        ({"GPTBATCH_SEED": "", "GPTBATCH_SERVICE_HOST": "10.0.0.1"}, (), []),
        ({"GPTBATCH_DATASET": "data"}, ("GPTBATCH_DATASET",), []),
        (
            {"GPTBATCH_MIN_NEW_TOKENS": "200", "GPTBATCH_MAX_NEW_TOKENS": "300"},
            ("GPTBATCH_MAX_NEW_TOKENS", "GPTBATCH_MIN_NEW_TOKENS"),
            [],
        ),
        ({"GPTBATCH_MIN_NEW_TOKENS": "200"}, ("GPTBATCH_MIN_NEW_TOKENS",), ["min_new_tokens"]),
        (
            {"GPTBATCH_SEED": "x", "GPTBATCH_SEEDS": "1", "GPTBATCH_TOP_P": "3"},
            ("GPTBATCH_SEED", "GPTBATCH_SEEDS", "GPTBATCH_TOP_P"),
            ["GPTBATCH_SEED: ", "GPTBATCH_SEEDS: no such", "GPTBATCH_TOP_P: "],
        ),
        (
            {"GPTBATCH_INPUT": "a", "GPTBATCH_DATASET": "b"},
            ("GPTBATCH_DATASET", "GPTBATCH_INPUT"),
            ["give either input or dataset, not both"],
        ),
    ],
)
def test_all_wrong_variables_are_found(
    variables: dict[str, str], names: tuple[str, ...], problems: list[str]
) -> None:
    checked = check_environment(variables)
    assert checked.names == names
    assert len(checked.problems) == len(problems)
    for found, expected in zip(checked.problems, problems, strict=True):
        assert expected in found


def test_settings_of_the_environment_decide_the_defaults(in_process: Callable[..., Ran]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTBATCH_ENGINE_BATCH_SIZE", "17")
        patch.setenv("GPTBATCH_ENGINE_MEMORY_GIB", "1.5")
        patch.setenv("GPTBATCH_ENGINE_DEVICE", "cuda")
        patch.setenv("GPTBATCH_SHARD", "4/4")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        ran = in_process("--json")
    assert ran.code == 78
    first, second = ran.summary["problems"]
    assert "torch finds no CUDA device here" in first
    assert "GPTBATCH_SHARD: must be auto, or INDEX/COUNT" in second
    assert ran.summary["defaults"]["batch_size"] == 17
    assert ran.summary["defaults"]["kv_cache_bytes"] == 1.5 * 2**30
