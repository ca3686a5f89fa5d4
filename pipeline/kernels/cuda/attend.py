"""Attention of one query per program over a paged KV cache: prefill, chunk and decode alike.

Online softmax (Milakov and Gimelshein 2018) over the blocks 0, 1, .. position / 64, in order, with
no split over keys: a row's bits depend on its own keys alone. Keys and values of the query's own
token are in the cache already. Naive, for one query and head:

    m, l, acc = -inf, 0, 0
    for block of 64 keys:
        s = (q * scale) . k, -inf beyond the query's position
        m_new = max(m, max s); p = exp(s - m_new); alpha = exp(m - m_new)
        l, acc, m = l * alpha + sum p, acc * alpha + p v, m_new
    out = acc / l

DOT chooses how the sums run. With it, those over d and of p v are chains of fma, and the sum of p
is a fixed tree: portable. Without it, all are trees of `tl.sum`: faster with bfloat16 caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptbatch.pipeline.kernels.cuda.arithmetic import exp, tree_sum
from gptbatch.pipeline.kernels.cuda.linear import BLOCK_TOKENS


@triton.jit
def attend_kernel(
    q,
    cache,
    block_tables,
    seq_indices,
    positions,
    out,
    scale,
    table_size,
    C: tl.constexpr,
    H: tl.constexpr,
    SIZE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Attend by q (M, C) over cache (blocks, 2, H, 64, D): out (M, C). SIZE: 2^n, at least D."""
    D: tl.constexpr = C // H
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row)
    seq_index = tl.load(seq_indices + row)
    d, key = tl.arange(0, SIZE), tl.arange(0, BLOCK_TOKENS)
    query = tl.load(q + row * C + head * D + d, mask=d < D, other=0.0).to(tl.float32) * scale
    largest = float("-inf")
    total = 0.0
    acc = tl.zeros((SIZE,), tl.float32)
    for index in range((position + BLOCK_TOKENS) // BLOCK_TOKENS):
        block = tl.load(block_tables + seq_index * table_size + index).to(tl.int64)
        is_key = index * BLOCK_TOKENS + key <= position
        base = cache + (block * 2 * H + head) * (BLOCK_TOKENS * D)
        tile = key[:, None] * D + d[None, :]
        mask = is_key[:, None] & (d < D)[None, :]
        keys = tl.load(base + tile, mask=mask, other=0.0).to(tl.float32)
        # Loaded before the scores are computed, so that both loads overlap.
        values = tl.load(base + H * BLOCK_TOKENS * D + tile, mask=mask, other=0.0)
        if DOT:
            scores = tl.dot(query[None, :], tl.trans(keys), input_precision="ieee")
            scores = tl.reshape(scores, (BLOCK_TOKENS,))
        else:
            scores = tl.sum(keys * query[None, :], axis=1)
        scores = tl.where(is_key, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=0))
        alpha = exp(tl.zeros((1,), tl.float32) + (largest - new_largest))
        p = exp(scores - new_largest)
        values = values.to(tl.float32)
        if DOT:
            summed = tl.reshape(tl.dot(p[None, :], values, input_precision="ieee"), (SIZE,))
            block_total = tree_sum(p, BLOCK_TOKENS, 6)
        else:
            summed = tl.sum(p[:, None] * values, axis=0)
            block_total = tl.sum(p, axis=0)
        alpha = tl.sum(alpha, axis=0)
        acc = tl.fma(acc, alpha, summed)
        total = tl.fma(total, alpha, block_total)
        largest = new_largest
    # 0 / 1 in rows of padding; NaN stays NaN.
    result = tl.div_rn(acc, tl.where(total == 0.0, 1.0, total))
    tl.store(out + row * C + head * D + d, result.to(out.dtype.element_ty), mask=d < D)


def attend_twin(
    q: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    seq_indices: Tensor,
    positions: Tensor,
    scale: float,
) -> Tensor:
    """Compute in torch what `attend_kernel` computes, in float32; rows of padding are 0."""
    _, _, heads, block_tokens, head_size = cache.shape
    out = torch.zeros(len(q), heads, head_size)
    for row, (seq_index, position) in enumerate(
        zip(seq_indices.tolist(), positions.tolist(), strict=True)
    ):
        if position < 0:
            continue
        blocks = block_tables[seq_index, : position // block_tokens + 1].long()
        keys, values = (
            cache[blocks].float().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : position + 1]
        )
        query = q[row].float().view(heads, head_size)
        weights = torch.softmax(torch.einsum("hd,hkd->hk", query, keys) * scale, dim=-1)
        out[row] = torch.einsum("hk,hkd->hd", weights, values)
    return out.flatten(1)
