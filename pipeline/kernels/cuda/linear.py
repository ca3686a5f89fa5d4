"""y = activation(x W^T + b), or x W^T + b + residual, and the largest outputs of blocks of columns.

    rows m     tiles of BM; loads beyond M repeat the last row
    columns n  tiles of BN; the last one is masked
    k          one chain, whatever the tile

Naive, for one output:

    s = 0
    for k in range(K):
        s = fma(x[m, k], w[n, k], s)
    y = activation(s + bias[n]) + residual[m, n]

float32 runs on the FMA units: this order, which is that of docs/arithmetic.md. bfloat16 and float16
run on the tensor cores, which add 16 products at a time to the chain (microsoft/MMA-Sim). By
measurement (docs/cuda) neither depends on BM, BN, BK, warps or stages. There is no cut of K
(split-K, stream-K): the order would follow the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gptbatch.pipeline.kernels.cuda.arithmetic import ACTIVATIONS, activate
from gptbatch.pipeline.kernels.cuda.launch import launch, wait_for_previous
from gptbatch.pipeline.kernels.cuda.tiles import MAX_COLUMNS, Tile, tile_for


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x,
    w,
    bias,
    residual,
    y,
    block_max,
    M,
    N,
    y_stride,
    w_stride_n,
    w_stride_k,
    K: tl.constexpr,
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
    wait_for_previous()
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    m_mask, n_mask = m < M, n < N
    x_tile = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K + k[None, :]
    w_tile = w + n[None, :] * w_stride_n + k[:, None] * w_stride_k
    total = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        if K % BK == 0:
            a = tl.load(x_tile)
            b = tl.load(w_tile, mask=n_mask[None, :], other=0.0)
        else:
            is_k = k0 + k < K
            a = tl.load(x_tile, mask=is_k[None, :], other=0.0)
            b = tl.load(w_tile, mask=is_k[:, None] & n_mask[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        x_tile += BK
        w_tile += BK * w_stride_k
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    total = activate(total, ACTIVATION)
    place = m.to(tl.int64)[:, None] * y_stride + n[None, :]
    mask = m_mask[:, None] & n_mask[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=mask)
    if HAS_MAX:
        # tl.max passes over NaN.
        has_nan = tl.max(((total != total) & n_mask[None, :]).to(tl.int32), axis=1) == 1
        largest = tl.max(tl.where(n_mask[None, :], total, float("-inf")), axis=1)
        largest = tl.where(has_nan, float("nan"), largest)
        tl.store(block_max + m * tl.num_programs(1) + tl.program_id(1), largest, mask=m_mask)


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    activation: str = "none",
    block_max: Tensor | None = None,
    *,
    tile: Tile | None = None,
) -> None:
    """Compute y (M, N) of x (M, K) and w (N, K).

    Args:
        x: (M, K), contiguous.
        w: (N, K) of any strides; float32 is fast where N is contiguous (`column_major`).
        bias: (N,) or None.
        residual: (M, N) with the strides of y, or None; it may be y. Only without an activation.
        y: (M, N), its rows contiguous.
        activation: See `Activation`.
        block_max: (M, blocks) float32, gets the largest output of each MAX_COLUMNS columns.
        tile: How to cut it, which changes no bit; None takes the table's.
    """
    (rows, depth), columns = x.shape, len(w)
    if rows == 0:
        return
    tile = tile or tile_for(x.dtype, rows, columns, depth, has_max=block_max is not None)
    assert block_max is None or tile.bn == MAX_COLUMNS or block_max.shape[1] * tile.bn >= columns
    launch(
        linear_kernel,
        (triton.cdiv(rows, tile.bm), triton.cdiv(columns, tile.bn)),
        *(x, w, bias, residual, y, block_max, rows, columns, y.stride(0), *w.stride(), depth),
        bias is not None,
        ACTIVATIONS[activation],
        residual is not None,
        block_max is not None,
        **tile.options,
    )


def linear_twin(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    activation: str = "none",
    block_max: Tensor | None = None,
) -> None:
    """Compute in torch what `linear` computes."""
    total = x.float() @ w.float().T
    if bias is not None:
        total = total + bias.float()
    total = ACTIVATION_TWINS[activation](total)
    if residual is not None:
        total = total + residual.float()
    y.copy_(total)
    if block_max is not None:
        padded = F.pad(total, (0, -len(w) % MAX_COLUMNS), value=float("-inf"))
        block_max.copy_(padded.view(len(x), -1, MAX_COLUMNS).amax(dim=2))


ACTIVATION_TWINS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def new_logits(rows: int, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return memory for logits (rows, V) and for their maxima (rows, blocks), in float32."""
    n_blocks = triton.cdiv(vocab_size, MAX_COLUMNS)
    # Rows of a multiple of 16 bytes are stored in one go.
    logits = torch.zeros(rows, n_blocks * MAX_COLUMNS, device=device)
    return logits[:, :vocab_size], torch.zeros(rows, n_blocks, device=device)


def column_major(w: Tensor) -> Tensor:
    """Copy w (N, K) so that N is contiguous, with columns of a multiple of 128."""
    columns, depth = w.shape
    padded = w.new_zeros(depth, -(-columns // 128) * 128)
    padded[:, :columns] = w.t()
    return padded[:, :columns].t()
