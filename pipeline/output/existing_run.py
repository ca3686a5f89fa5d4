"""ExistingRun: what is in the output folder of a run, and what the run writes there.

Inspected under the lock of the folder.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import OutputBusyError, StorageError
from gptbatch.pipeline.input.prompt_reader import InputSummary
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.folder import FolderState, OutputFolder
from gptbatch.pipeline.output.kept_parts import (
    KeptParts,
    check_replaceable,
    find_kept_parts,
    numbers_to_inspect,
)
from gptbatch.pipeline.output.lock import OutputLock
from gptbatch.pipeline.output.part_plan import PartPlan
from gptbatch.pipeline.output.resume import (
    check_continuable,
    check_same_input,
    is_replaced,
    is_same_job,
    part_rows_of,
)
from gptbatch.pipeline.output.runs import list_runs
from gptbatch.pipeline.output.shards import Shard
from gptbatch.pipeline.storage.atomic_write import FileWriter

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
    numbers = numbers_to_inspect(state, target.share, plan.n_parts)
    kept = find_kept_parts(folder.inspect_parts(state, hashes, numbers), plan)
    logger.info("%d of %d parts are written", len(kept.parts), len(target.share))
    return ExistingRun(state=state, is_replaced=False, kept=kept)


def confirm_complete(target: Target, existing: ExistingRun) -> None:
    """Record the times of the parts of a complete output, unless it is read-only."""
    assert existing.state is not None
    folder, paths = target.folder, existing.state.parts
    target.hashes.confirm_parts(paths[number] for number in existing.kept.parts)
    # Versions of objects do not change when they are copied back.
    if isinstance(folder.work, Path):
        with suppress(StorageError):
            folder.write_hashes(FileWriter(folder.work), target.hashes)
