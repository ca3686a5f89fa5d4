"""Masked self-attention over flat tokens and its KV cache: the interface, and backend selection.

Attention is softmax(q k^T * scale) v over the keys at positions 0 to the query's own (Vaswani et
al. 2017, section 3.2.1, with a causal mask). Two backends implement it:

    ragged   Kernels over a paged cache: C++ on a CPU (blocks of 16 or 64 positions), Triton on a
             CUDA device (blocks of 64).
    padded   torch matmul and softmax over all sequences, padded to one width. Any device.

With both, a token's result depends only on its position and its sequence: not on other sequences,
and not on whether it arrives by prefill, in a chunk or alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from gptbatch.pipeline.errors import DeviceError
from gptbatch.pipeline.kernels.build import load_kernels
from gptbatch.pipeline.kernels.compiler import KernelError
from gptbatch.pipeline.kv_cache.block_pool import CacheAllocator
from gptbatch.pipeline.kv_cache.device import DeviceKVCache
from gptbatch.pipeline.kv_cache.padded import PaddedKVCache
from gptbatch.pipeline.kv_cache.paged import PagedKVCache
from gptbatch.pipeline.kv_cache.spec import PADDED, RAGGED, TRITON, Backend, KVCacheSpec

logger = logging.getLogger("gptbatch")

MIN_TRITON = (3, 6)
# Ampere: the first with bfloat16.
MIN_CAPABILITY = (8, 0)


class Attention(Protocol):
    """Attention of one forward pass over N tokens. Rows beyond N are padding and come back as 0."""

    def __call__(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
        """Write keys and values of the layer, then attend: qkv (>= N, 3, H, D) -> (>= N, C)."""


class KVCache(CacheAllocator, Protocol):
    """Keys and values of the running sequences. A sequence may be used without `allocate`."""

    def attention_for(self, seq_indices: Sequence[int], positions: Sequence[int]) -> Attention:
        """Prepare one forward pass over N tokens and return its attention.

        Args:
            seq_indices: The sequence of each token, (N,).
            positions: The position of each token in its sequence, (N,). The tokens of a sequence
                are in order and without a gap after those in the cache. Their keys and values
                overwrite what was at these positions.
        """


def new_cache(spec: KVCacheSpec, max_seqs: int, *, capacity: int | None = None) -> KVCache:
    """Create an empty cache.

    Args:
        spec: The layout.
        max_seqs: Number of sequences, indexed from 0.
        capacity: Positions of all sequences together, each rounded up to whole blocks. None is
            enough for max_seqs full contexts. One full context always fits. The padded backend
            ignores it: bound max_seqs with `KVCacheSpec.max_seqs` instead.
    """
    if spec.backend.triton:
        return DeviceKVCache(spec, max_seqs, capacity)
    if spec.backend.paged:
        return PagedKVCache(spec, max_seqs, capacity)
    return PaddedKVCache(spec, max_seqs)


def select_backend(name: Literal["auto", "ragged", "padded"], device: torch.device) -> Backend:
    """Return the backend to use.

    `auto` takes ragged where the kernels of the device are available, and warns where they are not.

    Raises:
        DeviceError: `ragged` is not available on this device.
    """
    if name == "padded":
        return PADDED
    kernels, problem = ("C++", None) if device.type == "cpu" else ("Triton", triton_problem(device))
    if device.type == "cpu":
        try:
            load_kernels()
        except KernelError as error:
            problem = str(error)
    if problem is None:
        return RAGGED if device.type == "cpu" else TRITON
    if name == "ragged":
        raise DeviceError(
            f"engine.attention is ragged, but the {kernels} kernels are not available: {problem}",
            keys=("engine.attention",),
        )
    logger.warning(
        "the %s kernels are not available; attention is padded, which is slower: %s",
        kernels,
        problem,
    )
    return PADDED


def triton_problem(device: torch.device) -> str | None:
    """Return why the Triton kernels cannot run on a CUDA device; None where they can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MIN_TRITON:
        return f"triton {triton.__version__} is older than {MIN_TRITON[0]}.{MIN_TRITON[1]}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}; "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} is needed"
        )
    return None
