"""Load a model and make it ready on this machine: device, backend, weights, batch invariance.

Imports torch where it is used.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptbatch.pipeline.config import BatchInvarianceSetting, EngineConfig, unportable_setting
from gptbatch.pipeline.errors import DeviceError, OutOfMemoryError
from gptbatch.pipeline.model.checkpoint import Checkpoint
from gptbatch.pipeline.model.config import GPTConfig
from gptbatch.pipeline.system.device import raise_if_device_failed
from gptbatch.pipeline.system.error_text import first_line
from gptbatch.pipeline.system.machine import cores, free_memory_bytes
from gptbatch.pipeline.types import NOISE_VERSION, BatchInvariance

if TYPE_CHECKING:
    import torch

    from gptbatch.pipeline.kv_cache.spec import Backend
    from gptbatch.pipeline.model.gpt import GPT
    from gptbatch.pipeline.model.self_test import SelfTestReport

logger = logging.getLogger("gptbatch")

SEQS_PER_THREAD = 32
MIN_BATCH_SIZE, MAX_BATCH_SIZE = 64, 512
TRITON_BATCH_SIZE = 1024
# Share of the free memory that the KV cache takes by default.
CACHE_MEMORY_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        model: The packed model.
        batch_invariance: Result of the batch-invariance self-test and of the golden digest.
        environment: What the bits of a row depend on besides the job. Bits are equal only within
            one environment; portable environments count as one.
    """

    model: GPT
    batch_invariance: BatchInvariance
    environment: dict[str, Any]

    def batch_size(self, configured: int | None) -> int:
        """Return the most sequences to run at once.

        By default 1,024 on a GPU with Triton kernels, else 32 per thread, from 64 to 512.
        """
        if configured is not None:
            return configured
        if self.model.backend.triton:
            return TRITON_BATCH_SIZE
        import torch

        return default_batch_size(torch.get_num_threads())

    def cache_memory_bytes(self, memory_gib: float | None) -> int | None:
        """Return the memory for the KV cache: as configured, or half of what is free.

        None means that the free memory is unknown.
        """
        if memory_gib is not None:
            return int(memory_gib * 2**30)
        if self.model.device.type == "cuda":
            import torch

            free: int | None = torch.cuda.mem_get_info(self.model.device)[0]
        else:
            free = free_memory_bytes()
        return None if free is None else int(free * CACHE_MEMORY_SHARE)


def load_model(
    checkpoint: Checkpoint,
    gpt_config: GPTConfig,
    engine: EngineConfig,
    device: torch.device,
    *,
    batch_invariance: BatchInvarianceSetting,
) -> LoadedModel:
    """Load a checkpoint on the device and run the batch-invariance self-test.

    Args:
        checkpoint: Where the weights are.
        gpt_config: From the checkpoint's config.json.
        engine: dtype, cache_dtype, attention and threads.
        device: See `resolve_device`.
        batch_invariance: auto warns if the self-test fails, require raises, off skips it. portable
            also raises where the bits depend on the machine.

    Raises:
        DeviceError: The self-test fails, or the attention backend is not available.
        ModelError: The weights cannot be used.
        OutOfMemoryError: The GPU has no memory for the model.
    """
    import torch

    from gptbatch.pipeline.model.weights import load_gpt

    def load(backend: Backend) -> GPT:
        return load_gpt(
            gpt_config,
            list(checkpoint.weights),
            dtype=getattr(torch, engine.dtype),
            device=device,
            backend=backend,
            cache_dtype=engine.cache_dtype,
        )

    try:
        return prepare_model(engine, device, load, batch_invariance=batch_invariance)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"out of memory: the model does not fit into the memory of {device} that other "
            f"programs leave ({first_line(error)})"
        ) from error


def prepare_model(
    engine: EngineConfig,
    device: torch.device,
    load: Callable[[Backend], GPT],
    *,
    batch_invariance: BatchInvarianceSetting,
) -> LoadedModel:
    """Select a backend, call `load` with it, and run the self-test; see `load_model`."""
    import torch

    from gptbatch.pipeline.kv_cache.interface import select_backend
    from gptbatch.pipeline.kv_cache.spec import PADDED
    from gptbatch.pipeline.model import golden, packing, self_test

    torch.set_num_threads(threads_to_use(engine.threads))
    # A program that uses gptbatch may have allowed TF32 or bfloat16 for float32.
    torch.set_float32_matmul_precision("highest")
    if batch_invariance == "portable":
        _check_portable_here(engine, device)
    backend = select_backend(engine.attention, device)
    model = load(backend)
    report = None
    level: BatchInvariance = "off"
    has_self_test = batch_invariance != "off"
    if backend.triton:
        report, problem = _try_triton(model, has_self_test=has_self_test)
        if problem and engine.attention == "auto":
            logger.warning(
                "the Triton kernels do not work here (%s); attention is padded, which is slower",
                problem,
            )
            backend = PADDED
            # Free the weights before they are loaded again.
            del model
            model, report = load(backend), None
        elif problem and report is None:
            raise DeviceError(
                f"engine.attention is ragged, but the Triton kernels do not work here: {problem}",
                keys=("engine.attention",),
            )
    if has_self_test:
        report = report or self_test.select_batch_invariant_kernels(model)
        level = _level(model, report, batch_invariance)
    if engine.cache_dtype == "int8" and not backend.stores_int8:
        logger.warning(
            "engine.cache_dtype is int8, but padded attention only rounds to int8: "
            "completions are less accurate and no faster"
        )
    has_reduction_orders = len(backend.reduction_orders) > 1
    environment = {
        "attention": backend.name,
        "linears": model.linear_kind,
        "reduction_order": model.reduction_order if has_reduction_orders else None,
        "padding_plan": packing.describe_padding(model),
        "torch": torch.__version__,
        "device_class": device_class(device),
        **_triton_environment(backend),
        "noise_version": NOISE_VERSION,
        "arithmetic": golden.ARITHMETIC if level == "portable" else None,
        "self_test_digest": None if report is None else report.self_test_digest,
    }
    return LoadedModel(model=model, batch_invariance=level, environment=environment)


