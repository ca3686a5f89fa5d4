"""Section `dependent-launch`: steps with and without programmatic dependent launch."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import triton

from benchmarks.cuda.common import CONFIG, DEVICE, DTYPES, ROW_COUNTS, report
from benchmarks.cuda.engines import measure_rates, new_engine
from benchmarks.cuda.parts import run_part
from gptbatch.pipeline.bench.random_model import random_model
from gptbatch.pipeline.kernels.cuda import launch as launch_module
from gptbatch.pipeline.kv_cache.spec import TRITON


def dependent_launch() -> None:
    """Compare steps with and without dependent launch: microseconds, tokens and margins."""
    found: dict[str, Any] = {"problems": []}
    for flag, name in enumerate(("plain", "dependent")):
        for part in run_part(f"dependent-one:{flag}"):
            found["problems"] += filter(None, [part.pop("error", None)])
            found[name] = part
            report(found)
    plain, dependent = found["plain"], found["dependent"]
    for key in plain.keys() & dependent.keys():
        if "us" in key:
            found[f"{key}: plain, dependent"] = [plain[key], dependent[key]]
        else:
            found[f"{key} equal"] = plain[key] == dependent[key]
    report(found)


def dependent_one(is_dependent: int) -> None:
    """Measure steps in bfloat16, all kernels dependent or none."""
    launch_module.DEPENDENT_LAUNCH = triton.language.constexpr(bool(is_dependent))
    model = random_model(
        CONFIG, dtype=DTYPES["bfloat16"], device=torch.device(DEVICE), backend=TRITON
    )
    found: dict[str, Any] = {}
    for rows in (ROW_COUNTS[0], ROW_COUNTS[-1]):
        results, rates = measure_rates(new_engine(model, rows)[0], rows)
        found[f"{rows} rows, step_us"] = rates["step_us"]
        found[f"{rows} rows, bits"] = hashlib.sha256(repr(results).encode()).hexdigest()
        report(found)
