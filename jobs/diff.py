"""`gptbatch diff`: do two runs hold the same rows, and if not, where do they part and which settings differ?"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from jobs.messages import echo, say
from jobs.options import Command, PathArgument

if TYPE_CHECKING:
    from pipeline.diff import RowDifference

DIFFERENT = 1


@click.command(cls=Command)
@click.argument("a", type=PathArgument())
@click.argument("b", type=PathArgument())
@click.option("--limit", default=20, show_default=True, type=click.IntRange(0), help="Most differences to print; 0 prints all.")
def diff(a: Path, b: Path, limit: int) -> int:
    """Compare the runs in the output folders A and B, finished or not, row by row, joined by prompt_id.

    Prints a line for each row that differs and for each setting that does, A's value first; its last line is a JSON object.
    Exits with 0 when both hold the same ids with the same prompts, tokens, endings and texts, with 1 when not. Rows whose tokens are
    equal but whose logits were not, by min_margin and logits_digest, are counted as equal_from_other_logits. Prompts and completions
    are never printed.
    """
    from pipeline.data.recorded import RecordedRun
    from pipeline.diff import diff_runs, settings_that_differ, summarize

    run_a, run_b = RecordedRun(a), RecordedRun(b)
    for name, run in (("A", run_a), ("B", run_b)):
        if not run.complete:
            say(f"{name} ({run.path}) is not complete; compared are the {run.n_rows} rows that it holds")
    summary = summarize(run_a, run_b, _printed(diff_runs(run_a, run_b), limit))
    if summary.equal_from_other_logits:
        echo(f"{summary.equal_from_other_logits} rows have equal tokens from logits of other bits")
    settings = settings_that_differ(run_a, run_b)
    for setting in settings:
        echo(f"setting {setting.name} differs: {json.dumps(setting.a)} / {json.dumps(setting.b)}")
    echo(json.dumps({**asdict(summary), "settings_that_differ": {setting.name: [setting.a, setting.b] for setting in settings}}))
    return 0 if summary.all_equal else DIFFERENT


def _printed(differences: Iterable[RowDifference], limit: int) -> Iterator[RowDifference]:
    """Hands the differences on, and prints the first `limit` on the way; 0 prints all."""
    count = 0
    for difference in differences:
        if difference.kind == "bits":  # equal all the same, and where profiles differ nearly all rows are so: counted at the end
            yield difference
            continue
        count += 1
        if limit == 0 or count <= limit:
            echo(f"row {difference.prompt_id!r}: {_in_words(difference)}")
        yield difference
    if limit and count > limit:
        echo(f"... and {count - limit} more")


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
        case "ending":
            a, b = difference.stop_reason_a or difference.finish_reason_a, difference.stop_reason_b or difference.finish_reason_b
            return f"the same tokens end differently: {a} / {b}"
        case "text":
            return "the same tokens stand for different texts"
        case "bits":
            return "the same tokens from other logits"
        case "tokens":
            tokens = " / ".join("end" if token is None else str(token) for token in (difference.token_a, difference.token_b))
            margins = " / ".join(
                "none" if margin is None else f"{margin:.3g}" for margin in (difference.min_margin_a, difference.min_margin_b)
            )
            return f"token {difference.token_index} differs: {tokens} (min_margin {margins})"


def _ending(finish_reason: str | None) -> str:
    return "an error" if finish_reason == "error" else "a completion"
