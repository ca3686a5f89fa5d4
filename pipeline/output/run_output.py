"""RunOutput: the output of one run, from its claim on the folder to `_SUCCESS`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import IncompleteError, OutputBusyError, StorageError
from gptbatch.pipeline.input.prompt_reader import InputSummary
from gptbatch.pipeline.input.rows import RowDefaults
from gptbatch.pipeline.output.claim import claim, delete_run
from gptbatch.pipeline.output.crash_journal import CRASH_JOURNAL, CrashJournal, read_crash_journal
from gptbatch.pipeline.output.error_rows import describe_errors, write_error_rows
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.finish import finish, mark_complete
from gptbatch.pipeline.output.folder import ERRORS, FolderState, OutputFolder
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.lock import OutputLock
from gptbatch.pipeline.output.part_file import part_name
from gptbatch.pipeline.output.part_plan import PartPlan
from gptbatch.pipeline.output.part_sink import PartSink
from gptbatch.pipeline.output.part_source import LocalParts, PartSource
from gptbatch.pipeline.output.part_writer import PartWriter
from gptbatch.pipeline.output.progress_file import ProgressFile
from gptbatch.pipeline.output.resume import (
    KeptParts,
    check_continuable,
    check_replaceable,
    check_same_environment,
    check_same_input,
    find_kept_parts,
    is_replaced,
    is_same_job,
    part_rows_of,
)
from gptbatch.pipeline.output.run_folder import RunFolder, read_records
from gptbatch.pipeline.output.runs import list_runs
from gptbatch.pipeline.output.shards import Shard, ShardParts, find_free_parts
from gptbatch.pipeline.storage.atomic_write import FileWriter, Writer
from gptbatch.pipeline.types import Completion

logger = logging.getLogger("gptbatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a run writes, and where.

    Attributes:
        config: The settings of the job.
        folder: The output folder.
        hashes: The recorded hashes of the files in it.
        plan: The parts of the job.
        shard: The shard of this run.
    """

    config: JobConfig
    folder: OutputFolder
    hashes: FileHashes
    plan: PartPlan
    shard: Shard

    @property
    def share(self) -> range:
        """The numbers of the parts of this run."""
        return self.shard.parts(self.plan.n_parts)

    @property
    def share_rows(self) -> int:
        """Rows of these parts."""
        return sum(self.plan.rows_of(number) for number in self.share)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExistingRun:
    """The run in a locked output folder.

    Attributes:
        state: The run; None for a new folder.
        is_replaced: Whether the job replaces it.
        kept: Its parts that this run keeps, of those in its share.
    """

    state: FolderState | None
    is_replaced: bool
    kept: KeptParts

    def facts(self, shard: Shard) -> dict[str, Any]:
        """Return the facts of the kept rows, for a shard else of those of others; {} for none."""
        joins = not shard.is_whole and not self.is_replaced
        return self.kept.footer or (self.state.manifest if joins and self.state else {})

    def is_complete(self, target: Target) -> bool:
        """Return whether the output is complete, and marked so."""
        return (
            self.state is not None
            and not self.is_replaced
            and self.state.marked_complete
            and self.state.identity == target.plan.identity
            and len(self.kept.parts) == len(target.share)
            and not target.folder.missing_parts(target.plan.n_parts)
        )


def inspect_output(
    target: Target, lock: OutputLock, identity: dict[str, Any], summary: InputSummary
) -> ExistingRun:
    """Inspect the folder again, under the lock: another run may have changed it.

    Args:
        target: The output of this run.
        lock: The lock of the folder.
        identity: The identity of the job, without its input.
        summary: The result of checking the input.

    Raises:
        OutputConflictError: The folder holds a run of another job or input.
        OutputBusyError: Another run has begun since the folder was locked or inspected.
    """
    config, folder, hashes, plan = target.config, target.folder, target.hashes, target.plan
    state = folder.state()
    nothing = KeptParts(parts={}, footer={})
    if state is None:
        return ExistingRun(state=None, is_replaced=False, kept=nothing)
    if not (lock.works or state.holds_job or is_same_job(state, identity)):
        for run in list_runs(folder.work):
            if run.is_live():
                raise OutputBusyError(
                    f"{config.output}: another job is beginning there, according to {run.path}; "
                    "name another output"
                )
    if is_replaced(config, state, identity):
        check_replaceable(state, folder.inspect_parts(state, hashes, state.parts))
        return ExistingRun(state=state, is_replaced=True, kept=nothing)
    check_continuable(config, state, identity)
    if part_rows_of(config, state) not in (None, plan.part_rows):
        raise OutputBusyError(
            f"{config.output}: another run began there while this one checked its input; run the "
            "same command again"
        )
    check_same_input(config, state, summary)
    # A part beyond the last is refused.
    numbers = {number for number in state.parts if number in target.share or number >= plan.n_parts}
    kept = find_kept_parts(folder.inspect_parts(state, hashes, numbers), plan)
    logger.info("%d of %d parts are written", len(kept.parts), len(target.share))
    return ExistingRun(state=state, is_replaced=False, kept=kept)


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
            logger.info("%s", error)
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
                "%s; %s has the reasons, and the prompts that were read",
                described,
                self.folder.work / ERRORS,
            )


def confirm_complete(target: Target, existing: ExistingRun) -> None:
    """Record the times of the parts of a complete output, unless it is read-only."""
    assert existing.state is not None
    folder, paths = target.folder, existing.state.parts
    target.hashes.confirm_parts(paths[number] for number in existing.kept.parts)
    # Versions of objects do not change when they are copied back.
    if isinstance(folder.work, Path):
        with suppress(StorageError):
            folder.write_hashes(FileWriter(folder.work), target.hashes)
