"""Bits and times of the Triton kernels and their engine, on a GPU: `make cuda-check`.

    python benchmarks/cuda_check.py [--out DIR] [--sections NAME ...] [--seconds 540] [--fake]

Imports first what the sections need, and ends with a list of what is missing. Then runs each
section in a process of its own, so that one that fails or hangs costs only its own results. Most
sections run cases: an exception costs only its case. After a case that hangs or ends the process,
the next case runs in a new process.

A section prints a JSON object that grows with its findings. What all sections print is in
DIR/log.txt. Their last objects are in DIR/results.json, which is written every second, and in the
last line of the output. Exits with 1 if a section fails or finds bits that differ. A section for
which no time is left is skipped.

--fake runs tiny shapes by torch on a CPU, to try the program itself: its results mean nothing, and
bits that differ are no failure.

docs/cuda/README.md says what it needs, and what each section answers.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
# Name and the most seconds of each section, in the order of what is worth most. Those up to
# kernel-times fit into the whole time. They end earlier where nothing hangs, and leave theirs to
# the others.
SECTIONS = {
    "machine": 20,
    "build": 60,
    "cpu-bits": 100,
    "engine": 125,
    "command": 100,
    "kernels": 45,
    "transformers": 50,
    "kernel-times": 35,
    "tests": 100,
    "dependent-launch": 70,
    "compile": 60,
    "linear-bits": 60,
    "linear-times": 90,
    "graph-nodes": 30,
    "start": 100,
    "host": 15,
}
# A section does not begin with less.
MIN_SECONDS = 5.0
# A process that was killed is gone by then, but for one that waits for the driver of a GPU.
KILL_SECONDS = 5.0
# The findings of a section that runs go to the results file this often.
KEEP_SECONDS = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("cuda-check"))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=540, help="limit for all sections")
    parser.add_argument(
        "--cpu-tests", action="store_true", help="test the C++ kernels beside it on half the cores"
    )
    parser.add_argument("--fake", action="store_true", help="try the program without a GPU")
    args = parser.parse_args()
    ends_at = time.monotonic() + args.seconds
    # tests/__init__.py looks for a GPU by itself otherwise.
    os.environ["CUDA_CHECK_FAKE"] = os.environ["TRITON_INTERPRET"] = str(int(args.fake))
    preflight(args.sections)
    args.out.mkdir(parents=True, exist_ok=True)
    background = start_cpu_tests(args.out) if args.cpu_tests else None
    results: dict[str, Any] = {}
    for section in args.sections:
        limit = min(SECTIONS[section], ends_at - time.monotonic())
        started = time.monotonic()

        def keep(found: dict[str, Any], section: str = section) -> None:
            results[section] = found
            write_results(args.out, results)

        found = run_section(section, args.out, limit, keep)
        keep({**found, "wall_s": round(time.monotonic() - started, 1)})
        print(section, json.dumps(results[section]), flush=True)
    if background is not None:
        try:
            background.wait(max(1.0, ends_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            stop(background)
        lines = (args.out / "cpu-tests.txt").read_text(errors="replace").splitlines()
        results["cpu-tests"] = {"rc": background.returncode, "last_line": lines[-1:]}
        write_results(args.out, results)
    print(json.dumps(results))
    failures = [name for name, found in results.items() if has_failed(found, fake=args.fake)]
    if failures:
        sys.exit(f"failed: {', '.join(failures)}")


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Replace the results file at once, so that it is whole whenever the program is killed."""
    new = out / "results.new"
    new.write_text(json.dumps(results, indent=1) + "\n")
    new.replace(out / "results.json")


def preflight(sections: list[str]) -> None:
    """Exit with what is missing here for these sections; see benchmarks/cuda/preflight.py."""
    command = [sys.executable, "-m", "benchmarks.cuda", "preflight", *sections]
    began = time.monotonic()
    if subprocess.run(command, env=child_environment(), cwd=REPOSITORY, check=False).returncode:
        sys.exit(1)
    print(f"preflight: {time.monotonic() - began:.1f} s", flush=True)


