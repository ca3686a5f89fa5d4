"""Runs the command in child processes without the price of importing torch each time.

    launcher = Launcher(); child = launcher.start("generate", ...); child.send_signal(...); child.wait()

A server process imports what the command imports and forks a child for each run: a process of its own, with its own signals,
limits and files, which runs `gptbatch ARGUMENTS...` as the console script does. The server itself computes nothing, so that a
child starts as a fresh process would.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tests.paths import REPOSITORY


@dataclass
class Child:
    """A running command."""

    launcher: Launcher
    pid: int
    folder: Path

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code; minus the signal's number when one ended it."""
        return int(self.launcher.ask({"wait": self.pid})["code"])

    def is_running(self) -> bool:
        return bool(self.launcher.ask({"running": self.pid})["running"])

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8", errors="replace")

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of the last line on standard output."""
        summary: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return summary


class Launcher:
    """Starts children. A context manager."""

    def __enter__(self) -> Launcher:
        self._temporary = tempfile.TemporaryDirectory()
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.launcher"],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)
        assert self._server.stdout is not None
        self._server.stdout.close()
        self._temporary.cleanup()

    def start(
        self,
        *arguments: str | Path,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        stdin: Path | None = None,
        fault: tuple[str, str] | None = None,
        file_size_limit: int | None = None,
    ) -> Child:
        """fault: (step, kind) of tests/faults.py. file_size_limit: in bytes, of any file that the child writes."""
        self._count += 1
        folder = Path(self._temporary.name) / str(self._count)
        folder.mkdir()
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd or folder),
            "env": env or {},
            "stdin": str(stdin or "/dev/null"),
            "folder": str(folder),
            "fault": fault,
            "file_size_limit": file_size_limit,
        }
        return Child(self, int(self.ask(request)["pid"]), folder)

    def run(self, *arguments: str | Path, **settings: Any) -> tuple[int, Child]:
        """Start and wait."""
        child = self.start(*arguments, **settings)
        return child.wait(), child

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer: dict[str, Any] = json.loads(self._server.stdout.readline())
        return answer


# -- the server --------------------------------------------------------------------------------------------------------


def serve(requests: TextIO, answers: TextIO) -> None:
    import datasets  # noqa: F401
    import torch  # noqa: F401

    import pipeline.generation.engine
    import pipeline.gpt.weights
    import pipeline.run  # noqa: F401
    from jobs.cli import run_command

    codes: dict[int, int] = {}
    for line in requests:
        request = json.loads(line)
        if "wait" in request:
            pid = request["wait"]
            if pid not in codes:
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            answer = {"code": codes[pid]}
        elif "running" in request:
            pid = request["running"]
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0] == pid:
                codes[pid] = os.waitstatus_to_exitcode(found[1])
            answer = {"running": pid not in codes}
        else:
            pid = os.fork()
            if pid == 0:
                code = 70
                try:
                    prepare(request)
                    code = run_command(request["arguments"])
                finally:
                    with contextlib.suppress(OSError):
                        sys.stdout.flush()
                        sys.stderr.flush()
                    os._exit(code)
            answer = {"pid": pid}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def prepare(request: dict[str, Any]) -> None:
    """In the child: its own standard files, folder, environment, limits and faults."""
    from tests.faults import install

    folder = Path(request["folder"])
    for number, (name, flags) in enumerate(
        [(request["stdin"], os.O_RDONLY), (folder / "stdout", os.O_WRONLY | os.O_CREAT), (folder / "stderr", os.O_WRONLY | os.O_CREAT)]
    ):
        descriptor = os.open(name, flags, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    if request["file_size_limit"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size_limit"], request["file_size_limit"]))
    if request["fault"] is not None:
        install(*request["fault"])


if __name__ == "__main__":
    # what children print must not be taken for an answer
    private = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    serve(os.fdopen(os.dup(0), "r"), private)
