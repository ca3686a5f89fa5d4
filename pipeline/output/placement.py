"""Checks of the place of an output folder, before anything is loaded. Writes nothing."""

from __future__ import annotations

import logging
from pathlib import Path

from gptbatch.pipeline.config import JobConfig
from gptbatch.pipeline.errors import OutputConflictError
from gptbatch.pipeline.output.schema import COLUMNS
from gptbatch.pipeline.storage.location import location_of
from gptbatch.pipeline.system.bundled import locate

logger = logging.getLogger("gptbatch")


def check_placement(config: JobConfig) -> None:
    """Refuse an output inside its dataset, and warn of names that readers take for columns.

    Raises:
        OutputConflictError: The next run would read the output as rows of the dataset.
    """
    if not isinstance(location_of(config.output), Path):
        _refuse_inside_input(config)
        return
    output = Path(config.output).resolve()
    if config.dataset is not None and (dataset := locate(config.dataset)).is_dir():
        folder = dataset.resolve()
        if output == folder or folder in output.parents:
            raise OutputConflictError(
                f"{config.output}: lies inside the folder of its own dataset ({config.dataset}), "
                "so that the next run would read it as input; name an output outside it"
            )
    for name in config.inputs:
        location = location_of(name)
        if not isinstance(location, Path):
            continue
        folder = location.resolve()
        if folder.is_dir() and (output == folder or folder in output.parents):
            raise OutputConflictError(
                f"{config.output}: lies inside the folder of its own input ({name}), so that the "
                "next run would read it as input; name an output outside it"
            )
    named = {column.name.lower() for column in COLUMNS}
    hive = [
        part
        for part in Path(config.output).absolute().parts
        if "=" in part and part.partition("=")[0].lower() in named
    ]
    if hive:
        logger.warning(
            "%s: readers of Parquet take the folder name %s for a column, which replaces or "
            "contradicts that of the table; use a name without =",
            config.output,
            ", ".join(hive),
        )


def _refuse_inside_input(config: JobConfig) -> None:
    """Refuse an output in the folder of its own input, in an object store."""
    output = str(location_of(config.output))
    for name in config.inputs:
        folder = str(location_of(name))
        if output == folder or output.startswith(f"{folder}/"):
            raise OutputConflictError(
                f"{config.output}: lies inside the folder of its own input ({name}), so that the "
                "next run would read it as input; name an output outside it"
            )
