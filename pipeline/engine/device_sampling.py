"""The row of the state of a device for a sequence, and which kernels sample it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gptbatch.pipeline.engine.sampling import kept_range, kept_set_size
from gptbatch.pipeline.engine.sequence import Sequence
from gptbatch.pipeline.kernels.cuda import state as fields
from gptbatch.pipeline.params.sampling_params import SamplingParams

Int64s = npt.NDArray[np.int64]


def has_top_p(params: SamplingParams) -> bool:
    """Return whether top_p matters."""
    return params.temperature > 0 and params.top_p < 1


def keeps_full_vocab(params: SamplingParams, vocab_size: int) -> bool:
    """Return whether every token can win."""
    is_filtered = has_top_p(params) or math.isfinite(kept_range(params))
    return kept_set_size(params, vocab_size) == vocab_size and not is_filtered


def state_row(
    table: Int64s,
    sequence: Sequence | None = None,
    *,
    budget: int = 0,
    vocab_size: int = 0,
    host_samples: bool = False,
    adjustments: int = -1,
) -> Int64s:
    """Return the state of a row (see kernels/cuda/state.py) that decodes from its last token on.

    Args:
        table: The blocks of the sequence.
        sequence: None for one that prefills: an empty row.
        budget: New tokens with which the row ends.
        vocab_size: V.
        host_samples: The host samples.
        adjustments: The place of its bias, penalties and masks; -1 for none.
    """
    row = np.zeros(fields.HEADER + len(table), np.int64)
    row[fields.HEADER :] = table
    row[fields.POSITION.value] = -1
    if sequence is None:
        return row
    params = sequence.params
    size = kept_set_size(params, vocab_size)
    row[fields.TOKEN.value] = sequence.tokens[-1]
    row[fields.POSITION.value] = len(sequence.tokens) - 1
    row[fields.STEP.value] = sequence.n_new_tokens
    row[fields.BUDGET.value] = budget
    row[fields.SEED.value] = params.seed
    row[fields.ADJUSTMENTS.value] = adjustments
    row[fields.LOGPROBS.value] = 0 if params.logprobs is None else 1 + params.logprobs
    row[fields.TOP_K.value] = size if size < vocab_size else fields.FULL_VOCAB.value
    if host_samples:
        row[fields.TOP_K.value] = fields.HOST_SAMPLES.value
        row[fields.LOGPROBS.value] = 0
    numbers = {
        fields.TEMPERATURE.value: params.temperature,
        fields.KEPT_RANGE.value: kept_range(params),
        fields.MARGIN.value: np.inf,
        fields.TOP_P.value: params.top_p if has_top_p(params) else 1.0,
    }
    row[[*numbers]] = np.array([*numbers.values()], np.float64).view(np.int64)
    return row
