"""One shard of `gptbatch plan --index`: checks some parts, and joins the pieces of all shards.

    1. count  all rows of the input, without parsing them: the parts follow from their number
    2. check  the rows of the parts of this shard
    3. write  a piece with digests, places and hashes of ids
    4. join   the pieces to the index, if those of all shards are there

No shard waits for another one: each counts all rows itself, and the last one to write its piece
joins them. Several may find that they are the last, and write the same index.
"""

from __future__ import annotations

import logging
import time

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import ConfigError, InputNotFoundError, InputRowsError
from gptbatch.pipeline.input.input_digest import default_part_rows
from gptbatch.pipeline.input.input_files import STANDARD_INPUT, InputFiles
from gptbatch.pipeline.input.part_check import CheckedParts, check_parts, join_parts
from gptbatch.pipeline.input.prompt_reader import InputSummary, PromptReader
from gptbatch.pipeline.output.error_limit import ErrorLimit
from gptbatch.pipeline.output.file_hashes import input_key, wait_for_clock_tick
from gptbatch.pipeline.output.folder import OutputFolder
from gptbatch.pipeline.output.index_piece import (
    delete_pieces,
    piece_path,
    read_parts,
    read_piece_content,
    read_pieces,
    write_piece,
)
from gptbatch.pipeline.output.input_record import CheckedInput, find_index
from gptbatch.pipeline.output.json_models import PieceContent
from gptbatch.pipeline.output.lock import open_lock
from gptbatch.pipeline.output.part_plan import check_part_count, count_parts
from gptbatch.pipeline.output.resume import input_settings
from gptbatch.pipeline.output.runs import open_run_folder
from gptbatch.pipeline.output.shards import Shard
from gptbatch.pipeline.storage.atomic_write import Writer
from gptbatch.pipeline.storage.location import location_of

logger = logging.getLogger("gptbatch")


class PlanShard:
    """One shard of the check of an input.

    Args:
        config: The settings of the job.
        folder: The output folder.
        reader: The input, which has passed `check_divisible`.
        shard: The shard.
        part_rows: Rows per part. None follows `default_part_rows`.

    Attributes:
        content: The metadata of its piece, once `run` has returned.
    """

    content: PieceContent

    def __init__(
        self,
        config: JobConfig,
        folder: OutputFolder,
        reader: PromptReader,
        shard: Shard,
        part_rows: int | None,
    ) -> None:
        self._config, self._folder, self._reader = config, folder, reader
        self._shard, self._part_rows = shard, part_rows
        assert isinstance(reader.source, InputFiles)
        files = reader.source.files()
        assert files is not None, "see check_divisible"
        self._source, self._files = reader.source, [*files]
        self._settings = {**input_settings(config), "part_rows": part_rows}

    def run(self) -> InputSummary | None:
        """Check the rows of the shard.

        Returns:
            The result for all rows; None while the pieces of other shards are missing.

        Raises:
            InputRowsError: Rows of the shard are bad, ids are repeated, too many rows are bad, or
                the input has changed.
            ConfigError: There are too many parts, or an id of skip_row is unknown.
            StorageError: A file cannot be written.
        """
        if (index := self._find_index()) is not None:
            return index
        wait_for_clock_tick(self._files)
        began_ns, key = time.time_ns(), self._input_key()
        path = piece_path(self._folder.work, self._shard)
        found = read_piece_content(path, self._shard, key)
        parts = None
        if found is None:
            found, parts = self._check(key, began_ns)
        self.content = found
        self._folder.create()
        with open_lock(self._folder.work, shared=True), open_run_folder(self._folder.work) as run:
            if parts is not None:
                # Another process may have checked the same shard.
                if (index := self._find_index()) is not None:
                    return index
                run.writer.write(path, lambda file: write_piece(file, found, parts))
            return self._join(key, run.writer)

    def _check(self, key: str, began_ns: int) -> tuple[PieceContent, CheckedParts]:
        config = self._config
        try:
            count = self._source.count(config.limit)
            part_rows = self._part_rows or default_part_rows(count.rows)
            check_part_count(part_rows, count.rows)
            numbers = self._shard.parts(count_parts(part_rows, count.rows))
            logger.info(
                "shard %s checks %d parts of %d rows", self._shard, len(numbers), count.rows
            )
            parts = check_parts(self._reader, count, part_rows, numbers, config.skip_row)
        except InputRowsError as error:
            if self._input_key() != key:
                raise self._changed() from error
            raise
        if self._input_key() != key:
            raise self._changed()
        content = PieceContent(
            input_key=key,
            began_ns=began_ns,
            rows=count.rows,
            part_rows=part_rows,
            bad_rows=parts.bad_rows,
            max_n=parts.max_n,
            found_ids=sorted(parts.found_ids),
        )
        return content, parts

    def _join(self, key: str, writer: Writer) -> InputSummary | None:
        """Join the pieces and write the index, if all pieces are there."""
        config, work = self._config, self._folder.work
        try:
            contents = read_pieces(work, self._shard.count, key)
            if contents is None:
                logger.info("shard %s is checked; pieces of other shards are missing", self._shard)
                return self._find_index()
            rows, part_rows = self._agreed(contents)
            summary = join_parts(
                self._reader,
                lambda: read_parts(work, contents),
                rows,
                part_rows,
                config.skip_row,
            )
        except FileNotFoundError:
            # Another shard has joined the pieces.
            return self._find_index()
        ErrorLimit(config.max_row_errors, rows).check(summary.bad_rows)
        if self._input_key() != key:
            raise self._changed()
        hashes = self._folder.read_hashes()
        hashes.record_input(
            input_settings(config),
            self._files,
            min(content.began_ns for content in contents),
            {"rows": rows, "digest": summary.digest},
        )
        CheckedInput(summary=summary, hashes=hashes, is_new=True).write(self._folder, writer)
        delete_pieces(work)
        return summary

    def _agreed(self, contents: list[PieceContent]) -> tuple[int, int]:
        """Return the rows of the input and of a part, which all shards must have found alike."""
        found = {(content.rows, content.part_rows) for content in contents}
        if len(found) > 1:
            delete_pieces(self._folder.work)
            raise self._changed()
        return found.pop()

    def _find_index(self) -> InputSummary | None:
        hashes = self._folder.read_hashes()
        return find_index(
            self._config, self._folder, self._reader, hashes, self._part_rows, is_whole=False
        )

    def _input_key(self) -> str:
        try:
            return input_key(self._settings, self._files)
        except OSError as error:
            raise InputNotFoundError(
                f"{error.filename}: cannot be read ({error.strerror})"
            ) from error

    def _changed(self) -> InputRowsError:
        return InputRowsError(
            f"{self._source.name}: the input has changed while it was checked; run all shards again"
        )


def check_divisible(config: JobConfig) -> None:
    """Check that processes on several machines can each read some rows of the input.

    Raises:
        ConfigError: The input is a dataset, a pipe or standard input.
    """
    if config.dataset is not None:
        raise _indivisible(
            config.dataset,
            "a dataset, whose rows cannot be counted without reading them; name its files with "
            "--input",
        )
    for name in config.inputs:
        path = location_of(name)
        if name == STANDARD_INPUT or (path.exists() and not (path.is_file() or path.is_dir())):
            raise _indivisible(
                name, "a pipe, which only one process can read; write its rows to a file"
            )


def _indivisible(name: str, problem: str) -> ConfigError:
    return ConfigError(
        f"shard: {name} is {problem}, or run `gptbatch plan --index` without --shard",
        keys=("shard",),
    )
