"""Sample the next token of each row from its logits on the device, without a sort.

What is computed stands in `engine/sampling.py`; tokens and decision margins are equal to its own,
bit for bit: noise and scores are in float64 by the logarithm of docs/arithmetic.md. One program of
one of three kernels samples a row:

    sample_filtered_kernel    top_k or min_p
    the same with HAS_TOP_P   top_p, perhaps with top_k and min_p
    sample_all_kernel         the full vocabulary: the two largest scores
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gptbatch.pipeline.kernels.cuda.filtered import sample_filtered_kernel
from gptbatch.pipeline.kernels.cuda.launch import launch, wait_for_previous
from gptbatch.pipeline.kernels.cuda.masses import mass_bits
from gptbatch.pipeline.kernels.cuda.state import (
    FULL_VOCAB,
    KEPT_RANGE,
    MARGIN,
    NO_TOKEN,
    POSITION,
    SEED,
    STEP,
    TEMPERATURE,
    TOP_K,
    TOP_P,
)
from gptbatch.pipeline.kernels.cuda.tiles import MAX_COLUMNS
from gptbatch.pipeline.kernels.cuda.tokens import LARGEST_INT32, can_be_sampled, gumbel

ALL_COLUMNS = 1024
# Columns that a program of the filtered kernel looks at together, and tokens that it scores.
TILE, SCORES = 512, 256
# Tokens near a cutoff whose masses are listed.
CAPACITY = 2048
# Limits for the filtered kernel without and with top_p: three and two programs per multiprocessor.
MAX_REGISTERS = (80, 128)


def scratch_sizes(n_blocks: int) -> tuple[int, int]:
    """Return the numbers of int32 and int64 that `sample` needs per row."""
    return n_blocks + 2 * TILE + CAPACITY, CAPACITY


@triton.jit
def sample_all_kernel(
    logits,
    block_max,
    state,
    sampled,
    stride,
    state_stride,
    V,
    BLOCKS,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sample one row per program where the row runs and keeps the full vocabulary."""
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    own = state + row * state_stride
    keeps_all = (tl.load(own + POSITION) >= 0) & (tl.load(own + TOP_K) == FULL_VOCAB)
    keeps_all = keeps_all & (tl.load(own + TOP_P).to(tl.float64, bitcast=True) == 1.0)
    kept_range = tl.load(own + KEPT_RANGE).to(tl.float64, bitcast=True)
    if keeps_all & (kept_range == float("inf")):
        b = tl.arange(0, SIZE)
        maxima = tl.load(block_max + row * BLOCKS + b, mask=b < BLOCKS, other=float("-inf"))
        is_finite = can_be_sampled(maxima)
        seed, step = tl.load(own + SEED), tl.load(own + STEP)
        temperature = tl.load(own + TEMPERATURE).to(tl.float64, bitcast=True)
        lane = tl.arange(0, COLUMNS)
        best = tl.full((COLUMNS,), float("-inf"), tl.float64)
        second = best
        token = lane
        for first in range(0, V, COLUMNS):
            column = first + lane
            z = tl.load(logits + row * stride + column, mask=column < V, other=float("-inf"))
            score = z.to(tl.float64) + temperature * gumbel(seed, step, column)
            is_better = score > best
            second = tl.maximum(second, tl.where(is_better, best, score))
            token = tl.where(is_better, column, token)
            best = tl.where(is_better, score, best)
        whole_best = tl.max(best, axis=0)
        winner = tl.min(tl.where(best == whole_best, token, LARGEST_INT32), axis=0)
        other = tl.max(tl.where(token == winner, second, best), axis=0)
        margin = tl.load(own + MARGIN).to(tl.float64, bitcast=True)
        margin = tl.minimum(margin, whole_best - other)
        tl.store(sampled + row, tl.where(is_finite, winner, NO_TOKEN))
        if is_finite:
            tl.store(own + MARGIN, margin.to(tl.int64, bitcast=True))


def sample(
    logits: Tensor,
    block_max: Tensor,
    state: Tensor,
    scratch: tuple[Tensor, Tensor],
    sampled: Tensor,
    *,
    full_vocab: bool,
    top_p: bool,
) -> None:
    """Sample the next token of each row that runs and whose TOP_K is not HOST_SAMPLES.

    Args:
        logits: (S, V) float32, its rows contiguous.
        block_max: (S, blocks) float32: the largest logit of each MAX_COLUMNS columns.
        state: (sequences, fields) int64; MARGIN is lowered to the margin of this step.
        scratch: int32 and int64, S rows of `scratch_sizes` each, contiguous.
        sampled: Gets the tokens (S,) int32, or NO_TOKEN.
        full_vocab: Whether a row may keep the full vocabulary.
        top_p: Whether a row may have a top_p.
    """
    rows, vocab_size = logits.shape
    blocks = block_max.shape[1]
    size = triton.next_power_of_2(blocks)
    small, large = scratch
    bits = mass_bits(vocab_size)
    for has_top_p in (True, False)[not top_p :]:
        launch(
            sample_filtered_kernel,
            (rows,),
            *(logits, block_max, state, small, large, sampled),
            *(logits.stride(0), state.stride(0), small.stride(0), vocab_size, blocks),
            *(has_top_p, bits, MAX_COLUMNS, size, TILE, SCORES, CAPACITY),
            num_warps=8,
            maxnreg=MAX_REGISTERS[has_top_p],
            enable_fp_fusion=False,
        )
    if full_vocab:
        launch(
            sample_all_kernel,
            (rows,),
            *(logits, block_max, state, sampled, logits.stride(0), state.stride(0)),
            *(vocab_size, blocks, size, ALL_COLUMNS),
            num_warps=8,
            enable_fp_fusion=False,
        )
