"""`gptbatch generate`: generates the completions of an input into an output folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from gptbatch.jobs.limits import check_limits
from gptbatch.jobs.messages import echo, print_message
from gptbatch.jobs.options import GroupedCommand, config_options, option_name
from gptbatch.jobs.progress import progress_for_terminal
from gptbatch.jobs.signals import Signals
from gptbatch.pipeline.config import JobConfig, load_config
from gptbatch.pipeline.dry_run import InputReport, inspect_job
from gptbatch.pipeline.errors import ConfigError
from gptbatch.pipeline.run import run_job

if TYPE_CHECKING:
    from gptbatch.pipeline.cluster.on_ray import RaySummary

EXAMPLES = """\
gptbatch generate --model gpt2 --input prompts.jsonl --output out/mine --temperature 0.8 --top-k 40
gptbatch generate --config gpt2-cpu --input prompts.jsonl --output out/mine --dry-run"""


# fields that a line of the dry run names
MAX_FIELDS = 30
CLUSTER_OPTIONS = ("workers", "ray_address", "worker_cpus", "worker_gpus")

config_file_option = click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="YAML file, or a bundled config: demo, gpt2-cpu, gpt2-cpu-fast, gpt2-cuda, "
    "gpt2-cuda-fast.",
)


class _Generate(GroupedCommand):
    example = EXAMPLES


@click.command(cls=_Generate)
@config_file_option
@config_options
@click.option(
    "--on",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where to run. ray: on the workers of a Ray cluster.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="Workers on the cluster. Each loads the model once. Required with --on ray.",
)
@click.option(
    "--ray-address",
    metavar="ADDRESS",
    help="Ray cluster: auto, or HOST:PORT. Default: start one on this machine.",
)
@click.option(
    "--worker-cpus",
    type=click.FloatRange(0),
    default=1,
    show_default=True,
    metavar="N",
    help="CPUs per worker; also its threads, unless --threads is given.",
)
@click.option(
    "--worker-gpus",
    type=click.FloatRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="GPUs per worker.",
)
@click.option("--greedy", is_flag=True, help="Decode greedily: the same as --temperature 0.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Validate every row and the output folder, and print token counts. Loads no model and "
    "writes nothing.",
)
@click.pass_context
def generate(
    context: click.Context,
    /,
    config_file: str | None,
    on: str,
    greedy: bool,
    dry_run: bool,
    **settings: Any,
) -> None:
    """Generate a completion for every prompt of an input and write them to Parquet files.

    A stopped or crashed run is continued by the same command: finished parts are not computed
    again. SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU stop a run within 10 seconds with
    exit code 75; a second signal stops it at once. The last line on standard output is a JSON
    summary.

    Options override environment variables (GPTBATCH_SEED=1), and these override the config file.
    """
    cluster = {name: settings.pop(name) for name in CLUSTER_OPTIONS}
    if greedy and context.get_parameter_source("temperature") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--greedy and --temperature cannot be given together")
    config = command_config(context, config_file, settings, {"temperature": 0.0} if greedy else {})
    if dry_run:
        report = inspect_job(config)
        if report.rows_kept:
            print_message(f"the output holds {report.rows_kept:,} of the rows, which a run keeps")
        for line in _describe_fields(report):
            print_message(line)
        echo(json.dumps(asdict(report)))
        return
    if on == "local" and (given := [name for name in CLUSTER_OPTIONS if _is_given(context, name)]):
        raise click.UsageError(f"{option_name(given[0])} needs --on ray")
    if on == "ray":
        echo(json.dumps(asdict(_generate_on_ray(config, cluster, context.find_object(Signals)))))
        return
    check_limits(computes=True)
    summary = run_job(config, progress_for_terminal(), context.find_object(Signals))
    echo(json.dumps(asdict(summary)))


def _describe_fields(report: InputReport) -> list[str]:
    """Return a line each about the fields of the prompt, of settings and of metadata."""

    def named(fields: Mapping[str, int]) -> str:
        shown = [
            name if rows == report.rows else f"{name} ({rows} of {report.rows} rows)"
            for name, rows in list(fields.items())[:MAX_FIELDS]
        ]
        more = [f"{len(fields) - MAX_FIELDS} more"] if len(fields) > MAX_FIELDS else []
        return ", ".join(shown + more) or "none"

    return [
        f"fields of the prompt: {', '.join(report.prompt_fields)}",
        f"fields that are settings: {named(report.setting_fields)}",
        f"fields that are metadata: {named(report.metadata_fields)}",
    ]


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _generate_on_ray(
    config: JobConfig, options: dict[str, Any], signals: Signals | None
) -> RaySummary:
    from gptbatch.pipeline.cluster.on_ray import RaySettings, run_on_ray

    if options["workers"] is None:
        raise click.UsageError("--on ray needs --workers")
    settings = RaySettings(
        workers=options["workers"],
        address=options["ray_address"],
        cpus=options["worker_cpus"],
        gpus=options["worker_gpus"],
    )
    return run_on_ray(config, settings, progress_for_terminal(), signals)


def command_config(
    context: click.Context,
    config_file: str | None,
    settings: dict[str, Any],
    more: dict[str, Any],
    defaults: dict[str, Any] | None = None,
) -> JobConfig:
    """Return the config that the options of a command, the environment and a file give.

    Args:
        context: The context of the command.
        config_file: A YAML file, or the name of a bundled config.
        settings: The values of the options by parameter.
        more: Further settings.
        defaults: Settings that all others override.
    """
    options = {
        name.replace("__", "."): list(value) if isinstance(value, tuple) else value
        for name, value in settings.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    } | more
    try:
        return load_config(config_file, options=options, defaults=defaults)
    except ConfigError as error:
        if error.keys:
            raise click.UsageError(_in_option_words(str(error), options)) from error
        raise


def _in_option_words(message: str, options: dict[str, Any]) -> str:
    for key in options:
        message = re.sub(rf"options: {re.escape(key)}(\.\d+)?:", f"{option_name(key)}:", message)
    return message
