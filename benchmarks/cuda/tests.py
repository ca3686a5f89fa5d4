"""Section `tests`: the tests marked cuda."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.cuda.common import IS_FAKE, out_folder, report

# The files with tests marked cuda, without those that need packages that a GPU machine may lack.
NAMES = ("cuda_invariance", "device_engine", "sampling", "invariance", "model", "engine")
CUDA_TESTS = [f"tests/test_{name}.py" for name in NAMES]
# A warning of another version is no failure here. A file that cannot be imported spares the others.
OPTIONS = ["-v", "-m", "cuda", "-W", "default", "--continue-on-collection-errors"]
OPTIONS += ["-p", "no:cacheprovider", "-p", "no:benchmark"]
OUTCOME = re.compile(r"(tests/\S+).* (PASSED|FAILED|ERROR|SKIPPED)\b")


def tests() -> None:
    """Run the tests marked cuda; their output is in tests.txt."""
    found: dict[str, Any] = {"problems": []}
    command = [sys.executable, "-m", "pytest", *OPTIONS, *CUDA_TESTS[: 1 if IS_FAKE else None]]
    with (
        (out_folder() / "tests.txt").open("w") as file,
        subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            file.write(line)
            file.flush()
            if match := OUTCOME.match(line):
                test, outcome = match[1], match[2].lower()
                found[outcome] = found.get(outcome, 0) + 1
                if outcome in ("failed", "error"):
                    found["problems"].append(test)
                report(found)
    found["rc"] = child.returncode
    found["last_line"] = line.strip()
    report(found)
