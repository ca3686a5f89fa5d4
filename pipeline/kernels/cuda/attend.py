"""Attention of one query per program over the paged cache: prefill, chunk and decode alike.

A program visits blocks 0, 1, .. position / 64 of its own sequence in order, with no split over
keys. So the bits of a row depend on its own keys alone. The keys and values of the query's own
token are in the cache already. Three kernels compute the same, in the order that fits the cache:

    float32     `attend_float32_kernel`: docs/arithmetic.md. Two passes over the keys: first the
                largest score, then weights and values.
    int8        `attend_int8_kernel`: docs/arithmetic.md, with online softmax (Milakov and
                Gimelshein 2018) over blocks. Products are sums of whole numbers, in any order.
    16 bits     `attend_half_kernel`: online softmax, sums by `tl.sum`, whose order does not follow
                the batch. A third faster than chains on an H100.

Naive, for one query and head: out = softmax(q . keys * scale) @ values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptbatch.pipeline.kernels.constants import HEAD_SIZE_MULTIPLE
from gptbatch.pipeline.kernels.cuda.arithmetic import exp, sum_lanes
from gptbatch.pipeline.kernels.cuda.launch import launch, wait_for_previous
from gptbatch.pipeline.kernels.cuda.state import BLOCK_TOKENS
from gptbatch.pipeline.kernels.cuda.store import LayerCache, quantize, quantize_twin

# Queries and weights of an int8 cache are rounded to whole numbers of at most this.
LARGEST_INT16 = tl.constexpr(32639.0)


@triton.jit
def scores_of_block(even, odd, keys, scale, D: tl.constexpr, SIZE: tl.constexpr):
    """Return the scores of the 64 keys at `keys` in float32: chains over even and odd d."""
    key, d = tl.arange(0, BLOCK_TOKENS), tl.arange(0, SIZE)
    tile = tl.load(keys + key[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    even_keys, odd_keys = tl.split(tl.reshape(tile, (BLOCK_TOKENS, SIZE // 2, 2)))
    sums = tl.dot(even[None, :], tl.trans(even_keys), input_precision="ieee") + tl.dot(
        odd[None, :], tl.trans(odd_keys), input_precision="ieee"
    )
    return tl.reshape(sums, (BLOCK_TOKENS,)) * scale


@triton.jit
def add_to_lanes(lanes, weights):
    """Add 64 weights to 32 lanes: first those of keys 0 to 31, then those of 32 to 63."""
    first, second = tl.split(tl.permute(tl.reshape(weights, (2, 32)), (1, 0)))
    return (lanes + first) + second


@triton.jit
def attend_float32_kernel(
    qkv,
    cache,
    tables,
    seq_indices,
    positions,
    out,
    scale,
    table_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Attend by the queries of qkv (M, 3 C): out (M, C). SIZE: 2^n, at least D and 32."""
    wait_for_previous()
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row)
    table = tables + tl.load(seq_indices + row).to(tl.int64) * table_stride
    d, key = tl.arange(0, SIZE), tl.arange(0, BLOCK_TOKENS)
    query = tl.load(qkv + row.to(tl.int64) * (3 * H * D) + head * D + d, mask=d < D, other=0.0)
    even, odd = tl.split(tl.reshape(query, (SIZE // 2, 2)))
    n_blocks = (position + BLOCK_TOKENS) // BLOCK_TOKENS
    largest = float("-inf")
    for index in range(n_blocks):
        block = tl.load(table + index)
        keys = cache + (block * (2 * H) + head) * (BLOCK_TOKENS * D)
        scores = scores_of_block(even, odd, keys, scale, D, SIZE)
        is_key = index * BLOCK_TOKENS + key <= position
        largest = tl.maximum(largest, tl.max(tl.where(is_key, scores, float("-inf")), axis=0))
    lanes = tl.zeros((32,), tl.float32)
    total = tl.zeros((1, SIZE), tl.float32)
    for index in range(n_blocks):
        block = tl.load(table + index)
        keys = cache + (block * (2 * H) + head) * (BLOCK_TOKENS * D)
        is_key = index * BLOCK_TOKENS + key <= position
        values = tl.load(
            keys + H * BLOCK_TOKENS * D + key[:, None] * D + d[None, :],
            mask=is_key[:, None] & (d < D)[None, :],
            other=0.0,
        )
        scores = scores_of_block(even, odd, keys, scale, D, SIZE)
        weights = tl.where(is_key, exp(scores - largest), 0.0)
        lanes = add_to_lanes(lanes, weights)
        total = tl.dot(weights[None, :], values, total, input_precision="ieee")
    # An empty row has no keys: 0 times 1. NaN stays NaN.
    whole = sum_lanes(lanes)
    factor = tl.div_rn(1.0, tl.where(whole == 0.0, 1.0, whole))
    result = tl.reshape(total, (SIZE,)) * factor
    tl.store(out + row.to(tl.int64) * (H * D) + head * D + d, result, mask=d < D)


@triton.jit
def attend_int8_kernel(
    qkv,
    cache,
    scales,
    tables,
    seq_indices,
    positions,
    out,
    scale,
    table_stride,
    QUERY_MAX: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Attend as `attend_float32_kernel`, over a cache of whole numbers. SIZE: 2^n, at least D."""
    wait_for_previous()
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row)
    table = tables + tl.load(seq_indices + row).to(tl.int64) * table_stride
    d, key = tl.arange(0, SIZE), tl.arange(0, BLOCK_TOKENS)
    query = tl.load(qkv + row.to(tl.int64) * (3 * H * D) + head * D + d, mask=d < D, other=0.0)
    query, query_scale = quantize(query.to(tl.float32), tl.full((), QUERY_MAX, tl.float32))
    query = query.to(tl.int32)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    sums = tl.zeros((SIZE,), tl.float32)
    for index in range((position + BLOCK_TOKENS) // BLOCK_TOKENS):
        place = (tl.load(table + index) * (2 * H) + head) * BLOCK_TOKENS
        value_place = place + H * BLOCK_TOKENS
        is_key = index * BLOCK_TOKENS + key <= position
        tile = key[:, None] * D + d[None, :]
        mask = is_key[:, None] & (d < D)[None, :]
        keys = tl.load(cache + place * D + tile, mask=mask, other=0).to(tl.int32)
        values = tl.load(cache + value_place * D + tile, mask=mask, other=0).to(tl.int32)
        key_scales = tl.load(scales + place + key, mask=is_key, other=0.0)
        value_scales = tl.load(scales + value_place + key, mask=is_key, other=0.0)
        dots = tl.sum(keys * query[None, :], axis=1).to(tl.float32)
        scores = tl.where(is_key, dots * (key_scales * (scale * query_scale)), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=0))
        decay = exp(largest - new_largest)
        weights = tl.where(is_key, exp(scores - new_largest), 0.0)
        block_total = sum_lanes(add_to_lanes(tl.zeros((32,), tl.float32), weights))
        total = total * decay + block_total
        whole, weight_scale = quantize(
            weights * value_scales, tl.full((), LARGEST_INT16, tl.float32)
        )
        dots = tl.sum(whole.to(tl.int32)[:, None] * values, axis=0).to(tl.float32)
        sums = tl.fma(dots, tl.zeros((SIZE,), tl.float32) + weight_scale, sums * decay)
        largest = new_largest
    factor = tl.div_rn(1.0, tl.where(total == 0.0, 1.0, total))
    result = sums * factor
    tl.store(
        out + row.to(tl.int64) * (H * D) + head * D + d,
        result.to(out.dtype.element_ty),
        mask=d < D,
    )


@triton.jit
def attend_half_kernel(
    qkv,
    cache,
    tables,
    seq_indices,
    positions,
    out,
    scale,
    table_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Attend as `attend_float32_kernel`, over a cache of 16-bit numbers. SIZE: 2^n, at least D."""
    wait_for_previous()
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row)
    table = tables + tl.load(seq_indices + row).to(tl.int64) * table_stride
    d, key = tl.arange(0, SIZE), tl.arange(0, BLOCK_TOKENS)
    query = tl.load(qkv + row.to(tl.int64) * (3 * H * D) + head * D + d, mask=d < D, other=0.0)
    query = query.to(tl.float32) * scale
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    sums = tl.zeros((SIZE,), tl.float32)
    for index in range((position + BLOCK_TOKENS) // BLOCK_TOKENS):
        base = cache + (tl.load(table + index) * (2 * H) + head) * (BLOCK_TOKENS * D)
        is_key = index * BLOCK_TOKENS + key <= position
        tile = key[:, None] * D + d[None, :]
        mask = is_key[:, None] & (d < D)[None, :]
        keys = tl.load(base + tile, mask=mask, other=0.0).to(tl.float32)
        # Loaded before the scores are computed, so that both loads overlap.
        values = tl.load(base + H * BLOCK_TOKENS * D + tile, mask=mask, other=0.0)
        scores = tl.where(is_key, tl.sum(keys * query[None, :], axis=1), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=0))
        decay = exp(largest - new_largest)
        weights = tl.where(is_key, exp(scores - new_largest), 0.0)
        added = tl.sum(weights[:, None] * values.to(tl.float32), axis=0)
        sums = tl.fma(sums, tl.zeros((SIZE,), tl.float32) + decay, added)
        total = tl.fma(total, decay, tl.sum(weights, axis=0))
        largest = new_largest
    result = tl.div_rn(sums, tl.zeros((SIZE,), tl.float32) + tl.where(total == 0.0, 1.0, total))
    tl.store(
        out + row.to(tl.int64) * (H * D) + head * D + d,
        result.to(out.dtype.element_ty),
        mask=d < D,
    )


def attend(
    qkv: Tensor,
    cache: LayerCache,
    tables: Tensor,
    seq_indices: Tensor,
    positions: Tensor,
    out: Tensor,
    scale: float,
) -> None:
    """Attend by the queries of qkv (M, 3 C): out (M, C), 0 in empty rows. Arguments as `store`."""
    _, _, heads, _, head_size = cache.data.shape
    size = triton.next_power_of_2(head_size)
    rows = (tables, seq_indices, positions, out, scale, tables.stride(0))
    grid = (len(qkv), heads)
    if cache.scales is not None:
        launch(
            attend_int8_kernel,
            grid,
            *(qkv, cache.data, cache.scales, *rows, query_max(head_size), heads, head_size, size),
            num_warps=2,
            enable_fp_fusion=False,
        )
    elif qkv.dtype == torch.float32:
        launch(
            attend_float32_kernel,
            grid,
            *(qkv, cache.data, *rows, heads, head_size, max(32, size)),
            num_warps=2,
            enable_fp_fusion=False,
        )
    else:
        launch(
            attend_half_kernel,
            grid,
            *(qkv, cache.data, *rows, heads, head_size, size),
            num_warps=1,
            enable_fp_fusion=False,
        )


def query_max(head_size: int) -> float:
    """Return the largest whole number of a query: sums of its products fit 32 bits."""
    padded = -(-head_size // HEAD_SIZE_MULTIPLE) * HEAD_SIZE_MULTIPLE
    return float(min(int(LARGEST_INT16.value), (2**31 - 1) // (128 * padded)))


def attend_twin(
    qkv: Tensor,
    cache: LayerCache,
    tables: Tensor,
    seq_indices: Tensor,
    positions: Tensor,
    out: Tensor,
    scale: float,
) -> None:
    """Compute in torch what `attend` computes."""
    _, _, heads, block_tokens, head_size = cache.data.shape
    out.zero_()
    for row, (seq_index, position) in enumerate(
        zip(seq_indices.tolist(), positions.tolist(), strict=True)
    ):
        if position < 0:
            continue
        blocks = tables[seq_index, : position // block_tokens + 1]
        query = qkv[row, : heads * head_size].float().view(heads, head_size)
        stored = cache.data[blocks].float()
        if cache.scales is not None:
            stored = stored * cache.scales[blocks][..., None]
            whole, query_scale = quantize_twin(query, query_max(head_size))
            query = whole * query_scale[:, None]
        keys, values = stored.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : position + 1]
        weights = torch.softmax(torch.einsum("hd,hkd->hk", query, keys) * scale, dim=-1)
        out[row] = torch.einsum("hk,hkd->hd", weights, values).flatten()
