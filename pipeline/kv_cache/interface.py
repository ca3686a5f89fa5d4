"""Masked self-attention over flat tokens: what a backend is, and which one a machine gets.

The formula is that of Vaswani et al. 2017, section 3.2.1, with a causal mask: softmax(q k^T * scale) v over the keys at
positions 0 to the query's own. There are two backends, each with a KV cache laid out as it likes:

    ragged   a C++ kernel over pages of 16 positions, or 64; reads just what each sequence holds. CPU only.
    padded   matmul and softmax of torch over all seq_indices padded to one width. Everywhere.

In both, what a token gets depends on its position and its sequence alone, not on what else runs, nor on whether it comes by
prefill, in a chunk or alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from gptbatch.pipeline.errors import DeviceError
from gptbatch.pipeline.kernels.build import KernelError, load_kernels
from gptbatch.pipeline.kv_cache.block_pool import CacheAllocator
from gptbatch.pipeline.kv_cache.padded import PaddedKVCache, ReductionOrder, round_up
from gptbatch.pipeline.kv_cache.paged import PagedKVCache
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.model.config import GPTConfig

logger = logging.getLogger("gptbatch")

Backend = Literal["ragged", "padded"]


class Attention(Protocol):
    """Attention of one call of the network. Rows beyond the call's N tokens belong to nobody and come back as 0.

    Where it is ragged, a kernel may compute whole blocks instead (blocks.py).
    """

    def __call__(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        """qkv (N or more, 3, H, D) of a layer -> (as many, C)."""


class KVCache(CacheAllocator, Protocol):
    """The keys and values of the sequences that are running. A seq_index that nobody was admitted to may be used all the same."""

    def step(self, seq_indices: Sequence[int], positions: Sequence[int]) -> Attention:
        """The attention of one call over N tokens: the seq_index of each and its position there.

        The tokens of a seq_index stand in order, without a gap after those that the cache holds; their keys and values are
        written to it, over what was at these positions.
        """


def new_cache(
    backend: Backend,
    config: GPTConfig,
    *,
    max_seqs: int,
    capacity: int | None,
    dtype: torch.dtype,
    cache_dtype: CacheDtype,
    reduction_order: ReductionOrder,
    device: torch.device,
) -> KVCache:
    """An empty cache for sequences of the network `config`.

    capacity: positions that all sequences together may take, each rounded up to whole pages; None is enough for max_seqs full
    contexts. One full context always fits. padded makes room for what comes, up to that: its seq_indices are to be limited (`max_seqs_for`).
    reduction_order: of padded, see PaddedKVCache.
    """
    if backend == "padded":
        return PaddedKVCache(
            config,
            max_seqs=max_seqs,
            dtype=dtype,
            cache_dtype=cache_dtype,
            reduction_order=reduction_order,
            device=device,
        )
    return PagedKVCache(
        config,
        max_seqs=max_seqs,
        capacity=capacity,
        dtype=dtype,
        cache_dtype=cache_dtype,
        device=device,
    )


def max_seqs_for(backend: Backend, config: GPTConfig, *, capacity: int | None) -> int | None:
    """How many seq_indices a cache of that capacity may have so that it cannot outgrow it; None for any number."""
    if backend == "ragged" or capacity is None:
        return None
    return max(1, capacity // round_up(config.n_positions))


def choose_backend(
    logits_indices: Literal["auto", "ragged", "padded"], device: torch.device
) -> Backend:
    """The backend to use: auto takes ragged on a CPU where the kernel builds, and warns where it does not.

    Raises DeviceError when ragged is asked for and cannot be had.
    """
    if logits_indices == "padded" or (logits_indices == "auto" and device.type != "cpu"):
        return "padded"
    if device.type != "cpu":
        raise DeviceError(
            f"engine.attention is ragged, which runs on a CPU only, not on {device.type}",
            keys=("engine.attention",),
        )
    try:
        load_kernels()
    except KernelError as error:
        if logits_indices == "ragged":
            raise DeviceError(
                f"engine.attention is ragged, but its kernel cannot be had: {error}",
                keys=("engine.attention",),
            ) from error
        logger.warning(
            "the fast attention kernel cannot be had, attention is padded and slower: %s", error
        )
        return "padded"
    return "ragged"
