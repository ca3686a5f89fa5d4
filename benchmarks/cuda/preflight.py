"""What the sections need: `python -m benchmarks.cuda preflight SECTION ...`.

Imports nothing but the standard library by itself, so that it can say what is missing.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
# Beside the dependencies of the package.
EXTRA_PACKAGES = ("triton", "pytest", "pytest-timeout", "hypothesis", "scipy")
# What a section imports beside its own module: later, or in a child process.
LATER_MODULES = {
    "command": ("gptbatch.jobs.cli", "gptbatch.pipeline.run", "transformers", "tokenizers"),
    "tests": (
        "tests.test_device_engine",
        "tests.test_sampling",
        "pytest_timeout",
    ),
    "transformers": ("transformers",),
}


def preflight(modules: Iterable[str], *, needs_gpu: bool) -> None:
    """Import modules and look for the GPU; exit with what is wrong and what to do."""
    problems: list[str] = []
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - of whatever kind, the section cannot run
            problem = f"{type(error).__name__}: {error}"
            if problem not in problems:
                problems.append(problem)
    if problems and (missing := missing_packages()):
        problems.append(f"not installed: {', '.join(missing)}")
        problems.append(f"pip install {' '.join(missing)}; or leave sections out by --sections")
    if not problems and needs_gpu:
        problems += filter(None, [gpu_problem()])
    if problems:
        sys.exit("\n".join(["cuda-check cannot run here:", *problems]))


def modules_of(sections: dict[str, str], names: Iterable[str]) -> list[str]:
    """Return the modules that these sections import; `sections` is that of __main__.py."""
    modules = ["gptbatch.pipeline.config", "benchmarks.cuda.common"]
    for name in names:
        modules.append(f"benchmarks.cuda.{sections[name].partition(':')[0]}")
        modules += LATER_MODULES.get(name, ())
    return list(dict.fromkeys(modules))


def missing_packages() -> list[str]:
    """Return the packages that are not installed here, as pip names them."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    found = (re.match(r"[\w.-]+", requirement) for requirement in project["dependencies"])
    names = [match[0] for match in found if match]
    return [name for name in (*names, *EXTRA_PACKAGES) if not _is_installed(name)]


def gpu_problem() -> str | None:
    """Return why the Triton kernels cannot run here; None where they can."""
    import torch

    from gptbatch.pipeline.kv_cache.interface import triton_problem

    if not torch.cuda.is_available():
        return "torch finds no CUDA device; --fake tries the program without one"
    return triton_problem(torch.device("cuda"))


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def is_fake() -> bool:
    """Return whether the sections run on a CPU; see fake.py."""
    return os.environ.get("CUDA_CHECK_FAKE") == "1"
