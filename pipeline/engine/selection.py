"""Select the engine of a run: the device's own where the model has Triton kernels and it passes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.errors import OutOfMemoryError
from gptbatch.pipeline.system.device import raise_if_device_failed
from gptbatch.pipeline.system.error_text import first_line

if TYPE_CHECKING:
    from gptbatch.pipeline.model.gpt import GPT

logger = logging.getLogger("gptbatch")


def new_engine(model: GPT, **options: Any) -> Engine:
    """Return an engine for a loaded model.

    A `DeviceEngine` for a model with Triton kernels, unless logits are recorded or windows slide,
    which need the host at every step. Where its self-test fails, the host takes every step.

    Args:
        model: A loaded model.
        **options: The other attributes of `Engine`.

    Raises:
        DeviceError: The device failed in the self-test, and takes no more work.
    """
    is_plain = not options.get("record_logits") and options.get("window_full", "stop") == "stop"
    if not (model.backend.triton and is_plain):
        return Engine(model=model, **options)
    from gptbatch.pipeline.engine.device_engine import DeviceEngine
    from gptbatch.pipeline.engine.device_self_test import device_engine_problem

    if model.device_engine_problem is None:
        try:
            model.device_engine_problem = device_engine_problem(model, compares=model.has_self_test)
        except (torch.OutOfMemoryError, OutOfMemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - a driver or a GPU may fail in any way
            raise_if_device_failed(model.device, error)
            model.device_engine_problem = first_line(error)
        if model.device_engine_problem:
            logger.warning(
                "the engine of the device fails its self-test (%s); the host takes every step, "
                "which is slower",
                model.device_engine_problem,
            )
    if model.device_engine_problem:
        return Engine(model=model, **options)
    return DeviceEngine(model=model, **options)
