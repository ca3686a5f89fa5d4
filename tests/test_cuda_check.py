"""The program of `make cuda-check`, where there is no GPU: a machine with one has it once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cuda_check
from tests.paths import REPOSITORY

SECTIONS = """
import json, sys, time
name = sys.argv[1]
print(json.dumps({"found": 1}), flush=True)
if name == "hangs":
    print('{"found', flush=True)
    time.sleep(60)
if name == "fails":
    sys.exit(3)
print(json.dumps({"found": 2, "bits equal": name != "differs"}), flush=True)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sections that go wrong in known ways. Returns the folder of results."""
    package = tmp_path / "benchmarks" / "cuda"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    (package / "__main__.py").write_text(SECTIONS)
    limits = {"good": 30, "fails": 30, "hangs": 3, "differs": 30}
    monkeypatch.setattr(cuda_check, "REPOSITORY", tmp_path)
    monkeypatch.setattr(cuda_check, "SECTIONS", limits)
    monkeypatch.setattr(cuda_check, "MIN_SECONDS", 1.0)
    return tmp_path / "out"


def test_a_section_that_goes_wrong_costs_only_its_own_results(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["cuda_check.py", "--out", str(program)])
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


def test_sections_for_which_no_time_is_left_are_skipped(
    program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cuda_check.py", "--out", str(program), "--seconds", "0"])
    cuda_check.main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {found["skipped"] for found in results.values()} == {"no time left"}


@pytest.mark.slow
def test_the_sections_of_most_worth_run_on_a_fake_device(tmp_path: Path) -> None:
    """Their bits and times mean nothing, but for a verify of the command's output."""
    pytest.importorskip("triton")
    sections = ["machine", "kernels", "engine", "dependent-launch", "command", "host"]
    program = Path(cuda_check.__file__)
    done = subprocess.run(
        [sys.executable, program, "--fake", "--out", tmp_path, "--sections", *sections],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == sections, done.stderr
    failures = {name: found["error"] for name, found in results.items() if "error" in found}
    assert not failures, (tmp_path / "log.txt").read_text()[-5000:]
    command = results["command"]
    assert command["gpt2-cuda, 10 rows, verified on the CPU"]["mismatches"] == 0
    assert command["gpt2-cuda-fast, 40 rows"]["rows"] == 40
