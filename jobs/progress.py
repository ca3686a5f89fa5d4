"""Progress on standard error: a bar on a terminal, a plain line every few seconds otherwise."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

import click
from tqdm import tqdm

LINE_EVERY_S = 5.0
REFRESH_S = 0.2


class Bar:
    """A tqdm bar over rows: `40%|####  | 80/200 rows [00:03, 00:05 left, 5376 tokens/s]`.

    The time that is left is that of the run, by tokens. That of tqdm goes by rows.
    """

    def begin(self, total_rows: int, done_rows: int) -> None:
        self._bar = tqdm(
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
            shown.append(f"{errors} errors")
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
                f"{done} of {total} rows, {errors} errors, {speed}{left}",
                err=True,
            )

    def end(self) -> None:
        pass


def progress_for_terminal() -> Bar | Lines:
    """Return a bar if standard error is a terminal, else lines."""
    # sys.stderr is None if the caller has closed it
    has_terminal = sys.stderr is not None and sys.stderr.isatty()
    return Bar() if has_terminal else Lines()