def has_failed(found: dict[str, Any], *, fake: bool = False) -> bool:
    """Return whether a section did not end, or found bits that differ."""
    if fake:
        return bool(found.get("error") or found.get("rc"))
    equal_bits = [value for key, value in found.items() if "equal" in key]
    return bool(
        found.get("error") or found.get("rc") or found.get("problems") or not all(equal_bits)
    )


def start_cpu_tests(out: Path) -> subprocess.Popen[bytes]:
    """Test the C++ kernels on the upper half of the cores, which may know more instructions."""
    cores = sorted(os.sched_getaffinity(0))
    half = ",".join(map(str, cores[len(cores) // 2 :]))
    command = ["taskset", "-c", half, sys.executable, "-m", "pytest", "-q", "-n", "6"]
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark", "tests/test_kernels.py"]
    with (out / "cpu-tests.txt").open("w") as file:
        return subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env=child_environment(),
            start_new_session=True,
        )


def run_section(
    section: str, out: Path, limit: float, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run a section in a child process; return its JSON object, or what went wrong.

    A section of cases that ends before its last one goes on with the next, in another process.

    Args:
        section: Name of the section.
        out: Folder of log.txt.
        limit: The most seconds.
        keep: Takes the findings so far, while the section runs.
    """
    if limit < MIN_SECONDS:
        return {"skipped": "no time left"}
    ends_at = time.monotonic() + limit
    before: dict[str, Any] = {}
    part = section
    while True:
        seconds = ends_at - time.monotonic()
        found = before
        for each in run_process(part, out, seconds):
            found = joined(before, each)
            keep(found)
        case = found.pop("case", None)
        if "error" not in found or case is None:
            return found
        number, n_cases, name = case
        error = f"{name}: {found.pop('error')}"
        is_last = number + 1 == n_cases
        if not is_last and ends_at - time.monotonic() < MIN_SECONDS:
            return {"error": error, **found}
        found["problems"].append(error)
        if is_last:
            return found
        before, part = found, f"{section}:{number + 1}"


def joined(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return the findings of two processes of a section."""
    if not before:
        return found
    return {**before, **found, "problems": [*before["problems"], *found.get("problems", ())]}


def run_process(part: str, out: Path, limit: float) -> Iterator[dict[str, Any]]:
    """Run a section, or its cases from one on, in a child process; yield its findings so far."""
    output = out / "log.txt"
    environment = {**child_environment(), "CUDA_CHECK_OUT": str(out.resolve())}
    begins_at = output.stat().st_size if output.exists() else 0
    ends_at = time.monotonic() + limit
    with output.open("a") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cuda", part],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=REPOSITORY,
            start_new_session=True,
        )
        while (seconds := ends_at - time.monotonic()) > 0:
            with suppress(subprocess.TimeoutExpired):
                child.wait(min(seconds, KEEP_SECONDS))
                break
            yield _found(output, begins_at)
        else:
            stop(child)
            yield {"error": f"stopped after {limit:.0f} s", **_found(output, begins_at)}
            return
    found = _found(output, begins_at)
    yield found if child.returncode == 0 else {"error": f"exit {child.returncode}", **found}


def stop(child: subprocess.Popen[bytes]) -> None:
    """Kill a child and the processes that it started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        child.wait(KILL_SECONDS)


def child_environment() -> dict[str, str]:
    """Return the environment in which Python finds gptbatch, benchmarks and tests."""
    paths = [str(REPOSITORY / "src"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _found(output: Path, begins_at: int) -> dict[str, Any]:
    return last_object(output.read_bytes()[begins_at:].decode(errors="replace"))


def last_object(text: str) -> dict[str, Any]:
    """Return the last line that is a JSON object; an empty one for none."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            # A line may be cut off.
            with suppress(ValueError):
                found: dict[str, Any] = json.loads(line)
                return found
    return {}


if __name__ == "__main__":
    main()
