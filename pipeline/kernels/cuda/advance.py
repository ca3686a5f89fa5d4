"""Take the sampled tokens as the next inputs, end rows, and report to the host.

Naive, for one row that runs:

    token = sampled
    out = (token, bits of the smallest margin)
    TOKEN, POSITION, STEP = token, POSITION + 1, STEP + 1
    if no token or an EOS token or STEP == BUDGET: POSITION = -1

A row that the host samples ends here, too: the host writes its token and starts it again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptbatch.pipeline.kernels.cuda.launch import launch, wait_for_previous
from gptbatch.pipeline.kernels.cuda.state import (
    BUDGET,
    HOST_SAMPLES,
    IDLE,
    MARGIN,
    POSITION,
    STEP,
    TOKEN,
    TOP_K,
)

ROWS = 128


@triton.jit(do_not_specialize=["S", "N_EOS"])
def advance_kernel(sampled, state, eos_token_ids, out, state_stride, S, N_EOS, SIZE: tl.constexpr):
    """Advance SIZE rows per program; out (S, 2) int64."""
    wait_for_previous()
    row = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    own = state + row.to(tl.int64) * state_stride
    position = tl.load(own + POSITION, mask=row < S, other=-1)
    is_sampled = (position >= 0) & (tl.load(own + TOP_K, mask=row < S, other=0) > HOST_SAMPLES)
    token = tl.load(sampled + row, mask=is_sampled, other=IDLE).to(tl.int64)
    margin = tl.load(own + MARGIN, mask=is_sampled, other=0)
    tl.store(out + row * 2, token, mask=row < S)
    tl.store(out + row * 2 + 1, margin, mask=row < S)
    step = tl.load(own + STEP, mask=is_sampled, other=0) + 1
    is_last = (token < 0) | (step >= tl.load(own + BUDGET, mask=is_sampled, other=0))
    for i in range(N_EOS):
        is_last = is_last | (token == tl.load(eos_token_ids + i))
    tl.store(own + TOKEN, token, mask=is_sampled)
    tl.store(own + STEP, step, mask=is_sampled)
    tl.store(own + POSITION, tl.where(is_last, -1, position + 1), mask=row < S)


def advance(sampled: Tensor, state: Tensor, eos_token_ids: Tensor, out: Tensor) -> None:
    """Advance the first S rows.

    Args:
        sampled: (S,) int32.
        state: (sequences, fields) int64.
        eos_token_ids: (n,) int64.
        out: Gets the token and the bits of the smallest margin of each row, (S, 2) int64,
            contiguous. The token may be NO_TOKEN, or IDLE where nothing was sampled.
    """
    rows = len(sampled)
    launch(
        advance_kernel,
        (triton.cdiv(rows, ROWS),),
        *(sampled, state, eos_token_ids, out, state.stride(0), rows, len(eos_token_ids), ROWS),
        num_warps=4,
    )


def advance_twin(sampled: Tensor, state: Tensor, eos_token_ids: Tensor, out: Tensor) -> None:
    """Compute in torch what `advance` computes."""
    own = state[: len(sampled)]
    is_sampled = (own[:, POSITION.value] >= 0) & (own[:, TOP_K.value] > HOST_SAMPLES.value)
    token = torch.where(is_sampled, sampled.long(), IDLE.value)
    out[:, 0], out[:, 1] = token, torch.where(is_sampled, own[:, MARGIN.value], 0)
    step = own[:, STEP.value] + 1
    is_last = (token < 0) | (step >= own[:, BUDGET.value]) | torch.isin(token, eos_token_ids)
    position = torch.where(is_last, -1, own[:, POSITION.value] + 1)
    own[:, TOKEN.value] = torch.where(is_sampled, token, own[:, TOKEN.value])
    own[:, STEP.value] = torch.where(is_sampled, step, own[:, STEP.value])
    own[:, POSITION.value] = torch.where(is_sampled, position, -1)
