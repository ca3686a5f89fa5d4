"""y = activation(x W^T + b), or x W^T + b + residual, with the K/V write in the epilogue of qkv.

    rows m    tiles of BM; the caller pads M to a multiple of BM
    columns n tiles of BN; the last one is masked
    K         segments of SEGMENT in order; within a segment one chain over k from 0

Naive, for one output:

    total = 0
    for segment in range(0, K, SEGMENT):
        chain = 0
        for k in range(segment, segment + SEGMENT):
            chain = fma(x[m, k], w[n, k], chain)
        total += chain

float32 runs on the FMA units. bfloat16 and float16 run on the tensor cores, which add 16 products
at a time to the chain (microsoft/MMA-Sim). By measurement (docs/cuda), neither depends on BM, BN,
BK, warps or stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gptbatch.pipeline.kernels.cuda.arithmetic import gelu_tanh

NO_ACTIVATION, GELU_TANH, RELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Tokens per block of the KV cache.
BLOCK_TOKENS = tl.constexpr(64)


@triton.jit
def chain_over_k(
    x,
    w,
    m,
    n,
    n_mask,
    first,
    w_stride_n,
    w_stride_k,
    K: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Return the sum of SEGMENTS segments of K from k = first on, (BM, BN) in float32."""
    k = tl.arange(0, BK)
    x_tile = x + m[:, None] * K + k[None, :] + first
    w_tile = w + n[None, :] * w_stride_n + (first + k)[:, None] * w_stride_k
    total = tl.zeros((BM, BN), tl.float32)
    for _ in range(SEGMENTS):
        chain = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, SEGMENT, BK):
            if SEGMENT % BK == 0:
                a = tl.load(x_tile)
                b = tl.load(w_tile, mask=n_mask[None, :], other=0.0)
            else:
                is_k = k0 + k < SEGMENT
                a = tl.load(x_tile, mask=is_k[None, :], other=0.0)
                b = tl.load(w_tile, mask=is_k[:, None] & n_mask[None, :], other=0.0)
            chain = tl.dot(a, b, chain, input_precision="ieee")
            x_tile += BK
            w_tile += BK * w_stride_k
        total = chain if SEGMENTS == 1 else total + chain
        if SEGMENT % BK != 0:
            x_tile += SEGMENT % BK - BK
            w_tile += (SEGMENT % BK - BK) * w_stride_k
    return total


