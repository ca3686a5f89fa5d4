"""The network of a checkpoint, loaded and ready on this machine: device, attention backend, weights, batch_invariance.

Knows: gpt, and the start-up check of generation. Does not know: prompts, files of a run.
Imports torch where it is used.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gptbatch.pipeline.config import EngineConfig
from gptbatch.pipeline.errors import DeviceError
from gptbatch.pipeline.model.checkpoint import Checkpoint
from gptbatch.pipeline.model.config import GPTConfig
from gptbatch.pipeline.system.machine import cores, free_memory_bytes
from gptbatch.pipeline.types import NOISE_VERSION

if TYPE_CHECKING:
    import torch

    from gptbatch.pipeline.kv_cache.interface import Backend
    from gptbatch.pipeline.model.gpt import GPT

logger = logging.getLogger("gptbatch")

ROWS_A_THREAD, LEAST_ROWS, MOST_ROWS = 32, 64, 512
MEMORY_SHARE = 0.5  # of what is free, for the cache

BatchInvariance = Literal["verified", "unverified", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A loaded network. batch_invariance: whether the start-up check found a row's bits independent of the batch, or was not asked.

    environment: what the bits of a row depend on besides the job; equality is promised within a environment.
    """

    model: GPT
    batch_invariance: BatchInvariance
    environment: dict[str, Any]

    def batch_size(self, logits_indices: int | None) -> int:
        """Rows that run at a time: as set, or enough for each thread to read weights for many rows at once."""
        if logits_indices is not None:
            return logits_indices
        import torch

        return max(LEAST_ROWS, min(MOST_ROWS, ROWS_A_THREAD * torch.get_num_threads()))

    def cache_memory_bytes(self, memory_gib: float | None) -> int | None:
        """Memory for the cache: as set, or a share of what is free. None where nobody knows what is."""
        if memory_gib is not None:
            return int(memory_gib * 2**30)
        if self.model.device.type == "cuda":
            import torch

            free: int | None = torch.cuda.mem_get_info(self.model.device)[0]
        else:
            free = free_memory_bytes()
        return None if free is None else int(free * MEMORY_SHARE)


def load_model(
    checkpoint: Checkpoint,
    gpt_config: GPTConfig,
    engine: EngineConfig,
    device: torch.device,
    *,
    batch_invariance: Literal["auto", "require", "off"],
) -> LoadedModel:
    """Load the weights on the device and check them there.

    Raises DeviceError when `batch_invariance` is require and the check fails, or when an attention backend is asked for that is not to
    be had; ModelError for weights that cannot be used.
    """
    from gptbatch.pipeline.model.weights import load_gpt

    files = list(checkpoint.weights)
    return prepare_model(
        engine,
        device,
        lambda attention, dtype: load_gpt(
            gpt_config, files, dtype=dtype, device=device, attention=attention
        ),
        batch_invariance=batch_invariance,
    )


def prepare_model(
    engine: EngineConfig,
    device: torch.device,
    load: Callable[[Backend, torch.dtype], GPT],
    *,
    batch_invariance: Literal["auto", "require", "off"],
) -> LoadedModel:
    """The network that `load` makes for an attention backend and a dtype, checked. Raises DeviceError as load_model does."""
    import torch

    from gptbatch.pipeline.kv_cache.interface import choose_backend
    from gptbatch.pipeline.model.self_test import select_batch_invariant_kernels

    torch.set_num_threads(threads_to_use(engine.threads))
    backend = choose_backend(engine.attention, device)
    model = load(backend, getattr(torch, engine.dtype))
    model.cache_dtype = engine.cache_dtype
    if engine.cache_dtype == "int8" and backend == "padded":
        logger.warning(
            "engine.cache_dtype is int8, to which padded attention rounds without storing it so: it is no faster, and coarser"
        )
    found: BatchInvariance = "off"
    self_test_digest = None
    if batch_invariance != "off":
        report = select_batch_invariant_kernels(model)
        found = "verified" if report.passed else "unverified"
        self_test_digest = report.self_test_digest
        if not report.passed:
            message = f"on this machine the bits of a row depend on the batch ({', '.join(report.failures)} differ)"
            if batch_invariance == "require":
                raise DeviceError(
                    f"batch_invariance is require, but {message}; batch_invariance: auto goes on with a warning",
                    keys=("batch_invariance",),
                )
            logger.warning(
                "%s: with another batch size a token may change at a near tie; the output says unverified",
                message,
            )
    environment = {
        "attention": backend,
        "linears": model.linear_kind,
        "reduction_order": model.reduction_order if backend == "padded" else None,
        "padding_plan": model.padding_plan_name,
        "torch": torch.__version__,
        "device_class": device_class(device),
        "noise_version": NOISE_VERSION,
        "self_test_digest": self_test_digest,
    }
    return LoadedModel(model=model, batch_invariance=found, environment=environment)


def threads_to_use(logits_indices: int | None) -> int:
    """CPU threads: as set, else what torch finds, within the quota of the control group unless OMP_NUM_THREADS says more."""
    import torch

    if logits_indices is not None:
        return logits_indices
    found = torch.get_num_threads()
    return found if os.environ.get("OMP_NUM_THREADS") else min(found, cores().threads)


def device_class(device: torch.device) -> str:
    """The kind of hardware: a GPU's name, or a CPU's architecture and the vector instructions that torch uses."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def resolve_device(engine: EngineConfig) -> torch.device:
    """The device that the config asks for. Raises DeviceError when this machine does not have it or its dtype."""
    import torch

    logits_indices = engine.device
    has_cuda = torch.cuda.is_available()
    if logits_indices == "cuda" and not has_cuda:
        raise DeviceError(
            "engine.device is cuda, but torch finds no CUDA device here; use cpu or auto",
            keys=("engine.device",),
        )
    device = torch.device("cuda" if has_cuda and logits_indices != "cpu" else "cpu")
    if device.type == "cpu" and engine.dtype == "float16":
        raise DeviceError(
            "engine.dtype is float16, which CPUs compute slowly and coarsely; use float32 or bfloat16, or a CUDA device",
            keys=("engine.dtype",),
        )
    return device
