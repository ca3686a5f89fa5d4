"""examine_machine: run all probes, each isolated, and collect what they found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gptbatch.pipeline.config import EngineConfig
from gptbatch.pipeline.doctor import defaults, host, kernels, libraries, self_tests
from gptbatch.pipeline.doctor.section import Section, run_probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What all probes found.

    Attributes:
        sections: By name, in the order in which they are shown.
        wall_s: Seconds of all probes.
    """

    sections: dict[str, Section]
    wall_s: float

    @property
    def warnings(self) -> list[str]:
        """What makes runs slower or less certain."""
        return [text for section in self.sections.values() for text in section.warnings]

    @property
    def problems(self) -> list[str]:
        """What makes runs fail."""
        return [text for section in self.sections.values() for text in section.problems]

    def to_json(self) -> dict[str, Any]:
        """Return the object of `gptbatch doctor --json`."""
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "warnings": self.warnings,
            **{name: section.facts for name, section in self.sections.items()},
            "wall_s": round(self.wall_s, 2),
        }


def examine_machine(limits_problem: str | None = None) -> Diagnosis:
    """Examine this machine. Builds the C++ kernels if they are not built.

    Args:
        limits_problem: Why the limits of this process forbid to import torch. None if they do not.
    """
    began = time.monotonic()
    sections = dict(_probes(limits_problem))
    return Diagnosis(sections=sections, wall_s=time.monotonic() - began)


def _probes(limits_problem: str | None) -> Iterator[tuple[str, Section]]:
    """Run the probes in order and yield their names and sections."""

    def probed(name: str, probe: Callable[[], Section]) -> tuple[str, Section]:
        return name, run_probe(name, probe)

    imports = limits_problem is None
    yield probed("versions", lambda: libraries.probe_versions(imports=imports))
    if limits_problem is None:
        torch = run_probe("torch", libraries.probe_torch)
    else:
        torch = Section(facts={"error": limits_problem}, problems=[limits_problem])
    yield "torch", torch
    has_torch = "error" not in torch.facts

    def probed_with_torch(name: str, probe: Callable[[], Section]) -> tuple[str, Section]:
        if has_torch:
            return probed(name, probe)
        return name, Section(facts={"error": "needs torch"})

    yield probed("cpu", host.probe_cpu)
    yield probed_with_torch("instruction_sets", host.probe_instruction_sets)
    yield probed("memory", host.probe_memory)
    yield probed_with_torch("gpu", host.probe_gpu)
    yield probed_with_torch("compiler", kernels.probe_compiler)
    _, built = probed_with_torch("kernels", kernels.probe_kernels)
    if (error := built.facts.get("error")) is not None:
        built.facts |= {"available": False, "reason": error}
    yield "kernels", built
    # After a build, whose library it counts.
    yield probed_with_torch("kernel_cache", kernels.probe_kernel_cache)
    engine = EngineConfig()

    def probe_settings() -> Section:
        nonlocal engine
        section, engine = defaults.probe_settings()
        return section

    settings = run_probe("settings", probe_settings)
    # Before the self-tests, which a run would execute with this number of threads.
    yield probed_with_torch("defaults", lambda: _use(engine, built.facts))
    yield probed_with_torch(
        "batch_invariance", lambda: self_tests.probe_batch_invariance(built.facts)
    )
    yield probed_with_torch("arithmetic", lambda: self_tests.probe_arithmetic(built.facts))
    yield probed("extras", libraries.probe_extras)
    yield probed("hugging_face", defaults.probe_hugging_face)
    yield "settings", settings


def _use(engine: EngineConfig, built: dict[str, Any]) -> Section:
    """Return the defaults, and set torch's threads to those of a run."""
    import torch

    section = defaults.probe_defaults(engine, built)
    torch.set_num_threads(section.facts["threads"])
    return section
