"""gptbatch as a library: `run_job(JobConfig(model="gpt2", input="prompts.jsonl", output="out"))`."""

from pipeline.config import EngineConfig, JobConfig, load_config
from pipeline.errors import GptbatchError
from pipeline.job import InputReport, inspect_job
from pipeline.loop import Progress, Stop
from pipeline.run import run_job
from pipeline.summary import RunSummary

__all__ = [
    "EngineConfig",
    "GptbatchError",
    "InputReport",
    "JobConfig",
    "Progress",
    "RunSummary",
    "Stop",
    "inspect_job",
    "load_config",
    "run_job",
]
