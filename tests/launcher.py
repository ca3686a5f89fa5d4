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
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tests.paths import PYTHONPATH, REPOSITORY

POLL_S = 0.01
WAIT_LIMIT_S = 240.0


@dataclass
class Child:
    """A running command. `token` names it for ever; its pid may become another process's."""

    launcher: Launcher
    token: int
    pid: int
    folder: Path

    def send_signal(self, number: int) -> None:
        """No effect on a child that has ended."""
        self.launcher.ask({"signal": int(number), "token": self.token})

    def wait(self) -> int:
        """The exit code; minus the signal's number when one ended it."""
        deadline = time.monotonic() + WAIT_LIMIT_S
        while (code := self._poll()) is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(
                    f"{self.folder}: still running after {WAIT_LIMIT_S} s: {self.stderr[-500:]}"
                )
            time.sleep(POLL_S)
        return code

    def is_running(self) -> bool:
        return self._poll() is None

    def _poll(self) -> int | None:
        code: int | None = self.launcher.ask({"poll": True, "token": self.token})["code"]
        return code

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
        self._count = self._asked = 0
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.launcher"],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "PYTHONPATH": PYTHONPATH,
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
            },
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
            "start": self._count,
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd or folder),
            "env": env or {},
            "stdin": str(stdin or "/dev/null"),
            "folder": str(folder),
            "fault": fault,
            "file_size_limit": file_size_limit,
        }
        return Child(self, self._count, int(self.ask(request)["pid"]), folder)

    def run(self, *arguments: str | Path, **settings: Any) -> tuple[int, Child]:
        """Start and wait."""
        child = self.start(*arguments, **settings)
        return child.wait(), child

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to this request; answers to earlier ones, which a time-out cut off, are passed over."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._asked += 1
        tag = self._asked
        self._server.stdin.write(json.dumps({**request, "tag": tag}) + "\n")
        self._server.stdin.flush()
        while line := self._server.stdout.readline():
            with contextlib.suppress(ValueError):  # the end of a line whose beginning was cut off
                answer: dict[str, Any] = json.loads(line)
                if answer["tag"] == tag:
                    return answer
        raise RuntimeError(f"the server has ended with {self._server.poll()}")


# -- the server --------------------------------------------------------------------------------------------------------


def serve(requests: TextIO, answers: TextIO) -> None:
    import datasets  # noqa: F401
    import torch  # noqa: F401

    import gptbatch.pipeline.engine.engine
    import gptbatch.pipeline.model.weights
    import gptbatch.pipeline.run  # noqa: F401

    pids: dict[int, int] = {}  # of children that have not been waited for, by token
    codes: dict[int, int] = {}
    for line in requests:
        request = json.loads(line)
        answer: dict[str, Any] = {"tag": request["tag"]}
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                run_child(request)
            pids[request["start"]] = answer["pid"] = pid
        else:
            token = request["token"]
            if token in pids and (found := os.waitpid(pids[token], os.WNOHANG))[0]:
                del pids[token]
                codes[token] = os.waitstatus_to_exitcode(found[1])
            if "signal" in request and token in pids:
                os.kill(pids[token], request["signal"])
            answer["code"] = codes.get(token)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def run_child(request: dict[str, Any]) -> NoReturn:
    from gptbatch.jobs.cli import run_command

    code = 70
    try:
        prepare(request)
        code = run_command(request["arguments"])
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def prepare(request: dict[str, Any]) -> None:
    """In the child: its own standard files, folder, environment, limits and faults."""
    from tests.faults import install

    folder = Path(request["folder"])
    for number, (name, flags) in enumerate(
        [
            (request["stdin"], os.O_RDONLY),
            (folder / "stdout", os.O_WRONLY | os.O_CREAT),
            (folder / "stderr", os.O_WRONLY | os.O_CREAT),
        ]
    ):
        descriptor = os.open(name, flags, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    if request["file_size_limit"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (request["file_size_limit"], request["file_size_limit"])
        )
    if request["fault"] is not None:
        install(*request["fault"])


if __name__ == "__main__":
    # what children print must not be taken for an answer
    private = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    serve(os.fdopen(os.dup(0), "r"), private)
