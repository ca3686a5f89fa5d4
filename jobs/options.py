"""The options of the commands. `gptbatch generate` has one option for each config key."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from gptbatch.jobs.arguments import (
    ListItems,
    ModelArgument,
    SearchedTextArgument,
    TokenValuesArgument,
)
from gptbatch.jobs.messages import log_verbosely, print_message
from gptbatch.pipeline.config import config_fields
from gptbatch.pipeline.config.field_types import has_comma_items, is_list, value_type
from gptbatch.pipeline.params.other_names import advice_for, setting_of
from gptbatch.pipeline.params.settings import (
    MAX_TOKEN_ID,
    SAMPLING_SETTINGS,
    SamplingSetting,
)

if TYPE_CHECKING:
    from gptbatch.pipeline.audit.run_reader import RunReader

_METAVARS = {
    "--model": "M",
    "--input": "F",
    "--dataset": "D",
    "--split": "S",
    "--prompt-template": "TEXT",
    "--row-settings": "NAME",
    "--output": "DIR",
    "--batch-size": "B",
    "--part-rows": "R",
    "--shard": "I/N",
    "--max-row-errors": "N|P%",
    "--skip-row": "ID",
}


def _log_verbosely(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        log_verbosely()


_VERBOSE = click.Option(
    ["-v", "--verbose"],
    is_flag=True,
    expose_value=False,
    callback=_log_verbosely,
    help="Log more to standard error.",
)

# the first config key of each group of options, in the order of the fields
_GROUPS = {
    "model": "Model",
    "input": "Input",
    "output": "Output",
    "seed": "Sampling",
    "batch_invariance": "Batch invariance",
    "engine.device": "Engine",
}


class Command(click.Command):
    """A command with `-v` that rejects an option given twice; click would take the last."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), _VERBOSE]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        refuse_repeated_options(self, ctx, args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            setting = setting_of(error.option_name)
            names = {name for parameter in self.params for name in parameter.opts}
            if setting:
                advice = f"use {name}" if (name := option_name(setting)) in names else ""
            else:
                advice = advice_for(error.option_name)
            if advice:
                raise click.UsageError(f"no such option: {error.option_name}; {advice}") from error
            raise


class Group(click.Group):
    """A group of commands that rejects an option given twice."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        refuse_repeated_options(self, ctx, args)
        return super().parse_args(ctx, args)


class GroupedCommand(Command):
    """A command whose `--help` groups the options of the config keys and ends with examples.

    Attributes:
        example: Command lines.
        lists_settings: `--help` shows the options of config keys. Otherwise the description of the
            command says which there are.
    """

    example = ""
    lists_settings = True

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        titles = option_groups()
        sections: dict[str, list[tuple[str, str]]] = {
            title: [] for title in [*_GROUPS.values(), "Run"]
        }
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                sections[titles.get((parameter.name or "").replace("__", "."), "Run")].append(
                    record
                )
        for title, records in sections.items():
            if title == "Run" or self.lists_settings:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for line in self.example.splitlines():
                formatter.write(f"  {line}\n")


def option_groups() -> dict[str, str]:
    """Return the heading of each config key."""
    title, titles = "", {}
    for key in config_fields():
        title = _GROUPS.get(key, title)
        titles[key] = title
    return titles


def refuse_repeated_options(command: click.Command, ctx: click.Context, args: list[str]) -> None:
    """Raise UsageError for an option that takes one value and is given twice."""
    try:
        _, _, order = command.make_parser(ctx).parse_args(args=list(args))
    except click.UsageError:
        # the parsing of the command reports it
        return
    for parameter in order:
        repeated = (
            isinstance(parameter, click.Option)
            and not parameter.multiple
            and not parameter.count
            and order.count(parameter) > 1
        )
        if repeated:
            raise click.UsageError(f"{parameter.opts[0]} is given twice; it takes one value", ctx)


def option_name(key: str) -> str:
    """Return --batch-size for the config key engine.batch_size."""
    return "--" + key.rpartition(".")[2].replace("_", "-")


def config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every config key. JobConfig checks their ranges."""
    return options_for(config_fields())(command)


