"""Opens the input that a config names: files of rows, or a split of a dataset."""

from __future__ import annotations

import logging

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.config.prompt_template import parse_template
from gptbatch.pipeline.input.dataset import DatasetSplit
from gptbatch.pipeline.input.input_files import InputFiles
from gptbatch.pipeline.input.prompt_reader import PromptReader, Purpose
from gptbatch.pipeline.input.rows import RowDefaults
from gptbatch.pipeline.input.source import RowSource
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS

logger = logging.getLogger("gptbatch")


def open_input(
    config: JobConfig, source: RowSource | None = None, *, purpose: Purpose = "generated"
) -> PromptReader:
    """Open the input that a config names: files of rows, or a split of a dataset.

    Args:
        config: The settings of the job.
        source: Rows to read instead of those that the config names.
        purpose: What is done with the rows, for messages.

    Raises:
        InputNotFoundError: There is no such file.
    """
    defaults = row_defaults(config)
    _warn_about_texts(config, defaults)
    return PromptReader(
        source=source or _open_source(config),
        limit=config.limit,
        record_bad=config.on_bad_row == "record",
        finds_duplicates=config.ids == "checked",
        defaults=defaults,
        purpose=purpose,
    )


def _warn_about_texts(config: JobConfig, defaults: RowDefaults) -> None:
    """Log what a template, a stop string or a bad word may hold by mistake."""
    texts = {
        "prompt_template": [config.prompt_template or ""],
        "stop": config.stop,
        "bad_words": config.bad_words,
    }
    for name in (name for name, some in texts.items() if any("\\n" in text for text in some)):
        logger.warning(
            "%s holds a backslash and an n, which stay two characters; a line feed is $'\\n' in "
            "bash, and \\n between double quotes in YAML",
            name,
        )
    if config.prompt_template is None:
        return
    settings = [name for name in defaults.prompt_paths if name in SAMPLING_SETTINGS]
    if settings and config.row_settings is None:
        logger.warning(
            "prompt_template names %s: fields of these names are also settings of their rows; "
            "--row-settings says which fields are settings",
            ", ".join(settings),
        )


def row_defaults(config: JobConfig) -> RowDefaults:
    """Return the field names and the settings of rows without their own."""
    template, names = config.prompt_template, config.row_settings
    return RowDefaults(
        prompt_field=config.prompt_field,
        template=None if template is None else tuple(parse_template(template)),
        messages_field=config.messages_field,
        id_field=config.id_field,
        row_settings=tuple(SAMPLING_SETTINGS if names is None else names),
        sampling=config.sampling,
        given=tuple(name for name in SAMPLING_SETTINGS if name in config.model_fields_set),
    )


def _open_source(config: JobConfig) -> RowSource:
    if config.dataset is not None:
        return DatasetSplit(
            dataset=config.dataset,
            config=config.dataset_config,
            split=config.split,
            revision=config.dataset_revision,
            delimiter=config.csv_delimiter,
        )
    assert config.input is not None
    return InputFiles(config.input)
