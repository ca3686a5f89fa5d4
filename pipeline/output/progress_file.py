"""`progress.json`: the progress of a run for monitoring, replaced every few seconds."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Literal

from gptbatch.pipeline.errors import OutputConflictError, StoppedError, StorageError
from gptbatch.pipeline.output.json_models import ProgressContent, validated
from gptbatch.pipeline.storage.atomic_write import Writer
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.storage.regular_file import read_json

PROGRESS = "progress.json"
WRITE_INTERVAL_S = 2.0
# Requests to an object store take longer, and cost money.
OBJECT_WRITE_INTERVAL_S = 20.0
# Loading a large model takes minutes without an update.
MAX_SILENCE_S = 600.0

State = Literal["loading", "running", "complete", "stopped", "failed"]


class ProgressFile:
    """Writes the progress of a run.

    Args:
        run: The folder of the run.
        writer: Writes files atomically.
        rows_total: Rows of the parts of this run.
        rows_kept: Rows among them that earlier runs have done.
        error_rows_kept: Error rows among these.

    Attributes:
        threads: CPU threads of the run. None before its model is loaded.
    """

    def __init__(
        self,
        run: Location,
        writer: Writer,
        *,
        rows_total: int,
        rows_kept: int,
        error_rows_kept: int,
    ) -> None:
        self._path, self._writer = run / PROGRESS, writer
        self._rows_total, self._rows_kept, self._errors_kept = (
            rows_total,
            rows_kept,
            error_rows_kept,
        )
        self._began_s = self._updated_s = time.monotonic()
        self._is_local = isinstance(run, Path)
        self._interval_s = WRITE_INTERVAL_S if self._is_local else OBJECT_WRITE_INTERVAL_S
        self._has_ended = threading.Event()
        self._state: State = "loading"
        self._written_s = -self._interval_s
        self._rows = self._errors = self._tokens = 0
        self._remaining_s: float | None = None
        self._last_speed: ProgressContent | None = None
        self.threads: int | None = None

    @property
    def seconds(self) -> float:
        """Seconds from `begin` to the last update, which comes when all rows are written."""
        return self._updated_s - self._began_s

    def take_over(self, last_speed: ProgressContent | None) -> None:
        """Show the speed of an earlier run at the end, if this run generates no token."""
        self._last_speed = last_speed

    @contextmanager
    def recording_state(self) -> Iterator[None]:
        """Record the state of the run: loading at first, then complete, stopped or failed."""
        self.write("loading")
        try:
            with nullcontext() if self._is_local else self._repeating():
                yield
        except (StoppedError, KeyboardInterrupt):
            self.write("stopped")
            raise
        except OutputConflictError:
            # The files in .gptbatch belong to another job now.
            raise
        except BaseException:
            self.write("failed")
            raise
        self.write("complete")

    @contextmanager
    def _repeating(self) -> Iterator[None]:
        """Show that the run is alive where no lock does, also while it loads the model."""

        def repeat() -> None:
            while not self._has_ended.wait(self._interval_s):
                if time.monotonic() - self._written_s >= self._interval_s:
                    self.write(self._state)

        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._has_ended.set()
            thread.join()

    def begin(self, total_rows: int, done_rows: int) -> None:
        """Start the clock of tokens/s: the first row is about to run."""
        self._began_s = self._updated_s = time.monotonic()
        self.write("running")

    def update(
        self, *, rows: int, errors: int, completion_tokens: int, remaining_s: float | None
    ) -> None:
        """Take the counts of this run, and write the file at most every few seconds."""
        self._rows, self._errors, self._tokens = rows, errors, completion_tokens
        self._remaining_s, self._updated_s = remaining_s, time.monotonic()
        if self._updated_s - self._written_s >= self._interval_s:
            self.write("running")

    def end(self) -> None:
        """Do nothing: `recording_state` writes the final state."""

    def write(self, state: State) -> None:
        """Write the file now. A full disk does not end the run for the sake of this file."""
        self._written_s, self._state = time.monotonic(), state
        # Without the time of finishing the output, after the last row.
        has_speed = self._tokens > 0 and self.seconds > 0
        updated_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        speed = round(self._tokens / self.seconds, 1) if has_speed else None
        if self._last_speed is not None and speed is None and state == "complete":
            speed, updated_at = (
                self._last_speed.tokens_per_s,
                self._last_speed.updated_at or updated_at,
            )
        content = {
            "state": state,
            "rows_total": self._rows_total,
            "rows_done": self._rows_kept + self._rows,
            "error_rows": self._errors_kept + self._errors,
            "tokens_per_s": speed,
            "remaining_s": None
            if self._remaining_s is None or state != "running"
            else round(self._remaining_s, 1),
            "threads": self.threads,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "updated_at": updated_at,
        }
        with suppress(StorageError):
            self._writer.write_text(self._path, json.dumps(content) + "\n", durable=False)


def seems_running(run: Location, max_silence_s: float = MAX_SILENCE_S) -> bool:
    """Return whether a run says that it is running, less than `max_silence_s` ago.

    This is a guess, for file systems without locks.
    """
    progress = read_progress(run)
    if (
        progress is None
        or progress.updated_at is None
        or progress.state not in ("loading", "running")
    ):
        return False
    try:
        updated_s = datetime.fromisoformat(progress.updated_at).timestamp()
    except ValueError:
        # The pattern of the field accepts the 99th day of a month.
        return False
    return time.time() - updated_s < max_silence_s


def read_progress(run: Location) -> ProgressContent | None:
    """Read the progress of a run; None when the file is missing or damaged."""
    try:
        return validated(ProgressContent, read_json(run / PROGRESS))
    except (OSError, ValueError):
        return None
