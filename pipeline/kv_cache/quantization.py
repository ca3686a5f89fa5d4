"""What type a cache keeps keys and values in, and what that takes.

auto is the network's own. int8 keeps of each head of a token the largest absolute value, and each number as the nearest of 255
steps up to it: a quarter of the memory that float32 reads, for completions that differ. It depends on the token's own numbers
alone, so a row's bits stay a function of the row. The ragged kernel multiplies whole numbers, and rounds queries and weights
for it, 257 times as finely (queries less so in heads of more than 512).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gptbatch.pipeline.model.config import GPTConfig

CacheDtype = Literal["auto", "int8"]

DEPTH_MULTIPLE = 32  # numbers of a head that are stored, rounded up to a multiple of this
SCALE_BYTES = 4  # of a head of a token, with int8
STEPS = 127
# positions of a page of the ragged cache: sequences share prefixes, and take memory, in steps of so many
BLOCK_SIZES: dict[CacheDtype, int] = {"auto": 16, "int8": 64}
LEAST = 1e-30  # where the largest is below, all is 0


def bytes_a_head(config: GPTConfig, dtype: torch.dtype, cache_dtype: CacheDtype) -> int:
    """Memory that a key takes in one head, or a value."""
    depth = -(-config.head_size // DEPTH_MULTIPLE) * DEPTH_MULTIPLE
    return depth + SCALE_BYTES if cache_dtype == "int8" else depth * dtype.itemsize


def bytes_a_token(config: GPTConfig, dtype: torch.dtype, cache_dtype: CacheDtype) -> int:
    """Memory that the keys and values of a token take in all layers, or somewhat more: padded rounds the head size up by less."""
    return 2 * config.n_layer * config.n_head * bytes_a_head(config, dtype, cache_dtype)


def through_int8(x: Tensor) -> Tensor:
    """x (..., D) as an int8 cache gives it back. NaN and infinity make all of a head NaN."""
    largest = x.float().abs().amax(-1, keepdim=True)
    factor = torch.where(
        largest < LEAST, 0.0, torch.full_like(largest, STEPS) / largest
    )  # STEPS / largest would round twice
    return ((x.float() * factor).round() * (largest / STEPS)).to(x.dtype)
