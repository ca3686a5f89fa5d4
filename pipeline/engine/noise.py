"""Noise version 1: Gumbel noise as a pure function of (row seed, step, token id).

The generator is Philox4x32-10 (model/philox.py). It maps a 64-bit key and a 128-bit counter to 128
random bits.

    key      the row seed: its low, then its high 32 bits
    counter  (token id // 2, step, 0, 0); step is the index of the new token in its row, from 0
    words    0 and 1 of the result for even token ids, 2 and 3 for odd ones
    n        52 bits: the first word times 2^20 plus the upper 20 bits of the second
    u        (n + 0.5) * 2^-52, which is never 0 or 1; 53 bits could round to 1
    g        -log(-log(u)), a standard Gumbel variable

n is equal on every device, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptbatch.pipeline.model.philox import philox4x32

_MASK = 0xFFFFFFFF


def random_bits(seeds: Tensor, steps: Tensor, token_ids: Tensor) -> Tensor:
    """Return n, 0 to 2^52 - 1. All int64, of broadcastable shapes; seeds 0 to 2^63 - 1."""
    zero = torch.zeros_like(token_ids)
    words = philox4x32((token_ids >> 1, steps, zero, zero), (seeds & _MASK, seeds >> 32))
    is_odd = (token_ids & 1).bool()
    high, low = torch.where(is_odd, words[2], words[0]), torch.where(is_odd, words[3], words[1])
    return (high << 20) | (low >> 12)


def gumbel(seeds: Tensor, steps: Tensor, token_ids: Tensor) -> Tensor:
    """Return g in float64, about -3.6 to 36.7. Arguments as for `random_bits`."""
    uniform = (random_bits(seeds, steps, token_ids).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))
