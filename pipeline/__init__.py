"""The public API of gptbatch.

    from gptbatch.pipeline import JobConfig, run_job

    run_job(JobConfig(model="gpt2", input="prompts.jsonl", output="out"))

A name is imported on first use, so that a command loads only the libraries that it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gptbatch.pipeline.system.openmp import limit_spinning

if TYPE_CHECKING:
    from gptbatch.pipeline.cluster.plan import Plan, plan_job
    from gptbatch.pipeline.config import EngineConfig, JobConfig, load_config
    from gptbatch.pipeline.dry_run import InputReport, inspect_job
    from gptbatch.pipeline.errors import (
        ConfigError,
        DeviceError,
        GptbatchError,
        IncompleteError,
        InputNotFoundError,
        InputRowsError,
        ModelError,
        OutOfMemoryError,
        OutputBusyError,
        OutputConflictError,
        OutputCreationError,
        StoppedError,
        StorageError,
    )
    from gptbatch.pipeline.output.finish_folder import FinishedOutput, finish_folder
    from gptbatch.pipeline.output.part_runner import Stop
    from gptbatch.pipeline.output.part_source import PartSource
    from gptbatch.pipeline.output.row_runner import Progress
    from gptbatch.pipeline.output.summary import RunSummary
    from gptbatch.pipeline.run import run_job, run_parts

__all__ = [
    "ConfigError",
    "DeviceError",
    "EngineConfig",
    "FinishedOutput",
    "GptbatchError",
    "IncompleteError",
    "InputNotFoundError",
    "InputReport",
    "InputRowsError",
    "JobConfig",
    "ModelError",
    "OutOfMemoryError",
    "OutputBusyError",
    "OutputConflictError",
    "OutputCreationError",
    "PartSource",
    "Plan",
    "Progress",
    "RunSummary",
    "Stop",
    "StoppedError",
    "StorageError",
    "finish_folder",
    "inspect_job",
    "load_config",
    "plan_job",
    "run_job",
    "run_parts",
]

# the module of each name; the errors are in `errors`
_MODULES = {
    "EngineConfig": "config",
    "FinishedOutput": "output.finish_folder",
    "InputReport": "dry_run",
    "JobConfig": "config",
    "PartSource": "output.part_source",
    "Plan": "cluster.plan",
    "Progress": "output.row_runner",
    "RunSummary": "output.summary",
    "Stop": "output.part_runner",
    "finish_folder": "output.finish_folder",
    "inspect_job": "dry_run",
    "load_config": "config",
    "plan_job": "cluster.plan",
    "run_job": "run",
    "run_parts": "run",
}

limit_spinning()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
