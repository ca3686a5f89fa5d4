"""Bias, penalties and masks on logits, before a token is sampled.

    z = x in float32, with one rounding per operation, in this order:
        + logit_bias
        repetition_penalty r of tokens in prompt or completion:  z < 0: z * r,  else z / r
        - frequency_penalty * times in the completion
        - presence_penalty of tokens in the completion
        -inf for tokens that are masked or not allowed

The repetition penalty is that of CTRL (Keskar et al. 2019) as transformers and vLLM apply it; the
others are those of OpenAI's API, and count new tokens only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptbatch.pipeline.engine.row_adjustments import StepAdjustments

_NONE = np.empty(0, np.int64)


def adjusted_logits(logits: Tensor, steps: Sequence[StepAdjustments]) -> Tensor:
    """Return the adjusted logits in float32, (S, V). The given ones stay as they are.

    Args:
        logits: (S, V) of any floating dtype.
        steps: The adjustments of each row.
    """
    z = logits.to(torch.float32, copy=True)

    def entries(
        tokens_of: Callable[[StepAdjustments], npt.NDArray[np.int64]],
    ) -> tuple[tuple[Tensor, Tensor], npt.NDArray[np.int64]] | None:
        """Return (row, token) of the tokens of all rows, and their number by row; None for none."""
        tokens = [tokens_of(step) for step in steps]
        counts = np.array([len(ids) for ids in tokens])
        if not counts.any():
            return None
        rows = np.repeat(np.arange(len(steps)), counts)
        index = (_to(z, rows), _to(z, np.concatenate(tokens)))
        return index, counts

    def per_entry(values: Sequence[float], counts: npt.NDArray[np.int64]) -> Tensor:
        return _to(z, np.repeat(np.array(values, np.float32), counts))

    if found := entries(lambda step: step.bias_ids):
        index, _ = found
        z[index] = z[index] + _to(z, np.concatenate([step.bias for step in steps]))
    if found := entries(lambda step: step.repeated):
        index, counts = found
        penalty = per_entry([step.repetition_penalty for step in steps], counts)
        values = z[index]
        z[index] = torch.where(values < 0, values * penalty, values / penalty)
    if found := entries(lambda step: step.generated):
        index, counts = found
        times = _to(z, np.concatenate([step.times for step in steps]))
        frequency = per_entry([step.frequency_penalty for step in steps], counts)
        presence = per_entry([step.presence_penalty for step in steps], counts)
        z[index] = z[index] - frequency * times - presence
    if found := entries(lambda step: _NONE if step.allowed is None else step.allowed):
        index, _ = found
        kept = z[index]
        z[[row for row, step in enumerate(steps) if step.allowed is not None]] = -math.inf
        z[index] = kept
    if found := entries(lambda step: step.masked):
        z[found[0]] = -math.inf
    return z


def _to(like: Tensor, values: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(values).to(like.device)
