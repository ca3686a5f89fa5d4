"""The console script `gptbatch`: signals are handled from its first line to its last, and every end has a documented code.

Imports nothing heavy, so that a signal finds its handler as early as can be.
"""

from __future__ import annotations

import gc
import os
import sys

from gptbatch.jobs.signals import STOPPED, Signals

GARBAGE_THRESHOLD = 100_000  # new objects before the collector looks; Python's own is 700 to 2,000


def main() -> None:
    """Run the command and exit with a documented code."""
    signals = Signals()
    try:
        open_standard_files()
        signals.install()
        # torch and what comes with it are many objects that stay: to look through them for garbage again and again
        # while they are loaded, and a last time at the end, is a good part of a short run
        gc.set_threshold(GARBAGE_THRESHOLD)
        code = _run(sys.argv[1:], signals)
    except KeyboardInterrupt:  # between two lines of ours
        code = STOPPED
    signals.finish()
    gc.disable()
    sys.exit(code)


def open_standard_files() -> None:
    """Put /dev/null where the caller has closed a standard file: the next file that is opened would take its place."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def run_command(arguments: list[str]) -> int:
    """Run `gptbatch ARGUMENTS...` and return its exit code; messages go to standard error."""
    with Signals() as signals:
        return _run(arguments, signals)


def _run(arguments: list[str], signals: Signals) -> int:
    try:
        from gptbatch.jobs.group import cli

        code = cli.main(args=arguments, prog_name="gptbatch", standalone_mode=False, obj=signals)
        return code if isinstance(code, int) else 0
    except BaseException as error:  # noqa: BLE001 (panics of Rust libraries are no Exceptions)
        try:
            from gptbatch.jobs.failures import report

            return report(error, signals.requested())
        except MemoryError:
            os.write(2, b"gptbatch: out of memory\n")
            return STOPPED
