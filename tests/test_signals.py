"""Signals at every stage of a command, from the first import to the exit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptbatch.jobs.group import COMMANDS
from gptbatch.jobs.signals import EXIT_STOPPED, STOP_SIGNALS, Signals
from gptbatch.pipeline.kernels.build import KERNELS
from tests.launcher import Launcher
from tests.processes import LIMIT_S, child_environment, is_running, wait_for

NAMES = [number.name for number in STOP_SIGNALS]

# The console script, with a signal at a chosen moment. The process sends the signal to itself just
# before it imports a module or calls a function, so the test needs no clock.
PROGRAM = """
import builtins, os, signal, sys
moment, number = sys.argv.pop(1), int(sys.argv.pop(1))
original = builtins.__import__
def strike():
    global moment
    moment = None
    os.kill(os.getpid(), number)
def importing(name, *rest, **more):
    if name == moment:
        strike()
    return original(name, *rest, **more)
builtins.__import__ = importing
from gptbatch.jobs.cli import main
from gptbatch.jobs import signals
# a busy machine may need longer than the patience of the watching thread
signals.LOADING_TIMEOUT_S = signals.RUNNING_TIMEOUT_S = 900
if moment == "exit":
    import atexit
    atexit.register(strike)
if moment == "teardown":
    class Late:
        def __del__(self, kill=os.kill, pid=os.getpid(), number=number):
            kill(pid, number)
    late = Late()
    import gptbatch.jobs.signals
    gptbatch.jobs.signals.late = late
    late.itself = late
    del late
