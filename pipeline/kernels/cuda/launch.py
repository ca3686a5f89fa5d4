"""Launch Triton kernels, or compile what would be launched, many kernels side by side.

Triton compiles a kernel when it is first launched, on one core. A run launches about 30 of them.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton

_only_compiles = contextvars.ContextVar("only_compiles", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel; inside `compile_side_by_side`, only compile it."""
    kernel.run(*arguments, grid=grid, warmup=_only_compiles.get(), **options)


def compile_side_by_side(launches: Callable[[], None], threads: int) -> int:
    """Compile and load all kernels that a function launches, without running them.

    What triton has in its cache on disk is only read. Where this version of triton cannot compile
    side by side, nothing is done: kernels are compiled when they are launched.

    Args:
        launches: Calls `launch`. The tensors may be on the meta device.
        threads: The most kernels that are compiled at the same time.

    Returns:
        The number of kernels that were not in the cache.
    """
    if not hasattr(triton, "AsyncCompileMode"):
        return 0
    is_cached: list[bool] = []

    def note(*, cache_hit: bool = False, **_: Any) -> None:
        is_cached.append(cache_hit)

    def collect() -> None:
        _only_compiles.set(True)
        with triton.knobs.compilation.scope(), ThreadPoolExecutor(threads) as executor:
            triton.knobs.compilation.listener = note
            mode = triton.AsyncCompileMode(executor)
            with mode:
                launches()
            # Loads them. Before triton 3.7 a launcher in C is compiled, too.
            list(executor.map(lambda each: each.result().run, mode.future_kernels.values()))

    # A context of its own, in which a mode that fails stays active.
    contextvars.copy_context().run(collect)
    return is_cached.count(False)


def cache_folder() -> str:
    """Return the folder in which triton keeps compiled kernels."""
    folder: str = triton.knobs.cache.dir
    return folder
