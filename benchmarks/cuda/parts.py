"""Cases of a section, and parts in processes of their own: one that fails spares the others."""

from __future__ import annotations

import faulthandler
import gc
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.cuda.common import IS_FAKE, report, synchronize
from benchmarks.cuda_check import last_object
from gptbatch.pipeline.system.error_text import first_line

Found = dict[str, Any]
Case = Callable[[Found], None]

# A fake device is slow.
LIMIT_FACTOR = 10 if IS_FAKE else 1


def run_cases(cases: Mapping[str, Case], first: int, limit: float) -> None:
    """Run the cases of a section, and report after each of them.

    An exception is a problem of its case. The process ends where the device takes no more work, and
    where a case takes too long. cuda_check.py then starts the next case in a new process: the key
    "case" of the report says which one runs.

    Args:
        cases: By name. A case adds findings to a dict, and may report it.
        first: Index of the first case to run.
        limit: The most seconds of a case.
    """
    found: Found = {"problems": []}
    for number, (name, case) in list(enumerate(cases.items()))[first:]:
        found["case"] = [number, len(cases), name]
        report(found)
        # By a thread that needs no lock of Python: a kernel that hangs does not stop it.
        faulthandler.dump_traceback_later(limit * LIMIT_FACTOR, exit=True)
        problem = problem_of(case, found)
        if problem:
            found["problems"].append(f"{name}: {problem}")
        report(found)
        if problem:
            # Raises again after an error that the device keeps.
            synchronize()
            # The memory that the traceback held.
            gc.collect()
            torch.cuda.empty_cache()
    faulthandler.cancel_dump_traceback_later()
    found.pop("case", None)
    report(found)


def problem_of(case: Case, found: Found) -> str:
    """Run a case to its end on the device; return its exception, "" for none."""
    try:
        case(found)
        synchronize()
    except Exception as error:  # noqa: BLE001 - it is reported, and the rest goes on
        traceback.print_exc()
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def run_part(part: str, **environment: str) -> Iterator[Found]:
    """Run a part of a section in a new process, and yield each JSON object that it prints.

    Its other lines are passed on. Where it fails, one more object has its "error".
    """
    found: Found = {}
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.cuda", part],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line_found := last_object(line):
                found = line_found
                yield found
            else:
                print(line, end="", flush=True)
    if child.returncode:
        yield {"error": f"{part}: exit {child.returncode}", **found}
