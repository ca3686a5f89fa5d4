"""Probes of the installed packages: versions, imports, extras."""

from __future__ import annotations

import platform
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from gptbatch.pipeline.doctor.section import Section
from gptbatch.pipeline.system.error_text import first_line

# Package -> module, of packages that a run needs.
REQUIRED = {
    "torch": "torch",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "datasets": "datasets",
    "huggingface-hub": "huggingface_hub",
    "safetensors": "safetensors",
    "pyarrow": "pyarrow",
    "numpy": "numpy",
    "pydantic": "pydantic",
}
# Every run imports these. The others take seconds, and only their presence is checked.
IMPORTED = ("numpy", "pyarrow", "safetensors", "tokenizers")
# Package -> (module, what it is for, what to install).
EXTRAS = {
    "obstore": ("obstore", "object stores", "pip install 'gptbatch[cloud]'"),
    "ray": ("ray", "--on ray", "pip install 'gptbatch[ray]'"),
    "lm-eval": ("lm_eval", "lm-evaluation-harness", "pip install 'gptbatch[lm-eval]'"),
    "matplotlib": ("matplotlib", "charts of bench scaling", "pip install 'gptbatch[bench]'"),
    "triton": ("triton", "kernels of CUDA devices", "pip install triton"),
}


def probe_versions(*, imports: bool) -> Section:
    """Return the versions of gptbatch, Python and the required packages.

    Args:
        imports: Whether to import the packages. A limit of memory may forbid it.
    """
    found = Section()
    minimums = minimum_versions()
    found.facts = {
        "gptbatch": installed_version("gptbatch"),
        "python": platform.python_version(),
        "system": platform.platform(),
        **{package: installed_version(package) for package in REQUIRED},
    }
    for package, module in REQUIRED.items():
        installed = found.facts[package]
        advice = f"install it: pip install '{package}{minimums.get(package, '')}'"
        if installed is None and find_spec(module) is None:
            found.problems.append(f"{package} is not installed; {advice}")
        elif installed is not None and is_too_old(installed, minimums.get(package, "")):
            found.problems.append(
                f"{package} {installed} is too old: gptbatch needs {minimums[package]}; {advice}"
            )
        elif imports and package in IMPORTED and (reason := _import_problem(module)):
            found.problems.append(f"{package} cannot be imported ({reason}); install it again")
    return found


def probe_torch() -> Section:
    """Import torch, and return its version, its builds and the seconds of the import."""
    began = time.monotonic()
    if reason := _import_problem("torch"):
        return Section(
            facts={"error": reason},
            problems=[f"torch cannot be imported ({reason}); install it again"],
        )
    import torch

    return Section(
        facts={
            "version": torch.__version__,
            "import_s": round(time.monotonic() - began, 2),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "onednn": torch.backends.mkldnn.is_available(),
            "cuda": torch.version.cuda,
        }
    )


def probe_extras() -> Section:
    """Return which optional packages are installed, and how to install the others."""
    found = Section()
    minimums = minimum_versions()
    for package, (module, purpose, install) in EXTRAS.items():
        installed = installed_version(package)
        present = installed is not None or find_spec(module) is not None
        found.facts[package] = {
            "version": installed,
            "installed": present,
            "for": purpose,
            "install": None if present else install,
        }
        if installed is not None and is_too_old(installed, minimums.get(package, "")):
            found.warnings.append(
                f"{package} {installed} is too old: {purpose} needs {minimums[package]}; {install}"
            )
    return found


def installed_version(package: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def minimum_versions() -> dict[str, str]:
    """Return the version that gptbatch needs of each package, as `>=2.6`, its extras included.

    Empty for a checkout that is not installed.
    """
    from packaging.requirements import Requirement

    try:
        lines = requires("gptbatch") or []
    except PackageNotFoundError:
        return {}
    return {parsed.name: str(parsed.specifier) for parsed in map(Requirement, lines)}


def is_too_old(installed: str, needed: str) -> bool:
    """Return whether a version is not among those needed; "" needs none."""
    from packaging.specifiers import SpecifierSet

    return not SpecifierSet(needed).contains(installed, prereleases=True)


def _import_problem(module: str) -> str | None:
    """Import a module. Return why that fails; None where it works."""
    try:
        import_module(module)
    # A broken library may raise anything.
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {first_line(error)}"
    return None
