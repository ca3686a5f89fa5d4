"""The launcher of the tests: an exit code is that of its child, whatever happened before."""

from __future__ import annotations

import json
import signal

from tests.launcher import Launcher


def test_codes_are_told_apart(launcher: Launcher) -> None:
    good, bad = launcher.start("--version"), launcher.start("--unknown")
    assert (bad.wait(), good.wait(), bad.wait()) == (2, 0, 2)
    assert not good.is_running()
    good.send_signal(signal.SIGKILL)  # its pid may be another process's now
    assert good.wait() == 0


def test_an_answer_that_nobody_read_is_passed_over(launcher: Launcher) -> None:
    """As a time-out leaves it, in the middle of a question."""
    child = launcher.start("--unknown")
    assert launcher._server.stdin is not None
    launcher._server.stdin.write(json.dumps({"poll": True, "token": child.token, "tag": 0}) + "\n")
    launcher._server.stdin.flush()
    assert child.wait() == 2
    assert launcher.run("--version")[0] == 0
