"""How an exception becomes a message on standard error and an exit code."""

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
from gptbatch.jobs.messages import clean, is_from_echo, say
from gptbatch.pipeline.errors import ConfigError, GptbatchError, StoppedError, StorageError

BUG = 70
MAX_QUOTED = 200
MAX_CAUSES = 20
MAX_LIBRARY_TEXT = 300
COMPLETION = "_GPTBATCH_COMPLETE"  # set by the shell that asks click for completions
OWN = "gptbatch"
# what the names of a library's environment variables begin with, besides its own name
VARIABLES = {
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
    r"not enough memory|can't allocate memory|cannot allocate memory|bad_alloc|out of memory|memory allocation of \d+|"
    r"failed to map segment|malloc of size|realloc of size|Unable to allocate|os error 12\b",
    re.IGNORECASE,
)
_THREADS = re.compile(
    r"can't start new thread|Resource temporarily unavailable|failed to spawn|os error 11\b|pthread_create",
    re.IGNORECASE,
)


def report(error: BaseException, signal_name: str | None) -> int:
    """Say what happened, and return the exit code. signal_name: the signal that has arrived, if one has."""
    if isinstance(error, click.Abort) and isinstance(error.__cause__, EOFError):
        error = error.__cause__  # which click takes for the end of what a user types
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        say(f"stopped{f' by {signal_name}' if signal_name else ''}; run the same command again")
        return StoppedError.exit_code
    if isinstance(error, click.ClickException):
        say_usage(error)
        return error.exit_code
    if isinstance(error, SystemExit):
        if COMPLETION in os.environ and isinstance(error.code, int):
            return error.code
        _drop_output()  # how click ends when the reader of our standard output has gone
        return StorageError.exit_code
    if not isinstance(error, StoppedError) and (shortage := find_shortage(error)) is not None:
        say(shortage)
        return StoppedError.exit_code
    if isinstance(error, GptbatchError):
        say(str(error))
        return error.exit_code
    if isinstance(error, OSError):
        if is_from_echo(error):
            _drop_output()
            say(f"standard output: cannot be written ({error.strerror or error})")
        else:
            say(f"{_short(error.filename) or 'I/O'}: {error.strerror or error}")
        return StorageError.exit_code
    if (library := find_library(error)) is not None:
        say(describe_library(library, error))
        return ConfigError.exit_code
    logger.error("this is a bug in gptbatch; please report it with the lines below", exc_info=error)
    return BUG


def say_usage(error: click.ClickException) -> None:
    """As click shows it: usage, hint, error; cleaned, and with long values cut."""
    shown = io.StringIO()
    error.show(file=shown)
    text = re.sub(
        rf"\S{{{MAX_QUOTED + 1},}}",
        lambda found: f"{found[0][:MAX_QUOTED]}...",
        shown.getvalue().rstrip("\n"),
    )
    with suppress(OSError):  # nobody may be left to read it
        click.echo(clean(text, indent=""), err=True)


def _drop_output() -> None:
    """Nothing is left to be flushed to standard output at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _short(name: object) -> str:
    text = "" if name is None else os.fsdecode(name) if isinstance(name, bytes) else str(name)
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}... ({len(text)} characters)"


def find_library(error: BaseException) -> str | None:
    """The library that failed while it was imported: broken, not installed, or with an environment that it does not accept."""
    if not isinstance(error, Exception):
        return None
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        name = error.name.partition(".")[0]
        return None if name == OWN else name
    library = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if name == OWN:
            library = None
        elif (
            library is not None or frame.f_code.co_name == "<module>"
        ) and name not in sys.stdlib_module_names:
            library = name
    return library


def describe_library(library: str, error: BaseException) -> str:
    """What the library says, and the environment variables that it may have read."""
    prefixes = (f"{library.upper()}_", *VARIABLES.get(library, ()))
    text = " ".join(str(error).split())
    if len(text) > MAX_LIBRARY_TEXT:
        text = f"{text[:MAX_LIBRARY_TEXT]}..."
    found = sorted(name for name in os.environ if name.startswith(prefixes))
    said = [f"{name}={_short(os.environ[name])}" for name in found]
    advice = (
        f"correct or unset what it reads from the environment: {', '.join(said)}"
        if said
        else "install it again"
    )
    return f"the library {library} cannot be imported ({type(error).__name__}: {text}); {advice}"


def find_shortage(error: BaseException) -> str | None:
    """The message where memory or threads ran out, by the error or by one that caused it; else None."""
    link: BaseException | None = error
    for _ in range(MAX_CAUSES):
        if link is None:
            return None
        number = link.errno if isinstance(link, OSError) else None
        # torch, pyarrow and the Rust libraries (whose panics are no Exceptions) say it in words only
        in_words = (
            isinstance(link, (RuntimeError, ImportError))
            or type(link) is Exception
            or not isinstance(link, Exception)
        )
        text = str(link) if in_words else ""
        if isinstance(link, MemoryError) or number == errno.ENOMEM or _MEMORY.search(text):
            return out_of_memory()
        if number == errno.EAGAIN or _THREADS.search(text):
            return out_of_threads()
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None
