"""The runs of an output, on a file system or in an object store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptbatch.pipeline.output.json_models import ProgressContent
from gptbatch.pipeline.output.local_run import LocalRunFolder, list_local_runs
from gptbatch.pipeline.output.object_run import ObjectRunFolder, list_object_runs
from gptbatch.pipeline.output.progress_file import read_progress
from gptbatch.pipeline.output.run_folder import OtherRun, RunFolder, pid_space
from gptbatch.pipeline.storage.location import Location


def open_run_folder(
    work: Location,
    config_hash: str | None = None,
    *,
    shared: bool = True,
    lock_works: bool = True,
) -> RunFolder:
    """Return the folder of a new run.

    Args:
        work: The folder `.gptbatch` of the output.
        config_hash: Of the job; None where it is not known.
        shared: Whether runs of other shards may be going on.
        lock_works: Whether the lock of the output is held.
    """
    if isinstance(work, Path):
        return LocalRunFolder(work, config_hash, alone=lock_works and not shared)
    return ObjectRunFolder(work, config_hash, shared=shared)


def list_runs(work: Location) -> Sequence[OtherRun]:
    """Return the folders of all runs, this process's own among them, oldest first."""
    return list_local_runs(work) if isinstance(work, Path) else list_object_runs(work)


def live_runs(work: Location) -> list[OtherRun]:
    """Return the runs that are going on."""
    return [run for run in list_runs(work) if run.is_live()]


def processes_here(work: Location) -> dict[int, int | None]:
    """Return the processes of this machine that hold a live run.

    Returns:
        Number of the process -> CPU threads of its run. None before its model is loaded.
    """
    found = {}
    for run in live_runs(work):
        content, progress = run.holder(), read_progress(run.path)
        if content is not None and content.pid_space == pid_space():
            found[content.pid] = None if progress is None else progress.threads
    return found


def last_speed(work: Location) -> ProgressContent | None:
    """Return the progress of the last run that has generated tokens; None without one."""
    found = [progress for run in list_runs(work) if (progress := read_progress(run.path))]
    return max(
        (progress for progress in found if progress.tokens_per_s is not None),
        key=lambda progress: progress.updated_at or "",
        default=None,
    )
