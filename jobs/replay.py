"""`gptbatch replay`: generates one row of a run again and explains each of its tokens."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from gptbatch.jobs.arguments import OutputArgument
from gptbatch.jobs.messages import echo
from gptbatch.jobs.options import Command, print_checkpoint, reopen_options, sampling_options
from gptbatch.pipeline.params.sampling_params import SamplingParams, from_row, to_attribute
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS
from gptbatch.pipeline.storage.location import Location

if TYPE_CHECKING:
    from gptbatch.pipeline.audit.loaded_run import LoadedRun
    from gptbatch.pipeline.audit.replay import Replay
    from gptbatch.pipeline.audit.trace import Candidate, StepTrace
    from gptbatch.pipeline.types import Completion

# the text of a token id at its position
TokenText = Callable[[int], str]


@click.command(cls=Command)
@click.argument("output", type=OutputArgument())
@click.option("--prompt-id", required=True, help="Id of the row.")
@click.option(
    "--sample",
    "sample_index",
    type=click.IntRange(0),
    metavar="I",
    default=0,
    help="Index of the sample among the n of the row. Default: 0.",
)
@click.option(
    "--trace",
    is_flag=True,
    help="Print a table of steps: token, probability, rank, kept set size, margin, runners-up.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON lines: one per step with --trace, then one for the row.",
)
@sampling_options
@reopen_options
def replay(
    output: Location,
    prompt_id: str,
    sample_index: int,
    trace: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate one row of the run in the folder OUTPUT again, alone, and compare it.

    Needs the folder and the weights, but not the input. Exits with 0 even if the row differs; use
    verify for an exit code of 1.
    """
    from gptbatch.pipeline.audit.loaded_run import LoadedRun, Overrides
    from gptbatch.pipeline.audit.replay import replay_row
    from gptbatch.pipeline.audit.run_reader import RunReader

    run = RunReader(output)
    row = run.require(prompt_id, sample_index)
    settings = {name: options.pop(name, None) for name in SAMPLING_SETTINGS}
    overrides = Overrides(**options)
    print_checkpoint(run, overrides.model)
    loaded_run = LoadedRun(run, overrides)
    changes: dict[str, Any] = {
        name: to_attribute(list(value) if isinstance(value, tuple) else value, setting)
        for name, setting in SAMPLING_SETTINGS.items()
        if (value := settings[name]) is not None
    }
    params = _params(loaded_run, row, changes)
    replayed = replay_row(loaded_run, row, params, trace=trace)
    completion = replayed.completion

    def text_of_step(step: int) -> TokenText:
        before = completion.prompt_token_ids + completion.token_ids[:step]
        return lambda token: loaded_run.tokenizer.added_text(before, [token])

    reasons = loaded_run.reasons_bits_may_differ()
    if as_json:
        for step in replayed.trace:
            click.echo(json.dumps(_step_in_json(step, text_of_step(step.step))))
        click.echo(json.dumps(_summary(row, replayed, changes, reasons)))
        return
    if trace:
        echo("\n".join(_table(replayed.trace, text_of_step)) + "\n")
    text = f" [{_error(completion)}]" if replayed.text is None else replayed.text
    echo(f"{row['prompt']}{text}\n")
    echo(
        _verdict(
            replayed.first_difference,
            changes,
            reasons,
            len(completion.token_ids),
            completion.min_decision_margin,
        )
    )


def _params(loaded_run: LoadedRun, row: dict[str, Any], changes: dict[str, Any]) -> SamplingParams:
    """Return the recorded parameters of a row with changes.

    Raises:
        StorageError: The recorded ones cannot be read.
        ConfigError: The model cannot follow the changed ones.
    """
    from gptbatch.pipeline.errors import ConfigError, StorageError

    try:
        params = dataclasses.replace(from_row(row), **changes)
    except ValueError as error:
        raise StorageError(
            f"{loaded_run.run.path}: row {row['prompt_id']!r} is damaged: {error}"
        ) from error
    if changes and (problem := loaded_run.setting_problem(params)):
        raise ConfigError(problem)
    return params


def _summary(
    row: dict[str, Any], replayed: Replay, changes: dict[str, Any], reasons: list[str]
) -> dict[str, Any]:
    completion = replayed.completion
    return {
        "prompt_id": row["prompt_id"],
        "sample_index": row["sample_index"] or 0,
        "equal": replayed.equal,
        "first_difference": replayed.first_difference,
        "changed": changes,
        "because": reasons,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "stop_string": completion.stop_string,
        "error": _error(completion),
        "prompt": row["prompt"],
        "completion": replayed.text,
        "completion_token_ids": completion.token_ids,
        "min_decision_margin": completion.min_decision_margin,
        "recorded_completion": row["completion"],
        "recorded_token_ids": row["completion_token_ids"],
        "recorded_min_margin": row["min_decision_margin"],
        "logits_digest": completion.logits_digest,
        "recorded_logits_digest": row["logits_digest"],
    }


def _error(completion: Completion) -> str | None:
    """Return why changed settings give no completion."""
    return None if completion.error is None else completion.error.reason


def _verdict(
    first_difference: int | None,
    changes: dict[str, Any],
    reasons: list[str],
    count: int,
    margin: float | None,
) -> str:
    changed = ", ".join(f"{name} {value}" for name, value in changes.items())
    nearest = "" if margin is None else f", smallest margin {margin:.3g}"
    if first_difference is None:
        unsure = f"; bits may differ: {', '.join(reasons)}" if reasons else ""
        settings = f" with {changed}" if changed else ""
        return f"equal to the recorded row{settings}: {count} tokens{nearest}{unsure}"
    why = (
        f" with {changed}"
        if changed
        else f" ({', '.join(reasons)})"
        if reasons
        else ", although the environment is that of the run"
    )
    return (
        f"differs from the recorded row from token {first_difference} on{why}: "
        f"{count} tokens{nearest}"
    )


def _step_in_json(step: StepTrace, text: TokenText) -> dict[str, Any]:
    def named(candidate: Candidate) -> dict[str, Any]:
        return {
            "token": candidate.token,
            "text": text(candidate.token),
            "probability": candidate.probability,
            "noise": candidate.noise,
        }

    return {
        "step": step.step,
        **named(step.candidate),
        "logprob": step.logprob,
        "rank": step.rank,
        "kept": step.kept,
        # null: no other token can be sampled
        "margin": None if step.decision_margin == math.inf else step.decision_margin,
        "runners_up": [named(candidate) for candidate in step.runners_up],
    }


def _table(steps: tuple[StepTrace, ...], text_of_step: Callable[[int], TokenText]) -> list[str]:
    def text(step: StepTrace, candidate: Candidate) -> str:
        return json.dumps(text_of_step(step.step)(candidate.token), ensure_ascii=False)

    lines = [
        f"{'step':>5} {'token':>6} {'text':<18} {'probability':>11} {'rank':>6} {'kept':>6} "
        f"{'margin':>9}  runners-up"
    ]
    for step in steps:
        runners_up = ", ".join(
            f"{text(step, candidate)} {candidate.probability:.3g}" for candidate in step.runners_up
        )
        margin = "" if step.decision_margin is None else f"{step.decision_margin:.3g}"
        lines.append(
            f"{step.step:>5} {step.candidate.token:>6} {text(step, step.candidate):<18} "
            f"{step.candidate.probability:>11.3g} {step.rank:>6} {step.kept:>6} "
            f"{margin:>9}  {runners_up}"
        )
    return lines
