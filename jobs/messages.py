"""Output to a terminal: messages and log lines without secrets and control characters."""

from __future__ import annotations

import logging
import sys
import traceback
from contextlib import suppress

import click

from gptbatch.pipeline.system.redact import printable, redact

MAX_LINE = 4000


def print_message(message: str) -> None:
    """Write `gptbatch: MESSAGE` to standard error. Lines after the first are indented."""
    # the reader of standard error may have closed it
    with suppress(OSError):
        click.echo(f"gptbatch: {cut(clean(message))}", err=True)


def echo(text: str) -> None:
    """Write text to standard output."""
    click.echo(clean(text, indent=""))


def is_from_echo(error: BaseException) -> bool:
    """Return whether the error comes from writing to standard output."""
    return any(
        frame.f_code is click.echo.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def clean(text: str, indent: str = "  ") -> str:
    """Remove secrets and control characters.

    Args:
        text: One or several lines.
        indent: Put before each line but the first, so that a file name cannot forge a message.
    """
    return f"\n{indent}".join(printable(line) for line in redact(text).split("\n"))


def cut(text: str) -> str:
    """Limit the length of each line: the message of a library may quote its whole input."""
    lines = text.split("\n")
    return "\n".join(
        line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}... ({len(line)} characters)"
        for line in lines
    )


class LogFormatter(logging.Formatter):
    """Formats log records and tracebacks without secrets and control characters."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s %(levelname)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return cut(clean(super().format(record)))


def set_up_logging(verbose: bool) -> None:
    """Log warnings, and the slow steps at start-up: loading, and building the kernels.

    Args:
        verbose: Log everything of level INFO.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO if verbose else logging.WARNING)
    for name in ("gptbatch.kernels", "gptbatch.loading"):
        logging.getLogger(name).setLevel(logging.INFO)


def log_verbosely() -> None:
    """Log everything of level INFO from now on."""
    logging.getLogger().setLevel(logging.INFO)
