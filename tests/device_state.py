"""Builds the state of sequences on a device, for tests of the kernels."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gptbatch.pipeline.engine.sampling import kept_range, kept_set_size

FIELDS = ("token", "position", "step", "budget", "seed", "temperature", "top_k")


def bits(x: float) -> int:
    """Return the bits of a float64 as an int64."""
    return int(struct.unpack("<q", struct.pack("<d", x))[0])


def state_of(rows: Sequence[Mapping[str, Any]], blocks: int = 3, vocab_size: int = 2**30) -> Tensor:
    """Return the state (rows, fields); see kernels/cuda/state.py.

    Args:
        rows: Values of fields by name. `params` has those that sampling takes.
        blocks: Length of the block tables, which are 0.
        vocab_size: V: a top_k of V and more is none.
    """
    from gptbatch.pipeline.kernels.cuda.state import (
        ADJUSTMENTS,
        HEADER,
        KEPT_RANGE,
        LOGPROBS,
        MARGIN,
        TOP_P,
    )

    state = torch.zeros(len(rows), HEADER + blocks, dtype=torch.int64)
    for row, values in enumerate(rows):
        params = values.get("params")
        fields = dict(values)
        state[row, KEPT_RANGE.value] = bits(math.inf if params is None else kept_range(params))
        state[row, MARGIN.value] = bits(values.get("margin", math.inf))
        state[row, TOP_P.value] = bits(1.0)
        state[row, ADJUSTMENTS.value] = -1
        if params is not None:
            has_logprobs = params.logprobs is not None
            state[row, LOGPROBS.value] = 1 + params.logprobs if has_logprobs else 0
            if params.temperature > 0:
                state[row, TOP_P.value] = bits(params.top_p)
            size = kept_set_size(params, vocab_size)
            fields = {
                "seed": params.seed,
                "temperature": bits(params.temperature),
                "top_k": 0 if size == vocab_size else size,
                **fields,
            }
        for index, name in enumerate(FIELDS):
            state[row, index] = fields.get(name, 1 if name == "top_k" else 0)
    return state
