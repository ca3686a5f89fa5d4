"""Checking an input, unless its index in the output folder shows that it was checked before."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.input.prompt_reader import InputSummary, PromptReader
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.folder import FolderState, OutputFolder
from gptbatch.pipeline.output.index_file import INDEX, read_index, write_index
from gptbatch.pipeline.output.part_plan import check_part_count
from gptbatch.pipeline.output.resume import input_settings, part_rows_of
from gptbatch.pipeline.storage.atomic_write import Writer

logger = logging.getLogger("gptbatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedInput:
    """An input whose rows are checked.

    Attributes:
        summary: The result.
        hashes: The hashes of the output folder, the input among them.
        is_new: Whether the rows were read now. Otherwise the index had the result.
    """

    summary: InputSummary
    hashes: FileHashes
    is_new: bool

    def forget(self, folder: OutputFolder, writer: Writer) -> None:
        """Delete the index: the input has changed in a way that its files do not show."""
        writer.remove(folder.work / INDEX)

    def write(self, folder: OutputFolder, writer: Writer) -> None:
        """Write the index and the hashes, if they are new.

        Raises:
            StorageError: A file cannot be written.
        """
        if self.is_new:
            writer.write(folder.work / INDEX, lambda file: write_index(file, self.summary))
            folder.write_hashes(writer, self.hashes)


def check_input(
    config: JobConfig,
    folder: OutputFolder,
    reader: PromptReader,
    hashes: FileHashes,
    continued: FolderState | None,
    *,
    is_whole: bool,
) -> CheckedInput:
    """Read and check every row, or take the result from the index of an unchanged input.

    Args:
        config: The settings of the job.
        folder: The output folder.
        reader: The input.
        hashes: The hashes of the output folder.
        continued: The run that the job continues. It decides the rows per part.
        is_whole: Whether the run has the job for itself. A shard may run on another host than the
            one that wrote the index, so it compares only sizes and times of change of the files.

    Raises:
        InputRowsError: Rows are bad.
        ConfigError: There are too many parts, or an id of skip_row is unknown.
    """
    part_rows = part_rows_of(config, continued)
    rows = None if continued is None else continued.identity.get("rows", 0)
    settings, files = input_settings(config), reader.source.files()
    index = find_index(config, folder, reader, hashes, part_rows, is_whole=is_whole)
    if index is not None and rows is not None and rows < index.rows:
        # The input has grown since the run began. Its first rows must be those of the run.
        prefix = {rows: reader.prefix_digest(index, rows)}
        index = replace(index, prefix_digests=index.prefix_digests | prefix)
    if index is not None and (rows is None or rows <= index.rows):
        logger.info("the input is unchanged since all of its rows were checked")
        return CheckedInput(summary=index, hashes=hashes, is_new=False)
    if not is_whole and (folder.work / INDEX).exists():
        logger.warning(
            "%s: its index is not used, since files or settings of the input have changed; each "
            "run checks all rows",
            folder.path,
        )
    began_ns = time.time_ns()
    summary = reader.check(
        part_rows=part_rows,
        prefix_rows=[] if rows is None else [rows],
        required_ids=config.skip_row,
    )
    check_part_count(summary.part_rows, summary.rows)
    hashes.record_input(settings, files, began_ns, {"rows": summary.rows, "digest": summary.digest})
    return CheckedInput(summary=summary, hashes=hashes, is_new=True)


def find_index(
    config: JobConfig,
    folder: OutputFolder,
    reader: PromptReader,
    hashes: FileHashes,
    part_rows: int | None,
    *,
    is_whole: bool,
) -> InputSummary | None:
    """Return the index of an unchanged input; None where there is none.

    Args:
        config: The settings of the job.
        folder: The output folder.
        reader: The input.
        hashes: The hashes of the output folder.
        part_rows: Rows per part; None for any number.
        is_whole: As for `check_input`.
    """
    recorded = hashes.find_input(input_settings(config), reader.source.files(), exactly=is_whole)
    index = None if recorded is None else read_index(folder.work / INDEX)
    if (
        index is None
        or recorded != {"rows": index.rows, "digest": index.digest}
        or part_rows not in (None, index.part_rows)
    ):
        return None
    return index
