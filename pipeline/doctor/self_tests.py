"""Probes of the bits: the self-test per device, attention and dtype, and the golden digests."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from gptbatch.pipeline.doctor.section import Section, run_probe

if TYPE_CHECKING:
    import torch

    from gptbatch.pipeline.kv_cache.quantization import CacheDtype
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


def probe_arithmetic(kernels: dict[str, Any]) -> Section:
    """Compare the golden digests of the kernels, and those of the demo model, with the right ones.

    Args:
        kernels: The facts of `probe_kernels`.
    """
    from gptbatch.pipeline.model.golden import ARITHMETIC, DEMO_DIGESTS, why_golden_differs

    section = Section(facts={"version": ARITHMETIC, "portable": False, "differing": []})
    if not kernels.get("available"):
        return section
    for cache_dtype in DEMO_DIGESTS:
        problems = {
            "golden": why_golden_differs(cache_dtype),
            "demo": None
            if demo_digest(cache_dtype) == DEMO_DIGESTS[cache_dtype]
            else f"the demo model has other logits here than by arithmetic {ARITHMETIC}",
        }
        for name, problem in problems.items():
            if problem is not None:
                section.facts["differing"].append(f"{name}, cache_dtype {cache_dtype}")
                section.warnings.append(problem)
    section.facts["portable"] = not section.facts["differing"]
    return section


def demo_digest(cache_dtype: CacheDtype) -> str:
    """Return the digest of the logits of the bundled demo model in float32."""
    import torch

    from gptbatch.pipeline.kv_cache.spec import RAGGED
    from gptbatch.pipeline.model.checkpoint import find_checkpoint
    from gptbatch.pipeline.model.config import parse_config
    from gptbatch.pipeline.model.golden import logits_digest
    from gptbatch.pipeline.model.weights import load_gpt

    demo = find_checkpoint("bundled:demo/model")
    model = load_gpt(
        parse_config(demo.config, str(demo.config_path)),
        list(demo.weights),
        dtype=torch.float32,
        device=torch.device("cpu"),
        backend=RAGGED,
        cache_dtype=cache_dtype,
    )
    return logits_digest(model)


def _test(device: str, attention: BackendName, dtype: str) -> Section:
    import torch

    from gptbatch.pipeline.bench.random_model import random_model
    from gptbatch.pipeline.kv_cache.interface import select_backend
    from gptbatch.pipeline.model.config import parse_config
    from gptbatch.pipeline.model.golden import why_golden_differs, why_not_portable
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
    why_not = why_not_portable(model) or why_golden_differs(model.cache_dtype)
    level = "unverified" if not report.passed else "verified" if why_not else "portable"
    section = Section(
        facts={
            "batch_invariance": level,
            "reason": None if report.passed else f"{', '.join(report.failures)} differ",
            "why_not_portable": why_not if report.passed else None,
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
