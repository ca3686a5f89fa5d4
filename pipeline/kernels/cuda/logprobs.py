"""What log probabilities take from the logits of a step; `engine/device_logprobs.py` does the rest.

`measure`, before the logits are adjusted: the mass of all tokens (`engine/nucleus.py`), the largest
logit, and the n most likely tokens. The sum of masses is one of whole numbers, so its order does
not matter. The most likely token left is in the block with the largest logit left, the first of
these among ties: one block is read per token.

`look_up`, after a token is sampled: its logit as the head computed it. Masks leave it as it was,
and `adjust` keeps those that it changes.

    found[row] = TOTAL, LARGEST, OWN, and the most likely tokens, most likely first
    LARGEST, OWN     bits of float32
    a likely token   its id * 2^32 + the bits of its logit
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptbatch.pipeline.kernels.cuda.adjust import LANES
from gptbatch.pipeline.kernels.cuda.adjustments import FIELDS, N_ENTRIES, Adjustments
from gptbatch.pipeline.kernels.cuda.launch import launch, wait_for_previous
from gptbatch.pipeline.kernels.cuda.masses import mass_bits, masses
from gptbatch.pipeline.kernels.cuda.state import ADJUSTMENTS, LOGPROBS, POSITION
from gptbatch.pipeline.kernels.cuda.tiles import MAX_COLUMNS
from gptbatch.pipeline.kernels.cuda.tokens import (
    LARGEST_INT32,
    can_be_sampled,
    from_ordered_bits,
    ordered_bits,
)

TOTAL, LARGEST, OWN, TOP = (tl.constexpr(i) for i in range(4))
# The most tokens that are listed, by SAMPLING_SETTINGS.
MAX_TOP = 20
WIDTH = TOP.value + MAX_TOP
COLUMNS = 1024


@triton.jit
def float_bits(x):
    """Return the bits of float32 as an int64 below 2^32."""
    return x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF


@triton.jit
def list_most_likely(logits, maxima, found, n_top, V, BLOCKS, BN: tl.constexpr, SIZE: tl.constexpr):
    """Write the n most likely tokens of a row, by the largest logit of each block (SIZE,)."""
    b = tl.arange(0, SIZE)
    # The largest logit left of each block.
    left = tl.where(b < BLOCKS, ordered_bits(maxima), -LARGEST_INT32)
    last = tl.max(left, axis=0) + 1
    last_column = BLOCKS * 0
    for i in range(tl.minimum(n_top, V)):
        largest = tl.max(left, axis=0)
        block = tl.min(tl.where(left == largest, b, SIZE), axis=0)
        column = block * BN + tl.arange(0, BN)
        bits = ordered_bits(tl.load(logits + column, mask=column < V, other=float("-inf")))
        is_left = (bits < last) | ((bits == last) & (column > last_column))
        is_left = is_left & (column < V)
        last = largest
        last_column = tl.min(tl.where(is_left & (bits == last), column, LARGEST_INT32), axis=0)
        logit_bits = float_bits(from_ordered_bits(last))
        tl.store(found + i, (last_column.to(tl.int64) << 32) | logit_bits)
        is_left = is_left & (column != last_column)
        left_here = tl.max(tl.where(is_left, bits, -LARGEST_INT32), axis=0)
        left = tl.where(b == block, left_here, left)


@triton.jit
def measure_kernel(
    logits,
    block_max,
    state,
    found,
    stride,
    state_stride,
    V,
    BLOCKS,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BN: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Measure one row per program where the row runs and has log probabilities."""
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    own = state + row * state_stride
    n_top = tl.load(own + LOGPROBS).to(tl.int32) - 1
    if (tl.load(own + POSITION) >= 0) & (n_top >= 0):
        logits += row * stride
        found += row * WIDTH
        b = tl.arange(0, SIZE)
        maxima = tl.load(block_max + row * BLOCKS + b, mask=b < BLOCKS, other=float("-inf"))
        largest = tl.max(maxima, axis=0)
        # Other rows get no token.
        if can_be_sampled(maxima):
            total = tl.zeros((COLUMNS,), tl.int64)
            for first in range(0, V, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                z = tl.load(logits + column, mask=column < V, other=float("-inf"))
                total += masses(z.to(tl.float64) - largest.to(tl.float64), BITS)
            tl.store(found + TOTAL, tl.sum(total, axis=0))
            tl.store(found + LARGEST, float_bits(largest))
            list_most_likely(logits, maxima, found + TOP, n_top, V, BLOCKS, BN, SIZE)


@triton.jit
def look_up_kernel(
    logits,
    sampled,
    state,
    header,
    tokens,
    originals,
    found,
    stride,
    state_stride,
    entries,
    HAS_ADJUSTMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """Look up the logit of one row's token per program."""
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    own = state + row * state_stride
    has_logprobs = (tl.load(own + POSITION) >= 0) & (tl.load(own + LOGPROBS) >= 1)
    token = tl.load(sampled + row, mask=has_logprobs, other=-1)
    if token >= 0:
        z = tl.load(logits + row * stride + token)
        if HAS_ADJUSTMENTS:
            place = tl.load(own + ADJUSTMENTS)
            if place >= 0:
                count = tl.load(header + place * FIELDS + N_ENTRIES)
                for first in range(0, count, LANES):
                    e = first + tl.arange(0, LANES)
                    t = tl.load(tokens + place * entries + e, mask=e < count, other=-1)
                    original = tl.load(originals + place * entries + e, mask=t == token, other=0.0)
                    # Each token has one entry.
                    is_entry = tl.sum((t == token).to(tl.int32), axis=0) == 1
                    z = tl.where(is_entry, tl.sum(original, axis=0), z)
        tl.store(found + row * WIDTH + OWN, float_bits(z))


def measure(logits: Tensor, block_max: Tensor, state: Tensor, found: Tensor) -> None:
    """Measure each row that runs and has log probabilities.

    Args:
        logits: (S, V) float32 of the head, its rows contiguous.
        block_max: (S, blocks) float32: the largest logit of each MAX_COLUMNS columns.
        state: (sequences, fields) int64.
        found: Gets all but OWN, (S, WIDTH) int64, contiguous.
    """
    rows, vocab_size = logits.shape
    blocks = block_max.shape[1]
    launch(
        measure_kernel,
        (rows,),
        *(logits, block_max, state, found, logits.stride(0), state.stride(0), vocab_size, blocks),
        *(mass_bits(vocab_size), WIDTH, MAX_COLUMNS, triton.next_power_of_2(blocks), COLUMNS),
        num_warps=8,
        enable_fp_fusion=False,
    )


def look_up(
    logits: Tensor,
    sampled: Tensor,
    state: Tensor,
    adjustments: Adjustments | None,
    found: Tensor,
) -> None:
    """Look up the logit of the token of each row that runs and has log probabilities.

    Args:
        logits: (S, V) float32, adjusted.
        sampled: (S,) int32.
        state: (sequences, fields) int64.
        adjustments: What `adjust` took; None where no row had any.
        found: Gets OWN, (S, WIDTH) int64, contiguous.
    """
    header = tokens = originals = None
    if adjustments is not None:
        header, tokens = adjustments.header, adjustments.tokens
        originals = adjustments.originals
    launch(
        look_up_kernel,
        (len(sampled),),
        *(logits, sampled, state, header, tokens, originals, found, logits.stride(0)),
        *(state.stride(0), 0 if tokens is None else tokens.shape[1]),
        *(adjustments is not None, WIDTH, LANES),
        num_warps=4,
    )


def look_up_twin(
    logits: Tensor,
    sampled: Tensor,
    state: Tensor,
    adjustments: Adjustments | None,
    found: Tensor,
) -> None:
    """Compute in torch what `look_up` computes."""
    for row, token in enumerate(sampled.tolist()):
        own = state[row]
        if own[POSITION.value] < 0 or own[LOGPROBS.value] < 1 or token < 0:
            continue
        z, place = logits[row, token], int(own[ADJUSTMENTS.value])
        if adjustments is not None and place >= 0:
            tokens = adjustments.tokens[place, : adjustments.header[place, N_ENTRIES.value]]
            for entry in torch.nonzero(tokens == token)[:, 0]:
                z = adjustments.originals[place, entry]
        found[row, OWN.value] = z.view(torch.int32).long() & 0xFFFFFFFF
