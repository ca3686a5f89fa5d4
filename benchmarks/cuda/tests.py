"""Section `tests`: the tests marked cuda."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.cuda.common import IS_FAKE, report

# The files with tests marked cuda, without those that need packages that a GPU machine may lack.
NAMES = ("device_engine", "cuda_invariance", "sampling", "invariance", "model", "engine")
CUDA_TESTS = [f"tests/test_{name}.py" for name in NAMES]


def tests() -> None:
    """Run the tests marked cuda."""
    child = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "cuda",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:benchmark",
            *(CUDA_TESTS[1:2] if IS_FAKE else CUDA_TESTS),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    print(child.stdout[-6000:], child.stderr[-2000:])
    lines = child.stdout.strip().splitlines()
    report({"rc": child.returncode, "last_line": lines[-1] if lines else ""})
