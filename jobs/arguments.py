"""The types of arguments and options: folders, outputs, models, texts, lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gptbatch.pipeline.params.sampling_params import parse_token_values
from gptbatch.pipeline.params.settings import text_problem
from gptbatch.pipeline.storage.location import Location, location_of
from gptbatch.pipeline.system.paths import PathError, expand_path


class FolderArgument(click.ParamType[Path]):
    """A folder to write, which need not exist. `~` is the home folder."""

    name = "path"

    def convert(
        self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path:
        try:
            return Path(expand_path(str(value), writes=True))
        except PathError as error:
            self.fail(f"{value!r} {error}", param, ctx)


class OutputArgument(click.ParamType[Location]):
    """The output of a run: a folder, in which `~` is the home folder, or a URL of an object store.

    A store that cannot be used raises ConfigError.
    """

    name = "path"

    def convert(
        self, value: str | Location, param: click.Parameter | None, ctx: click.Context | None
    ) -> Location:
        try:
            return location_of(expand_path(str(value), stores=True))
        except PathError as error:
            self.fail(f"{value!r} {error}", param, ctx)


class ModelArgument(click.ParamType[str]):
    """The folder of a checkpoint, or a model name on the hub. `~` is the home folder."""

    name = "model"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return expand_path(value)
        except PathError as error:
            self.fail(f"{value!r} {error}", param, ctx)


class ListItems(click.ParamType[list[Any]]):
    """Items of a list: one, several with commas, or `[]` for none.

    Args:
        item: The type of an item.
        with_commas: Whether commas divide items.
    """

    def __init__(self, item: click.ParamType[Any], *, with_commas: bool) -> None:
        self.item, self.with_commas, self.name = item, with_commas, item.name

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[Any]:
        if isinstance(value, list):
            return value
        if value.strip() == "[]":
            return []
        if not value:
            self.fail("must not be empty; [] stands for an empty list", param, ctx)
        texts = [text.strip() for text in value.split(",")] if self.with_commas else [value]
        return [self.item.convert(text, param, ctx) for text in texts]

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        return self.item.get_metavar(param, ctx)


class TokenValuesArgument(click.ParamType[dict[str, float]]):
    """A JSON object of numbers by token id."""

    name = "json"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, float]:
        try:
            parsed = parse_token_values(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not isinstance(parsed, dict):
            self.fail(f"{value!r} is no JSON object", param, ctx)
        return parsed


class SearchedTextArgument(click.ParamType[str]):
    """A text to search for in completions."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if problem := text_problem(value):
            self.fail(problem, param, ctx)
        return str(value)
