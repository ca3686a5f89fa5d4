"""plan_job: check the rows of an input once, before the runs of many shards."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from gptbatch.pipeline.cluster.plan_shard import PlanShard, check_divisible
from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.input.open_input import open_input
from gptbatch.pipeline.input.prompt_reader import InputSummary, PromptReader
from gptbatch.pipeline.output.error_limit import ErrorLimit
from gptbatch.pipeline.output.file_hashes import wait_for_clock_tick
from gptbatch.pipeline.output.folder import FolderState, OutputFolder
from gptbatch.pipeline.output.index_piece import delete_pieces
from gptbatch.pipeline.output.input_record import check_input
from gptbatch.pipeline.output.lock import open_lock
from gptbatch.pipeline.output.part_plan import count_parts
from gptbatch.pipeline.output.placement import check_placement
from gptbatch.pipeline.output.resume import check_format, check_part_rows, find_run, part_rows_of
from gptbatch.pipeline.output.runs import open_run_folder
from gptbatch.pipeline.output.shards import find_shard
from gptbatch.pipeline.storage.location import location_of

logger = logging.getLogger("gptbatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The parts of a job.

    Attributes:
        output: The output folder.
        rows: Rows of the input.
        bad_rows: Rows that become error rows. Without `complete`, those that this shard has found.
        part_rows: Rows per part.
        parts: Number of parts.
        input_digest: SHA-256 of the content of all rows that decides the output. None without
            `complete`.
        complete: Whether all rows are checked. Otherwise other shards have not checked theirs.
    """

    output: str
    rows: int
    bad_rows: int
    part_rows: int
    parts: int
    input_digest: str | None
    complete: bool


def plan_job(config: JobConfig) -> Plan:
    """Check every row of the input, and write its index into the output folder.

    Runs of this input then begin without reading it. Neither the model nor its tokenizer is needed.
    With a shard in the config, only its rows are checked. The last shard writes the index.

    Args:
        config: The settings of the job.

    Raises:
        GptbatchError: The errors of the input and the output folder that `run_job` raises.
    """
    shard = find_shard(config.shard, os.environ)
    if not shard.is_whole:
        check_divisible(config)
    check_placement(config)
    folder = OutputFolder(location_of(config.output))
    folder.check_creatable()
    state = find_run(folder)
    if state is not None and not state.holds_job:
        state = None
    if state is not None:
        check_format(config.output, state)
        check_part_rows(config, state)
    reader = open_input(config, purpose="indexed")
    if shard.is_whole:
        return _complete(config, _check_all(config, folder, reader, state))
    work = PlanShard(config, folder, reader, shard, part_rows_of(config, state))
    summary = work.run()
    if summary is not None:
        return _complete(config, summary)
    piece = work.content
    return Plan(
        output=config.output,
        rows=piece.rows,
        bad_rows=piece.bad_rows,
        part_rows=piece.part_rows,
        parts=count_parts(piece.part_rows, piece.rows),
        input_digest=None,
        complete=False,
    )


def _check_all(
    config: JobConfig, folder: OutputFolder, reader: PromptReader, state: FolderState | None
) -> InputSummary:
    files = reader.source.files()
    if files is None:
        logger.warning(
            "%s: cannot be recognised again, since it is no file of this machine: each run checks "
            "its rows itself",
            reader.source.name,
        )
    else:
        wait_for_clock_tick(files)
    checked = check_input(config, folder, reader, folder.read_hashes(), state, is_whole=False)
    ErrorLimit(config.max_row_errors, checked.summary.rows).check(checked.summary.bad_rows)
    folder.create()
    with open_lock(folder.work, shared=True), open_run_folder(folder.work) as run:
        checked.write(folder, run.writer)
        # of shards that were given up
        delete_pieces(folder.work)
    return checked.summary


def _complete(config: JobConfig, summary: InputSummary) -> Plan:
    return Plan(
        output=config.output,
        rows=summary.rows,
        bad_rows=summary.bad_rows,
        part_rows=summary.part_rows,
        parts=len(summary.part_digests),
        input_digest=summary.digest,
        complete=True,
    )
