"""Probe of batch invariance: the self-test on a tiny random model, per device, attention, dtype."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from gptbatch.pipeline.doctor.section import Section, run_probe

if TYPE_CHECKING:
    import torch

    from gptbatch.pipeline.kv_cache.spec import BackendName

# A run tests its own weights. This model is small, so that all its tests take about a second.
TINY = {
    "model_type": "gpt2",
    "vocab_size": 256,
    "n_positions": 256,
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 64,
}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}


def probe_batch_invariance(kernels: dict[str, Any]) -> Section:
    """Run the self-test for each device, attention and dtype of this machine.

    Args:
        kernels: The facts of `probe_kernels`: whether ragged attention is available, and why not.
    """
    import torch

    section = Section(facts={"tests": []})
    cases: list[tuple[str, BackendName]] = [("cpu", "ragged"), ("cpu", "padded")]
    if torch.cuda.is_available():
        cases += [("cuda", "ragged"), ("cuda", "padded")]
    for device, attention in cases:
        for dtype in DTYPES[device]:
            case = {"device": device, "attention": attention, "dtype": dtype}
            needs_compiler = device == "cpu" and attention == "ragged"
            if needs_compiler and not kernels.get("available"):
                result = {"batch_invariance": "not available", "reason": "needs the C++ kernels"}
                section.facts["tests"].append(case | result)
                continue
            name = f"the self-test of {attention} attention in {dtype} on {device}"
            test = run_probe(name, partial(_test, device, attention, dtype))
            section.warnings += test.warnings
            if (error := test.facts.get("error")) is not None:
                test.facts = {"batch_invariance": "not available", "reason": error}
            section.facts["tests"].append(case | test.facts)
    return section


def _test(device: str, attention: BackendName, dtype: str) -> Section:
    import torch

    from gptbatch.pipeline.bench.random_model import random_model
    from gptbatch.pipeline.kv_cache.interface import select_backend
    from gptbatch.pipeline.model.config import parse_config
    from gptbatch.pipeline.model.self_test import select_batch_invariant_kernels

    began = time.monotonic()
    kind: torch.dtype = getattr(torch, dtype)
    model = random_model(
        parse_config(TINY, "doctor"),
        dtype=kind,
        device=torch.device(device),
        backend=select_backend(attention, torch.device(device)),
    )
    report = select_batch_invariant_kernels(model)
    section = Section(
        facts={
            "batch_invariance": "verified" if report.passed else "unverified",
            "reason": None if report.passed else f"{', '.join(report.failures)} differ",
            "linears": model.linear_kind,
            "reduction_order": model.reduction_order if attention == "padded" else None,
            "padding_plan": report.padding_plan,
            "seconds": round(time.monotonic() - began, 2),
        }
    )
    if not report.passed:
        section.warnings.append(
            f"{attention} attention in {dtype} on {device}: the bits of a row depend on the batch "
            f"({section.facts['reason']}); outputs of such runs are unverified, and "
            "--batch-invariance require refuses them"
        )
    return section
