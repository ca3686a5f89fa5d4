"""RunView: what the report says about one run, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gptbatch.pipeline.audit.run_reader import RunReader
from gptbatch.pipeline.config import config_fields
from gptbatch.pipeline.errors import StorageError
from gptbatch.pipeline.output.folder import ERRORS, OutputFolder
from gptbatch.pipeline.output.status import OutputStatus, output_status
from gptbatch.pipeline.report.run_columns import RunColumns, read_columns
from gptbatch.pipeline.report.series import TimeAxis, Timeline, time_axis, timeline
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.system.redact import redact

# The summary shows these.
_SHOWN_ELSEWHERE = ("model", "input", "output", "engine.device")
# How the last process ended, by the state in its progress file.
_ENDS = {
    "stopped": "stopped by a signal",
    "failed": "ended by an error",
    "loading": "killed while it loaded the model",
    "running": "killed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over a run.

    Attributes:
        rows: Rows of the table.
        error_rows: Rows of the table with an error.
        prompt_tokens: Tokens of the prompts.
        cached_tokens: Tokens of the prompts found in the prefix cache.
        new_tokens: Tokens of the completions.
        active_s: Seconds in which rows ran; None if none ever ran.
        wall_s: Seconds from the first step to the last new token, with gaps.
        tokens_per_s: New tokens per second of `active_s`.
    """

    rows: int
    error_rows: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    active_s: float | None
    wall_s: float | None
    tokens_per_s: float | None

    @property
    def cached_share(self) -> float | None:
        """The share of prompt tokens found in the prefix cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None


class RunView:
    """A run with its columns and time axis.

    Args:
        path: The output folder.

    Attributes:
        run: The reader of its rows.
        status: The status of the folder.
        columns: The numbers of all rows.

    Raises:
        InputNotFoundError: The folder holds no run.
        OutputConflictError: It holds parts of several jobs.
        StorageError: It cannot be read.
    """

    def __init__(self, path: Location) -> None:
        self.run = RunReader(path)
        self.status: OutputStatus = output_status(path, (self.run.state, self.run.listing))
        self.columns: RunColumns = read_columns(self.run)

    @property
    def unit(self) -> str:
        """The word for rows of the table: "samples" where a row of the input has several."""
        return "samples" if self.run.has_samples else "rows"

    @cached_property
    def axis(self) -> TimeAxis | None:
        """The time axis; None if no row ever ran."""
        return time_axis(self.columns)

    @cached_property
    def timeline(self) -> Timeline | None:
        """The rates over time; None if no row ever ran."""
        return None if self.axis is None else timeline(self.columns, self.axis)

    @cached_property
    def totals(self) -> Totals:
        """Sums over the run."""
        columns, axis = self.columns, self.axis
        new_tokens = int(columns.completion_tokens.sum(dtype=np.int64))
        return Totals(
            rows=len(columns),
            error_rows=sum(group.count for group in columns.errors),
            prompt_tokens=int(columns.prompt_tokens.sum(dtype=np.int64)),
            cached_tokens=int(columns.cached_tokens.sum(dtype=np.int64)),
            new_tokens=new_tokens,
            active_s=None if axis is None else axis.active_s,
            wall_s=None if axis is None else axis.ended_s - axis.began_s,
            tokens_per_s=None if axis is None else new_tokens / axis.active_s,
        )

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config, flat (`engine.dtype`); empty for a copy without it."""
        try:
            config = self.run.config
        except StorageError:
            return {}
        flat: dict[str, Any] = {}
        for key, value in config.items():
            if key == "engine" and isinstance(value, dict):
                flat.update({f"{key}.{name}": item for name, item in value.items()})
            else:
                flat[key] = value
        return {
            key: redact(value) if isinstance(value, str) else value for key, value in flat.items()
        }

    @property
    def changed_settings(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        fields = config_fields()
        return {
            key: value
            for key, value in self.config.items()
            if key not in _SHOWN_ELSEWHERE
            and (
                key not in fields
                or fields[key].is_required()
                or _differs(value, fields[key].default)
            )
        }

    @property
    def batch_size(self) -> int | None:
        """The largest number of running rows, as configured."""
        size = self.config.get("engine.batch_size")
        return size if isinstance(size, int) else None

    @property
    def ended(self) -> str:
        """How the run ended, in a few words."""
        if self.status.state == "complete":
            return "complete"
        if self.status.state == "running":
            return "running"
        return _ENDS.get(self.status.last_state or "", "unfinished")

    @property
    def has_error_file(self) -> bool:
        """Whether the folder has errors.jsonl."""
        return (OutputFolder(self.run.path).work / ERRORS).exists()


def _differs(value: Any, default: Any) -> bool:
    return value != default and not (value in ({}, [], None) and default in ({}, [], None, ()))
