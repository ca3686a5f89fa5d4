"""The settings of a job, and where they come from."""

from gptbatch.pipeline.config.engine_settings import EngineConfig, unportable_setting
from gptbatch.pipeline.config.settings import JobConfig, config_fields
from gptbatch.pipeline.config.sources import environment_name, find_config, load_config
from gptbatch.pipeline.config.values import BatchInvarianceSetting

__all__ = [
    "BatchInvarianceSetting",
    "EngineConfig",
    "JobConfig",
    "config_fields",
    "environment_name",
    "find_config",
    "load_config",
    "unportable_setting",
]
