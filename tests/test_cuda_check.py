"""The program of `make cuda-check`, where there is no GPU: a machine with one has it once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from benchmarks import cuda_check
from benchmarks.cuda import __main__ as sections
from benchmarks.cuda import preflight
from tests.conftest import has_kernels
from tests.paths import REPOSITORY

SECTIONS = """
import json, os, sys, time
name, _, first = sys.argv[1].partition(":")
if name == "preflight":
    sys.exit("cannot run: fails needs more" if "fails early" in sys.argv else 0)
if name == "cases":
    found = {"problems": []}
    for case in range(int(first or 0), 4):
        found["case"] = [case, 4, f"case {case}"]
        print(json.dumps(found), flush=True)
        if case == 1:
            os.kill(os.getpid(), 9)
        if case == 3:
            sys.exit(3)
        found[f"case {case} equal"] = True
    found.pop("case", None)
    print(json.dumps(found), flush=True)
    sys.exit(0)
print("a line", flush=True)
print(json.dumps({"found": 1}), flush=True)
if name == "hangs":
    print('{"found', flush=True)
    time.sleep(60)
if name == "fails":
    sys.exit(3)
print(json.dumps({"found": 2, "bits equal": name != "differs"}), flush=True)
"""


# A case that hangs.
TAKES_TOO_LONG = """
import time
from benchmarks.cuda.parts import run_cases

run_cases({"ends": lambda _: None, "hangs": lambda _: time.sleep(60)}, 0, limit=0.1)
"""

NO_DEVICE_ENGINE = """
from benchmarks.cuda import fake

fake.install()
from benchmarks.cuda import cpu_bits

def broken(**_):
    raise RuntimeError("cannot capture")

