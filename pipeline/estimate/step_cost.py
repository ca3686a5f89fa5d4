"""The time of a step of the engine as a linear function of its work.

    seconds = a * steps + b * decoded tokens + c * their contexts + d * prefilled tokens

a is the work of every step, such as reading the weights. Sums of the work of many steps give their
time, too. In a short pilot all contexts are short and alike, so c has a prior: the time of reading
the keys and values from memory. Imports no torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# The work of a step or of many, in this order.
WORK = ("steps", "decoded_tokens", "decode_context", "prefilled_tokens")
CONTEXT = WORK.index("decode_context")
PRIOR_DEVIATION = 0.5


def fit_step_cost(work: Array, seconds: Array, context_s: float) -> Array:
    """Return the seconds per unit of work; none is negative.

    This is Bayesian linear regression: a normal prior is one more step in least squares.

    Args:
        work: (steps, len(WORK)).
        seconds: (steps,).
        context_s: Mean of the prior of c, more than 0. Half of it is the standard deviation.
    """
    noise_s = float((seconds - work @ _least_squares(work, seconds)).std())
    prior = np.zeros((1, work.shape[1]))
    prior[0, CONTEXT] = noise_s / (PRIOR_DEVIATION * context_s)
    return _least_squares(
        np.concatenate([work, prior]), np.append(seconds, prior[0, CONTEXT] * context_s)
    )


def calibrated(cost: Array, work: Array, seconds: Array) -> Array:
    """Return the costs times the factor that makes the sum over these steps exact.

    A linear function is not exact for all batch sizes; the prior shifts it, too.
    """
    predicted = float((work @ cost).sum())
    return cost * (float(seconds.sum()) / predicted) if predicted > 0 else cost


def _least_squares(work: Array, seconds: Array) -> Array:
    """Return the least squares solution without a negative cost."""
    cost = np.zeros(work.shape[1])
    used = [column for column in range(work.shape[1]) if work[:, column].any()]
    while used:
        scale = work[:, used].max(axis=0)
        found = np.linalg.lstsq(work[:, used] / scale, seconds, rcond=None)[0]
        if found.min() >= 0:
            cost[used] = found / scale
            break
        # A cost below 0 is noise: work without it.
        del used[int(found.argmin())]
    return cost


def r_squared(work: Array, seconds: Array, cost: Array) -> float:
    """Return the share of the variance between steps that the costs explain."""
    residual = float(((seconds - work @ cost) ** 2).sum())
    total = float(((seconds - seconds.mean()) ** 2).sum())
    return 1 - residual / total if total > 0 else 1.0


def resampled(n: int, rng: np.random.Generator, *, n_blocks: int = 20) -> NDArray[np.int64]:
    """Return n indices below n in blocks of neighbours (moving block bootstrap, Künsch 1989).

    Neighbouring steps are alike, since other programs disturb several at once.
    """
    length = max(1, n // n_blocks)
    starts = rng.integers(0, n - length + 1, size=-(-n // length))
    return (starts[:, None] + np.arange(length)).ravel()[:n]
