"""The public API: the names of gptbatch.pipeline, and an import without heavy libraries."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import gptbatch
import gptbatch.pipeline
from gptbatch.pipeline import errors

FUNCTIONS = {
    "finish_folder",
    "inspect_job",
    "load_config",
    "plan_job",
    "run_job",
    "run_parts",
}
TYPES = {
    "EngineConfig",
    "FinishedOutput",
    "InputReport",
    "JobConfig",
    "PartSource",
    "Plan",
    "Progress",
    "RunSummary",
    "Stop",
}


def test_the_public_names_are_the_functions_their_types_and_the_errors() -> None:
    error_classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert set(gptbatch.pipeline.__all__) == FUNCTIONS | TYPES | error_classes
    for name in gptbatch.pipeline.__all__:
        assert getattr(gptbatch.pipeline, name).__name__ == name


def test_the_names_of_the_package_are_those_of_generation_in_memory() -> None:
    assert gptbatch.__all__ == ["LLM", "generate", "unload"]
    for name in gptbatch.__all__:
        assert getattr(gptbatch, name).__name__ == name


def test_the_version_is_that_of_the_package() -> None:
    assert gptbatch.__version__ == version("gptbatch")


def test_an_import_loads_no_heavy_library() -> None:
    code = (
        "import sys; import gptbatch.pipeline; "
        "print([n for n in ('torch', 'pydantic', 'pyarrow', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"
