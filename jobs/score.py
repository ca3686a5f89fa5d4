"""`gptbatch score`: computes log probabilities of given continuations."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click
from click.core import ParameterSource

from gptbatch.jobs.arguments import OutputArgument
from gptbatch.jobs.generate import command_config, config_file_option
from gptbatch.jobs.limits import check_limits
from gptbatch.jobs.messages import echo, print_message
from gptbatch.jobs.options import GroupedCommand, option_name, options_for, print_checkpoint
from gptbatch.jobs.progress import progress_for_terminal
from gptbatch.pipeline.score.rows import ScoreFields
from gptbatch.pipeline.score.run import ScoreSummary, score_input, score_run
from gptbatch.pipeline.storage.location import Location
from gptbatch.pipeline.system.paths import expand_path

EXAMPLES = """\
gptbatch score --model gpt2 --input questions.jsonl --output scores.parquet
gptbatch score --from out/mine --output scores.parquet"""

KEYS = (
    "model",
    "revision",
    "allow_pickle",
    "input",
    "dataset",
    "dataset_config",
    "dataset_revision",
    "split",
    "csv_delimiter",
    "prompt_field",
    "prompt_template",
    "id_field",
    "limit",
    "ids",
    "parse_special",
    "add_special_tokens",
    "batch_invariance",
    "engine.device",
    "engine.dtype",
    "engine.cache_dtype",
    "engine.threads",
    "engine.attention",
)
# parameters that --from takes
FROM_PARAMETERS = {
    "from_run",
    "output",
    "overwrite",
    "model",
    "allow_pickle",
    "allow_other_weights",
    "engine__device",
    "engine__threads",
}


class _Score(GroupedCommand):
    example = EXAMPLES


@click.command(cls=_Score)
@config_file_option
@options_for(KEYS)
@click.option(
    "--continuation-field",
    default="continuation",
    show_default=True,
    metavar="NAME",
    help="Field of a row that holds the text to score. Dots select nested values.",
)
@click.option(
    "--choices-field",
    default="choices",
    show_default=True,
    metavar="NAME",
    help="Field of a row that holds an array of texts to score. Dots select nested values.",
)
@click.option(
    "--on-lost-text",
    type=click.Choice(["error", "warn"]),
    help=(
        "Action for a text with characters that the tokenizer drops (byte-level ones, such as "
        "GPT-2's, drop none). error: write an error row. warn: score the rest. Default: error."
    ),
)
@click.option(
    "--from",
    "from_run",
    type=OutputArgument(),
    metavar="DIR",
    help="Score the completions of the run in this output folder instead of an input.",
)
@click.option(
    "--allow-other-weights",
    is_flag=True,
    help="With --from: continue if the SHA-256 of the weights is not that of the run.",
)
@click.option(
    "--output",
    required=True,
    metavar="FILE",
    help="Parquet file to write, in any folder. A name without a suffix is a file, too.",
)
@click.option("--overwrite", is_flag=True, help="Replace the output file if it exists.")
@click.pass_context
def score(
    context: click.Context,
    /,
    config_file: str | None,
    continuation_field: str,
    choices_field: str,
    from_run: Location | None,
    allow_other_weights: bool,
    **settings: Any,
) -> None:
    """Compute log probabilities of continuations of prompts, and write them to a Parquet file.

    A row of the input has a prompt, and `continuation` (a text) or `choices` (an array of texts).
    Texts are encoded as lm-evaluation-harness does. The table has one row per continuation. With
    --from, the completions of a run are scored, by their recorded tokens.

    The scores of a row do not depend on the other rows. The last line on standard output is a JSON
    summary. If the file holds the scores of this input already, nothing is computed.
    """
    if from_run is not None:
        summary = _score_run(context, from_run, allow_other_weights, settings)
    elif allow_other_weights:
        raise click.UsageError("--allow-other-weights needs --from")
    else:
        config = command_config(context, config_file, settings, {})
        check_limits(computes=True)
        fields = ScoreFields(continuation=continuation_field, choices=choices_field)
        summary = score_input(config, fields, progress_for_terminal())
    echo(json.dumps(asdict(summary)))


def _score_run(
    context: click.Context,
    from_run: Location,
    allow_other_weights: bool,
    settings: dict[str, Any],
) -> ScoreSummary:
    given = [
        name
        for name in context.params
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if others := [name for name in given if name not in FROM_PARAMETERS]:
        other = "--config" if others[0] == "config_file" else option_name(_key(others[0]))
        raise click.UsageError(f"--from and {other} cannot be given together")
    check_limits(computes=True)

    from gptbatch.pipeline.audit.loaded_run import LoadedRun, Overrides
    from gptbatch.pipeline.audit.run_reader import RunReader
    from gptbatch.pipeline.errors import StorageError
    from gptbatch.pipeline.output.stray_tables import describe_stray_tables

    run = RunReader(from_run)
    if run.stray_tables:
        raise StorageError(f"{from_run}: {describe_stray_tables(run.stray_tables)}")
    if not run.complete:
        print_message(f"{from_run} is not complete; scoring the {run.described_rows} that it holds")
    overrides = Overrides(
        model=settings["model"] and expand_path(settings["model"]),
        allow_pickle=bool(settings["allow_pickle"]),
        allow_other_weights=allow_other_weights,
        device=settings["engine__device"],
        threads=settings["engine__threads"],
    )
    print_checkpoint(run, overrides.model)
    return score_run(
        LoadedRun(run, overrides),
        expand_path(settings["output"], writes=True, stores=True),
        overwrite=settings["overwrite"],
        progress=progress_for_terminal(),
    )


def _key(parameter: str) -> str:
    return parameter.replace("__", ".")
