"""The expected time of a run: the work of all rows, times what the pilot says that work takes.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptbatch.pipeline.estimate.lengths import LengthCurve, fit_lengths
from gptbatch.pipeline.estimate.pilot import Pilot
from gptbatch.pipeline.estimate.step_cost import Array, calibrated, fit_step_cost, resampled
from gptbatch.pipeline.estimate.walk import Batching, Walk, walk
from gptbatch.pipeline.estimate.workload import Workload
from gptbatch.pipeline.input.tokenize import TokenizedInput
from gptbatch.pipeline.types import TokenizedPrompt

# Sequences times steps of a walk: about 2 s of Python.
MAX_WALKED_TOKENS = 600_000
N_BOOTSTRAPS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeEstimate:
    """Seconds of a run, from start to end.

    Attributes:
        expected_s: Expected seconds.
        low_s: 10 % of the bootstraps are faster.
        high_s: 10 % of the bootstraps are slower.
        limit_s: Seconds if every row reaches max_new_tokens.
        start_s: Seconds among these of checking the input and loading the model.
    """

    expected_s: float
    low_s: float
    high_s: float
    limit_s: float
    start_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The prediction for all rows.

    Attributes:
        time: Seconds.
        new_tokens: Expected new tokens.
        mean_batch_size: Expected rows per step, before the end.
        cost: Seconds per unit of work of a step.
    """

    time: TimeEstimate
    new_tokens: int
    mean_batch_size: float
    cost: Array


def forecast(
    pilot: Pilot,
    work: Workload,
    batching: Batching,
    prompts: TokenizedInput,
    *,
    context_s: float,
    start_s: float,
) -> Forecast:
    """Predict the time of a run.

    Args:
        pilot: The measurements.
        work: The rows.
        batching: How the run schedules.
        prompts: The input.
        context_s: Seconds of reading the keys and values of one token from memory.
        start_s: Seconds before the first row.
    """
    rng = np.random.default_rng(0)
    sample = _Sample(work, prompts, rng)
    cost = _cost(pilot, [np.array(segment) for segment in pilot.segments], context_s)
    curve = fit_lengths(pilot.observed)
    lengths = sample.lengths(curve)
    walked = walk(sample.prompts, lengths.tolist(), batching)
    expected = sample.scaled(walked)
    at_limit = expected
    if (lengths < sample.limits).any():
        at_limit = sample.scaled(walk(sample.prompts, sample.limits.tolist(), batching))
    bootstraps = []
    for _ in range(N_BOOTSTRAPS):
        steps = [segment.start + resampled(len(segment), rng) for segment in pilot.segments]
        rows = rng.integers(0, max(1, len(pilot.observed)), size=len(pilot.observed))
        other_lengths = sample.lengths(fit_lengths([pilot.observed[row] for row in rows]))
        other_work = expected * sample.work_ratio(other_lengths, lengths)
        bootstraps.append(float(other_work @ _cost(pilot, steps, context_s)))
    low, high = np.quantile(bootstraps, [0.1, 0.9])
    new_tokens = float(lengths.sum()) * sample.new_ratio

    def seconds(steps_s: float, tokens: float) -> float:
        writing_s = (work.prompt_tokens + tokens) * pilot.written.seconds
        return start_s + work.read_s + writing_s + steps_s

    steps_s = float(expected @ cost)
    return Forecast(
        time=TimeEstimate(
            expected_s=seconds(steps_s, new_tokens),
            low_s=seconds(min(low, steps_s), new_tokens),
            high_s=seconds(max(high, steps_s), new_tokens),
            limit_s=seconds(float(at_limit @ cost), work.max_new_tokens),
            start_s=start_s,
        ),
        new_tokens=round(new_tokens),
        mean_batch_size=walked.mean_batch_size,
        cost=cost,
    )


def _cost(pilot: Pilot, steps: list[NDArray[np.int64]], context_s: float) -> Array:
    """Return the cost of work from steps of each segment, exact for the run's batch size."""
    every, main = np.concatenate(steps), steps[0]
    cost = fit_step_cost(pilot.work[every], pilot.seconds[every], context_s)
    return calibrated(cost, pilot.work[main], pilot.seconds[main])


class _Sample:
    """The rows to walk through, as many as MAX_WALKED_TOKENS allows.

    Attributes:
        prompts: The rows.
        limits: The most new tokens of each.
        new_ratio: The most new tokens of all rows, divided by those of these.
    """

    def __init__(self, work: Workload, prompts: TokenizedInput, rng: np.random.Generator) -> None:
        limits = np.array([prompts.new_token_limit(prompt) for prompt in work.sampled])
        n = max(1, int(np.searchsorted(np.cumsum(limits), MAX_WALKED_TOKENS)))
        self.prompts: list[TokenizedPrompt] = work.sampled[:n]
        self.limits: NDArray[np.int64] = limits[:n]
        self._prompt_tokens = np.array([len(prompt.token_ids) for prompt in self.prompts])
        self._quantiles = (rng.permutation(len(self.limits)) + 0.5) / len(self.limits)
        self.new_ratio = work.max_new_tokens / int(self.limits.sum())
        self._prompt_ratio = work.prompt_tokens / int(self._prompt_tokens.sum())

    def lengths(self, curve: LengthCurve) -> NDArray[np.int64]:
        """Return the new tokens of each row by a curve."""
        found = np.minimum(curve.lengths(self._quantiles), self.limits)
        return np.maximum(found, 1).astype(np.int64)

    def scaled(self, walked: Walk) -> Array:
        """Return the work of all rows. The steps at the end of the walk come only once."""
        ratio = self.new_ratio
        work: Array = walked.work * np.array([ratio, ratio, ratio, self._prompt_ratio])
        work[0] -= walked.drain_steps * (ratio - 1)
        return work

    def work_ratio(self, lengths: NDArray[np.int64], others: NDArray[np.int64]) -> Array:
        """Return the ratio of the work at these lengths to that at others."""
        tokens = lengths.sum() / others.sum()
        context = self._context(lengths) / self._context(others)
        return np.array([tokens, tokens, context, 1.0])

    def _context(self, lengths: NDArray[np.int64]) -> float:
        return float((lengths * (self._prompt_tokens + (lengths + 1) / 2)).sum())
