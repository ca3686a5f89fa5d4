"""`gptbatch diff`: do two runs hold the same rows, and if not, where do they part and which settings differ?"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gptbatch.jobs.messages import echo, print_message
from gptbatch.jobs.options import Command, PathArgument

if TYPE_CHECKING:
    from gptbatch.pipeline.audit.diff import DiffSummary, RowDifference

DIFFERENT = 1


@click.command(cls=Command)
@click.argument("a", type=PathArgument())
@click.argument("b", type=PathArgument())
@click.option(
    "--limit",
    default=20,
    show_default=True,
    type=click.IntRange(0),
    help="Most differences to print; 0 prints all.",
)
@click.option("--common", is_flag=True, help="Compare only the ids that both runs have.")
def diff(a: Path, b: Path, limit: int, common: bool) -> int:
    """Compare the runs in the output folders A and B, finished or not, row by row, joined by prompt_id.

    Prints how many rows differ and in what, then each setting that differs, A's value first, then the rows; its last line is a
    JSON object. Exits with 0 when both hold the same ids with the same prompts, tokens, endings and texts, with 1 when not.
    With --common, rows that one run alone has are no difference; without a common id it exits with 66. Rows whose tokens are
    equal but whose logits were not, by min_decision_margin and logits_digest, are counted as equal_from_other_logits. Prompts and
    completions are never printed.
    """
    from gptbatch.pipeline.audit.diff import diff_runs, settings_that_differ, summarize
    from gptbatch.pipeline.audit.run_reader import RunReader
    from gptbatch.pipeline.errors import InputNotFoundError
    from gptbatch.pipeline.output.stray_tables import describe_stray_tables

    run_a, run_b = RunReader(a), RunReader(b)
    for name, run in (("A", run_a), ("B", run_b)):
        if not run.complete:
            print_message(
                f"{name} ({run.path}) is not complete; compared are the {run.n_rows} rows that it holds"
            )
        if run.stray_tables:
            print_message(f"{name} ({run.path}): {describe_stray_tables(run.stray_tables)}")
    shown: list[RowDifference] = []
    summary = summarize(run_a, run_b, _collected(diff_runs(run_a, run_b), shown, limit, common))
    if common and not summary.common and (run_a.n_rows or run_b.n_rows):
        raise InputNotFoundError(
            f"{a} and {b}: no id is in both; were the ids taken from the same field?"
        )
    for line in _summary_lines(summary, common):
        echo(line)
    settings = settings_that_differ(run_a, run_b)
    for setting in settings:
        echo(f"setting {setting.name} differs: {json.dumps(setting.a)} / {json.dumps(setting.b)}")
    for difference in shown:
        echo(f"row {difference.prompt_id!r}: {_in_words(difference)}")
    count = summary.different + (0 if common else summary.missing_in_a + summary.missing_in_b)
    if count > len(shown):
        echo(f"... and {count - len(shown)} more")
    echo(
        json.dumps(
            {
                **asdict(summary),
                "settings_that_differ": {
                    setting.name: [setting.a, setting.b] for setting in settings
                },
            }
        )
    )
    return 0 if count == 0 else DIFFERENT


def _collected(
    differences: Iterable[RowDifference], shown: list[RowDifference], limit: int, common: bool
) -> Iterator[RowDifference]:
    """Hands the differences on, and puts the first `limit` (0: all) into `shown`: rows that both runs have before the others."""
    most = limit or sys.maxsize
    only: list[RowDifference] = []
    for difference in differences:
        if difference.kind in ("only_in_a", "only_in_b"):
            if len(only) < most and not common:
                only.append(difference)
        elif difference.kind != "logits" and len(shown) < most:  # bits: equal all the same
            shown.append(difference)
        yield difference
    shown.extend(only[: most - len(shown)])


def _summary_lines(summary: DiffSummary, common: bool) -> Iterator[str]:
    kinds = ", ".join(f"{count} by {kind}" for kind, count in summary.kinds.items())
    differ = f"{summary.different} differ ({kinds})" if summary.different else "all are equal"
    yield (
        f"{summary.common} rows are in both runs: {differ}"
        if summary.common
        else "no row is in both runs"
    )
    for name, count in (("A", summary.missing_in_b), ("B", summary.missing_in_a)):
        if count:
            yield f"{count} rows are only in {name}" + (", and not compared" if common else "")
    if summary.equal_from_other_logits:
        yield f"{summary.equal_from_other_logits} rows have equal tokens from logits of other bits"


def _in_words(difference: RowDifference) -> str:
    match difference.kind:
        case "only_in_a":
            return "only in A"
        case "only_in_b":
            return "only in B"
        case "prompt":
            return "the prompts differ"
        case "error":
            return f"{_ending(difference.finish_reason_a)} in A, {_ending(difference.finish_reason_b)} in B"
        case "finish":
            a, b = (
                difference.stop_reason_a or difference.finish_reason_a,
                difference.stop_reason_b or difference.finish_reason_b,
            )
            return f"the same tokens end differently: {a} / {b}"
        case "text":
            return "the same tokens stand for different texts"
        case "logits":
            return "the same tokens from other logits"
        case "tokens":
            tokens = " / ".join(
                "end" if token is None else str(token)
                for token in (difference.token_a, difference.token_b)
            )
            margins = " / ".join(
                "none" if margin is None else f"{margin:.3g}"
                for margin in (difference.min_decision_margin_a, difference.min_decision_margin_b)
            )
            return (
                f"token {difference.token_index} differs: {tokens} (min_decision_margin {margins})"
            )


def _ending(finish_reason: str | None) -> str:
    return "an error" if finish_reason == "error" else "a completion"
