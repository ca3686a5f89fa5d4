"""Layer normalization, one warp per row, in the order of docs/arithmetic.md.

Naive, for one row; `lanes` is the sum over 32 lanes:

    mean = lanes(x) / C
    f    = float32(1 / sqrt(float64(lanes((x - mean)^2)) / C + epsilon))
    y    = (((x - mean) * f) * weight) + bias
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gptbatch.pipeline.kernels.cuda.arithmetic import sum_lanes


@triton.jit
def norm_kernel(x, weight, bias, y, EPSILON: tl.constexpr, C: tl.constexpr):
    """Normalize x (M, C) into y (M, C). A row is read once: lane j holds the elements j mod 32."""
    lane = tl.arange(0, 32)
    x += tl.program_id(0).to(tl.int64) * C
    y += tl.program_id(0).to(tl.int64) * C
    total = tl.zeros((32,), tl.float32)
    values: tl.tuple = ()
    for c0 in tl.static_range(0, C, 32):
        value = tl.load(x + c0 + lane, mask=c0 + lane < C, other=0.0).to(tl.float32)
        values = values + (value,)  # noqa: RUF005 - triton takes no * in a tuple
        total += value
    mean = tl.div_rn(sum_lanes(total), C * 1.0)
    total = tl.zeros((32,), tl.float32)
    for i in tl.static_range(len(values)):
        centered = tl.where(i * 32 + lane < C, values[i] - mean, 0.0)
        total += centered * centered
    variance = sum_lanes(total).to(tl.float64) / C
    factor = (1.0 / tl.sqrt(variance + EPSILON)).to(tl.float32)
    for i in tl.static_range(len(values)):
        c = i * 32 + lane
        w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
        b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
        result = (((values[i] - mean) * factor) * w) + b
        tl.store(y + c, result.to(y.dtype.element_ty), mask=c < C)


def norm(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, epsilon: float) -> None:
    """Normalize the rows of x (M, C) into y (M, C), both contiguous."""
    norm_kernel[(len(x),)](
        x, weight, bias, y, epsilon, x.shape[1], num_warps=1, enable_fp_fusion=False
    )


def norm_twin(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, epsilon: float) -> None:
    """Compute in torch what `norm` computes."""
    y.copy_(F.layer_norm(x.float(), (x.shape[1],), weight.float(), bias.float(), epsilon))