def _try_triton(model: GPT, *, has_self_test: bool) -> tuple[SelfTestReport | None, str]:
    """Compile and run the Triton kernels.

    Without the self-test, they run once, and no bits are compared, neither here nor by the engine.

    Returns:
        The report of the self-test, if it came to an end, and what is wrong; "" for nothing.

    Raises:
        DeviceError: The device failed, and takes no more work.
    """
    import torch

    from gptbatch.pipeline.model import compiling, self_test

    try:
        compiling.compile_kernels(model)
        began = time.monotonic()
        if not has_self_test:
            model.has_self_test = False
            with torch.inference_mode():
                model(torch.zeros(1, 1, dtype=torch.int64)).cpu()
            return None, ""
        report = self_test.select_batch_invariant_kernels(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a compiler, a driver or a GPU may fail in any way
        raise_if_device_failed(model.device, error)
        return None, first_line(error)
    if not report.passed:
        return report, f"the bits of a row depend on the batch: {', '.join(report.failures)}"
    logger.info("the Triton kernels passed the self-test in %.1f s", time.monotonic() - began)
    return report, ""


def _triton_environment(backend: Backend) -> dict[str, Any]:
    if not backend.triton:
        return {}
    import triton

    from gptbatch.pipeline.kernels.cuda.tiles import table_hash

    return {"triton": triton.__version__, "tiles": table_hash()}


def default_batch_size(threads: int) -> int:
    """Return the most sequences that run at once by default: 32 per thread, from 64 to 512."""
    return max(MIN_BATCH_SIZE, min(MAX_BATCH_SIZE, SEQS_PER_THREAD * threads))


def threads_to_use(configured: int | None) -> int:
    """Return the number of CPU threads.

    By default this is torch's number, limited to the CPU quota of the control group unless
    OMP_NUM_THREADS is set.
    """
    import torch

    if configured is not None:
        return configured
    default = torch.get_num_threads()
    return default if os.environ.get("OMP_NUM_THREADS") else min(default, cores().threads)


def device_class(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's architecture and torch's vector instructions."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def resolve_device(engine: EngineConfig) -> torch.device:
    """Return the configured device; auto takes cuda where there is a GPU.

    Raises:
        DeviceError: The device is missing, or it does not support the dtype.
    """
    import torch

    has_cuda = torch.cuda.is_available()
    if engine.device == "cuda" and not has_cuda:
        raise DeviceError(
            "engine.device is cuda, but torch finds no CUDA device here; use cpu or auto",
            keys=("engine.device",),
        )
    device = torch.device("cuda" if has_cuda and engine.device != "cpu" else "cpu")
    if device.type == "cpu" and engine.dtype == "float16":
        raise DeviceError(
            "engine.dtype is float16, which is slow and inaccurate on a CPU; "
            "use float32 or bfloat16, or a CUDA device",
            keys=("engine.dtype",),
        )
    return device


def _check_portable_here(engine: EngineConfig, device: torch.device) -> None:
    """Check, before weights are loaded, that this machine has what portable arithmetic needs."""
    from gptbatch.pipeline.kernels.build import load_kernels
    from gptbatch.pipeline.kernels.compiler import KernelError

    problem = unportable_setting(engine)
    if problem is None and device.type != "cpu":
        problem = f"a CPU, and the device is {device.type}; use engine.device: cpu"
    if problem is None:
        try:
            load_kernels()
        except KernelError as error:
            problem = f"the C++ kernels: {error}"
    if problem is not None:
        raise DeviceError(
            f"batch_invariance is portable, which needs {problem}", keys=("batch_invariance",)
        )


def _level(
    model: GPT, report: SelfTestReport, batch_invariance: BatchInvarianceSetting
) -> BatchInvariance:
    """Return how much the bits depend on, after the self-test.

    Raises:
        DeviceError: `batch_invariance` requires more.
    """
    from gptbatch.pipeline.model.golden import why_golden_differs, why_not_portable

    if not report.passed:
        _report_failures(report, batch_invariance)
        return "unverified"
    expected = why_not_portable(model)
    problem = expected or why_golden_differs(model.cache_dtype)
    if problem is None:
        return "portable"
    if batch_invariance == "portable":
        raise DeviceError(
            f"batch_invariance is portable, but {problem}", keys=("batch_invariance",)
        )
    if expected is None:
        logger.warning("the bits of this run depend on the machine: %s", problem)
    return "verified"


def _report_failures(report: SelfTestReport, batch_invariance: BatchInvarianceSetting) -> None:
    message = (
        "on this machine the bits of a row depend on the batch "
        f"({', '.join(report.failures)} differ)"
    )
    if batch_invariance in ("require", "portable"):
        raise DeviceError(
            f"batch_invariance is {batch_invariance}, but {message}; "
            "batch_invariance: auto goes on with a warning",
            keys=("batch_invariance",),
        )
    logger.warning(
        "%s: with another batch size a token may change at a near tie; the output says unverified",
        message,
    )
