"""Quantize keys and values: symmetric per-token, per-head int8 with an absmax scale.

`int8` stores one float32 scale per head of a token, absmax / 127, and each element as the nearest
of 255 steps. It reads a quarter of the memory that float32 reads. Completions differ from those of
a full cache. The scale depends only on the token's own elements, so batch invariance holds.

The paged kernel multiplies integers. It rounds queries and weights to 16 bits for that, 257 times
finer than keys and values (queries less in heads of more than 512 elements).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from gptbatch.pipeline.kernels.constants import (
    FULL_BLOCK_SIZE,
    HEAD_SIZE_MULTIPLE,
    INT8_BLOCK_SIZE,
    INT8_MAX,
    INT8_MIN_ABSMAX,
    INT8_SCALE_BYTES,
)

if TYPE_CHECKING:
    from gptbatch.pipeline.model.config import GPTConfig

CacheDtype = Literal["auto", "int8"]

# Positions per block of the paged cache: the unit of allocation and of prefix caching.
BLOCK_SIZES: dict[CacheDtype, int] = {
    "auto": FULL_BLOCK_SIZE,
    "int8": INT8_BLOCK_SIZE,
}


def bytes_per_head(config: GPTConfig, dtype: torch.dtype, cache_dtype: CacheDtype) -> int:
    """Return the bytes that one key (or one value) of one head takes."""
    depth = -(-config.head_size // HEAD_SIZE_MULTIPLE) * HEAD_SIZE_MULTIPLE
    return depth + INT8_SCALE_BYTES if cache_dtype == "int8" else depth * dtype.itemsize


def round_trip_int8(x: Tensor) -> Tensor:
    """Return x (..., D) as an int8 cache gives it back: quantized per head, then dequantized.

    NaN or infinity anywhere in a head makes the whole head NaN.
    """
    absmax = x.float().abs().amax(-1, keepdim=True)
    # One division: rounding the scale first would round twice.
    factor = torch.where(absmax < INT8_MIN_ABSMAX, 0.0, torch.full_like(absmax, INT8_MAX) / absmax)
    return ((x.float() * factor).round() * (absmax / INT8_MAX)).to(x.dtype)
