"""RunOutput: the output of one job, from the inspection of its folder to `_SUCCESS`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import OutputBusyError, StorageError
from gptbatch.pipeline.input.prompt_reader import InputSummary
from gptbatch.pipeline.input.rows import RowDefaults
from gptbatch.pipeline.output.atomic_write import sweep
from gptbatch.pipeline.output.crash_journal import CrashJournal
from gptbatch.pipeline.output.error_rows import describe_errors, write_error_rows
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.folder import ERRORS, FolderState, OutputFolder
from gptbatch.pipeline.output.json_models import Part
from gptbatch.pipeline.output.lock import OutputLock
from gptbatch.pipeline.output.manifest import facts_of
from gptbatch.pipeline.output.part_plan import PartPlan
from gptbatch.pipeline.output.part_sink import PartSink
from gptbatch.pipeline.output.part_writer import PartWriter
from gptbatch.pipeline.output.progress_file import PROGRESS, ProgressFile, seems_running
from gptbatch.pipeline.output.resume import (
    KeptParts,
    check_continuable,
    check_replaceable,
    check_same_input,
    find_kept_parts,
    is_replaced,
    is_same_job,
    part_rows_of,
)
from gptbatch.pipeline.output.schema import FORMAT

logger = logging.getLogger("gptbatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExistingRun:
    """The run in a locked output folder.

    Attributes:
        state: The run; None for a new folder.
        is_replaced: Whether the job replaces it.
        kept: Its parts that the job keeps.
    """

    state: FolderState | None
    is_replaced: bool
    kept: KeptParts


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutput:
    """The output of one job. Its methods are called in order, while the folder is locked.

    Attributes:
        folder: The output folder.
        hashes: The hashes of its files.
        plan: The parts of the job.
        defaults: The names of the input's fields, for errors.jsonl.
        lock: The lock of the folder.
    """

    folder: OutputFolder
    hashes: FileHashes
    plan: PartPlan
    defaults: RowDefaults
    lock: OutputLock

    def inspect(
        self, config: JobConfig, identity: dict[str, Any], summary: InputSummary
    ) -> ExistingRun:
        """Inspect the folder again, under the lock: another run may have changed it.

        Args:
            config: The settings of the job.
            identity: The identity of the job, without its input.
            summary: The result of checking the input.

        Raises:
            OutputConflictError: The folder holds a run of another job or input.
            OutputBusyError: Another run has begun since the folder was locked or inspected.
        """
        folder, state = self.folder, self.folder.state()
        nothing = KeptParts(parts={}, footer={})
        if state is None:
            return ExistingRun(state=None, is_replaced=False, kept=nothing)
        if not (
            self.lock.works or state.holds_job or is_same_job(state, identity)
        ) and seems_running(folder.work):
            raise OutputBusyError(
                f"{config.output}: another job is beginning there, according to "
                f"{folder.work / PROGRESS}; name another output"
            )
        if is_replaced(config, state, identity):
            check_replaceable(state, folder.inspect_parts(state, self.hashes))
            return ExistingRun(state=state, is_replaced=True, kept=nothing)
        check_continuable(config, state, identity)
        if part_rows_of(config, state) != self.plan.part_rows:
            raise OutputBusyError(
                f"{config.output}: another run began there while this one checked its input; run "
                "the same command again"
            )
        check_same_input(config, state, summary)
        kept = find_kept_parts(folder.inspect_parts(state, self.hashes), self.plan)
        logger.info("%d of %d parts are written", len(kept.parts), self.plan.n_parts)
        return ExistingRun(state=state, is_replaced=False, kept=kept)

    def progress_file(self, kept: KeptParts) -> ProgressFile:
        """Return the progress file of a run that keeps these parts."""
        return ProgressFile(
            self.folder.work,
            self.folder.writer,
            rows_total=self.plan.total_rows,
            rows_kept=kept.rows,
            error_rows_kept=kept.errors,
        )

    def claim(self, config_yaml: str, facts: dict[str, Any], existing: ExistingRun) -> None:
        """Delete the run that is replaced, and claim the folder for this job.

        Args:
            config_yaml: The resolved config.
            facts: The facts of the run.
            existing: The run in the folder.

        Raises:
            OutputConflictError: Another job has claimed the folder since it was inspected.
        """
        replaced = existing.state if existing.is_replaced else None
        if replaced is not None:
            same_run = replaced.identity == self.plan.identity and not replaced.holds_job
            self.folder.delete_run(replaced, keep_journal=same_run)
        self.folder.claim(
            config_yaml,
            facts,
            existing.kept.parts.values(),
            replaces=None if replaced is None else replaced.identity,
        )

    def open_sink(self, kept: KeptParts, facts: dict[str, Any]) -> PartSink:
        """Return the sink of the rows that are to be generated.

        Args:
            kept: The parts that are not generated again.
            facts: The facts of the run.
        """
        folder = self.folder
        self.hashes.keep_parts(part.name for part in kept.parts.values())
        folder.write_hashes(self.hashes)
        writer = PartWriter(folder.path, folder.writer, self.hashes, plan=self.plan, facts=facts)
        journal = CrashJournal(folder.work, folder.writer) if self.lock.works else None
        return PartSink(folder, self.hashes, writer, journal, kept.parts)

    def write_records(self, parts: Iterable[Part]) -> None:
        """Write the records that a run leaves unless it crashes: file hashes and error rows.

        Args:
            parts: The written parts.
        """
        self.folder.write_hashes(self.hashes)
        write_error_rows(self.folder, parts, self.defaults)

    def complete(self, parts: dict[int, Part], facts: dict[str, Any]) -> None:
        """Mark the output complete, and log its error rows.

        Args:
            parts: All parts of the job, by number.
            facts: The facts of the run.
        """
        self.folder.complete(facts, parts, self.hashes, self.plan)
        kinds: Counter[str] = Counter()
        for part in parts.values():
            kinds.update(part.error_kinds)
        if described := describe_errors(kinds, self.plan.total_rows):
            errors = self.folder.work / ERRORS
            logger.warning("%s; %s has their prompts and reasons", described, errors)

    def complete_existing(self, existing: ExistingRun) -> dict[str, Any]:
        """Mark an output complete whose parts are all written, unless it is marked already.

        Returns:
            The manifest of the output.
        """
        folder, state, parts = self.folder, existing.state, existing.kept.parts
        assert state is not None
        facts = {
            **facts_of(existing.kept.footer),
            "format": FORMAT,
            "identity": self.plan.identity,
        }
        # A complete output may be read-only: then nothing is recorded.
        with suppress(StorageError) if state.marked_complete else nullcontext():
            if not state.marked_complete:
                folder.create()
            if self.lock.works:
                sweep(folder.work)
            if state.marked_complete and state.identity == self.plan.identity:
                self.hashes.confirm_parts(folder.path / part.name for part in parts.values())
                folder.write_hashes(self.hashes)
            else:
                self.write_records(parts.values())
                folder.complete(facts, parts, self.hashes, self.plan)
                self.progress_file(existing.kept).write("complete")
        return {**facts, "rows": existing.kept.rows}
