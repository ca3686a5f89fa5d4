"""One step of some rows from all of their logits: adjust, sample, and look up log probabilities."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptbatch.pipeline.engine.logit_adjustments import adjusted_logits
from gptbatch.pipeline.engine.logprobs import token_logprobs
from gptbatch.pipeline.engine.row_adjustments import StepAdjustments
from gptbatch.pipeline.engine.sampling import SampledToken, sample_tokens
from gptbatch.pipeline.kernels.build import load_kernels
from gptbatch.pipeline.kernels.compiler import KernelError
from gptbatch.pipeline.params.sampling_params import SamplingParams

if TYPE_CHECKING:
    from gptbatch.pipeline.model.gpt import GPT


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """What decides the next token of a row, besides its logits.

    Attributes:
        params: The settings of the row.
        step: Index of the new token, from 0.
        margin_bound: A larger decision margin may be returned as this; see `sample_tokens`.
        adjustments: Changes of the logits; None for none.
    """

    params: SamplingParams
    step: int
    margin_bound: float = math.inf
    adjustments: StepAdjustments | None = None

    @property
    def needs_all_logits(self) -> bool:
        """Whether logits matter that lie far below the kept ones."""
        return self.adjustments is not None or self.params.logprobs is not None


def sample_for_model(
    model: GPT, logits: Tensor, requests: Sequence[SampleRequest]
) -> list[SampledToken]:
    """Sample from the logits of a model, by the kernels of its backend; see `sample_step`.

    Beside the Triton kernels, the C++ kernels sample on the CPU where they can be built. Their
    margins are those of the sampler of the device, bit for bit.
    """
    native = model.backend.native
    if model.backend.triton and has_native_kernels():
        logits, native = logits.cpu(), True
    return sample_step(logits, requests, native=native)


@functools.cache
def has_native_kernels() -> bool:
    """Return whether the C++ kernels can be built and loaded here."""
    try:
        load_kernels()
    except KernelError:
        return False
    return True


def sample_step(
    logits: Tensor, requests: Sequence[SampleRequest], *, native: bool
) -> list[SampledToken]:
    """Sample the next token of each row.

    Args:
        logits: (S, V) of any floating dtype, as the model gives them.
        requests: One per row.
        native: Use the C++ kernels (CPU only).
    """
    rows = range(len(requests))
    if not any(request.needs_all_logits for request in requests):
        return _sample(logits, requests, rows, native=native)
    sampled = [SampledToken(None, None)] * len(requests)
    plain = [row for row in rows if requests[row].adjustments is None]
    for row, token in zip(plain, _sample(logits, requests, plain, native=native), strict=True):
        sampled[row] = token
    adjusted = [row for row in rows if requests[row].adjustments is not None]
    if adjusted:
        tokens = _sample_adjusted(logits, requests, adjusted, native=native)
        for row, token in zip(adjusted, tokens, strict=True):
            sampled[row] = token
    _add_logprobs(logits, requests, sampled, native=native)
    return sampled


def _sample(
    logits: Tensor, requests: Sequence[SampleRequest], rows: Sequence[int], *, native: bool
) -> list[SampledToken]:
    """Sample from the logits of some rows."""
    return sample_tokens(
        _rows_of(logits, rows),
        [requests[row].params for row in rows],
        [requests[row].step for row in rows],
        [requests[row].margin_bound for row in rows],
        native=native,
    )


def _sample_adjusted(
    logits: Tensor, requests: Sequence[SampleRequest], rows: Sequence[int], *, native: bool
) -> list[SampledToken]:
    """Sample from adjusted logits. A row whose own logits are not finite has no token."""
    own = _rows_of(logits, rows)
    some = [requests[row] for row in rows]
    steps = [request.adjustments for request in some if request.adjustments is not None]
    adjusted = adjusted_logits(own, steps)
    sampled = _sample(adjusted, some, range(len(some)), native=native)
    is_finite = torch.isfinite(own.amax(dim=1)).tolist()
    is_forbidden = (adjusted.amax(dim=1) == -math.inf).tolist()
    return [
        token
        if token.token is not None and finite
        else SampledToken(None, None, is_forbidden=finite and forbidden)
        for token, finite, forbidden in zip(sampled, is_finite, is_forbidden, strict=True)
    ]


def _add_logprobs(
    logits: Tensor,
    requests: Sequence[SampleRequest],
    sampled: list[SampledToken],
    *,
    native: bool,
) -> None:
    """Set the log probabilities of the rows that request them, in place."""
    found = {
        row: (token.token, n_top)
        for row, token in enumerate(sampled)
        if token.token is not None and (n_top := requests[row].params.logprobs) is not None
    }
    logprobs = token_logprobs(
        _rows_of(logits, list(found)),
        [token for token, _ in found.values()],
        [n_top for _, n_top in found.values()],
        native=native,
    )
    for row, token in zip(found, logprobs, strict=True):
        sampled[row] = dataclasses.replace(sampled[row], logprobs=token)


def _rows_of(logits: Tensor, rows: Sequence[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[list(rows)]
