"""`gptbatch diff`: compares two runs row by row, and their settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from gptbatch.jobs.arguments import OutputArgument
from gptbatch.jobs.messages import echo, print_message
from gptbatch.jobs.options import Command
from gptbatch.pipeline.storage.location import Location

if TYPE_CHECKING:
    from gptbatch.pipeline.audit.diff import DiffSummary, RowDifference

DIFFERENT = 1


@click.command(cls=Command)
@click.argument("a", type=OutputArgument())
@click.argument("b", type=OutputArgument())
@click.option(
    "--limit",
    default=10,
    show_default=True,
    type=click.IntRange(0),
    help="Maximum number of differing rows (samples, where rows have several) to print; 0 prints "
    "all.",
)
@click.option(
    "--common",
    is_flag=True,
    help="Compare only the samples, by id and sample index, that both runs have. The others are "
    "counted, and do not change the exit code.",
)
@click.option("--no-text", is_flag=True, help="Leave out prompts and completions.")
def diff(a: Location, b: Location, limit: int, common: bool, no_text: bool) -> int:
    """Compare the runs in the output folders A and B row by row, joined by id and sample.

    Prints the number of rows that differ, the settings that differ (A / B), and the rows, with at
    most 60 characters of their texts from where these first differ. The last line is a JSON object,
    whose counts are of samples. Rows with equal tokens but another min_decision_margin or
    logits_digest count as equal_from_other_logits.

    Exits with 0 if both runs have the same ids with the same prompts, tokens, finish reasons and
    texts, else with 1. With --common, samples of only one run are ignored; without a common one the
    exit code is 66.
    """
    from gptbatch.pipeline.audit.diff import diff_runs, settings_that_differ, summarize
    from gptbatch.pipeline.audit.run_reader import RunReader
    from gptbatch.pipeline.errors import InputNotFoundError
    from gptbatch.pipeline.output.stray_tables import describe_stray_tables

    run_a, run_b = RunReader(a), RunReader(b)
    for name, run in (("A", run_a), ("B", run_b)):
        if not run.complete:
            print_message(
                f"{name} ({run.path}) is not complete; "
                f"comparing the {run.described_rows} that it holds"
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
        sample = f" sample {difference.sample_index}" if summary.unit == "samples" else ""
        echo(f"row {difference.prompt_id!r}{sample}: {_in_words(difference)}")
        for name, text in (("A", difference.excerpt_a), ("B", difference.excerpt_b)):
            if text is not None and not no_text:
                echo(f"  {name} {json.dumps(text, ensure_ascii=False)}")
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
    """Yield the differences, and put the first `limit` of them (0: all) into `shown`.

    Rows of both runs come before rows of only one run.
    """
    max_shown = limit or sys.maxsize
    only: list[RowDifference] = []
    for difference in differences:
        if difference.kind in ("only_in_a", "only_in_b"):
            if len(only) < max_shown and not common:
                only.append(difference)
        elif difference.kind != "logits" and len(shown) < max_shown:
            shown.append(difference)
        yield difference
    shown.extend(only[: max_shown - len(shown)])


def _summary_lines(summary: DiffSummary, common: bool) -> Iterator[str]:
    kinds = ", ".join(f"{count:,} by {kind}" for kind, count in summary.kinds.items())
    differ = f"{summary.different:,} differ ({kinds})" if summary.different else "all are equal"
    unit = summary.unit
    yield (
        f"{summary.counted(summary.common)} in both runs: {differ}"
        if summary.common
        else f"no {unit} are in both runs"
    )
    for name, count in (("A", summary.missing_in_b), ("B", summary.missing_in_a)):
        if count:
            yield f"{summary.counted(count)} only in {name}" + (
                ", and not compared" if common else ""
            )
    if summary.equal_from_other_logits:
        yield f"{summary.equal_from_other_logits:,} {unit} have equal tokens, but other logits"


def _in_words(difference: RowDifference) -> str:
    match difference.kind:
        case "only_in_a":
            return "only in A"
        case "only_in_b":
            return "only in B"
        case "prompt":
            return "the prompts differ"
        case "error":
            result_a, result_b = (
                _result(reason)
                for reason in (difference.finish_reason_a, difference.finish_reason_b)
            )
            return f"{result_a} in A, {result_b} in B"
        case "finish":
            a, b = (
                difference.stop_reason_a or difference.finish_reason_a,
                difference.stop_reason_b or difference.finish_reason_b,
            )
            return f"the same tokens, but other finish reasons: {a} / {b}"
        case "text":
            return "the same tokens, but other texts"
        case "logits":
            return "the same tokens, but other logits"
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


def _result(finish_reason: str | None) -> str:
    return "an error" if finish_reason == "error" else "a completion"
