"""Progress on standard error: a bar on a terminal, a plain line every few seconds otherwise."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import click
from tqdm import tqdm

from gptbatch.pipeline.system.nouns import noun

LINE_EVERY_S = 5.0
REFRESH_S = 0.2


class Bar:
    """A tqdm bar over rows: `40%|####  | 80/200 rows [00:03, 00:05 left, 5376 tokens/s]`.

    The time that is left is that of the run, by tokens. That of tqdm goes by rows.

    Args:
        kind: The class of the bar.
    """

    def __init__(self, kind: Callable[..., Any] = tqdm) -> None:
        self._kind = kind

    def begin(self, total_rows: int, done_rows: int) -> None:
        self._bar = self._kind(
            total=total_rows,
            initial=done_rows,
            file=sys.stderr,
            dynamic_ncols=True,
            # Also while no row is finished.
            mininterval=REFRESH_S,
            miniters=0,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} rows [{elapsed}{postfix}]",
        )
        self._total, self._done = total_rows, done_rows
        self._began = time.monotonic()

    def update(
        self, *, rows: int, errors: int, completion_tokens: int, remaining_s: float | None
    ) -> None:
        speed = completion_tokens / max(time.monotonic() - self._began, 1e-9)
        shown = [f"{speed:.0f} tokens/s"] if completion_tokens else []
        if remaining_s is not None:
            shown.insert(0, f"{tqdm.format_interval(remaining_s)} left")
        if errors:
            shown.append(f"{errors} {noun(errors, 'error')}")
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        # A shard that helps others generates more than its own rows.
        self._bar.total = max(self._total, self._done + rows)
        self._bar.update(self._done + rows - self._bar.n)

    def end(self) -> None:
        self._bar.close()


class Lines:
    """A line every few seconds: `120 of 2000 rows, 0 errors, 950 tokens/s, about 40 s left`."""

    def begin(self, total_rows: int, done_rows: int) -> None:
        self._total, self._done = total_rows, done_rows
        self._began = self._printed = time.monotonic()

    def update(
        self, *, rows: int, errors: int, completion_tokens: int, remaining_s: float | None
    ) -> None:
        now = time.monotonic()
        if now - self._printed < LINE_EVERY_S:
            return
        self._printed = now
        done = self._done + rows
        # A shard that helps others generates more than its own rows.
        total = max(self._total, done)
        left = "" if remaining_s is None else f", about {remaining_s:.0f} s left"
        speed = f"{completion_tokens / (now - self._began):.0f} tokens/s"
        # the reader of standard error may have closed it
        with suppress(OSError):
            click.echo(
                f"{done} of {total} rows, {errors} {noun(errors, 'error')}, {speed}{left}",
                err=True,
            )

    def end(self) -> None:
        pass


def progress_for_terminal() -> Bar | Lines:
    """Return a bar if standard error is a terminal, else lines."""
    return Bar() if _has_terminal() else Lines()


def progress_for_python(shown: bool | None) -> Bar | None:
    """Return a bar for a call from Python; None shows one in notebooks and on terminals."""
    if shown is False:
        return None
    if _is_notebook():
        with warnings.catch_warnings():
            # without ipywidgets, the bar is text
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm as notebook_bar
        return Bar(notebook_bar)
    return Bar() if shown or _has_terminal() else None


def _has_terminal() -> bool:
    # sys.stderr is None if the caller has closed it
    return sys.stderr is not None and sys.stderr.isatty()


def _is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config
