"""`gptbatch verify`: checks recorded rows against the weights."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from gptbatch.jobs.arguments import OutputArgument
from gptbatch.jobs.messages import echo, print_message
from gptbatch.jobs.options import Command, print_checkpoint, reopen_options
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.system.nouns import noun

if TYPE_CHECKING:
    from gptbatch.pipeline.audit.loaded_run import LoadedRun
    from gptbatch.pipeline.audit.run_reader import RunReader
    from gptbatch.pipeline.audit.verify import Verdict

MISMATCH = 1
MAX_LINES = 20


@click.command(cls=Command)
@click.argument("output", type=OutputArgument())
@click.option(
    "--rows",
    type=click.IntRange(1),
    help="Number of rows (samples, where rows have several) to check, evenly spaced over the run. "
    "Default: 100.",
)
@click.option("--all", "all_rows", is_flag=True, help="Check every row.")
@reopen_options
def verify(
    output: Location,
    rows: int | None,
    all_rows: bool,
    **options: Any,
) -> int:
    """Check rows of the run in the folder OUTPUT against its weights without generating them.

    One prefill per row gives the logits of every step. With the noise of the row they must give
    the recorded token, including a final EOS token. In the environment of the run the check is
    exact. In another one, a recorded token within rounding distance is a near tie, not a mismatch.
    A row whose window slid takes one prefill per step. The last line is a JSON object.

    Exits with 0 if all rows agree, with 1 if a row does not, with 66 if there is no row to check,
    and with 74 if rows of a complete run are lost or the folder holds other tables.
    """
    if all_rows and rows is not None:
        raise click.UsageError("--rows and --all cannot be given together")

    from gptbatch.pipeline.audit.loaded_run import LoadedRun, Overrides
    from gptbatch.pipeline.audit.run_reader import RunReader, describe_rows
    from gptbatch.pipeline.audit.verify import evenly_spaced
    from gptbatch.pipeline.errors import StorageError
    from gptbatch.pipeline.output.stray_tables import describe_stray_tables

    run = RunReader(output)
    if run.stray_tables:
        raise StorageError(f"{output}: {describe_stray_tables(run.stray_tables)}")
    if not run.complete:
        print_message(f"{output} is not complete; checking the {run.described_rows} that it holds")
    overrides = Overrides(**options)
    print_checkpoint(run, overrides.model)
    loaded_run = LoadedRun(run, overrides)
    selected = (
        run.rows() if all_rows else run.row_reader().take(evenly_spaced(rows or 100, run.n_rows))
    )
    reasons = loaded_run.reasons_bits_may_differ()
    began = time.monotonic()
    counts = _check_rows(loaded_run, selected)
    mismatches, near_ties, first = counts.mismatches, counts.near_ties, counts.first_mismatch
    echo(
        f"{describe_rows(counts.samples, counts.rows, run.has_samples)} checked, "
        f"{_count(mismatches, 'mismatch', 'mismatches')}"
        + (f", {_count(near_ties, 'near tie')}" if reasons else "")
        + (f", {_count(counts.error_rows, 'error row')} skipped" if counts.error_rows else "")
        + (
            f"; judged by tolerance: {', '.join(reasons)}"
            if reasons
            else "; judged exactly, bit for bit"
        )
        + ("; the run is complete and has no rows" if run.complete and run.n_rows == 0 else "")
    )
    summary = {
        "complete": run.complete,
        "rows_checked": counts.rows,
        "samples_checked": counts.samples,
        "mismatches": mismatches,
        "near_ties": near_ties,
        "error_rows_skipped": counts.error_rows,
        "judged": "by tolerance" if reasons else "exactly",
        "because": reasons,
        "first_mismatch": first
        and {
            "prompt_id": first.prompt_id,
            "sample_index": first.sample_index,
            "step": first.step,
            "distance": first.distance,
        },
        "verify_s": round(time.monotonic() - began, 3),
    }
    echo(json.dumps(summary))
    _raise_if_rows_are_missing(run, counts)
    return MISMATCH if mismatches else 0


@dataclass(slots=True)
class _Counts:
    """What was checked.

    Attributes:
        samples: Samples that were checked.
        rows: Rows of the input with such a sample.
        error_rows: Rows of the input with an error, whose samples were skipped.
        mismatches: Samples that do not agree.
        near_ties: Samples with a near tie.
        first_mismatch: The first sample that does not agree.
    """

    samples: int = 0
    rows: int = 0
    error_rows: int = 0
    mismatches: int = 0
    near_ties: int = 0
    first_mismatch: Verdict | None = None


def _check_rows(loaded_run: LoadedRun, rows: Iterable[dict[str, Any]]) -> _Counts:
    """Print the first mismatches. Return the counts."""
    from gptbatch.pipeline.audit.verify import verify_rows

    counts = _Counts()
    last_row = last_error_row = None
    for verdict in verify_rows(loaded_run, rows):
        if verdict.outcome == "skipped":
            counts.error_rows += verdict.prompt_index != last_error_row
            last_error_row = verdict.prompt_index
            continue
        counts.samples += 1
        counts.rows += verdict.prompt_index != last_row
        last_row = verdict.prompt_index
        counts.near_ties += verdict.outcome == "near_tie"
        if verdict.outcome == "mismatch":
            counts.mismatches += 1
            counts.first_mismatch = counts.first_mismatch or verdict
            if counts.mismatches <= MAX_LINES:
                echo(_in_words(verdict))
    if counts.mismatches > MAX_LINES:
        echo(f"... and {counts.mismatches - MAX_LINES} more")
    return counts


def _raise_if_rows_are_missing(run: RunReader, counts: _Counts) -> None:
    """Raise an error if no row was checked, or if a complete run has lost rows."""
    from gptbatch.pipeline.errors import InputNotFoundError, StorageError

    if not counts.samples and not (run.complete and run.n_rows == 0):
        reason = (
            noun(
                counts.error_rows,
                "the row looked at is an error row",
                f"all {counts.error_rows} rows looked at are error rows",
            )
            if counts.error_rows
            else "it holds no rows yet"
        )
        raise InputNotFoundError(f"{run.path}: nothing was checked: {reason}")
    if run.marked_complete and not run.complete and not counts.mismatches:
        held = f"{run.rows_done} of {run.rows_expected} rows"
        raise StorageError(
            f"{run.path}: is marked complete, but holds {held}; "
            "run the same generate command for the others"
        )


def _count(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {noun(count, one, many)}"


def _in_words(verdict: Verdict) -> str:
    sample = f", sample {verdict.sample_index}" if verdict.sample_index else ""
    row = f"row {verdict.prompt_id!r} (index {verdict.prompt_index}{sample})"
    if verdict.step is None:
        return f"{row}: {verdict.problem}"
    distance = (
        "no change of the logits would give the recorded one"
        if verdict.distance is None
        else f"the recorded one is {verdict.distance:.3g} from winning"
    )
    return (
        f"{row}: step {verdict.step}: token {verdict.recorded_token} is recorded, "
        f"{verdict.problem}; {distance}"
    )
