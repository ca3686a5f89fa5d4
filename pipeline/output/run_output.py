"""RunOutput: the output of one run, from its claim on the folder to `_SUCCESS`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gptbatch.pipeline.errors import IncompleteError, StorageError
from gptbatch.pipeline.input.rows import RowDefaults
from gptbatch.pipeline.output.claim import claim, delete_run
from gptbatch.pipeline.output.crash_journal import CRASH_JOURNAL, CrashJournal, read_crash_journal
from gptbatch.pipeline.output.error_rows import describe_errors, write_error_rows
from gptbatch.pipeline.output.existing_run import ExistingRun, Target
from gptbatch.pipeline.output.finish import finish, mark_complete
from gptbatch.pipeline.output.folder import ERRORS, OutputFolder
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.part_file import part_name
from gptbatch.pipeline.output.part_sink import PartSink
from gptbatch.pipeline.output.part_source import LocalParts, PartSource
from gptbatch.pipeline.output.part_writer import PartWriter
from gptbatch.pipeline.output.progress_file import ProgressFile
from gptbatch.pipeline.output.resume import check_same_environment
from gptbatch.pipeline.output.run_folder import RunFolder, read_records
from gptbatch.pipeline.output.runs import list_runs
from gptbatch.pipeline.output.shards import ShardParts, find_free_parts
from gptbatch.pipeline.storage.atomic_write import Writer
from gptbatch.pipeline.types import Completion

logger = logging.getLogger("gptbatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutput:
    """The output of one run. Its methods are called in order.

    Attributes:
        target: The folder, which is locked, and what this run writes there.
        run: The folder of this run.
        defaults: The names of the input's fields, for errors.jsonl.
        existing: The run that was in the folder.
    """

    target: Target
    run: RunFolder
    defaults: RowDefaults
    existing: ExistingRun

    @property
    def writer(self) -> Writer:
        """Writes files of the output."""
        return self.run.writer

    @property
    def folder(self) -> OutputFolder:
        """The output folder."""
        return self.target.folder

    def progress_file(self) -> ProgressFile:
        """Return the progress file of this run."""
        return ProgressFile(
            self.run.path,
            self.writer,
            rows_total=self.target.share_rows,
            rows_kept=self.existing.kept.rows,
            error_rows_kept=self.existing.kept.errors,
        )

    def claim(self, facts: dict[str, Any]) -> None:
        """Delete the run that is replaced, and claim the folder for this job.

        Args:
            facts: The facts of the run.

        Raises:
            OutputConflictError: Another job has claimed the folder since it was inspected, or
                another shard computes in another environment.
        """
        replaced = self.existing.state if self.existing.is_replaced else None
        config = self.target.config
        # Of runs of this job that are going on, or have written parts, a shard accepts the claim.
        joins = not self.target.shard.is_whole and (
            bool(self.folder.list_parts()) or self.run.has_company(facts["config_hash"])
        )
        if replaced is not None and self.run.has_company(replaced.identity["config_hash"]):
            replaced = None
        if replaced is not None:
            delete_run(self.folder, self.writer, replaced)
        claimed = claim(
            self.folder,
            self.writer,
            config.to_yaml(),
            facts,
            joins=joins,
            replaces=None if replaced is None else replaced.identity,
        )
        check_same_environment(config, claimed, facts["environment"], facts["batch_invariance"])

    def open_sink(
        self, facts: dict[str, Any], text_of: Callable[[Completion], str | None]
    ) -> PartSink:
        """Return the sink of the rows that are to be generated.

        Args:
            facts: The facts of the run.
            text_of: Decodes a completion; None for an error.
        """
        target, kept = self.target, self.existing.kept.parts
        if target.shard.is_whole:
            target.hashes.keep_parts(part.name for part in kept.values())
        self.folder.write_hashes(self.writer, target.hashes)
        writer = PartWriter(
            self.folder.path, self.writer, target.hashes, plan=target.plan, facts=facts
        )
        with self.run.dead_runs() as dead:
            replaced = self.existing.state if self.existing.is_replaced else None
            same_job = replaced is None or (
                replaced.identity == target.plan.identity and not replaced.holds_job
            )
            journals = [read_crash_journal(run.path) for run in dead if same_job]
            journal = CrashJournal(self.run.path, self.writer, journals)
            for record in read_records(dead):
                if record.number in kept or record.number not in target.share:
                    self.run.record(record, record.sha256)
        return PartSink(
            self.run,
            writer,
            journal,
            kept,
            plan=target.plan,
            text_of=text_of,
            rows_total=target.share_rows,
        )

    def open_source(self) -> PartSource:
        """Return the parts that are to be generated."""
        kept = self.existing.kept.parts
        missing = [number for number in self.target.share if number not in kept]
        if self.target.shard.is_whole:
            return LocalParts(missing)
        folder = self.folder.path
        # Files of these names are there, and are to be replaced.
        damaged = set(missing) & (
            self.existing.state.parts.keys() if self.existing.state else set()
        )
        return ShardParts(
            missing,
            lambda: find_free_parts(self.folder, self.run, self.target.plan),
            lambda number: number not in damaged and (folder / part_name(number)).exists(),
            seed=self.run.path.name,
        )

    def has_work(self) -> bool:
        """Return whether a part of this shard is missing, or one that no run has in flight."""
        if len(self.existing.kept.parts) < len(self.target.share):
            return True
        is_whole = self.target.shard.is_whole
        return not is_whole and bool(find_free_parts(self.folder, self.run, self.target.plan))

    def finish(self, parts: dict[int, Part]) -> bool:
        """Mark the output complete, if no part is missing.

        Args:
            parts: The parts that this run has written or kept, by number.

        Returns:
            Whether the output is complete.

        Raises:
            OutputConflictError: The folder holds other parts or tables.
            StorageError: A file cannot be written, or a part is gone.
        """
        target = self.target
        if missing := self.folder.missing_parts(target.plan.n_parts):
            if target.shard.is_whole:
                path = self.folder.path / part_name(missing[0])
                raise StorageError(
                    f"{path}: is gone since it was written; run the same command again"
                )
            logger.info(
                "%d of %d parts are missing, which other runs generate; the last run marks the "
                "output complete, or `gptbatch finish` does",
                len(missing),
                target.plan.n_parts,
            )
            return False
        try:
            self.finish_all(parts)
        except IncompleteError as error:
            if target.shard.is_whole:
                raise
            logger.warning("not complete: %s", error)
            return False
        return True

    def finish_all(self, known: Mapping[int, Part] | None = None) -> int:
        """Mark the output complete, of which no part is missing.

        Args:
            known: Parts that this run has written or kept, by number.

        Returns:
            The number of error rows.

        Raises:
            IncompleteError: A part is damaged, or lacks rows.
            InputRowsError: There are more error rows than `max_row_errors` allows.
            OutputConflictError: The folder holds other parts or tables.
            StorageError: A file cannot be written, or a part is gone.
        """
        target = self.target
        target.hashes.add_records(read_records(list_runs(self.folder.work)))
        done = finish(
            self.folder,
            self.writer,
            target.plan.identity,
            target.hashes,
            known or {},
            self.defaults,
            target.config.max_row_errors,
        )
        self.run.sweep()
        self.writer.remove(self.run.path / CRASH_JOURNAL)
        mark_complete(self.folder, self.writer, done)
        self._log_errors(done.parts)
        return sum(part.errors for part in done.parts)

    def write_error_rows(self, parts: Iterable[Part]) -> None:
        """Write errors.jsonl."""
        write_error_rows(self.folder, self.writer, parts, self.defaults)

    def _log_errors(self, parts: Iterable[Part]) -> None:
        kinds: Counter[str] = Counter()
        for part in parts:
            kinds.update(part.error_kinds)
        if described := describe_errors(kinds, self.target.plan.total_rows):
            logger.warning(
                "%s; %s has the reasons, and the prompts that were read: correct them in a copy, "
                "and run that into another output",
                described,
                self.folder.work / ERRORS,
            )