cpu_bits.DeviceEngine = broken
cpu_bits.cpu_bits()
"""


def run_fake(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program on a fake device."""
    environment = {"CUDA_CHECK_FAKE": "1", "TRITON_INTERPRET": "1"}
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**cuda_check.child_environment(), **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sections that go wrong in known ways. Returns the folder of results."""
    package = tmp_path / "benchmarks" / "cuda"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    (package / "__main__.py").write_text(SECTIONS)
    limits = {"good": 30, "fails": 30, "hangs": 3, "differs": 30, "fails early": 30, "cases": 30}
    monkeypatch.setattr(cuda_check, "REPOSITORY", tmp_path)
    monkeypatch.setattr(cuda_check, "SECTIONS", limits)
    monkeypatch.setattr(cuda_check, "MIN_SECONDS", 1.0)
    return tmp_path / "out"


def test_a_section_that_goes_wrong_costs_only_its_own_results(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = ["good", "fails", "hangs", "differs"]
    monkeypatch.setattr(
        sys, "argv", ["cuda_check.py", "--out", str(program), "--sections", *sections]
    )
    with pytest.raises(SystemExit, match=r"failed: fails, hangs, differs$"):
        cuda_check.main()
    results = json.loads((program / "results.json").read_text())
    for found in results.values():
        found.pop("wall_s")
    assert results == {
        "good": {"found": 2, "bits equal": True},
        "fails": {"error": "exit 3", "found": 1},
        "hangs": {"error": "stopped after 3 s", "found": 1},
        "differs": {"found": 2, "bits equal": False},
    }
    assert '{"found": 1}' in (program / "log.txt").read_text()


def test_a_section_goes_on_with_the_case_after_one_that_ends_its_process(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--out", str(program), "--sections", "cases", "good"]
    monkeypatch.setattr(sys, "argv", ["cuda_check.py", *arguments])
    with pytest.raises(SystemExit, match=r"failed: cases$"):
        cuda_check.main()
    results = json.loads((program / "results.json").read_text())
    results["cases"].pop("wall_s")
    assert results["cases"] == {
        "problems": ["case 1: exit -9", "case 3: exit 3"],
        "case 0 equal": True,
        "case 2 equal": True,
    }
    assert results["good"]["found"] == 2


def test_findings_are_in_the_results_file_while_their_section_runs(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []
    write_results = cuda_check.write_results

    def record(out: Path, results: dict[str, Any]) -> None:
        write_results(out, results)
        kept.append((out / "results.json").read_text())

    monkeypatch.setattr(cuda_check, "write_results", record)
    arguments = ["--out", str(program), "--sections", "hangs"]
    monkeypatch.setattr(sys, "argv", ["cuda_check.py", *arguments])
    with pytest.raises(SystemExit, match=r"failed: hangs$"):
        cuda_check.main()
    assert {"hangs": {"found": 1}} in [json.loads(text) for text in kept]


def test_a_case_that_raises_is_a_problem_and_spares_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    from benchmarks.cuda import parts

    def works(found: parts.Found) -> None:
        found["bits equal"] = True

    def breaks(found: parts.Found) -> None:
        found["before"] = 1
        raise ValueError("no such kernel\nmore")

    # Its timer would end this process.
    monkeypatch.setattr(parts, "faulthandler", Mock())
    monkeypatch.setattr(parts, "synchronize", lambda: None)
    parts.run_cases({"skipped": breaks, "breaks": breaks, "works": works}, 1, limit=60)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[0]) == {"problems": [], "case": [1, 3, "breaks"]}
    assert json.loads(lines[-1]) == {
        "problems": ["breaks: ValueError: no such kernel"],
        "before": 1,
        "bits equal": True,
    }

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    # The process ends, and cuda_check.py goes on with the next case.
    monkeypatch.setattr(parts, "synchronize", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        parts.run_cases({"breaks": breaks, "works": works}, 0, limit=60)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["case"] == [0, 2, "breaks"]
    assert found["problems"] == ["breaks: ValueError: no such kernel"]


def test_a_case_that_takes_too_long_ends_its_process() -> None:
    pytest.importorskip("triton")
    done = run_fake(TAKES_TOO_LONG)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["case"] == [1, 2, "hangs"]


@pytest.mark.slow
@pytest.mark.skipif(not has_kernels(), reason="no C++ compiler")
def test_bits_of_the_host_are_kept_where_the_engine_of_the_device_fails() -> None:
    pytest.importorskip("triton")
    done = run_fake(NO_DEVICE_ENGINE)
    assert done.returncode == 0, done.stderr
    found = cuda_check.last_object(done.stdout)
    assert found["problems"] == [
        "gelu_tanh auto: RuntimeError: cannot capture",
        "gelu_tanh int8: RuntimeError: cannot capture",
    ]
    assert {f"gelu_tanh {cache}: logits equal" for cache in ("auto", "int8")} < {*found}


def test_a_part_that_is_killed_keeps_what_it_printed(
    program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    from benchmarks.cuda.parts import run_part

    # Its fake package comes first for python -m.
    monkeypatch.chdir(program.parent)
    assert [*run_part("fails")] == [{"found": 1}, {"error": "fails: exit 3", "found": 1}]
    assert capsys.readouterr().out == "a line\n"
    killed = [*run_part("cases")]
    assert killed[-1]["error"] == "cases: exit -9"
    assert killed[-1]["case 0 equal"]


def test_sections_for_which_no_time_is_left_are_skipped(
    program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(program), "--seconds", "0", "--sections", "good", "fails"]
    monkeypatch.setattr(sys, "argv", ["cuda_check.py", *arguments])
    cuda_check.main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {found["skipped"] for found in results.values()} == {"no time left"}


def test_it_ends_before_the_first_section_where_a_package_is_missing(
    program: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cuda_check.py", "--out", str(program)])
    with pytest.raises(SystemExit):
        cuda_check.main()
    assert "cannot run: fails needs more" in capfd.readouterr().err
    assert not program.exists()


def test_the_preflight_names_all_that_is_missing_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modules = preflight.modules_of({"tests": "tests:tests"}, ["tests"])
    assert {"gptbatch.pipeline.config", "benchmarks.cuda.tests", "pytest_timeout"} <= {*modules}
    monkeypatch.setattr(preflight, "EXTRA_PACKAGES", ("no-such-package", "pytest", "none-such"))
    preflight.preflight(["json"], needs_gpu=False)
    with pytest.raises(SystemExit) as caught:
        preflight.preflight(["json", "no_such_module", "none_such.part"], needs_gpu=False)
    assert str(caught.value).splitlines() == [
        "cuda-check cannot run here:",
        "ModuleNotFoundError: No module named 'no_such_module'",
        "ModuleNotFoundError: No module named 'none_such'",
        "not installed: no-such-package, none-such",
        "pip install no-such-package none-such; or leave sections out by --sections",
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no CUDA device; --fake tries"):
        preflight.preflight(["json"], needs_gpu=True)


def test_the_sections_of_most_worth_fit_into_the_time() -> None:
    limits = list(cuda_check.SECTIONS.items())
    first = [name for name, _ in limits[:8]]
    assert first[-1] == "kernel-times"
    assert sum(limit for _, limit in limits[:8]) <= 535
    assert {*cuda_check.SECTIONS} < {*sections.SECTIONS}


def test_a_child_that_outlives_its_kill_does_not_hold_up_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process in a call of the driver of a GPU is killed when the call returns."""

    class Stuck:
        pid = 1

        def wait(self, limit: float) -> None:
            raise subprocess.TimeoutExpired("", limit)

    killed = []
    monkeypatch.setattr(os, "killpg", lambda pid, signal: killed.append(pid))
    cuda_check.stop(Stuck())  # type: ignore[arg-type]
    assert killed == [1]


def test_the_last_object_is_found_before_lines_that_are_cut_off_or_of_others() -> None:
    assert cuda_check.last_object('{"a": 1}\n{"a": 2}\nWARNING {\n{"a"') == {"a": 2}
    assert cuda_check.last_object("Killed\n") == {}


@pytest.mark.slow
def test_the_sections_of_most_worth_run_on_a_fake_device(tmp_path: Path) -> None:
    """Their bits and times mean nothing, but for a verify of the command's output."""
    pytest.importorskip("triton")
    names = ["machine", "build", "cpu-bits", "engine", "command", "host", "kernels"]
    names += ["dependent-launch", "kernel-times"]
    program = Path(cuda_check.__file__)
    done = subprocess.run(
        [sys.executable, program, "--fake", "--out", tmp_path, "--sections", *names],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == names, done.stderr
    assert done.returncode == 0
    failures = {name: found["error"] for name, found in results.items() if "error" in found}
    assert not failures, (tmp_path / "log.txt").read_text()[-5000:]
    command = results["command"]
    assert command["problems"] == []
    assert command["float32, sampled again on the CPU"]["rows"] == 10
    assert command["float32, sampled again on the CPU"]["rows with another token"] == 0
    assert command["gpt2-cuda-fast, 40 rows"]["rows"] == 40
