"""Which rows the device samples, and the row of its state for a sequence."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gptbatch.pipeline.engine.sampling import kept_range, kept_set_size
from gptbatch.pipeline.engine.sequence import Sequence
from gptbatch.pipeline.kernels.cuda import state as fields
from gptbatch.pipeline.kernels.cuda.sample import MAX_TOP_K
from gptbatch.pipeline.params.sampling_params import SamplingParams

Int64s = npt.NDArray[np.int64]


def needs_host(params: SamplingParams, vocab_size: int) -> bool:
    """Return whether the host samples a row: its settings are not those of kernels/cuda/sample.py.

    These are top_p; top_k above 64; and min_p without top_k.
    """
    if vocab_size == 1:
        return True
    if params.temperature == 0:
        return False
    size = kept_set_size(params, vocab_size)
    keeps_all = size == vocab_size
    return params.top_p < 1 or (params.min_p > 0 if keeps_all else size > MAX_TOP_K)


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
    numbers = np.array([params.temperature, kept_range(params), np.inf], np.float64)
    places = (fields.TEMPERATURE.value, fields.KEPT_RANGE.value, fields.MARGIN.value)
    row[[*places]] = numbers.view(np.int64)
    return row
