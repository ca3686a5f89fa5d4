"""PartWriter: writes the rows of a part as Parquet.

A part under its final name is the record that its rows are done. The file appears whole and checked
(atomic_write.py), and takes its name only where no other file has it.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from gptbatch.pipeline.errors import OutputConflictError, StorageError
from gptbatch.pipeline.output.environment import environment_differences
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.part_file import (
    FOOTER_KEY,
    PartFile,
    inspect_part,
    is_damage,
    part_name,
    read_error,
    read_part,
)
from gptbatch.pipeline.output.part_plan import PartPlan
from gptbatch.pipeline.output.schema import content_digest, to_table
from gptbatch.pipeline.storage.atomic_write import Writer
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.storage.regular_file import file_sha256, sha256_of
from gptbatch.pipeline.types import Sample

logger = logging.getLogger("gptbatch")

# Tries to commit a part while another program creates and deletes files of its name.
MAX_COMMIT_TRIES = 3


class PartWriter:
    """Writes parts, each when all of its rows are there.

    Args:
        output: The output folder.
        writer: Writes files atomically.
        hashes: Records the SHA-256 of each part.
        plan: The parts of the job.
        facts: The facts of the run, for the footers.
    """

    def __init__(
        self,
        output: Location,
        writer: Writer,
        hashes: FileHashes,
        *,
        plan: PartPlan,
        facts: dict[str, Any],
    ) -> None:
        self._output, self._writer, self._hashes, self._plan = output, writer, hashes, plan
        self.facts = facts

    def write(self, number: int, rows: Sequence[Sequence[Sample]]) -> Part:
        """Write a part where its name is free.

        Where another run of this job wrote the same part, keep that one; replace a damaged file.

        Args:
            number: Its number.
            rows: The samples of each of its input rows, in order.

        Raises:
            StorageError: The part cannot be written.
            OutputConflictError: A part of another job has its name.
        """
        assert len(rows) == self._plan.rows_of(number)
        part, table = self._to_part(number, rows)
        path = self._output / part.name
        for _ in range(MAX_COMMIT_TRIES):
            if self._write(path, table, part, only_if_absent=True):
                return part
            existing = inspect_part(path)
            if existing.state == "missing":
                continue
            self._plan.check_part(existing)
            if (
                existing.state == "sound"
                and existing.part is not None
                and self._plan.is_whole(existing.part)
            ):
                self._check_same_rows(existing, part)
                self._hashes.record_part(part.name, file_sha256(path))
                return existing.part
            if (
                existing.state == "sound"
                and existing.part is not None
                and existing.part.first_row == part.first_row
                and existing.part.rows > part.rows
            ):
                raise OutputConflictError(
                    f"{path}: another run of this job has more rows, of a larger limit or input; "
                    "run the same command with these again"
                )
            self._write(path, table, part, only_if_absent=False)
            return part
        raise StorageError(
            f"{path}: appears and disappears; is another program working in this folder?"
        )

    def sha256_of(self, part: Part) -> str:
        """Return the SHA-256 of the file of a written part."""
        return self._hashes.sha256_of_part(part.name)

    def _to_part(self, number: int, rows: Sequence[Sequence[Sample]]) -> tuple[Part, pa.Table]:
        """Return the part and its table, with the footer in the schema metadata."""
        samples = [sample for samples in rows for sample in samples]
        table = to_table(samples)
        part = Part(
            name=part_name(number),
            first_row=number * self._plan.part_rows,
            rows=len(rows),
            samples=len(samples),
            error_kinds=dict(sorted(count_errors(rows).items())),
            prompt_tokens=sum(sample.completion.prompt_tokens for sample in samples),
            completion_tokens=sum(len(sample.completion.token_ids) for sample in samples),
            input_rows_digest=self._plan.input_digests[number],
            content_digest=content_digest(table),
        )
        footer = {**self.facts, **part.model_dump(exclude={"name"})}
        return part, table.replace_schema_metadata({FOOTER_KEY: json.dumps(footer)})

    def _write(self, path: Location, table: pa.Table, part: Part, *, only_if_absent: bool) -> bool:
        """Write the part and read it back.

        Returns False where `only_if_absent` and the name is taken.
        """
        digests: list[str] = []

        def check(file: BinaryIO) -> None:
            try:
                written = read_part(file, part.name)
                cause = "" if written == part else "its footer differs"
            except Exception as error:
                if not is_damage(error):
                    raise read_error(path, error) from error
                cause = str(error) or type(error).__name__
            if cause:
                raise StorageError(
                    f"{path}: reads back differently from what was written ({cause}); is the disk "
                    "failing?"
                )
            digests.append(sha256_of(file))

        done = self._writer.write(
            path,
            lambda file: write_table(file, table),
            check=check,
            only_if_absent=only_if_absent,
        )
        if done:
            self._hashes.record_part(part.name, digests[0])
        return done

    def _check_same_rows(self, existing: PartFile, part: Part) -> None:
        assert existing.part is not None
        assert existing.footer is not None
        if existing.part.content_digest == part.content_digest:
            return
        if environment_differences(existing.footer, self.facts):
            # allow_other_environment
            logger.warning(
                "%s: another run wrote it in another environment, and its rows differ; they stay",
                existing.path,
            )
            return
        raise OutputConflictError(
            f"{existing.path}: another run of this job wrote it in the same environment, and its "
            "rows differ (content_digest): one of the two machines computes wrongly, "
            f"{existing.footer.get('host')} or {self.facts.get('host')}; find out which, with "
            "gptbatch verify on each, and name another output"
        )


def count_errors(rows: Iterable[Sequence[Sample]]) -> Counter[str]:
    """Count input rows with an error, by the kind of the first one of their samples."""
    errors = (
        next((sample.completion.error for sample in samples if sample.completion.error), None)
        for samples in rows
    )
    return Counter(error.kind for error in errors if error is not None)


def write_table(file: BinaryIO, table: pa.Table) -> None:
    """Write the table of a part."""
    with pq.ParquetWriter(
        file, table.schema, compression="zstd", write_page_checksum=True
    ) as writer:
        # load_dataset fails on a row group without rows, but accepts a file without row groups.
        if len(table):
            writer.write_table(table)
