"""Triton's interpreter with the arithmetic of a GPU: fma rounds once, a float32 dot is one chain.

The interpreter computes by numpy: it rounds the product of an fma, and its products of matrices are
those of a BLAS. On an H100 a float32 `tl.dot` with `input_precision="ieee"` is a chain of fma over
k (docs/cuda). With this replacement, kernels compute on a CPU the bits that they compute there, but
for `tl.sum` over floats.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from tests.arithmetic_reference import fma

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Modules whose functions were called by a kernel.
_patched_modules: set[str] = set()


@contextmanager
def interpreted(*, exact: bool = False) -> Iterator[None]:
    """Run kernels on CPU tensors inside the block.

    Args:
        exact: Replace fma and dot of float32.
    """
    from triton.runtime import interpreter

    patch, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    plain_dot, plain_fma = builder.create_dot, builder.create_fma

    def patched(tensor: Any, scope: Any) -> None:
        """Take a loop's bound from an array of one number, which numpy 2.4 refuses."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def call(self: Any, *args: Any, **options: Any) -> Any:
        """Call a function of a kernel without patching the language again, which takes longer."""
        if self.fn.__module__ not in _patched_modules:
            interpreter._patch_lang(self.fn)
            _patched_modules.add(self.fn.__module__)
        return self.rewrite()(*args, **options)

    def exact_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if x.data.dtype != np.float32:
            return plain_fma(self, x, y, z)
        return handle(fma(x.data, y.data, z.data), z.dtype.scalar)

    def exact_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.data.dtype != np.float32:
            return plain_dot(self, a, b, d, *options)
        total = d.data
        for k in range(a.data.shape[1]):
            total = fma(a.data[:, k, None], b.data[None, k], total)
        return handle(total, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
        if exact:
            monkeypatch.setattr(builder, "create_fma", exact_fma)
            monkeypatch.setattr(builder, "create_dot", exact_dot)
        yield
