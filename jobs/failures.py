"""Turns an exception into a message on standard error and an exit code."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import sys
import traceback
from contextlib import suppress

import click

from gptbatch.jobs.limits import out_of_memory, out_of_threads
from gptbatch.jobs.messages import clean, is_from_echo, print_message
from gptbatch.pipeline.errors import ConfigError, GptbatchError, StoppedError, StorageError
from gptbatch.pipeline.system.error_text import shortened

EXIT_BUG = 70
MAX_QUOTED = 200
MAX_CAUSES = 20
# the shell sets it to get completions of the command line from click
COMPLETION_VARIABLE = "_GPTBATCH_COMPLETE"
PACKAGE = "gptbatch"
# prefixes of a library's environment variables, besides the name of the library
VARIABLE_PREFIXES = {
    "torch": ("PYTORCH_", "TORCHINDUCTOR_", "ATEN_"),
    "transformers": ("HF_",),
    "huggingface_hub": ("HF_", "HUGGING_FACE_HUB_", "HUGGINGFACE_"),
    "datasets": ("HF_",),
    "tokenizers": ("RAYON_",),
    "pyarrow": ("ARROW_",),
    "numpy": ("NPY_", "OPENBLAS_"),
}

logger = logging.getLogger("gptbatch")

_MEMORY = re.compile(
    r"not enough memory|can't allocate memory|cannot allocate memory|bad_alloc|out of memory|"
    r"memory allocation of \d+|failed to map segment|malloc of size|realloc of size|"
    r"Unable to allocate|os error 12\b",
    re.IGNORECASE,
)
_THREADS = re.compile(
    r"can't start new thread|Resource temporarily unavailable|failed to spawn|os error 11\b|"
    r"pthread_create",
    re.IGNORECASE,
)


def report_error(error: BaseException, signal_name: str | None) -> int:
    """Print the message of an exception and return the exit code.

    Args:
        error: The exception that ended the command.
        signal_name: The signal that the process has received; None for no signal.
    """
    # click turns every EOFError into Abort, for a prompt that a user closes
    if isinstance(error, click.Abort) and isinstance(error.__cause__, EOFError):
        error = error.__cause__
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        print_message(
            f"stopped{f' by {signal_name}' if signal_name else ''}; run the same command again"
        )
        return StoppedError.exit_code
    if isinstance(error, click.ClickException):
        print_usage_error(error)
        return error.exit_code
    if isinstance(error, SystemExit):
        if COMPLETION_VARIABLE in os.environ and isinstance(error.code, int):
            return error.code
        # click exits like this when the reader of standard output has closed the pipe
        _discard_output()
        return StorageError.exit_code
    if (
        not isinstance(error, StoppedError)
        and (shortage := find_exhausted_resource(error)) is not None
    ):
        print_message(shortage)
        return StoppedError.exit_code
    if isinstance(error, GptbatchError):
        print_message(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        if is_from_echo(error):
            _discard_output()
            print_message(f"standard output: cannot be written ({error.strerror or error})")
        else:
            print_message(f"{_short(error.filename) or 'I/O'}: {error.strerror or error}")
        return StorageError.exit_code
    if (library := find_failed_library(error)) is not None:
        print_message(describe_failed_library(library, error))
        return ConfigError.exit_code
    logger.error("this is a bug in gptbatch; please report it with the lines below", exc_info=error)
    return EXIT_BUG


def print_usage_error(error: click.ClickException) -> None:
    """Print usage, hint and error as click does, without control characters and long values."""
    shown = io.StringIO()
    error.show(file=shown)
    text = re.sub(
        rf"\S{{{MAX_QUOTED + 1},}}",
        lambda found: f"{found[0][:MAX_QUOTED]}...",
        shown.getvalue().rstrip("\n"),
    )
    # the reader of standard error may have closed it
    with suppress(OSError):
        click.echo(clean(text, indent=""), err=True)


def _discard_output() -> None:
    """Redirect standard output to /dev/null, so that the flush at exit does not fail."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _short(name: object) -> str:
    text = "" if name is None else os.fsdecode(name) if isinstance(name, bytes) else str(name)
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}... ({len(text)} characters)"


def find_failed_library(error: BaseException) -> str | None:
    """Return the library whose import failed; None if the error has another cause.

    The library may be broken, not installed, or reject an environment variable.
    """
    if not isinstance(error, Exception):
        return None
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        name = error.name.partition(".")[0]
        return None if name == PACKAGE else name
    library = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if name == PACKAGE:
            library = None
        elif (
            library is not None or frame.f_code.co_name == "<module>"
        ) and name not in sys.stdlib_module_names:
            library = name
    return library


def describe_failed_library(library: str, error: BaseException) -> str:
    """Return the message of the library, and the environment variables that it may have read."""
    prefixes = (f"{library.upper()}_", *VARIABLE_PREFIXES.get(library, ()))
    text = shortened(" ".join(str(error).split()))
    found = sorted(name for name in os.environ if name.startswith(prefixes))
    variables = [f"{name}={_short(os.environ[name])}" for name in found]
    advice = (
        f"correct or unset these environment variables: {', '.join(variables)}"
        if variables
        else "install it again"
    )
    return f"the library {library} cannot be imported ({type(error).__name__}: {text}); {advice}"


def find_exhausted_resource(error: BaseException) -> str | None:
    """Return a message if the error, or one of its causes, is a lack of memory or threads."""
    link: BaseException | None = error
    for _ in range(MAX_CAUSES):
        if link is None:
            return None
        number = link.errno if isinstance(link, OSError) else None
        # torch, pyarrow and Rust libraries report it in the text only. A Rust panic is a
        # BaseException, but no Exception.
        has_text_only = (
            isinstance(link, (RuntimeError, ImportError))
            or type(link) is Exception
            or not isinstance(link, Exception)
        )
        text = str(link) if has_text_only else ""
        if isinstance(link, MemoryError) or number == errno.ENOMEM or _MEMORY.search(text):
            return out_of_memory()
        if number == errno.EAGAIN or _THREADS.search(text):
            return out_of_threads()
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None
