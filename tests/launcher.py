"""A fork server that runs the command in child processes without importing torch each time.

    with Launcher() as launcher:
        child = launcher.start("generate", ...)
        child.send_signal(signal.SIGTERM)
        code = child.wait()

The server imports what the command imports and forks one child per run. A child is a process of
its own, with its own signals, limits and files. It runs `gptbatch ARGUMENTS...` like the console
script. The server computes nothing, so a child starts in the state of a fresh process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tests.paths import REPOSITORY
from tests.processes import LIMIT_S, POLL_S, child_environment


@dataclass
class Child:
    """A running or ended command. Its token is unique; its pid may be reused by the system."""

    launcher: Launcher
    token: int
    pid: int
    folder: Path

    def send_signal(self, number: int) -> None:
        """Send a signal; does nothing when the child has ended."""
        self.launcher.request({"signal": int(number), "token": self.token})

    def wait(self) -> int:
        """Return the exit code, or minus the number of the signal that ended the child."""
        deadline = time.monotonic() + LIMIT_S
        while (code := self._poll()) is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(
                    f"{self.folder}: still running after {LIMIT_S} s: {self.stderr[-500:]}"
                )
            time.sleep(POLL_S)
        return code

    def is_running(self) -> bool:
        """Return whether the child has not ended."""
        return self._poll() is None

    def _poll(self) -> int | None:
        code: int | None = self.launcher.request({"token": self.token})["code"]
        return code

    @property
    def stdout(self) -> str:
        """What the child has written to standard output."""
        return (self.folder / "stdout").read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        """What the child has written to standard error."""
        return (self.folder / "stderr").read_text(encoding="utf-8", errors="replace")

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object on the last line of standard output."""
        summary: dict[str, Any] = json.loads(self.stdout.splitlines()[-1])
        return summary


class Launcher:
    """The client of one fork server; a context manager."""

    def __enter__(self) -> Launcher:
        self._temporary = tempfile.TemporaryDirectory()
        self._children = self._requests = 0
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.launcher"],
            cwd=REPOSITORY,
            env=child_environment(OMP_NUM_THREADS="1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(timeout=LIMIT_S)
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
        patience_s: float = LIMIT_S,
    ) -> Child:
        """Start a child.

        Args:
            arguments: The words after `gptbatch`.
            cwd: Its current folder. None: the folder of its output files.
            env: Changes to the environment of the server.
            stdin: The file on standard input. None: /dev/null.
            fault: (step, kind) of tests/faults.py.
            file_size_limit: In bytes, of each file that the child writes.
            patience_s: After a signal, the time until the child ends inside a step or a library.
        """
        self._children += 1
        folder = Path(self._temporary.name) / str(self._children)
        folder.mkdir()
        request = {
            "start": self._children,
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd or folder),
            "env": env or {},
            "stdin": str(stdin or os.devnull),
            "folder": str(folder),
            "fault": fault,
            "file_size_limit": file_size_limit,
            "patience_s": patience_s,
        }
        return Child(self, self._children, int(self.request(request)["pid"]), folder)

    def run(self, *arguments: str | Path, **settings: Any) -> tuple[int, Child]:
        """Start a child and wait for its end."""
        child = self.start(*arguments, **settings)
        return child.wait(), child

    def request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the server's answer to this request.

        A time-out of pytest may have interrupted an earlier request. Answers with other tags are
        skipped.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._requests += 1
        tag = self._requests
        # one system call, so that an interruption leaves no half of a line
        os.write(self._server.stdin.fileno(), f"{json.dumps({**request, 'tag': tag})}\n".encode())
        while line := self._server.stdout.readline():
            # an interrupted read may have taken the beginning of this line
            with contextlib.suppress(ValueError):
                answer: dict[str, Any] = json.loads(line)
                if answer["tag"] == tag:
                    return answer
        raise RuntimeError(f"the server has ended with {self._server.poll()}")


# -- the server ------------------------------------------------------------------------------------


def import_all() -> None:
    """Import every module that a command may import.

    A child that imports them itself takes seconds instead of tenths of a second.
    """
    import gptbatch.jobs
    import gptbatch.pipeline

    for package in (gptbatch.jobs, gptbatch.pipeline):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            # CUDA kernels need triton
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    for name in ("datasets", "matplotlib.pyplot", "torch._dynamo"):
        importlib.import_module(name)
    # transformers imports the modules of these names when they are first used
    from transformers import AutoTokenizer, GPT2LMHeadModel  # noqa: F401


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer one line of JSON per request until the requests end."""
    import_all()
    # of children that have not been waited for, by token
    pids: dict[int, int] = {}
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
    """Run the command of a start request in this process and exit with its code."""
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
    """Give this process its standard files, current folder, environment, limits and fault."""
    from gptbatch.jobs import signals
    from tests.faults import install

    folder = Path(request["folder"])
    files = [
        (request["stdin"], os.O_RDONLY),
        (folder / "stdout", os.O_WRONLY | os.O_CREAT),
        (folder / "stderr", os.O_WRONLY | os.O_CREAT),
    ]
    for number, (name, flags) in enumerate(files):
        descriptor = os.open(name, flags, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    if (limit := request["file_size_limit"]) is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signals.LOADING_TIMEOUT_S = signals.RUNNING_TIMEOUT_S = request["patience_s"]
    if request["fault"] is not None:
        install(*request["fault"])


if __name__ == "__main__":
    # output of children on descriptor 1 must not be read as an answer
    private = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    serve(os.fdopen(os.dup(0), "r"), private)