@triton.jit
def linear_kernel(
    x,
    w,
    bias,
    residual,
    y,
    block_max,
    N,
    y_stride,
    w_stride_n,
    w_stride_k,
    K: tl.constexpr,
    SEGMENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_MAX: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute y (M, N) of x (M, K) and w (N, K); block_max (M, tiles of N): their largest outputs.

    The tiles of rows run side by side, so that they share the weights in the L2 cache.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    n_mask = n < N
    total = chain_over_k(
        x, w, m, n, n_mask, 0, w_stride_n, w_stride_k, K, SEGMENT, K // SEGMENT, BM, BN, BK
    )
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == GELU_TANH:
        total = gelu_tanh(total)
    elif ACTIVATION == RELU:
        total = tl.where(total < 0.0, 0.0, total)
    place = m[:, None].to(tl.int64) * y_stride + n[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + place, mask=n_mask[None, :], other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=n_mask[None, :])
    if HAS_MAX:
        # tl.max passes over NaN.
        has_nan = tl.max(((total != total) & n_mask[None, :]).to(tl.int32), axis=1) == 1
        largest = tl.max(tl.where(n_mask[None, :], total, float("-inf")), axis=1)
        largest = tl.where(has_nan, float("nan"), largest)
        tl.store(block_max + m * tl.num_programs(1) + tl.program_id(1), largest)


@triton.jit
def qkv_kernel(
    x,
    w,
    bias,
    q,
    cache,
    block_tables,
    seq_indices,
    positions,
    table_size,
    w_stride_n,
    w_stride_k,
    C: tl.constexpr,
    H: tl.constexpr,
    SEGMENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Project x (M, C) by w (3 C, C): queries to q (M, C), keys and values to the layer's cache.

    cache (blocks, 2, H, 64, D); block_tables (sequences, table_size); seq_indices and positions
    (M,), position -1 in rows of padding, which write nothing to the cache.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    n_mask = n < 3 * C
    total = chain_over_k(
        x, w, m, n, n_mask, 0, w_stride_n, w_stride_k, C, SEGMENT, C // SEGMENT, BM, BN, BK
    )
    total += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    D: tl.constexpr = C // H
    part, channel = n // C, n % C
    head, d = channel // D, channel % D
    is_query, is_kv = part == 0, (part == 1) | (part == 2)
    tl.store(
        q + m[:, None] * C + channel[None, :], total.to(q.dtype.element_ty), mask=is_query[None, :]
    )
    position = tl.load(positions + m)
    is_token = position >= 0
    seq_index = tl.load(seq_indices + m)
    block = tl.load(
        block_tables + seq_index * table_size + position // BLOCK_TOKENS, mask=is_token, other=0
    )
    row = block.to(tl.int64) * (2 * C * BLOCK_TOKENS) + (position % BLOCK_TOKENS) * D
    column = ((part - 1) * H + head) * (BLOCK_TOKENS * D) + d
    tl.store(
        cache + row[:, None] + column[None, :],
        total.to(cache.dtype.element_ty),
        mask=is_token[:, None] & is_kv[None, :],
    )


@triton.jit
def partial_kernel(
    x,
    w,
    partials,
    M,
    N,
    w_stride_n,
    w_stride_k,
    K: tl.constexpr,
    SEGMENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One segment of K per program, for few rows: partials (segments, M, N) in float32.

    `add_norm_kernel` adds them in order, as `linear_kernel` does.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    n_mask = n < N
    segment = tl.program_id(2)
    total = chain_over_k(
        x, w, m, n, n_mask, segment * SEGMENT, w_stride_n, w_stride_k, K, SEGMENT, 1, BM, BN, BK
    )
    place = (segment * M + m)[:, None].to(tl.int64) * N + n[None, :]
    tl.store(partials + place, total, mask=n_mask[None, :])


@dataclass(frozen=True, slots=True)
class Tile:
    """How a linear is cut. It changes the speed and, by `make cuda-check`, never a bit.

    Attributes:
        bm: Rows per program.
        bn: Columns per program.
        bk: Step of K.
        warps: Warps per program.
        stages: Depth of the software pipeline.
    """

    bm: int
    bn: int
    bk: int
    warps: int = 4
    stages: int = 4

    @property
    def options(self) -> dict[str, int | bool]:
        """Return the keyword arguments of a launch."""
        return {
            "BM": self.bm,
            "BN": self.bn,
            "BK": self.bk,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": False,
        }


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    *,
    tile: Tile,
    activation: int = NO_ACTIVATION,
    segment: int | None = None,
    block_max: Tensor | None = None,
) -> None:
    """Launch `linear_kernel`: y (M, N) of x (M, K) and w (N, K), M a multiple of tile.bm.

    Args:
        x: (M, K), contiguous.
        w: (N, K) of any strides; float32 is fast where N is contiguous, and K is not.
        bias: (N,) or None.
        residual: (M, N) with the strides of y, or None; it may be y.
        y: (M, N), its rows contiguous.
        tile: How to cut it.
        activation: NO_ACTIVATION, GELU_TANH or RELU.
        segment: Length of a chain over K, a divisor of K; None is K.
        block_max: (M, tiles of N) float32, gets the largest output of each tile.

    Raises:
        ValueError: M is no multiple of tile.bm, or K no multiple of segment.
    """
    (rows, depth), columns = x.shape, len(w)
    segment = segment or depth
    if rows % tile.bm or depth % segment:
        raise ValueError(
            f"{rows} rows and K = {depth} must be multiples of {tile.bm} and {segment}"
        )
    linear_kernel[rows // tile.bm, triton.cdiv(columns, tile.bn)](
        x,
        w,
        bias,
        residual,
        y,
        block_max,
        columns,
        y.stride(0),
        *w.stride(),
        depth,
        segment,
        bias is not None,
        activation,
        residual is not None,
        block_max is not None,
        **tile.options,
    )


def linear_twin(
    x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, activation: int
) -> Tensor:
    """Compute in torch what `linear_kernel` computes, in float32."""
    y = x.float() @ w.float().T
    if bias is not None:
        y = y + bias.float()
    if activation == GELU_TANH:
        y = F.gelu(y, approximate="tanh")
    elif activation == RELU:
        y = F.relu(y)
    return y if residual is None else y + residual.float()