def options_for(keys: Iterable[str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that gives a command an option for each of these config keys."""
    names = set(keys)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        return _add_options(command, names)

    return decorate


def _add_options(command: Callable[..., Any], keys: Container[str]) -> Callable[..., Any]:
    for key, field in reversed(config_fields().items()):
        if key not in keys:
            continue
        name, kind = option_name(key), _click_type(field.annotation)
        many, callback = is_list(field), None
        if many and key != "input":
            kind = ListItems(kind, with_commas=has_comma_items(field))
            callback = partial(_join_items, field.get_default(call_default_factory=True))
        default = (
            ""
            if field.is_required() or field.default in (None, [], {})
            else f" Default: {_yaml(field.default)}."
        )
        declaration = f"{name}/--no-{name[2:]}" if kind is click.BOOL else name
        command = click.option(
            declaration,
            key.replace(".", "__"),
            type=None if kind is click.BOOL else kind,
            default=None,
            multiple=many,
            callback=callback,
            metavar=(
                (SAMPLING_SETTINGS[key].metavar or None)
                if key in SAMPLING_SETTINGS
                else _METAVARS.get(name)
            ),
            help=f"{field.description}{default}{' May be repeated.' if many else ''}",
        )(command)
    return command


def _join_items(
    default: Any, ctx: click.Context, param: click.Parameter, value: tuple[list[Any], ...]
) -> Any:
    """Return the items of all values of an option; the default of its setting for none."""
    return value and ([item for items in value for item in items] or default)


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command an option for every setting of one sample, None where it is not given."""
    for name, setting in reversed(SAMPLING_SETTINGS.items()):
        if name == "n":
            continue
        option = option_name(name)
        command = click.option(
            f"{option}/--no-{option[2:]}" if setting.kind == "bool" else option,
            type=_setting_type(setting),
            default=None,
            multiple=setting.kind in ("texts", "token_ids"),
            callback=_joined_or_none,
            metavar=setting.metavar or None,
            help=f"Generate with this {name}. Default: as recorded.",
        )(command)
    return command


def _setting_type(setting: SamplingSetting) -> click.ParamType[Any] | None:
    match setting.kind:
        case "int":
            return click.IntRange(int(setting.minimum), int(setting.maximum))
        case "float":
            return click.FloatRange(
                setting.minimum, setting.maximum, min_open=setting.above_minimum
            )
        case "token_ids":
            return ListItems(click.IntRange(0, MAX_TOKEN_ID), with_commas=True)
        case "token_values":
            return TokenValuesArgument()
        case "texts":
            return ListItems(SearchedTextArgument(), with_commas=False)
        case "bool":
            return None


def _joined_or_none(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(item for items in value for item in items) if value else None
    return value


def reopen_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options for loading the model of a recorded run."""
    for option in (
        click.option(
            "--threads",
            type=click.IntRange(1, 1024),
            help="CPU threads. Default: the number that PyTorch finds, at most the CPU quota.",
        ),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            help="Device to compute on. Default: as recorded.",
        ),
        click.option(
            "--allow-pickle",
            is_flag=True,
            help="Read pytorch_model.bin where the checkpoint has no safetensors.",
        ),
        click.option(
            "--allow-other-weights",
            is_flag=True,
            help="Continue if the SHA-256 of the weights is not that of the run.",
        ),
        click.option(
            "--model",
            type=ModelArgument(),
            metavar="M",
            help="Copy of the weights: a folder, or a name on the hub. Default: as recorded.",
        ),
    ):
        command = option(command)
    return command


def print_checkpoint(run: RunReader, model: str | None) -> None:
    """Print the checkpoint that a run names before it is read, since the folder is not trusted."""
    from gptbatch.pipeline.audit.loaded_run import recorded_model

    if model is None:
        print_message(f"reading the checkpoint {recorded_model(run)}, which {run.path} names")


def _click_type(annotation: Any) -> click.ParamType[Any]:
    annotation = value_type(annotation)
    if get_origin(annotation) is list:
        annotation = value_type(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation))
    if get_origin(annotation) is dict:
        return click.STRING
    return {bool: click.BOOL, int: click.INT, float: click.FLOAT, str: click.STRING}[annotation]


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
