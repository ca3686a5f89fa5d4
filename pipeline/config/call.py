"""The settings of a call of `gptbatch.generate`: those of a job, without files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from gptbatch.pipeline.config.engine_settings import EngineConfig
from gptbatch.pipeline.config.problems import settings_error
from gptbatch.pipeline.config.settings import JobConfig, config_fields
from gptbatch.pipeline.config.values import OutputPath
from gptbatch.pipeline.errors import ConfigError

# Settings of the input, the output folder, and runs that are continued.
_OF_FILES = {
    "input",
    "dataset",
    "dataset_config",
    "dataset_revision",
    "split",
    "csv_delimiter",
    "limit",
    "output",
    "part_rows",
    "shard",
    "overwrite",
    "max_row_errors",
    "skip_row",
    "allow_other_environment",
}
# The model is kept as long as these stay the same.
LOADING_SETTINGS = (
    "model",
    "revision",
    "allow_pickle",
    "batch_invariance",
    "device",
    "dtype",
    "cache_dtype",
    "threads",
    "attention",
)
_ENGINE = tuple(EngineConfig.model_fields)
CALL_SETTINGS = tuple(
    name
    for key in config_fields()
    if (name := key.removeprefix("engine.")) not in (*_OF_FILES, *LOADING_SETTINGS)
)


class CallConfig(JobConfig):
    """A job that reads no input and writes no output folder."""

    output: OutputPath = ""
    on_bad_row: Literal["fail", "record"] = Field("record", description="As in JobConfig.")

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        return self


def call_config(where: str, settings: Mapping[str, Any]) -> CallConfig:
    """Return the settings of a call, whose names are those of options: `dtype`, `top_k`.

    Args:
        where: The function, for messages.
        settings: By name.

    Raises:
        ConfigError: A setting is wrong, or one of files.
    """
    for name in settings:
        if name in _OF_FILES:
            raise ConfigError(
                f"{where}: {name} is a setting of jobs, which run_job(JobConfig(...)) runs",
                keys=(name,),
            )
        if name == "engine":
            raise ConfigError(
                f"{where}: engine: give its settings by their own names: {', '.join(_ENGINE)}",
                keys=(name,),
            )
    nested: dict[str, Any] = {
        name: value for name, value in settings.items() if name not in _ENGINE
    }
    nested["engine"] = {name: value for name, value in settings.items() if name in _ENGINE}
    try:
        return CallConfig.model_validate(nested)
    except ValidationError as error:
        known = [*LOADING_SETTINGS, *CALL_SETTINGS]
        raise settings_error(error, where, known, section="engine") from error
