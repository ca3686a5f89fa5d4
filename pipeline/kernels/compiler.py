"""The C++ compiler of this machine: its command, its version, and compilers in parallel.

Compilers are killed together with the process that started them.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from gptbatch.pipeline.system.error_text import shortened

BUILD_TIMEOUT_S = 600.0
VERSION_TIMEOUT_S = 10.0
# A process that reads its standard input. The read returns when the building process ends, however
# it ends, and the guard then kills its own process group, which holds the compilers.
_GUARD = """
import os, signal
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
os.read(0, 1)
os.killpg(0, signal.SIGKILL)
"""


class KernelError(Exception):
    """The kernels are not available on this machine; the message says why and what to do."""


def compiler_command() -> list[str]:
    """Return the C++ compiler and its first options: `CXX`, or c++.

    Raises:
        KernelError: The quotes in CXX are not closed.
    """
    text = os.environ.get("CXX") or "c++"
    try:
        return shlex.split(text) or ["c++"]
    except ValueError as error:
        raise KernelError(f"CXX={text}: cannot be parsed ({error}); correct it") from error


def compiler_version(compiler: list[str]) -> str | None:
    """Return the first line of `--version`; None where the compiler does not print one."""
    try:
        done = subprocess.run(
            [*compiler, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=VERSION_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return lines[0].strip() or None if lines else None


def run_compilers(commands: list[list[str]], temporary: str) -> None:
    """Run compilers in parallel, with their temporary files in the folder `temporary`.

    All of them have ended when this returns or raises.

    Raises:
        KernelError: A compiler fails or runs too long; the message has its first error.
    """
    deadline = time.monotonic() + BUILD_TIMEOUT_S
    running: list[subprocess.Popen[str]] = []
    try:
        with _process_group() as group:
            for command in commands:
                running.append(_start(command, temporary, group))
            for process in running:
                _, stderr = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
                if process.returncode != 0:
                    raise KernelError(
                        f"{commands[0][0]} cannot build the kernels (exit code "
                        f"{process.returncode}): {_first_error(stderr)}"
                    )
    except subprocess.TimeoutExpired as error:
        raise KernelError(
            f"{commands[0][0]} has not finished after {BUILD_TIMEOUT_S:.0f} s"
        ) from error
    finally:
        for process in running:
            process.wait()
            if process.stderr is not None:
                process.stderr.close()


@contextmanager
def _process_group() -> Iterator[int]:
    """Yield a process group whose members are killed when the block or this process ends.

    That includes an end by SIGKILL. PR_SET_PDEATHSIG would end the compiler driver only, not
    the compiler that it starts.
    """
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        yield guard.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()
        if guard.stdin is not None:
            guard.stdin.close()


def _start(command: list[str], temporary: str, group: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": temporary},
        process_group=group,
    )


def _first_error(stderr: str) -> str:
    lines = stderr.splitlines()
    errors = [line for line in lines if "error" in line.lower()] or lines or ["no message"]
    return shortened(errors[0])
