"""The settings of a job, and where they come from."""

from gptbatch.pipeline.config.settings import EngineConfig, JobConfig, config_fields
from gptbatch.pipeline.config.sources import environment_name, find_config, load_config

__all__ = [
    "EngineConfig",
    "JobConfig",
    "config_fields",
    "environment_name",
    "find_config",
    "load_config",
]
