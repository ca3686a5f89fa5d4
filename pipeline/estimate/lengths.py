"""How many new tokens rows have before they stop, from rows of which many were cut off.

The estimator is that of Kaplan and Meier (1958). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# The curve ends where fewer rows are left.
MIN_ROWS_AT_RISK = 10


@dataclass(frozen=True, slots=True)
class Observation:
    """The new tokens of one row.

    Attributes:
        tokens: New tokens.
        stopped: The row ended by itself: an EOS token, a stop token or a stop string. Otherwise
            its limit or the end of the pilot cut it off.
    """

    tokens: int
    stopped: bool


@dataclass(frozen=True, slots=True)
class LengthCurve:
    """The share of rows that do not stop by themselves within t tokens.

    Attributes:
        survival: The share at t = 0, 1, ...
        hazard: The share of rows that stop at each further token.
    """

    survival: NDArray[np.float64]
    hazard: float

    def lengths(self, quantiles: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the lengths at these quantiles, between 0 and 1; infinity for no stop."""
        left = 1 - quantiles
        found = np.searchsorted(-self.survival, -left, side="left").astype(np.float64)
        beyond = left < self.survival[-1]
        last = len(self.survival) - 1
        with np.errstate(divide="ignore"):
            further = np.log(left[beyond] / self.survival[-1]) / np.log1p(-self.hazard)
        found[beyond] = last + np.ceil(further) if self.hazard else np.inf
        return found


def fit_lengths(observed: Sequence[Observation]) -> LengthCurve:
    """Return the Kaplan-Meier curve of these rows.

    Beyond the tokens that at least MIN_ROWS_AT_RISK rows have reached, rows stop at the mean rate.
    """
    tokens = np.array([row.tokens for row in observed], dtype=np.int64)
    stopped = np.array([row.stopped for row in observed], dtype=bool)
    if not stopped.any():
        return LengthCurve(np.ones(1), 0.0)
    counts = np.bincount(tokens)
    at_risk = counts[::-1].cumsum()[::-1]
    ends = np.bincount(tokens[stopped], minlength=len(counts))
    n = max(2, int((at_risk >= min(MIN_ROWS_AT_RISK, len(tokens))).sum()))
    at_risk, ends = at_risk[1:n], ends[1:n]
    survival = np.concatenate([[1.0], np.cumprod(1 - ends / at_risk)])
    return LengthCurve(survival, min(float(ends.sum() / at_risk.sum()), 0.999))
