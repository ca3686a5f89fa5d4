"""Compile the Triton kernels of a model before its self-test, many side by side."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import torch

from gptbatch.pipeline.kernels.cuda.adjustments import Adjustments
from gptbatch.pipeline.kernels.cuda.kernels import TRITON
from gptbatch.pipeline.kernels.cuda.launch import cache_folder, compile_side_by_side
from gptbatch.pipeline.kv_cache.device import DeviceKVCache
from gptbatch.pipeline.model.device_step import DeviceStep, StepShape, padded_decode_rows
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.system.error_text import first_line
from gptbatch.pipeline.system.machine import cores

logger = logging.getLogger("gptbatch")

# Tiles do not change beyond.
MAX_ROWS = 1024


def compile_kernels(model: GPT, threads: int | None = None) -> int:
    """Compile all kernels that the engine of the device or the layers of the model may launch.

    The launches are those of `DeviceStep`, over buffers on the meta device. Kernels that triton has
    cached cost nothing.

    Args:
        model: Packed, with Triton kernels.
        threads: The most kernels that are compiled at the same time. None is one per core.

    Returns:
        The number of kernels that were not cached. Where they cannot be compiled ahead, 0: they are
        compiled when they are launched. A kernel that failed raises its error again then.
    """
    began = time.monotonic()
    try:
        count = compile_or_raise(model, threads or cores().threads)
    except Exception as error:  # noqa: BLE001 - another version of triton may fail in any way
        logger.info("Triton kernels are compiled when they are launched (%s)", first_line(error))
        return 0
    if count:
        logger.info(
            "compiled %d Triton kernels in %.1f s; they are kept in %s",
            count,
            time.monotonic() - began,
            cache_folder(),
        )
    return count


def compile_or_raise(model: GPT, threads: int) -> int:
    """Compile as `compile_kernels` does; return the number of kernels that were not cached.

    Raises:
        Exception: The failure of the first kernel that cannot be compiled.
    """
    spec = replace(model.cache_spec, device=torch.device("meta"))
    cache = DeviceKVCache(spec, MAX_ROWS, capacity=1)
    step = DeviceStep(model, cache, TRITON, (), n_token_bytes=1)
    step.adjustments = Adjustments(step.adjustment_layout, spec.device)

    def launches() -> None:
        # The sampler takes longest, so it comes first.
        step.sample(_shape(MAX_ROWS, adjusts=True))
        rows = 1
        while rows <= MAX_ROWS:
            rows = padded_decode_rows(rows)
            for adjusts in (False, True):
                step.run(_shape(rows, adjusts=adjusts))
            rows += 1

    return compile_side_by_side(launches, threads)


def _shape(rows: int, *, adjusts: bool) -> StepShape:
    return StepShape(
        decode_rows=rows,
        chunk_rows=0,
        full_vocab=True,
        top_p=True,
        adjusts=adjusts,
        logprobs=True,
    )
