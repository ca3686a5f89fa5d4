"""Noise version 1: the random draw for (row seed, step, token id), a pure function of these three.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
which turns a key of 64 bits and a counter of 128 bits into 128 random bits; it has no state, so nothing can shift it.

    key      the row seed: its low, then its high 32 bits
    counter  (token id // 2, step, 0, 0): step is the index of the new token in its row, from 0
    words    0 and 1 of the result for even token ids, 2 and 3 for odd ones: one block serves two tokens
    n        52 bits: the first word times 2^20 plus the upper 20 bits of the second
    u        (n + 0.5) * 2^-52, never 0 and never 1 (with 53 bits it could round to 1 and the noise to infinity)
    g        -log(-log(u)): a standard Gumbel variable

Integers are the same on every device, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10. All words are int64 tensors (any broadcastable shapes) of values 0 to 2^32 - 1."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # a product of two 32-bit words overflows int64 by wrapping, which keeps its 64 bits right
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _MASK) ^ c1 ^ k0,
            second & _MASK,
            ((first >> 32) & _MASK) ^ c3 ^ k1,
            first & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_bits(seeds: Tensor, steps: Tensor, token_ids: Tensor) -> Tensor:
    """n of the draw, 0 to 2^52 - 1. All int64, any broadcastable shapes; seeds 0 to 2^63 - 1."""
    zero = torch.zeros_like(token_ids)
    words = philox4x32((token_ids >> 1, steps, zero, zero), (seeds & _MASK, seeds >> 32))
    odd = (token_ids & 1).bool()
    high, low = torch.where(odd, words[2], words[0]), torch.where(odd, words[3], words[1])
    return (high << 20) | (low >> 12)


def gumbel(seeds: Tensor, steps: Tensor, token_ids: Tensor) -> Tensor:
    """g of the draw in float64: about -3.6 to 36.7."""
    uniform = (random_bits(seeds, steps, token_ids).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))
