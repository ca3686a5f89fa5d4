"""Constants of the kernels' data layouts, shared by Python and C++.

The build passes each one to the compiler as the macro GPTBATCH_<name>, so that it stands here only.
"""

from __future__ import annotations

# Positions per block of the paged KV cache: in the model's own dtype, and in int8.
FULL_BLOCK_SIZE = 16
INT8_BLOCK_SIZE = 64
# The paged KV cache pads the head size D with zeros to a multiple of this.
HEAD_SIZE_MULTIPLE = 32
# int8: bytes of the float32 scale of one key or value, and the largest quantized value.
INT8_SCALE_BYTES = 4
INT8_MAX = 127
# int8: keys and values whose absmax is below this are stored as 0.
INT8_MIN_ABSMAX = 1e-30
# Tokens of the vocabulary per group: sampling keeps one maximum per group, and the two-pass LM head
# one error bound.
TOKENS_PER_GROUP = 32
CACHE_LINE_BYTES = 64

LAYOUT: dict[str, int | float] = {
    "FULL_BLOCK_SIZE": FULL_BLOCK_SIZE,
    "INT8_BLOCK_SIZE": INT8_BLOCK_SIZE,
    "HEAD_SIZE_MULTIPLE": HEAD_SIZE_MULTIPLE,
    "INT8_SCALE_BYTES": INT8_SCALE_BYTES,
    "INT8_MAX": INT8_MAX,
    "INT8_MIN_ABSMAX": INT8_MIN_ABSMAX,
    "TOKENS_PER_GROUP": TOKENS_PER_GROUP,
    "CACHE_LINE_BYTES": CACHE_LINE_BYTES,
}
