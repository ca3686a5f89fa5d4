"""Continuing a run: whether an output is of the same job, environment and input.

Imports no torch. `kept_parts.py` decides which parts of the run are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import OutputConflictError
from gptbatch.pipeline.input.prompt_reader import InputSummary
from gptbatch.pipeline.input.source import RowSource
from gptbatch.pipeline.output.environment import environment_differences
from gptbatch.pipeline.output.file_hashes import FileHashes
from gptbatch.pipeline.output.folder import FolderState, OutputFolder
from gptbatch.pipeline.output.part_plan import describe_differences, differing_keys
from gptbatch.pipeline.output.schema import FORMAT
from gptbatch.pipeline.output.stray_tables import refuse_stray_tables
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS
from gptbatch.pipeline.types import BATCH_INVARIANT, DEFAULT_PART_ROWS

_INPUT_SETTINGS = {
    "input",
    "dataset",
    "dataset_config",
    "dataset_revision",
    "split",
    "csv_delimiter",
    "limit",
    "on_bad_row",
    # The settings of a row are checked together with those of the run.
    *(name for name in SAMPLING_SETTINGS if name != "seed"),
    # An index without a search for repeated ids is not that of a check with one.
    "ids",
    "skip_row",
    "prompt_field",
    "prompt_template",
    "messages_field",
    "id_field",
    "row_settings",
}
_ADVICE = "name another output, or use --overwrite"


# -- is it the same job ----------------------------------------------------------------------------


def is_same_job(state: FolderState, identity: dict[str, Any]) -> bool:
    """Return whether a folder holds a run of this job, apart from its input."""
    return state.manifest["format"] == FORMAT and not differing_keys(identity, state.identity)


def is_replaced(config: JobConfig, state: FolderState, identity: dict[str, Any]) -> bool:
    """Return whether this job keeps nothing of the run in a folder.

    A folder without parts holds no job. `overwrite` replaces a complete run and a run of another
    job, but continues an unfinished run of the same job.
    """
    return not state.holds_job or (
        config.overwrite and (state.marked_complete or not is_same_job(state, identity))
    )


def find_run(folder: OutputFolder) -> FolderState | None:
    """Return the run in a folder; None where there is none.

    Raises:
        OutputConflictError: The folder holds other files, or links under the names of a run.
    """
    folder.refuse_links()
    state = folder.state()
    if state is not None:
        refuse_stray_tables(folder.path, state.stray_tables)
    return state


def find_continued_run(
    config: JobConfig, state: FolderState | None, identity: Callable[[], dict[str, Any]]
) -> FolderState | None:
    """Return the run that this job continues; None where the job starts anew.

    Args:
        config: The settings of the job.
        state: The run in the output folder; None without one.
        identity: Returns the identity of the job. It may hash the weights, and is called only where
            there is a run.

    Raises:
        OutputConflictError: The folder holds a run of another job.
    """
    if state is None or not state.holds_job:
        return None
    job = identity()
    if is_replaced(config, state, job):
        return None
    check_continuable(config, state, job)
    return state


def check_format(output: str, state: FolderState) -> None:
    """Check that this version can continue the run in a folder.

    Raises:
        OutputConflictError: It is of another format.
    """
    if state.manifest["format"] != FORMAT:
        raise OutputConflictError(
            f"{output}: holds a run of format {state.manifest['format']}, and this version writes "
            f"{FORMAT}, which cannot be mixed; go on with the version that began it "
            f"({_version(state)}), {_ADVICE}"
        )


def check_part_rows(config: JobConfig, state: FolderState) -> None:
    """Check that the config names no other rows per part than the run in a folder.

    Raises:
        OutputConflictError: They differ.
    """
    recorded = state.identity.get("part_rows")
    if config.part_rows not in (None, recorded):
        raise OutputConflictError(
            f"{config.output}: holds a run with {recorded} rows per part, not {config.part_rows}; "
            f"{_advice(config)}"
        )


def check_continuable(config: JobConfig, state: FolderState, identity: dict[str, Any]) -> None:
    """Check that this job can continue the run in a folder, apart from its input.

    Raises:
        OutputConflictError: The format, a setting, the attention backend or the batch invariance
            differs.
    """
    check_format(config.output, state)
    differing = differing_keys(identity, state.identity)
    if config.part_rows not in (None, state.identity.get("part_rows")):
        differing.append("part_rows")
    if differing:
        here = {"part_rows": config.part_rows, **identity}
        raise OutputConflictError(
            f"{config.output}: holds a run of another job "
            f"({describe_differences(differing, state.identity, here)}); {_advice(config)}"
        )
    environment = state.manifest.get("environment")
    if (
        # Where nothing ran, there is none.
        environment
        and isinstance(environment, dict)
        and config.engine.attention not in ("auto", environment.get("attention"))
        and not config.allow_other_environment
    ):
        raise OutputConflictError(
            f"{config.output}: holds a run with engine.attention {environment.get('attention')}, "
            f"not {config.engine.attention}; {_advice(config)}"
        )
    recorded_level = state.manifest.get("batch_invariance")
    required = {"require": BATCH_INVARIANT, "portable": ("portable",)}.get(config.batch_invariance)
    if required is not None and recorded_level not in (None, *required):
        raise OutputConflictError(
            f"{config.output}: holds a run whose batch_invariance is {recorded_level}, not "
            f"{required[-1]}; {_advice(config)}"
        )


def check_same_environment(
    config: JobConfig, recorded: dict[str, Any], environment: dict[str, Any], batch_invariance: str
) -> None:
    """Check that new rows are computed in the same way as recorded ones.

    Args:
        config: The settings of the job.
        recorded: The facts of the recorded rows. Without rows they name no environment.
        environment: What the bits of this run depend on besides the job; {} without rows.
        batch_invariance: The result of its self-test.

    Raises:
        OutputConflictError: The environments differ, and allow_other_environment is off.
    """
    if not (recorded.get("environment") and environment) or config.allow_other_environment:
        return
    current = {"environment": environment, "batch_invariance": batch_invariance}
    differing = [
        f"{key} was {before}, is {now}"
        for key, (before, now) in environment_differences(recorded, current).items()
    ]
    if differing:
        levels = (recorded.get("batch_invariance"), batch_invariance)
        why = (
            "; they are not portable, as those of an earlier version or of a machine without the "
            "C++ kernels, and new rows would be"
            if levels == ("verified", "portable")
            else ""
        )
        raise OutputConflictError(
            f"{config.output}: holds rows of another environment ({'; '.join(differing)}), whose "
            f"bits these may not match{why}; go on where it was begun, name another output, or use "
            "--allow-other-environment"
        )


# -- is it the same input --------------------------------------------------------------------------


def input_settings(config: JobConfig) -> dict[str, Any]:
    """Return the settings that decide the rows of the input."""
    return config.model_dump(include=_INPUT_SETTINGS)


def part_rows_of(config: JobConfig, state: FolderState | None) -> int | None:
    """Return the rows per part: those of the continued run, else those of the config.

    With several samples per row, a part has about as many samples as it has rows otherwise. None
    follows `default_part_rows`.

    Args:
        config: The settings of the job.
        state: The continued run; None for a new run.
    """
    recorded = None if state is None else state.identity.get("part_rows")
    several = max(1, DEFAULT_PART_ROWS // config.n) if config.n > 1 else None
    return recorded or config.part_rows or several


def check_same_input(config: JobConfig, state: FolderState, summary: InputSummary) -> None:
    """Check that the input begins with the rows of the run. Further rows are added to it.

    Raises:
        OutputConflictError: The input has changed.
    """
    rows, digest = (state.identity.get(key) for key in ("rows", "input_digest"))
    if not isinstance(rows, int):
        raise OutputConflictError(
            f"{config.output}: another version wrote it, which did not record its number of rows; "
            f"{_advice(config)}"
        )
    if rows > summary.rows == config.limit:
        first = "the first row" if config.limit == 1 else f"the first {config.limit} rows"
        raise OutputConflictError(
            f"{config.output}: holds a run of {rows} rows, and limit takes {first}. Rows are added "
            "to an output, and never removed. For the whole run, leave limit out or raise it, if "
            f"the input still has {rows} rows; for {first} alone, {_advice(config)}"
        )
    if rows > summary.rows:
        raise OutputConflictError(
            f"{config.output}: holds a run of {rows} row{'s' * (rows > 1)}, but the input has "
            f"{summary.rows}; {_advice(config)}"
        )
    if summary.prefix_digests.get(rows) != digest:
        raise OutputConflictError(
            f"{config.output}: holds a run of another input (its {rows} rows, of "
            f"{state.manifest.get('input')!s:.200}, are not the first {rows} rows of this one); "
            f"{_advice(config)}"
        )


def is_up_to_date(
    config: JobConfig, state: FolderState, source: RowSource, hashes: FileHashes
) -> bool:
    """Return whether a run is complete and unchanged, judging by sizes and times of files.

    This takes no time. False means that the input and the parts must be read.
    """
    if not state.marked_complete:
        return False
    recorded_input = hashes.find_input(input_settings(config), source.files())
    if recorded_input is None or recorded_input != {
        "rows": state.identity.get("rows"),
        "digest": state.identity.get("input_digest"),
    }:
        return False
    recorded_parts = [part["name"] for part in state.manifest.get("parts", [])]
    return recorded_parts == [path.name for path in state.parts.values()] and all(
        hashes.is_unchanged(path) for path in state.parts.values()
    )


def _version(state: FolderState) -> str:
    version = state.manifest.get("versions", {}).get("gptbatch")
    return f"gptbatch {version}" if version else "its version is not recorded"


def _advice(config: JobConfig) -> str:
    """Return what to do about an output that this job cannot continue."""
    if config.overwrite:
        return (
            "--overwrite does not replace an unfinished run of the same settings: name another "
            "output, or delete the folder"
        )
    return _ADVICE
