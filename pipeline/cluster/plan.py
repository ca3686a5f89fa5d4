"""plan_job: check the rows of an input once, before the runs of many shards."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.input.prompt_reader import open_input
from gptbatch.pipeline.output.folder import OutputFolder
from gptbatch.pipeline.output.input_record import check_input
from gptbatch.pipeline.output.lock import open_lock
from gptbatch.pipeline.output.part_runner import ErrorLimit
from gptbatch.pipeline.output.placement import check_placement
from gptbatch.pipeline.output.resume import check_format, check_part_rows, find_run
from gptbatch.pipeline.output.runs import open_run_folder
from gptbatch.pipeline.storage.location import location_of

logger = logging.getLogger("gptbatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The parts of a job.

    Attributes:
        output: The output folder.
        rows: Rows of the input.
        bad_rows: Rows that become error rows.
        part_rows: Rows per part.
        parts: Number of parts.
        input_digest: SHA-256 of the content of all rows that decides the output.
    """

    output: str
    rows: int
    bad_rows: int
    part_rows: int
    parts: int
    input_digest: str


def plan_job(config: JobConfig) -> Plan:
    """Check every row of the input, and write its index into the output folder.

    Runs of this input then begin without reading it. Neither the model nor its tokenizer is needed.

    Args:
        config: The settings of the job.

    Raises:
        GptbatchError: The errors of the input and the output folder that `run_job` raises.
    """
    check_placement(config)
    folder = OutputFolder(location_of(config.output))
    folder.check_creatable()
    state = find_run(folder)
    if state is not None and not state.holds_job:
        state = None
    if state is not None:
        check_format(config.output, state)
        check_part_rows(config, state)
    reader = open_input(config)
    if reader.source.files() is None:
        logger.warning(
            "%s: cannot be recognised again, since it is no file of this machine: each run checks "
            "its rows itself",
            reader.source.name,
        )
    checked = check_input(config, folder, reader, folder.read_hashes(), state, is_whole=False)
    ErrorLimit(config.max_row_errors, checked.summary.rows).check(checked.summary.bad_rows)
    folder.create()
    with open_lock(folder.work, shared=True), open_run_folder(folder.work) as run:
        checked.write(folder, run.writer)
    summary = checked.summary
    return Plan(
        output=config.output,
        rows=summary.rows,
        bad_rows=summary.bad_rows,
        part_rows=summary.part_rows,
        parts=len(summary.part_digests),
        input_digest=summary.digest,
    )
