"""Masked self-attention over flat tokens: what a backend is, and which one a machine gets.

The formula is that of Vaswani et al. 2017, section 3.2.1, with a causal mask: softmax(q k^T * scale) v over the keys at
positions 0 to the query's own. There are two backends, each with a KV cache laid out as it likes:

    ragged   a C++ kernel over pages of 16 positions, or 64; reads just what each sequence holds. CPU only.
    padded   matmul and softmax of torch over all slots padded to one width. Everywhere.

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
from gptbatch.pipeline.kv_cache.block_pool import Slots
from gptbatch.pipeline.kv_cache.padded import PaddedCache, Products, round_up
from gptbatch.pipeline.kv_cache.paged import PagedCache
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


class KVCache(Slots, Protocol):
    """The keys and values of the sequences that are running. A slot that nobody was admitted to may be used all the same."""

    def step(self, slots: Sequence[int], positions: Sequence[int]) -> Attention:
        """The attention of one call over N tokens: the slot of each and its position there.

        The tokens of a slot stand in order, without a gap after those that the cache holds; their keys and values are
        written to it, over what was at these positions.
        """


def new_cache(
    backend: Backend,
    config: GPTConfig,
    *,
    n_slots: int,
    capacity: int | None,
    dtype: torch.dtype,
    cache_dtype: CacheDtype,
    products: Products,
    device: torch.device,
) -> KVCache:
    """An empty cache for sequences of the network `config`.

    capacity: positions that all sequences together may take, each rounded up to whole pages; None is enough for n_slots full
    contexts. One full context always fits. padded makes room for what comes, up to that: its slots are to be limited (`most_slots`).
    products: of padded, see PaddedCache.
    """
    if backend == "padded":
        return PaddedCache(
            config,
            n_slots=n_slots,
            dtype=dtype,
            cache_dtype=cache_dtype,
            products=products,
            device=device,
        )
    return PagedCache(
        config,
        n_slots=n_slots,
        capacity=capacity,
        dtype=dtype,
        cache_dtype=cache_dtype,
        device=device,
    )


def most_slots(backend: Backend, config: GPTConfig, *, capacity: int | None) -> int | None:
    """How many slots a cache of that capacity may have so that it cannot outgrow it; None for any number."""
    if backend == "ragged" or capacity is None:
        return None
    return max(1, capacity // round_up(config.n_positions))


def choose_backend(wanted: Literal["auto", "ragged", "padded"], device: torch.device) -> Backend:
    """The backend to use: auto takes ragged on a CPU where the kernel builds, and warns where it does not.

    Raises DeviceError when ragged is asked for and cannot be had.
    """
    if wanted == "padded" or (wanted == "auto" and device.type != "cpu"):
        return "padded"
    if device.type != "cpu":
        raise DeviceError(
            f"engine.attention is ragged, which runs on a CPU only, not on {device.type}",
            keys=("engine.attention",),
        )
    try:
        load_kernels()
    except KernelError as error:
        if wanted == "ragged":
            raise DeviceError(
                f"engine.attention is ragged, but its kernel cannot be had: {error}",
                keys=("engine.attention",),
            ) from error
        logger.warning(
            "the fast attention kernel cannot be had, attention is padded and slower: %s", error
        )
        return "padded"
    return "ragged"
