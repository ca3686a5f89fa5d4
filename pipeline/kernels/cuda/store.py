"""Write keys and values to the paged cache: as they are, or in whole numbers of 8 bits.

    cache (blocks, K or V, H, 64, D): the 64 keys of a head are contiguous
    scales (blocks, K or V, H, 64) float32, of an int8 cache

Naive, for one key or value x (D,) of a head in an int8 cache (docs/arithmetic.md):

    a = max |x|; integers = rint(x * (127 / a)), all 0 if a < 1e-30; scale = a / 127

A kernel of its own, not an epilogue of the linear: a head's largest element may lie in two tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptbatch.pipeline.kernels.constants import INT8_MAX, INT8_MIN_ABSMAX
from gptbatch.pipeline.kernels.cuda.arithmetic import WHOLE
from gptbatch.pipeline.kernels.cuda.launch import launch, wait_for_previous
from gptbatch.pipeline.kernels.cuda.state import BLOCK_TOKENS

MIN_ABSMAX, LARGEST_INT8 = tl.constexpr(INT8_MIN_ABSMAX), tl.constexpr(float(INT8_MAX))


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer: see above. scales is None but for int8."""

    data: Tensor
    scales: Tensor | None = None


@triton.jit
def quantize(x, largest):
    """Return whole numbers (n,) in float32, and their scale; NaN or infinity makes it NaN."""
    absmax = tl.max(tl.abs(x), axis=0)
    is_wrong = tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, axis=0) == 1
    factor = tl.where(absmax < MIN_ABSMAX, 0.0, tl.div_rn(largest, tl.maximum(absmax, MIN_ABSMAX)))
    whole = (x * factor + WHOLE) - WHOLE
    scale = tl.where(is_wrong, float("nan"), tl.div_rn(absmax, largest))
    return tl.where(is_wrong, 0.0, whole), scale


@triton.jit
def store_kernel(
    qkv,
    cache,
    scales,
    tables,
    seq_indices,
    positions,
    table_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    INT8: tl.constexpr,
):
    """Store one key or value of one head per program: (M, 2 H). Empty rows store nothing."""
    wait_for_previous()
    row, part_head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row)
    if position >= 0:
        seq_index = tl.load(seq_indices + row).to(tl.int64)
        block = tl.load(tables + seq_index * table_stride + position // BLOCK_TOKENS)
        place = (block * (2 * H) + part_head) * BLOCK_TOKENS + position % BLOCK_TOKENS
        d = tl.arange(0, SIZE)
        x = tl.load(
            qkv + row.to(tl.int64) * (3 * H * D) + (H + part_head) * D + d, mask=d < D, other=0.0
        )
        if INT8:
            whole, scale = quantize(x.to(tl.float32), tl.full((), LARGEST_INT8, tl.float32))
            tl.store(cache + place * D + d, whole.to(tl.int32).to(tl.int8), mask=d < D)
            tl.store(scales + place, scale)
        else:
            tl.store(cache + place * D + d, x.to(cache.dtype.element_ty), mask=d < D)


def store(
    qkv: Tensor, cache: LayerCache, tables: Tensor, seq_indices: Tensor, positions: Tensor
) -> None:
    """Write the keys and values of qkv to the cache.

    Args:
        qkv: (M, 3 C): queries, keys, values, by head.
        cache: Of the layer.
        tables: (sequences, blocks) int64.
        seq_indices: (M,) int32.
        positions: (M,) int32; -1 in empty rows.
    """
    _, _, heads, _, head_size = cache.data.shape
    launch(
        store_kernel,
        (len(qkv), 2 * heads),
        *(qkv, cache.data, cache.scales, tables, seq_indices, positions, tables.stride(0)),
        *(heads, head_size, triton.next_power_of_2(head_size), cache.scales is not None),
        num_warps=1,
        enable_fp_fusion=False,
    )


def store_twin(
    qkv: Tensor, cache: LayerCache, tables: Tensor, seq_indices: Tensor, positions: Tensor
) -> None:
    """Compute in torch what `store` computes."""
    _, _, heads, block_tokens, head_size = cache.data.shape
    rows = torch.nonzero(positions >= 0)[:, 0]
    place = positions[rows].long()
    blocks = tables[seq_indices[rows].long(), place // block_tokens]
    x = qkv[rows].view(len(rows), 3, heads, head_size)[:, 1:]
    if cache.scales is None:
        cache.data[blocks, :, :, place % block_tokens] = x.to(cache.data.dtype)
        return
    whole, scale = quantize_twin(x.float(), INT8_MAX)
    cache.data[blocks, :, :, place % block_tokens] = whole.to(torch.int8)
    cache.scales[blocks, :, :, place % block_tokens] = scale


def quantize_twin(x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Return whole numbers (..., n) in float32, and their scales (...)."""
    absmax = x.abs().amax(dim=-1, keepdim=True)
    is_wrong = ~absmax.isfinite()
    factor = torch.where(absmax < INT8_MIN_ABSMAX, 0.0, torch.full_like(absmax, largest) / absmax)
    whole = torch.where(is_wrong, 0.0, (x * factor).round())
    return whole, torch.where(is_wrong, torch.nan, absmax / largest)[..., 0]
