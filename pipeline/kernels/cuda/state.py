"""What the device keeps of each running sequence: one row of int64, and its blocks behind it.

    0 TOKEN         the input of the next step
    1 POSITION      of this token; -1: the row is empty, and every kernel skips it
    2 STEP          index of the new token that the next step samples, from 0
    3 BUDGET        the row ends with this many new tokens
    4 SEED          of the row
    5 TEMPERATURE   bits of a float64
    6 TOP_K         tokens that top-k keeps; FULL_VOCAB: all; HOST_SAMPLES: the host samples
    7 KEPT_RANGE    bits of a float64: how far below the largest logit min_p keeps tokens
    8 MARGIN        bits of a float64: the smallest decision margin so far
    9 ADJUSTMENTS   its row in `Adjustments` (adjustments.py); -1: nothing changes its logits
   10 LOGPROBS      1 + how many of the most likely tokens are listed; 0: no log probabilities
   11 TOP_P         bits of a float64; 1 keeps all
    HEADER ...      the block table: the block of positions 64 i to 64 i + 63

One tensor, so that an admission is one copy and a move between rows another.
"""

from __future__ import annotations

import triton.language as tl

(TOKEN, POSITION, STEP, BUDGET, SEED, TEMPERATURE, TOP_K, KEPT_RANGE, MARGIN) = (
    tl.constexpr(i) for i in range(9)
)
ADJUSTMENTS, LOGPROBS, TOP_P = (tl.constexpr(i) for i in range(9, 12))
HEADER = 16
# Tokens per block of the KV cache, and keys per step of attention.
BLOCK_TOKENS = tl.constexpr(64)

# Values of TOP_K.
FULL_VOCAB, HOST_SAMPLES = tl.constexpr(0), tl.constexpr(-1)
# Instead of a token: logits that are not finite; a row that was empty.
NO_TOKEN, IDLE = tl.constexpr(-1), tl.constexpr(-3)
