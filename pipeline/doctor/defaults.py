"""Probes of what a run does here: settings from the environment, defaults, Hugging Face caches."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from gptbatch.pipeline.config import EngineConfig
from gptbatch.pipeline.config.sources import check_environment
from gptbatch.pipeline.doctor.kernels import nearest_existing
from gptbatch.pipeline.doctor.section import Section
from gptbatch.pipeline.errors import DeviceError
from gptbatch.pipeline.system.machine import free_memory_bytes

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
TRUE_VALUES = {"1", "ON", "YES", "TRUE"}


def probe_settings() -> tuple[Section, EngineConfig]:
    """Return the settings that variables give, what is wrong with them, and their engine part."""
    checked = check_environment(os.environ)
    section = Section(facts={"variables": list(checked.names)}, problems=list(checked.problems))
    return section, checked.engine


def probe_defaults(engine: EngineConfig, kernels: dict[str, Any]) -> Section:
    """Return how a run without options would compute here.

    Args:
        engine: The settings that environment variables give.
        kernels: The facts of `probe_kernels`.
    """
    import torch

    from gptbatch.pipeline.kv_cache.interface import triton_problem
    from gptbatch.pipeline.model.loading import (
        CACHE_MEMORY_SHARE,
        TRITON_BATCH_SIZE,
        default_batch_size,
        resolve_device,
        threads_to_use,
    )

    section = Section()
    try:
        device = resolve_device(engine).type
    except DeviceError as error:
        section.problems.append(str(error))
        device = "cpu"
    available = bool(kernels.get("available"))
    names, problem = "C++", None if available else kernels.get("reason") or "not built"
    if device == "cuda":
        names, problem = "Triton", triton_problem(torch.device(device))
    attention = engine.attention
    if attention == "auto":
        attention = "ragged" if problem is None else "padded"
    elif attention == "ragged" and problem is not None:
        section.problems.append(
            f"engine.attention is ragged, but the {names} kernels are not available: {problem}"
        )
    batch_size = TRITON_BATCH_SIZE if (device, attention) == ("cuda", "ragged") else None
    threads = threads_to_use(engine.threads)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else free_memory_bytes()
    bfloat16 = has_bfloat16(device, kernels_available=available)
    section.facts = {
        "device": device,
        "attention": attention,
        "threads": threads,
        "batch_size": engine.batch_size or batch_size or default_batch_size(threads),
        "kv_cache_bytes": (
            int(engine.memory_gib * 2**30)
            if engine.memory_gib is not None
            else None
            if free is None
            else int(free * CACHE_MEMORY_SHARE)
        ),
        "dtype": engine.dtype,
        "bfloat16_instructions": bfloat16,
    }
    if engine.dtype == "bfloat16" and not bfloat16:
        section.warnings.append(
            f"GPTBATCH_ENGINE_DTYPE is bfloat16, but this {device} has no instructions for it; "
            "use float32"
        )
    return section


def has_bfloat16(device: str, *, kernels_available: bool) -> bool:
    """Return whether products of bfloat16 have instructions of their own on the device."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    if kernels_available:
        return bool(torch.ops.gptbatch.has_bfloat16())
    return bool(torch.cpu._is_avx512_bf16_supported())


def probe_hugging_face() -> Section:
    """Return the folder of downloads from the hub, and the variables that forbid downloads."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    existing = nearest_existing(cache)
    set_variables = {name: os.environ[name] for name in OFFLINE_VARIABLES if os.environ.get(name)}
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    offline = any(value.upper() in TRUE_VALUES for value in set_variables.values())
    section = Section(
        facts={
            "HF_HOME": os.environ.get("HF_HOME"),
            "cache": str(cache),
            "writable": writable,
            "free_bytes": shutil.disk_usage(existing).free,
            "offline": offline,
            "variables": set_variables,
            "token": bool(os.environ.get("HF_TOKEN")),
        }
    )
    if not writable and not offline:
        section.warnings.append(
            f"{existing}: cannot be written, so models and datasets of the hub cannot be "
            "downloaded; set HF_HOME to another folder"
        )
    return section
