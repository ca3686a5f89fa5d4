"""Top-p (nucleus) sampling (Holtzman et al. 2020): a cutoff on logits, and its decision margin.

    q_j     = rint(exp((z_j - z_max) / temperature) * 2^46)     of the tokens that top_k keeps
              (2^40 for a vocabulary above 65,536)
    above_j = sum of q_i over z_i > z_j
    kept    = the tokens with above_j < top_p * sum of all q

Masses are whole numbers: their sums do not depend on an order, so that the C++ kernel, torch and
the oracle keep the same tokens. exp is computed by + and * alone, so that its bits are equal, too.

Moving every logit by at most m/2 changes the odds of a set of tokens by at most exp(m / T). With

    h(A) = T * (ln(p / (1 - p)) - ln(A / (Z - A)))

the tokens of mass A come to hold p of the mass at the distance h(A). Tokens may also change places:

    reach(kept t)    = min over r of max(gap to the r-th token below t, h(above_t + their mass))
    reach(outside j) = min over r of max(gap to the r-th token above j, -h(above_j - their mass))
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# 2^16 masses of 2^46 have a sum below 2^63.
MASS_BITS, MASS_BITS_OF_LARGE_VOCAB = 46, 40
LARGE_VOCAB = 2**16
# exp of less has no mass.
MIN_EXPONENT = -33.0
# ln 2 in two parts, the first of which has 21 zero bits at its end.
LN2_HIGH, LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
# Degree of the polynomial of exp on [-ln(2) / 2, ln(2) / 2].
DEGREE = 13
# Covers the rounding of logarithms where only tokens that may matter are listed.
SLACK = 1e-9
# Tokens whose reach is computed at once.
PIECE = 64


def mass_bits(vocab_size: int) -> int:
    """Return the bits of the mass of the most likely token."""
    return MASS_BITS if vocab_size <= LARGE_VOCAB else MASS_BITS_OF_LARGE_VOCAB


def masses(x: Tensor, bits: int) -> Tensor:
    """Return rint(exp(x) * 2^bits) as int64, x <= 0 in float64; 0 below MIN_EXPONENT."""
    inside = x.clamp(min=MIN_EXPONENT)
    n = torch.round(inside * (1 / math.log(2)))
    r = (inside - n * LN2_HIGH) - n * LN2_LOW
    total = torch.full_like(r, 1 / math.factorial(DEGREE))
    for k in range(DEGREE - 1, -1, -1):
        total = total * r + 1 / math.factorial(k)
    scaled = torch.round(total * torch.exp2(n + bits))
    return torch.where(x < MIN_EXPONENT, 0, scaled.long())


@dataclass(frozen=True, slots=True, kw_only=True)
class Nucleus:
    """The tokens of R rows, sorted by logit, with their masses.

    Attributes:
        logits: (R, V) float64, descending.
        masses: (R, V) int64; 0 for tokens that top_k does not keep.
        before: Sum of the masses of the tokens before (R, V) int64.
        total: Sum of all masses (R, 1) int64.
        temperatures: (R, 1) float64.
        top_ps: (R, 1) float64.
    """

    logits: Tensor
    masses: Tensor
    before: Tensor
    total: Tensor
    temperatures: Tensor
    top_ps: Tensor

    def cutoff(self) -> Tensor:
        """Return the smallest logit that is kept, (R, 1)."""
        is_kept = self.above().double() < self.top_ps * self.total.double()
        return self.logits.gather(1, (is_kept.sum(dim=1, keepdim=True) - 1).clamp(min=0))

    def above(self) -> Tensor:
        """Return the mass of the tokens with larger logits (R, V). Ties have the same."""
        begins = torch.ones_like(self.logits, dtype=torch.bool)
        begins[:, 1:] = self.logits[:, 1:] < self.logits[:, :-1]
        return torch.where(begins, self.before, 0).cummax(dim=1).values

    def reach_of_kept(self, logits: Tensor) -> Tensor:
        """Return the reach of one kept token per row, by its logit (R,)."""
        first = (self.logits > logits[:, None]).sum(dim=1, keepdim=True)
        own = self.masses.gather(1, first)
        index = torch.arange(self.logits.shape[1], device=logits.device)[None]
        mass = self.before + self.masses - own
        mass = torch.where(index == first, self.before, mass)
        gap = logits[:, None] - self.logits
        reach = torch.maximum(gap, self._distance(mass))
        return torch.where(index >= first, reach, math.inf).amin(dim=1).clamp(min=0)

    def reach_of_outside(self, rows: Tensor, logits: Tensor) -> Tensor:
        """Return the reach of E tokens that top_p does not keep, by row and logit, (E,)."""
        pairs = zip(rows.split(PIECE), logits.split(PIECE), strict=True)
        return torch.cat([self._reach_of_outside(*pair) for pair in pairs])

    def _reach_of_outside(self, rows: Tensor, logits: Tensor) -> Tensor:
        distance = -self._distance(self.before)
        # The gap falls along a row, and the distance grows: find where they cross.
        keys = (distance - self.logits)[rows]
        crossing = torch.searchsorted(keys, -logits[:, None])
        first = (self.logits[rows] > logits[:, None]).sum(dim=1, keepdim=True)
        here = torch.minimum(crossing, first)
        gap = (self.logits[rows].gather(1, here) - logits[:, None]).clamp(min=0)
        at_crossing = torch.maximum(gap, distance[rows].gather(1, here))
        earlier = (here - 1).clamp(min=0)
        before_it = torch.maximum(
            self.logits[rows].gather(1, earlier) - logits[:, None],
            distance[rows].gather(1, earlier),
        )
        before_it = torch.where(here > 0, before_it, math.inf)
        return torch.minimum(at_crossing, before_it)[:, 0].clamp(min=0)

    def lowest(self, bounds: Tensor) -> Tensor:
        """Return a logit below which no token's reach is below the bound (R,), (R, 1)."""
        bounds = bounds[:, None] * (1 + SLACK) + SLACK
        near = (-self._distance(self.before) < bounds).sum(dim=1, keepdim=True)
        return self.logits.gather(1, (near - 1).clamp(min=0)) - bounds

    def _distance(self, mass: Tensor) -> Tensor:
        """Return h of a mass, (R, V)."""
        odds = mass.double() / (self.total - mass).double()
        log_odds = torch.log(self.top_ps / (1 - self.top_ps))
        return self.temperatures * (log_odds - torch.log(odds))


def find_nucleus(logits: Tensor, smallest: Tensor, temperatures: Tensor, top_ps: Tensor) -> Nucleus:
    """Sort the logits of rows (R, V) and compute the masses.

    Args:
        logits: (R, V).
        smallest: The smallest logit that top_k keeps, (R, 1); -inf for none.
        temperatures: Above 0, (R,) float64.
        top_ps: Between 0 and 1, (R,) float64.
    """
    ordered = torch.sort(logits.double(), dim=1, descending=True).values
    exponents = (ordered - ordered[:, :1]) / temperatures[:, None]
    found = torch.where(ordered >= smallest, masses(exponents, mass_bits(logits.shape[1])), 0)
    ends = found.cumsum(dim=1)
    return Nucleus(
        logits=ordered,
        masses=found,
        before=ends - found,
        total=ends[:, -1:],
        temperatures=temperatures[:, None],
        top_ps=top_ps[:, None],
    )