main()
"""


@pytest.fixture
def run_struck(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    def run(moment: str, number: int, *arguments: str, program: str = PROGRAM) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", program, moment, str(int(number)), *arguments],
            cwd=tmp_path,
            env=child_environment(),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        return done.returncode, done.stderr

    return run


def each_name_once(*moments: str) -> list[Any]:
    """Return all cases (moment, name); those beyond one moment per signal are slow."""
    return [
        pytest.param(
            moment,
            name,
            marks=() if number % len(moments) == moments.index(moment) else pytest.mark.slow,
        )
        for moment in moments
        for number, name in enumerate(NAMES)
    ]


@pytest.mark.parametrize(("moment", "name"), each_name_once("gptbatch.jobs.group", "click"))
def test_signal_during_the_import_of_the_program(
    name: str, moment: str, run_struck: Callable[..., tuple[int, str]]
) -> None:
    code, stderr = run_struck(moment, signal.Signals[name], "status", "nowhere")
    assert code == EXIT_STOPPED, stderr
    assert stderr.strip() == f"gptbatch: stopped by {name}; run the same command again"


@pytest.mark.parametrize("command", COMMANDS)
def test_signal_during_the_import_of_each_command(
    command: str, run_struck: Callable[..., tuple[int, str]]
) -> None:
    code, stderr = run_struck("gptbatch.jobs.options", signal.SIGTERM, command, "--help")
    assert (code, stderr.strip()) == (
        EXIT_STOPPED,
        "gptbatch: stopped by SIGTERM; run the same command again",
    )


@pytest.mark.parametrize("moment", ["pydantic", "torch"])
def test_signal_during_the_import_of_libraries(
    moment: str, checkpoint: Path, tmp_path: Path, run_struck: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The king"}\n')
    code, stderr = run_struck(
        moment,
        signal.SIGUSR2,
        "generate",
        "--model",
        str(checkpoint),
        "--input",
        "prompts.jsonl",
        "--output",
        "out",
    )
    assert code == EXIT_STOPPED, stderr
    assert "stopped by SIGUSR2; run the same command again" in stderr
    assert not list(tmp_path.glob("out/part-*"))


@pytest.mark.parametrize(("moment", "name"), each_name_once("exit", "teardown"))
def test_signal_after_the_exit_code_is_decided(
    name: str, moment: str, run_struck: Callable[..., tuple[int, str]]
) -> None:
    """The signal does not change the exit code."""
    code, stderr = run_struck(moment, signal.Signals[name], "status", "nowhere")
    assert code == 66, stderr


def test_signal_to_python_m_gptbatch(tmp_path: Path) -> None:
    """A FIFO as the config blocks the command at a point where a signal must end it.

    The text on standard error shows that the command has reached this point.
    """
    os.mkfifo(tmp_path / "prompts.jsonl")
    command = [
        sys.executable,
        "-m",
        "gptbatch",
        "generate",
        "--model",
        "bundled:demo/model",
        "--input",
        "prompts.jsonl",
        "--output",
        "out",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=child_environment(), stderr=subprocess.PIPE, text=True
    )
    writer = os.open(
        tmp_path / "prompts.jsonl", os.O_WRONLY
    )  # returns when the command has opened it
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=LIMIT_S)
    os.close(writer)
    assert process.returncode == EXIT_STOPPED
    assert "stopped by SIGHUP" in stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("numbers", "codes"),
    [
        ([signal.SIGTERM], {EXIT_STOPPED}),
        ([signal.SIGKILL], {-signal.SIGKILL}),
        ([signal.SIGTERM, signal.SIGINT], {128 + signal.SIGTERM, 128 + signal.SIGINT}),
        ([signal.SIGTERM, signal.SIGKILL], {-signal.SIGKILL}),
    ],
    ids=lambda value: "+".join(number.name for number in value) if isinstance(value, list) else "",
)
def test_compilers_end_with_a_stopped_build(
    launcher: Launcher,
    checkpoint: Path,
    tmp_path: Path,
    numbers: list[signal.Signals],
    codes: set[int],
) -> None:
    """Their child processes end too. The fake compiler prints both process ids."""
    compiler, started = tmp_path / "c++", tmp_path / "started"
    compiler.write_text(
        f"#!/bin/bash\ntrap '' HUP INT TERM\nsleep 600 &\necho $$ $! >> {started}\nwait; wait\n"
    )
    compiler.chmod(0o755)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The king"}\n')
    child = launcher.start(
        *("generate", "--model", checkpoint, "--input", "prompts.jsonl", "--output", "out"),
        cwd=tmp_path,
        env={"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": str(compiler)},
    )
    wait_for(
        lambda: started.exists() and len(started.read_text().split()) == 2 * len(KERNELS.units),
        "compilers",
    )
    for number in numbers:
        child.send_signal(number)
    assert child.wait() in codes, child.stderr
    wait_for(
        lambda: not [pid for pid in started.read_text().split() if is_running(int(pid))],
        "end of the compilers",
    )


def test_sighup_is_ignored_under_nohup(
    tmp_path: Path, run_struck: Callable[..., tuple[int, str]]
) -> None:
    program = f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n{PROGRAM}"
    code, stderr = run_struck("click", signal.SIGHUP, "--version", program=program)
    assert (code, stderr) == (0, "")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("SIGTERM", "SIGINT") else pytest.mark.slow)
        for name in NAMES
    ],
)
def test_two_equal_signals_at_once_count_as_one(
    name: str, run_struck: Callable[..., tuple[int, str]]
) -> None:
    """timeout(1) signals the process and its group."""
    twice = PROGRAM.replace(
        "    os.kill(os.getpid(), number)",
        "    signals.ONE_SIGNAL_S = 900\n    [os.kill(os.getpid(), number) for _ in range(2)]",
        1,
    )
    assert twice != PROGRAM
    code, stderr = run_struck("click", signal.Signals[name], "status", "nowhere", program=twice)
    assert (code, stderr.strip()) == (
        EXIT_STOPPED,
        f"gptbatch: stopped by {name}; run the same command again",
    )


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


@pytest.mark.usefixtures("handlers")
def test_the_library_restores_the_handlers() -> None:
    with Signals() as signals:
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_for(lambda: signals.requested() is not None, "the signal")
        assert signals.requested() == "SIGUSR1"
