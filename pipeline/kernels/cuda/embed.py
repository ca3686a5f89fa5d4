"""The inputs of a step: one token of each sequence, from the state, then the tokens of chunks.

    row       0 .. S - 1                     S .. M - 1
    token     state[row, TOKEN]              chunk[0, row - S]
    position  state[row, POSITION]           chunk[1, row - S]
    sequence  row                            chunk[2, row - S]

Naive: x[row] = wte[token] + wpe[position]. An empty row has position -1 and is embedded as 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptbatch.pipeline.kernels.cuda.launch import launch, wait_for_previous
from gptbatch.pipeline.kernels.cuda.state import POSITION, TOKEN


@triton.jit(do_not_specialize=["S"])
def embed_kernel(
    state,
    chunk,
    wte,
    wpe,
    x,
    seq_indices,
    positions,
    state_stride,
    chunk_stride,
    S,
    C: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Embed one token per program."""
    wait_for_previous()
    row = tl.program_id(0)
    is_decode = row < S
    own = state + row.to(tl.int64) * state_stride
    other = chunk + (row - S)
    token = tl.load(own + TOKEN, mask=is_decode, other=0)
    position = tl.load(own + POSITION, mask=is_decode, other=-1)
    seq_index = row
    if row >= S:
        token = tl.load(other)
        position = tl.load(other + chunk_stride)
        seq_index = tl.load(other + 2 * chunk_stride).to(tl.int32)
    is_token = position >= 0
    token = tl.where(is_token, token, 0)
    c = tl.arange(0, SIZE)
    value = tl.load(wte + token * C + c, mask=c < C, other=0.0).to(tl.float32)
    value += tl.load(wpe + tl.maximum(position, 0) * C + c, mask=c < C, other=0.0).to(tl.float32)
    value = tl.where(is_token, value, 0.0)
    tl.store(x + row.to(tl.int64) * C + c, value.to(x.dtype.element_ty), mask=c < C)
    tl.store(seq_indices + row, seq_index)
    tl.store(positions + row, position.to(tl.int32))


def embed(
    state: Tensor,
    chunk: Tensor,
    n_decode: int,
    wte: Tensor,
    wpe: Tensor,
    x: Tensor,
    seq_indices: Tensor,
    positions: Tensor,
) -> None:
    """Embed the tokens of a step.

    Args:
        state: (sequences, fields) int64, see state.py.
        chunk: (3, at least M - S) int64: tokens, positions and sequences.
        n_decode: S, rows that come from the state.
        wte: (V, C).
        wpe: (n_positions, C).
        x: Gets the sums (M, C).
        seq_indices: Gets the sequence of each row (M,) int32.
        positions: Gets the position of each row (M,) int32.
    """
    width = x.shape[1]
    launch(
        embed_kernel,
        (len(x),),
        *(state, chunk, wte, wpe, x, seq_indices, positions),
        *(state.stride(0), chunk.stride(0), n_decode, width, triton.next_power_of_2(width)),
        num_warps=4,
        enable_fp_fusion=False,
    )


def embed_twin(
    state: Tensor,
    chunk: Tensor,
    n_decode: int,
    wte: Tensor,
    wpe: Tensor,
    x: Tensor,
    seq_indices: Tensor,
    positions: Tensor,
) -> None:
    """Compute in torch what `embed` computes."""
    own, rest = state[:n_decode], chunk[:, : len(x) - n_decode]
    tokens = torch.cat([own[:, TOKEN.value], rest[0]])
    positions.copy_(torch.cat([own[:, POSITION.value], rest[1]]))
    seq_indices.copy_(torch.cat([torch.arange(n_decode, device=x.device), rest[2]]))
    is_token = positions >= 0
    value = wte[tokens * is_token].float() + wpe[positions.clamp(min=0).long()].float()
    x.copy_(value * is_token[:, None])
