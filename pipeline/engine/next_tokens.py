"""The next token of each row, from what the head sees of it.

Where the network has a two_pass_head (gpt/lm_head.py), few logits are computed exactly. What comes out is the same: a choice and its margin
depend on no logit that is further below the k-th largest than the margin, and down to there they are exact.

Knows: the network's head, and how tokens are chosen. Does not know: sequences, caches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptbatch.pipeline.engine.sampling import SampledToken, kept_set_size, sample_tokens
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.lm_head import HEAD_ROWS, TwoPassHead
from gptbatch.pipeline.types import SamplingParams

MOST_LOGITS = {
    "cpu": 2**19,
    "cuda": 2**25,
}  # at once, unless HEAD_ROWS have more: for the caches of a CPU, for the memory of a GPU
KEPT_SHARE = 256  # where more than one token in so many is kept, a two_pass_head is no help
SLACK = 0.2  # how far below the k-th largest logits are exact at first, unless the row's smallest margin so far is smaller


def next_tokens(
    model: GPT,
    hidden: Tensor,
    params: Sequence[SamplingParams],
    steps: Sequence[int],
    bounds: Sequence[float],
) -> list[SampledToken]:
    """What sample_tokens makes of the logits of `hidden` (S, C)."""
    choices: list[SampledToken] = []
    at_once = max(
        HEAD_ROWS,
        0 if model.two_pass_head else MOST_LOGITS[model.device.type] // model.config.vocab_size,
    )
    for first in range(0, len(params), at_once):
        some = slice(first, first + at_once)
        rows = _Rows(
            model=model,
            hidden=hidden[some],
            params=params[some],
            steps=steps[some],
            bounds=bounds[some],
        )
        choices += rows.choose()
    return choices


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    model: GPT
    hidden: Tensor
    params: Sequence[SamplingParams]
    steps: Sequence[int]
    bounds: Sequence[float]

    def __getitem__(self, rows: Sequence[int]) -> _Rows:
        return _Rows(
            model=self.model,
            hidden=self.hidden[rows],
            params=[self.params[row] for row in rows],
            steps=[self.steps[row] for row in rows],
            bounds=[self.bounds[row] for row in rows],
        )

    def choose(self) -> list[SampledToken]:
        two_pass_head, vocab_size = self.model.two_pass_head, self.model.config.vocab_size
        if two_pass_head is None or not two_pass_head.is_worthwhile:
            return self._from(self.model.logits(self.hidden))
        many = [
            row
            for row, params in enumerate(self.params)
            if kept_set_size(params, vocab_size) * KEPT_SHARE > vocab_size
        ]
        if len(many) == len(self.params):
            return self._from(self.model.logits(self.hidden))
        if many:
            few = [row for row in range(len(self.params)) if row not in many]
            found = dict(
                zip([*many, *few], [*self[many].choose(), *self[few].choose()], strict=True)
            )
            return [found[row] for row in range(len(self.params))]
        return self._two_pass(
            two_pass_head,
            two_pass_head.approximate_logits(self.hidden),
            [min(bound, SLACK) for bound in self.bounds],
        )

    def _from(self, logits: Tensor) -> list[SampledToken]:
        return sample_tokens(logits, self.params, self.steps, self.bounds, native=self.model.native)

    def _two_pass(
        self, two_pass_head: TwoPassHead, logits: Tensor, slack: list[float]
    ) -> list[SampledToken]:
        """From logits (S, V) that are nearly right; those down to `slack` below the k-th largest are computed here."""
        kept = torch.tensor(
            [kept_set_size(params, self.model.config.vocab_size) for params in self.params]
        )
        floors = two_pass_head.rescore(
            logits, self.hidden, kept, torch.tensor(slack, dtype=torch.float64)
        ).tolist()
        choices = self._from(logits)
        missed = [row for row, floor in enumerate(floors) if math.isnan(floor)]
        if missed:
            choices = _replaced(
                choices, missed, self[missed]._from(self.model.logits(self.hidden[missed]))
            )
        wide = {
            row: math.nextafter(margin, math.inf)
            for row, (choice, bound) in enumerate(zip(choices, self.bounds, strict=True))
            if (margin := choice.margin) is not None
            and slack[row] < bound
            and margin >= slack[row]
            and not math.isnan(floors[row])
        }
        if (
            wide
        ):  # what a margin may depend on reaches beyond the slack: once more, as far as it says
            rows = list(wide)
            choices = _replaced(
                choices,
                rows,
                self[rows]._two_pass(two_pass_head, logits[rows], list(wide.values())),
            )
        return choices


def _replaced(
    choices: list[SampledToken], rows: list[int], by: list[SampledToken]
) -> list[SampledToken]:
    others = dict(zip(rows, by, strict=True))
    return [others.get(row, choice) for row, choice in enumerate(choices)]
