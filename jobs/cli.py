"""The console script `gptbatch`: installs signal handlers, runs the command, exits.

Imports no heavy library, so that the handlers are installed early.
"""

from __future__ import annotations

import gc
import os
import sys

from gptbatch.jobs.signals import EXIT_STOPPED, Signals

# allocated objects per collection; the default of Python is 700 to 2,000
GARBAGE_THRESHOLD = 100_000


def main() -> None:
    """Run the command and exit with a documented code."""
    signals = Signals()
    try:
        open_standard_files()
        signals.install()
        # torch allocates many objects that stay alive. Repeated collections while it is imported,
        # and the one at exit, take a large part of the time of a short run.
        gc.set_threshold(GARBAGE_THRESHOLD)
        code = _run(sys.argv[1:], signals)
    except KeyboardInterrupt:
        code = EXIT_STOPPED
    signals.finish()
    gc.disable()
    sys.exit(code)


def open_standard_files() -> None:
    """Open /dev/null for each closed standard file, so that no other file gets its descriptor."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def run_command(arguments: list[str]) -> int:
    """Run `gptbatch ARGUMENTS...` and return its exit code. Messages go to standard error."""
    with Signals() as signals:
        return _run(arguments, signals)


def _run(arguments: list[str], signals: Signals) -> int:
    try:
        from gptbatch.jobs.group import cli

        code = cli.main(args=arguments, prog_name="gptbatch", standalone_mode=False, obj=signals)
        return code if isinstance(code, int) else 0
    except BaseException as error:  # noqa: BLE001 (a Rust panic is no Exception)
        try:
            from gptbatch.jobs.failures import report_error

            return report_error(error, signals.requested())
        except MemoryError:
            os.write(2, b"gptbatch: out of memory\n")
            return EXIT_STOPPED
