"""Describe the machine of a measurement."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return versions, device, cores, processor name and threads."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "gptbatch": _version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": f"{os.cpu_count()} cores of {_processor()} ({capability})",
        "threads": torch.get_num_threads(),
    }


def _version() -> str:
    try:
        return version("gptbatch")
    except PackageNotFoundError:
        # A checkout that is not installed.
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
