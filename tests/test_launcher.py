"""The launcher of the tests returns the exit code of the right child."""

from __future__ import annotations

import json
import signal

from tests.launcher import Launcher


def test_each_child_has_its_own_exit_code(launcher: Launcher) -> None:
    good, bad = launcher.start("--version"), launcher.start("--unknown")
    assert (bad.wait(), good.wait(), bad.wait()) == (2, 0, 2)
    assert not good.is_running()
    good.send_signal(signal.SIGKILL)  # its pid may be another process's now
    assert good.wait() == 0


def test_an_unread_answer_is_discarded(launcher: Launcher) -> None:
    """A time-out in the middle of a request leaves an unread answer."""
    child = launcher.start("--unknown")
    assert launcher._server.stdin is not None
    launcher._server.stdin.write(json.dumps({"poll": True, "token": child.token, "tag": 0}) + "\n")
    launcher._server.stdin.flush()
    assert child.wait() == 2
    assert launcher.run("--version")[0] == 0
