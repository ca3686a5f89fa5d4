"""Describe the machine of a measurement."""

from __future__ import annotations

import os
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from gptbatch.pipeline.system.machine import processor_name


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return versions, device, cores, processor name, threads and date."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "gptbatch": _version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": f"{os.cpu_count()} cores of {processor_name()} ({capability})",
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _version() -> str:
    try:
        return version("gptbatch")
    except PackageNotFoundError:
        # A checkout that is not installed.
        return "not installed"
