"""finish_folder: marks an output complete when all parts are written. Needs no input or model."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import IncompleteError, InputNotFoundError
from gptbatch.pipeline.input.open_input import row_defaults
from gptbatch.pipeline.output.finish import finish, mark_complete
from gptbatch.pipeline.output.folder import CONFIG, OutputFolder
from gptbatch.pipeline.output.lock import open_lock
from gptbatch.pipeline.output.part_plan import count_parts
from gptbatch.pipeline.output.progress_file import ProgressFile
from gptbatch.pipeline.output.resume import check_format, find_run
from gptbatch.pipeline.output.run_folder import RunFolder
from gptbatch.pipeline.output.runs import last_speed, open_run_folder
from gptbatch.pipeline.storage.location import Location, location_of
from gptbatch.pipeline.storage.regular_file import open_whole
from gptbatch.pipeline.system.yaml_reader import (
    MAX_RECORDED_BYTES,
    YamlError,
    parse_yaml_mapping,
)

logger = logging.getLogger("gptbatch")

MAX_NAMED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedOutput:
    """A complete output.

    Attributes:
        output: The folder.
        rows: Its rows.
        parts: Its parts.
        errors: Error rows among the rows.
    """

    output: str
    rows: int
    parts: int
    errors: int


def finish_folder(output: str | Location) -> FinishedOutput:
    """Write the final manifest and `_SUCCESS` of an output whose parts are all written.

    Each run does so at its end. This is for the case that none came to its end.

    Args:
        output: The output: a folder, or a URL of an object store.

    Raises:
        InputNotFoundError: There is no run.
        IncompleteError: Parts are missing.
        InputRowsError: There are more error rows than the recorded `max_row_errors` allows.
        OutputBusyError: A run of the whole job is going on.
        OutputConflictError: The folder holds other parts or tables.
        StorageError: A file cannot be read or written.
    """
    path = location_of(output) if isinstance(output, str) else output
    folder = OutputFolder(path)
    state = find_run(folder) if path.is_dir() else None
    known = {} if state is None else state.identity
    if state is None or not {"rows", "part_rows", "input_digest"} <= known.keys():
        raise InputNotFoundError(
            f"{path}: holds no run of gptbatch; name the output folder of a run"
        )
    check_format(str(path), state)
    folder.create()
    with open_lock(folder.work, shared=True), open_run_folder(folder.work) as run:
        n_parts = count_parts(state.identity["part_rows"], state.identity["rows"])
        if missing := folder.missing_parts(n_parts):
            named = ", ".join(map(str, missing[:MAX_NAMED]))
            more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
            raise IncompleteError(
                f"{path}: {len(missing)} of {n_parts} parts are missing ({named}{more}); run the "
                "job again, which generates them"
            )
        config = _recorded_config(folder)
        done = finish(
            folder,
            run.writer,
            state.identity,
            folder.read_hashes(),
            {},
            row_defaults(config),
            config.max_row_errors,
        )
        finished = FinishedOutput(
            output=str(path),
            rows=sum(part.rows for part in done.parts),
            parts=len(done.parts),
            errors=sum(part.errors for part in done.parts),
        )
        _keep_speed(folder, run, finished)
        run.sweep()
        mark_complete(folder, run.writer, done)
    return finished


def _keep_speed(folder: OutputFolder, run: RunFolder, finished: FinishedOutput) -> None:
    """Record the speed of the last run, whose own record is about to be deleted."""
    progress = ProgressFile(
        run.path,
        run.writer,
        rows_total=finished.rows,
        rows_kept=finished.rows,
        error_rows_kept=finished.errors,
    )
    progress.take_over(last_speed(folder.work))
    progress.write("complete")


def _recorded_config(folder: OutputFolder) -> JobConfig:
    """Return the recorded config. Without one, settings have their defaults."""
    path = folder.work / CONFIG
    try:
        with open_whole(path) as file:
            content = parse_yaml_mapping(file.read(MAX_RECORDED_BYTES))
        return JobConfig.model_validate(content)
    except (OSError, ValueError, YamlError) as error:
        logger.warning("%s: cannot be read (%s); errors.jsonl has default field names", path, error)
        return JobConfig(model="unknown", input="-", output=str(folder.path))
