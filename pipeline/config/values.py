"""The types of config values: paths, shards, names, token ids. They check and convert."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from gptbatch.pipeline.config.prompt_template import parse_template
from gptbatch.pipeline.params.sampling_params import parse_token_values
from gptbatch.pipeline.params.settings import MAX_TOKEN_ID, SAMPLING_SETTINGS, text_problem
from gptbatch.pipeline.system.paths import expand_path

Name = Annotated[str, Field(min_length=1)]
BatchInvarianceSetting = Literal["auto", "require", "portable", "off"]


def _path_setting(*, writes: bool = False, stores: bool = False) -> Any:
    """Return a validator for paths. pydantic's own validator rejects names that are not UTF-8."""

    def check(value: Any) -> str:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            raise PydanticCustomError("string_type", "Input should be a valid string")
        if not value:
            raise PydanticCustomError("string_too_short", "String should have at least 1 character")
        if value == "-" and not writes:
            return value
        return expand_path(value, writes=writes, stores=stores)

    return PlainValidator(check)


InputPath = Annotated[str, _path_setting()]
# One path stands for a list of one.
if TYPE_CHECKING:
    InputPaths = str | list[str]
else:
    InputPaths = Annotated[
        list[Annotated[str, _path_setting(stores=True)]],
        Field(min_length=1),
        BeforeValidator(lambda value: [value] if isinstance(value, str | os.PathLike) else value),
    ]
OutputPath = Annotated[str, _path_setting(writes=True, stores=True)]
# "5" or "2.5%"; a YAML file may say 5 without quotes
CountOrShare = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
    Field(pattern=r"^(\d+|\d{1,2}(\.\d+)?%|100%)$"),
]


AUTO_SHARD = "auto"
_SHARD = re.compile(r"(\d{1,9})/([1-9]\d{0,8})", re.ASCII)


def index_and_count(shard: str) -> tuple[int, int] | None:
    """Return 3 and 16 for "3/16". None for other text, or an index that is too large."""
    match = _SHARD.fullmatch(shard)
    if match is None or int(match[1]) >= int(match[2]):
        return None
    return int(match[1]), int(match[2])


def checked_shard(shard: str) -> str:
    if shard != AUTO_SHARD and index_and_count(shard) is None:
        raise ValueError(
            "must be auto, or INDEX/COUNT with an index from 0 to COUNT - 1: four shards are 0/4, "
            "1/4, 2/4 and 3/4"
        )
    return shard


NO_SETTING = "none"


def _names_of_settings(names: list[str]) -> list[str]:
    """Return the names in the order of SAMPLING_SETTINGS, each once; `none` alone is no name."""
    if NO_SETTING in names and len(names) > 1:
        raise PydanticCustomError("none_alone", "'none' must be given alone")
    return [name for name in SAMPLING_SETTINGS if name in names]


# One name stands for a list of one. mypy cannot read a computed Literal.
if TYPE_CHECKING:
    RowSettings = list[str]
else:
    RowSettings = Annotated[
        list[Literal[(NO_SETTING, *SAMPLING_SETTINGS)]],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        AfterValidator(_names_of_settings),
    ]


def _checked_template(template: str) -> str:
    parse_template(template)
    return template


PromptTemplate = Annotated[str, AfterValidator(_checked_template)]


def _list_of_one(value: Any) -> Any:
    return [value] if isinstance(value, (str, int)) else value


def _checked_text(text: str) -> str:
    if problem := text_problem(text):
        raise ValueError(problem)
    return text


TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIds = Annotated[list[TokenId], BeforeValidator(_list_of_one)]
Texts = Annotated[
    list[Annotated[str, AfterValidator(_checked_text)]], BeforeValidator(_list_of_one)
]
# JSON and YAML name the tokens by text and by number
TokenValues = Annotated[dict[str, float], BeforeValidator(parse_token_values)]
