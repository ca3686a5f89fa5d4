"""Launch Triton kernels, or compile what would be launched, many kernels side by side.

Triton compiles a kernel when it is first launched, on one core. A run launches about 30 of them.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait
from triton.language.target_info import cuda_capability_geq

# Programmatic dependent launch: a kernel of a step starts while the blocks of the one before it
# end, and waits for them. Off until a GPU has measured it: section `dependent-launch` of
# benchmarks/cuda_check.py.
DEPENDENT_LAUNCH = tl.constexpr(False)

_only_compiles = contextvars.ContextVar("only_compiles", default=False)


@triton.jit
def wait_for_previous():
    """Wait until the kernel before has ended and its writes are visible: every kernel's first line.

    The kernel before has itself waited for those before it.
    """
    if DEPENDENT_LAUNCH:  # noqa: SIM102
        if cuda_capability_geq(9, 0):
            gdc_wait()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel; inside `compile_side_by_side`, only compile it."""
    if DEPENDENT_LAUNCH.value and triton.runtime.driver.active.get_current_target().arch >= 90:
        options["launch_pdl"] = True
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
