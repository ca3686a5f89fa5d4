"""A device that is the CPU, so that the sections run where there is no GPU: `--fake`.

The torch twins take the place of the Triton kernels, and work is done at once. It shows that the
program runs from end to end. Its times and bits mean nothing.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

_open = contextlib.ExitStack()
NAMES = ("advance", "attend", "embed", "linear", "norm", "store")


def install() -> None:
    """Replace kernels and stream. Call it before anything else imports them."""
    from tests.triton_interpreter import interpreted

    modules = {
        name: importlib.import_module(f"gptbatch.pipeline.kernels.cuda.{name}")
        for name in (*NAMES, "sample")
    }
    # The other kernels run by the interpreter.
    _open.enter_context(interpreted())
    for name in NAMES:
        setattr(modules[name], name, _without_tile(getattr(modules[name], f"{name}_twin")))

    def sample(*arguments: Any, **options: Any) -> None:
        from tests.fake_device import sample_twin

        sample_twin(*arguments, **options)

    vars(modules["sample"])["sample"] = sample
    import torch

    from gptbatch.pipeline.engine import streams
    from tests.fake_device import LateStream

    class PromptStream(LateStream):
        """Does all work at once."""

        def __init__(self, _: torch.device) -> None:
            super().__init__(0)

    torch.set_num_threads(1)
    vars(streams)["CudaStream"] = PromptStream


def _without_tile(twin: Callable[..., None]) -> Callable[..., None]:
    def launch(*arguments: Any, tile: object = None, **options: Any) -> None:
        twin(*arguments, **options)

    return launch
