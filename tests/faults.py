"""Faults for child processes: kills and errors at each step of a commit, and others.

A fault of `STEPS` strikes while the second part is written, or at the end of the run. With kind
"kill" the process kills itself after the step. With the name of an errno the step fails instead.

    write      write the content of the temporary file
    close      close it
    fsync      sync it to the disk
    replace    rename it to its final name
    folder     sync the folder
    manifest   write the last manifest
    success    write `_SUCCESS`

The faults of `OTHERS` break locks, delay steps, exhaust memory or kill the process at a prompt.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from gptbatch.pipeline.output import finish, run_output
from gptbatch.pipeline.output.folder import SUCCESS
from gptbatch.pipeline.output.manifest import MANIFEST
from gptbatch.pipeline.storage import atomic_write

STEPS = ("write", "close", "fsync", "replace", "folder", "manifest", "success")
TARGETS = {"manifest": MANIFEST, "success": SUCCESS}


class FailingClose:
    """A file whose close fails, like on a disk without room for the buffered bytes."""

    def __init__(self, file: BinaryIO, fail: Callable[[], None]) -> None:
        self._file, self._fail = file, fail

    def __enter__(self) -> BinaryIO:
        return self._file.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._file.__exit__(*exception)
        self._fail()


class _Writing(threading.local):
    """The files that a thread is writing, innermost last."""

    def __init__(self) -> None:
        self.files: list[Path] = []

    def is_writing(self, name: str) -> bool:
        return bool(self.files) and self.files[-1].name == name


def install(step: str, kind: str) -> None:
    """Install a fault in this process.

    Args:
        step: A name of `STEPS` or `OTHERS`.
        kind: For `STEPS`: "kill", or the name of an errno. For `OTHERS`: the function's argument.
    """
    if step in OTHERS:
        OTHERS[step](kind)
        return
    part = "part-000001.parquet"
    target = TARGETS.get(step, part)
    now = _Writing()

    def strike() -> None:
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))

    def around(function: Callable[..., Any], at: Callable[..., bool]) -> Callable[..., Any]:
        """Wrap a step: kill after the call, or raise instead of it."""

        def call(*arguments: Any, **settings: Any) -> Any:
            hit = now.is_writing(target) and at(*arguments)
            if hit and kind != "kill":
                strike()
            result = function(*arguments, **settings)
            if hit:
                strike()
            return result

        return call

    original_write, original_finish = atomic_write.FileWriter.write, finish.finish
    completing: list[bool] = []

    def write(
        self: atomic_write.FileWriter,
        path: Path,
        content: Callable[[BinaryIO], None],
        **settings: Any,
    ) -> bool:
        if step == "manifest" and not completing:
            return original_write(self, path, content, **settings)
        now.files.append(path)
        try:
            written = original_write(
                self, path, around(content, lambda *_: step == "write"), **settings
            )
            if step in ("manifest", "success") and kind == "kill" and path.name == target:
                strike()
        finally:
            now.files.pop()
        return written

    def complete(*arguments: Any) -> finish.Finished:
        completing.append(True)
        return original_finish(*arguments)

    # mypy does not take the assignment
    setattr(atomic_write.FileWriter, "write", write)  # noqa: B010
    vars(run_output)["finish"] = complete
    if step == "close":
        original_open = Path.open

        def open_(self: Path, *arguments: Any, **settings: Any) -> Any:
            file = original_open(self, *arguments, **settings)
            return (
                FailingClose(file, strike)
                if now.is_writing(target) and self.name.endswith(".tmp")
                else file
            )

        Path.open = open_  # type: ignore[method-assign]  # a fault
    if step == "fsync":
        atomic_write._fsync = around(atomic_write._fsync, lambda path: not path.is_dir())
    if step == "folder":
        atomic_write._fsync = around(
            atomic_write._fsync,
            lambda path: path.is_dir() and (kind != "kill" or path.parent.name == "runs"),
        )
    if step == "replace" or (step in TARGETS and kind != "kill"):
        os.replace = around(os.replace, lambda *_: True)
        os.link = around(os.link, lambda *_: True)


# -- other faults ----------------------------------------------------------------------------------


def no_locks(kind: str) -> None:
    """Fail every lock with this errno."""
    from gptbatch.pipeline.system import file_lock

    def fail(*arguments: Any) -> None:
        raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))

    vars(file_lock)["_try_flock"] = fail


def before_each_step(act: Callable[[Any, list[Any]], None]) -> None:
    """Call act(engine, chunks) before each step of the engine."""
    from gptbatch.pipeline.engine.engine import Engine

    original = Engine._run

    def run(self: Engine, chunks: list[Any]) -> list[Any]:
        act(self, chunks)
        return original(self, chunks)

    Engine._run = run  # type: ignore[method-assign]  # a fault


def slow_step(seconds: str) -> None:
    """Sleep before each step of the engine."""
    before_each_step(lambda engine, chunks: time.sleep(float(seconds)))


def slow_part(seconds: str) -> None:
    """Sleep before each part gets its name: its rows are done, and its file is written."""
    original = atomic_write._link

    def link(temporary: Path, target: Path) -> bool:
        if target.suffix == ".parquet":
            time.sleep(float(seconds))
        return original(temporary, target)

    atomic_write._link = link


def slow_load(seconds: str) -> None:
    """Sleep before the model is loaded."""
    from gptbatch.pipeline import run

    original = vars(run)["load_model"]

    def load(*arguments: Any, **settings: Any) -> Any:
        time.sleep(float(seconds))
        return original(*arguments, **settings)

    vars(run)["load_model"] = load


def memory(times: str) -> None:
    """Fail a number of steps with the error of torch's allocator; "always" fails all."""
    left = [float("inf") if times == "always" else int(times)]

    def fail(engine: Any, chunks: list[Any]) -> None:
        if left[0] > 0:
            left[0] -= 1
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. "
                "DefaultCPUAllocator: can't allocate memory: you tried to ..."
            )

    before_each_step(fail)


def poison(prompt_id: str) -> None:
    """Kill the process in the first step that computes this prompt."""

    def kill(engine: Any, chunks: list[Any]) -> None:
        if any(chunk.sequence.source.prompt.prompt_id == prompt_id for chunk in chunks):
            os.kill(os.getpid(), signal.SIGKILL)

    before_each_step(kill)


def cleared(kind: str) -> None:
    """Kill the process between the deletion of the replaced run and the start of its own."""
    original = vars(run_output)["delete_run"]

    def clear(*arguments: Any) -> None:
        original(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    vars(run_output)["delete_run"] = clear


OTHERS = {
    "cleared": cleared,
    "no locks": no_locks,
    "slow load": slow_load,
    "slow part": slow_part,
    "slow step": slow_step,
    "memory": memory,
    "poison": poison,
}
