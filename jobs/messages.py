"""What reaches a terminal: without secrets, and without characters that a terminal obeys."""

from __future__ import annotations

import logging
import sys
import traceback
from contextlib import suppress

import click

from gptbatch.pipeline.system.redact import printable, redact

MAX_LINE = 4000


def say(message: str) -> None:
    """Write a message to standard error: `gptbatch: ` and its lines, those after the first indented."""
    with suppress(OSError):  # nobody may be left to read it
        click.echo(f"gptbatch: {cut(clean(message))}", err=True)


def echo(text: str) -> None:
    """Write text to standard output."""
    click.echo(clean(text, indent=""))


def is_from_echo(error: BaseException) -> bool:
    """Whether writing to standard output failed: `say` lets no error pass."""
    return any(
        frame.f_code is click.echo.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def clean(text: str, indent: str = "  ") -> str:
    """Lines without secrets and control characters. indent: of all but the first, so that no name can forge a message."""
    return f"\n{indent}".join(printable(line) for line in redact(text).split("\n"))


def cut(text: str) -> str:
    """Lines of bounded length: a library may say all that it was given."""
    lines = text.split("\n")
    return "\n".join(
        line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}... ({len(line)} characters)"
        for line in lines
    )


class LogFormatter(logging.Formatter):
    """Records and tracebacks, cleaned. A message is one line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s %(levelname)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return cut(clean(super().format(record)))


def set_up_logging(verbose: bool) -> None:
    """Warnings, and what takes long enough to look like nothing: loading, building kernels."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO if verbose else logging.WARNING)
    for name in ("gptbatch.kernels", "gptbatch.loading"):
        logging.getLogger(name).setLevel(logging.INFO)
