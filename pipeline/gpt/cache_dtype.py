"""What type a cache keeps keys and values in, and what that takes.

auto is the network's own. int8 keeps of each head of a token the largest absolute value, and each number as the nearest of 255
steps up to it: a quarter of the memory that float32 reads, for completions that differ. It depends on the token's own numbers
alone, so a row's bits stay a function of the row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pipeline.gpt.config import GPTConfig

CacheDtype = Literal["auto", "int8"]

DEPTH_MULTIPLE = 32  # numbers of a head that are stored, rounded up to a multiple of this
SCALE_BYTES = 4  # of a head of a token, with int8
STEPS = 127
LEAST = 1e-30  # where the largest is below, all is 0


def stored_depth(config: GPTConfig) -> int:
    """How many numbers of a key or a value are stored."""
    return -(-config.head_size // DEPTH_MULTIPLE) * DEPTH_MULTIPLE


def bytes_a_token(config: GPTConfig, dtype: torch.dtype, cache_dtype: CacheDtype) -> int:
    """Memory that the keys and values of a token take in all layers, or somewhat more: padded rounds the head size up by less."""
    depth = stored_depth(config)
    return 2 * config.n_layer * config.n_head * (depth + SCALE_BYTES if cache_dtype == "int8" else depth * dtype.itemsize)


def through_int8(x: Tensor) -> Tensor:
    """x (..., D) as an int8 cache gives it back. NaN and infinity make all of a head NaN."""
    largest = x.float().abs().amax(-1, keepdim=True)
    factor = torch.where(largest < LEAST, 0.0, torch.full_like(largest, STEPS) / largest)  # STEPS / largest would round twice
    return ((x.float() * factor).round() * (largest / STEPS)).to(x.dtype)
