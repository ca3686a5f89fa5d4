"""Samples every step of recorded rows again, from one prefill per row, for verify."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptbatch.pipeline.audit.loaded_run import LoadedRun
from gptbatch.pipeline.types import TokenLogprobs

if TYPE_CHECKING:
    from torch import Tensor

    from gptbatch.pipeline.audit.trace import RecordedRow
    from gptbatch.pipeline.engine.row_adjustments import RowAdjustments, StepAdjustments
    from gptbatch.pipeline.engine.sampling import SampledToken
    from gptbatch.pipeline.engine.sampling_step import SampleRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherToken:
    """A step at which the weights give another token than the recorded one.

    Attributes:
        step: The index of the step.
        recorded: The recorded token.
        sampled: The token that the weights give; None for logits that are not finite.
        distance: How far, in logits, the recorded token was from being sampled.
        max_logit: The largest magnitude of a logit.
    """

    step: int
    recorded: int
    sampled: int | None
    distance: float
    max_logit: float


class StepChecks:
    """The steps of one row: those with other tokens, and the records of their logits.

    Args:
        adjustments: Of its logits; None for none. It has taken the tokens of the steps so far.

    Attributes:
        other_tokens: The steps with another token.
        min_decision_margin: The smallest decision margin of all steps; infinity without a step.
        logits_hash: SHA-256 of the bits of all logits, where the run recorded a digest.
        logprobs: Of each step, where the row has log probabilities.
    """

    def __init__(self, adjustments: RowAdjustments | None) -> None:
        self.adjustments = adjustments
        self.other_tokens: list[OtherToken] = []
        self.min_decision_margin = math.inf
        self.logits_hash = hashlib.sha256()
        self.logprobs: list[TokenLogprobs] = []

    def next_adjustments(self, token: int) -> StepAdjustments | None:
        """Return the adjustments of the next step, whose recorded token is given."""
        from gptbatch.pipeline.engine.row_adjustments import next_adjustments

        step = next_adjustments(self.adjustments)
        if self.adjustments is not None:
            self.adjustments.add(token)
        return step


def check_steps(
    loaded_run: LoadedRun,
    rows: Sequence[RecordedRow],
    recorded_margins: Sequence[float | None],
) -> list[StepChecks]:
    """Sample every step of every row again, and compare the tokens with the recorded ones.

    Args:
        loaded_run: The run.
        rows: Rows of the run that can be prefilled.
        recorded_margins: The min_decision_margin of each row; None where it was not recorded.
    """
    from gptbatch.pipeline.audit.trace import explain_step, step_hidden
    from gptbatch.pipeline.engine.sampling_step import SampleRequest

    model = loaded_run.loaded.model
    checks = [StepChecks(loaded_run.row_adjustments(row.params, row.prompt)) for row in rows]
    # Margins above the recorded minimum need not be exact. The bound lies just above it, so that a
    # larger minimum shows.
    margin_bounds = [
        math.inf if margin is None else math.nextafter(margin, math.inf)
        for margin in recorded_margins
    ]
    for segments, hidden in step_hidden(model, rows):
        steps = [(segment.row, step) for segment in segments for step in segment.steps]
        requests = [
            SampleRequest(
                params=rows[index].params,
                step=step,
                margin_bound=margin_bounds[index],
                adjustments=checks[index].next_adjustments(rows[index].new[step]),
            )
            for index, step in steps
        ]
        samples = _sample(loaded_run, requests, hidden, [checks[index] for index, _ in steps])
        for number, ((index, step), sample) in enumerate(zip(steps, samples, strict=True)):
            check, token = checks[index], rows[index].new[step]
            if sample.decision_margin is not None:
                check.min_decision_margin = min(check.min_decision_margin, sample.decision_margin)
            if sample.logprobs is not None:
                check.logprobs.append(sample.logprobs)
            if sample.token != token:
                (logits,) = model.logits(hidden[number : number + 1])
                distance = explain_step(logits, requests[number], token).distance
                check.other_tokens.append(
                    OtherToken(
                        step=step,
                        recorded=token,
                        sampled=sample.token,
                        distance=distance,
                        max_logit=float(logits.abs().max()),
                    )
                )
    return checks


def _sample(
    loaded_run: LoadedRun,
    requests: Sequence[SampleRequest],
    hidden: Tensor,
    checks: Sequence[StepChecks],
) -> list[SampledToken]:
    """Sample the tokens of steps, and hash their logits where the run recorded a digest.

    Args:
        loaded_run: The run.
        requests: One per step.
        hidden: The head's input (S, C).
        checks: Those of the row of each step.
    """
    from gptbatch.pipeline.engine.sampling_step import sample_for_model
    from gptbatch.pipeline.engine.two_pass_sampling import sample_from_hidden
    from gptbatch.pipeline.model.lm_head import MAX_HEAD_ROWS, logits_bytes

    model = loaded_run.loaded.model
    if not loaded_run.config.record_logits_digest:
        return sample_from_hidden(model, hidden, requests)
    samples: list[SampledToken] = []
    for first in range(0, len(requests), MAX_HEAD_ROWS):
        chunk = slice(first, first + MAX_HEAD_ROWS)
        logits = model.logits(hidden[chunk])
        for check, step_logits in zip(checks[chunk], logits.cpu(), strict=True):
            check.logits_hash.update(logits_bytes(step_logits))
        samples += sample_for_model(model, logits, requests[chunk])
    return samples
