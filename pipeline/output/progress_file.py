"""`progress.json`: how far a run is, for whoever watches; replaced every few seconds, never half-written."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Literal

from gptbatch.pipeline.errors import StorageError
from gptbatch.pipeline.output.atomic_write import Writer
from gptbatch.pipeline.output.json_models import Progress, validated
from gptbatch.pipeline.system.regular_file import read_json

PROGRESS = "progress.json"
WRITE_INTERVAL_S = 2.0
MAX_SILENCE_S = 600.0  # loading a large model says nothing for minutes

State = Literal["loading", "running", "complete", "stopped", "failed"]


class ProgressFile:
    """total, done and failed count rows of the whole output; tokens/s and the time left are this run's."""

    def __init__(self, work: Path, writer: Writer, *, total: int, done: int, failed: int) -> None:
        self._path, self._writer = work / PROGRESS, writer
        self._total, self._done, self._failed = total, done, failed
        self._began = time.monotonic()
        self._written = -WRITE_INTERVAL_S
        self._rows = self._errors = self._tokens = 0

    def begin(self) -> None:
        """The first row is about to run."""
        self._began = time.monotonic()
        self.write("running")

    def update(self, *, rows: int, errors: int, completion_tokens: int) -> None:
        """Counts of this run. Writes now and then."""
        self._rows, self._errors, self._tokens = rows, errors, completion_tokens
        if time.monotonic() - self._written >= WRITE_INTERVAL_S:
            self.write("running")

    def write(self, state: State) -> None:
        """Now. A full disk must not end a run for the sake of this file."""
        self._written = time.monotonic()
        elapsed = self._written - self._began
        left = self._total - self._done - self._rows
        content = {
            "state": state,
            "rows_total": self._total,
            "rows_done": self._done + self._rows,
            "error_rows": self._failed + self._errors,
            "tokens_per_s": round(self._tokens / elapsed, 1) if elapsed > 0 else 0.0,
            "remaining_s": round(elapsed / self._rows * left, 1)
            if self._rows and state == "running"
            else None,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "updated_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        with suppress(StorageError):
            self._writer.write_text(self._path, json.dumps(content) + "\n", durable=False)


def seems_running(work: Path) -> bool:
    """Whether a run has said less than MAX_SILENCE_S ago that it is going on. For file systems without locks: a guess."""
    progress = read_progress(work)
    if (
        progress is None
        or progress.updated_at is None
        or progress.state not in ("loading", "running")
    ):
        return False
    try:
        updated_s = datetime.fromisoformat(progress.updated_at).timestamp()
    except ValueError:  # the 99th of a month
        return False
    return time.time() - updated_s < MAX_SILENCE_S


def read_progress(work: Path) -> Progress | None:
    """What a run has said of its progress; None when it has not, or the file is damaged."""
    try:
        return validated(Progress, read_json(work / PROGRESS))
    except (OSError, ValueError):
        return None
