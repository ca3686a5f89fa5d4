"""`gptbatch verify`: checks recorded rows against the weights."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from gptbatch.jobs.arguments import OutputArgument
from gptbatch.jobs.messages import echo, print_message
from gptbatch.jobs.options import Command, print_checkpoint, reopen_options
from gptbatch.pipeline.storage.location import Location

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
    help="Number of rows to check, evenly spaced over the run. Default: 100.",
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
    from gptbatch.pipeline.audit.run_reader import RunReader
    from gptbatch.pipeline.audit.verify import evenly_spaced
    from gptbatch.pipeline.errors import StorageError
    from gptbatch.pipeline.output.stray_tables import describe_stray_tables

    run = RunReader(output)
    if run.stray_tables:
        raise StorageError(f"{output}: {describe_stray_tables(run.stray_tables)}")
    if not run.complete:
        print_message(f"{output} is not complete; checking the {run.n_rows} rows that it holds")
    overrides = Overrides(**options)
    print_checkpoint(run, overrides.model)
    loaded_run = LoadedRun(run, overrides)
    selected = (
        run.rows() if all_rows else run.row_reader().take(evenly_spaced(rows or 100, run.n_rows))
    )
    reasons = loaded_run.reasons_bits_may_differ()
    began = time.monotonic()
    outcomes, first = _check_rows(loaded_run, selected)
    mismatches = outcomes["mismatch"]
    checked = sum(outcomes.values()) - outcomes["skipped"]
    echo(
        f"{_count(checked, 'row')} checked, {_count(mismatches, 'mismatch', 'mismatches')}"
        + (f", {_count(outcomes['near_tie'], 'near tie')}" if reasons else "")
        + (f", {_count(outcomes['skipped'], 'error row')} skipped" if outcomes["skipped"] else "")
        + (
            f"; judged by tolerance: {', '.join(reasons)}"
            if reasons
            else "; judged exactly, bit for bit"
        )
        + ("; the run is complete and has no rows" if run.complete and run.n_rows == 0 else "")
    )
    summary = {
        "complete": run.complete,
        "rows_checked": checked,
        "mismatches": mismatches,
        "near_ties": outcomes["near_tie"],
        "error_rows_skipped": outcomes["skipped"],
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
    _raise_if_rows_are_missing(run, outcomes)
    return MISMATCH if mismatches else 0


def _check_rows(
    loaded_run: LoadedRun, rows: Iterable[dict[str, Any]]
) -> tuple[Counter[str], Verdict | None]:
    """Print the first mismatches. Return the counts of the outcomes, and the first mismatch."""
    from gptbatch.pipeline.audit.verify import verify_rows

    outcomes: Counter[str] = Counter()
    first: Verdict | None = None
    for verdict in verify_rows(loaded_run, rows):
        outcomes[verdict.outcome] += 1
        if verdict.outcome == "mismatch":
            first = first or verdict
            if outcomes["mismatch"] <= MAX_LINES:
                echo(_in_words(verdict))
    if outcomes["mismatch"] > MAX_LINES:
        echo(f"... and {outcomes['mismatch'] - MAX_LINES} more")
    return outcomes, first


def _raise_if_rows_are_missing(run: RunReader, outcomes: Counter[str]) -> None:
    """Raise an error if no row was checked, or if a complete run has lost rows."""
    from gptbatch.pipeline.errors import InputNotFoundError, StorageError

    checked = sum(outcomes.values()) - outcomes["skipped"]
    if not checked and not (run.complete and run.n_rows == 0):
        reason = (
            f"all {outcomes['skipped']} rows looked at are error rows"
            if outcomes["skipped"]
            else "it holds no rows yet"
        )
        raise InputNotFoundError(f"{run.path}: nothing was checked: {reason}")
    if run.marked_complete and not run.complete and not outcomes["mismatch"]:
        held = f"{run.n_rows} of {run.rows_expected} rows"
        raise StorageError(
            f"{run.path}: is marked complete, but holds {held}; "
            "run the same generate command for the others"
        )


def _count(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def _in_words(verdict: Verdict) -> str:
    sample = f", sample {verdict.sample_index}" if verdict.sample_index else ""
    row = f"row {verdict.prompt_id!r} (index {verdict.prompt_index}{sample})"
    if verdict.step is None:
        return f"{row}: {verdict.problem}"
    return (
        f"{row}: step {verdict.step}: token {verdict.recorded_token} is recorded, "
        f"{verdict.problem}; "
        f"the recorded one is {verdict.distance:.3g} from winning"
    )
