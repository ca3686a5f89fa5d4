"""Whether a device still works after an error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptbatch.pipeline.errors import DeviceError
from gptbatch.pipeline.system.error_text import first_line

if TYPE_CHECKING:
    import torch


def raise_if_device_failed(device: torch.device, error: Exception) -> None:
    """Raise where an error has ended the process's work on a CUDA device.

    After an illegal memory access, say, every later call fails, whatever it is.

    Args:
        device: Where the error came up.
        error: It becomes the cause.

    Raises:
        DeviceError: The device takes no more work from this process.
    """
    if device.type != "cuda":
        return
    import torch

    try:
        torch.cuda.synchronize(device)
    except Exception:  # noqa: BLE001 - torch has several types for the errors of CUDA
        raise DeviceError(
            f"the Triton kernels made {device} fail ({first_line(error)}), and it takes no more "
            "work from this process; start again with engine.attention: padded",
            keys=("engine.attention",),
        ) from error
