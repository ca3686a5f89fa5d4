"""Sample the next token of each row from the head's input, by two passes where they are faster.

A token and its decision margin (see sampling.py) depend on no logit that lies further below the
k-th largest than the margin; the cutoff of min_p only leaves out tokens above it. The two-pass head
(model/lm_head.py) makes all logits exact down to a threshold, so tokens and margins are those of
all logits, bit for bit:

    1. approximate all logits
    2. rescore the candidates down to EXACT_RANGE below the k-th largest, and sample
    3. where the margin turns out larger than the range, rescore that far and sample again
    4. rows that fall back compute all logits

Rows whose logits are adjusted, or whose log probabilities are recorded, need all logits.
"""

from __future__ import annotations

import math
from collections import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from gptbatch.pipeline.engine.sampling import SampledToken, kept_set_size
from gptbatch.pipeline.engine.sampling_step import SampleRequest, sample_for_model
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.model.lm_head import MAX_HEAD_ROWS, TwoPassHead

# Logits computed at once, unless MAX_HEAD_ROWS rows have more: they fit the caches of a CPU, or
# take a small part of a GPU's memory.
MAX_LOGITS = {"cpu": 2**19, "cuda": 2**25}
# Rows that keep more than one token in this many do not profit from two passes.
TOKENS_PER_KEPT_TOKEN = 256
# First range below the k-th largest logit, unless the row's smallest margin so far is smaller.
EXACT_RANGE = 0.2


def sample_from_hidden(
    model: GPT, hidden: Tensor, requests: abc.Sequence[SampleRequest]
) -> list[SampledToken]:
    """Return the result of `sample_for_model` for the logits of hidden (S, C).

    Args:
        model: Provides the head.
        hidden: The head's input, from `GPT.hidden`.
        requests: One per row. Their margin_bound is the smallest decision margin so far.
    """
    max_rows = MAX_HEAD_ROWS
    if model.two_pass_head is None:
        max_rows = max(max_rows, MAX_LOGITS[model.device.type] // model.config.vocab_size)
    sampled: list[SampledToken] = []
    for first in range(0, len(requests), max_rows):
        piece = slice(first, first + max_rows)
        sampled += _Rows(model=model, hidden=hidden[piece], requests=requests[piece]).sample()
    return sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Rows to sample, S of them."""

    model: GPT
    hidden: Tensor
    requests: abc.Sequence[SampleRequest]

    def __getitem__(self, rows: abc.Sequence[int]) -> _Rows:
        return _Rows(
            model=self.model,
            hidden=self.hidden[rows],
            requests=[self.requests[row] for row in rows],
        )

    def sample(self) -> list[SampledToken]:
        """Sample by two passes where they are faster, else from all logits."""
        head, vocab_size = self.model.two_pass_head, self.model.config.vocab_size
        if head is None or not head.is_worthwhile:
            return self._sample_from_all()
        max_kept = vocab_size // TOKENS_PER_KEPT_TOKEN
        is_two_pass = [
            not request.needs_all_logits and kept_set_size(request.params, vocab_size) <= max_kept
            for request in self.requests
        ]
        if not any(is_two_pass):
            return self._sample_from_all()
        if not all(is_two_pass):
            one_pass_rows = [row for row, two_pass in enumerate(is_two_pass) if not two_pass]
            two_pass_rows = [row for row, two_pass in enumerate(is_two_pass) if two_pass]
            sampled = self[two_pass_rows].sample()
            return _merged(
                len(is_two_pass),
                (two_pass_rows, sampled),
                (one_pass_rows, self[one_pass_rows].sample()),
            )
        logits = head.approximate_logits(self.hidden)
        return self._two_pass(
            head, logits, [min(request.margin_bound, EXACT_RANGE) for request in self.requests]
        )

    def _sample(self, logits: Tensor) -> list[SampledToken]:
        return sample_for_model(self.model, logits, self.requests)

    def _sample_from_all(self) -> list[SampledToken]:
        return self._sample(self.model.logits(self.hidden))

    def _two_pass(
        self, head: TwoPassHead, logits: Tensor, exact_ranges: list[float]
    ) -> list[SampledToken]:
        """Rescore approximate logits (S, V) down to exact_ranges below the k-th, and sample."""
        vocab_size = self.model.config.vocab_size
        thresholds = head.rescore(
            logits,
            self.hidden,
            torch.tensor([kept_set_size(request.params, vocab_size) for request in self.requests]),
            torch.tensor(exact_ranges, dtype=torch.float64),
        ).tolist()
        sampled = self._sample(logits)
        fallback_rows = [row for row, value in enumerate(thresholds) if math.isnan(value)]
        if fallback_rows:
            replacement = self[fallback_rows]._sample_from_all()
            sampled = _replaced(sampled, fallback_rows, replacement)
        # A margin may depend on logits beyond the range: rescore as far as the margin reaches.
        wider = {
            row: math.nextafter(margin, math.inf)
            for row, (token, request) in enumerate(zip(sampled, self.requests, strict=True))
            if (margin := token.decision_margin) is not None
            and exact_ranges[row] < request.margin_bound
            and margin >= exact_ranges[row]
            and not math.isnan(thresholds[row])
        }
        if wider:
            rows = list(wider)
            replacement = self[rows]._two_pass(head, logits[rows], list(wider.values()))
            sampled = _replaced(sampled, rows, replacement)
        return sampled


def _replaced(
    sampled: list[SampledToken], rows: list[int], replacement: list[SampledToken]
) -> list[SampledToken]:
    by_row = dict(zip(rows, replacement, strict=True))
    return [by_row.get(row, token) for row, token in enumerate(sampled)]


def _merged(count: int, *parts: tuple[list[int], list[SampledToken]]) -> list[SampledToken]:
    by_row: dict[int, SampledToken] = {}
    for rows, sampled in parts:
        by_row.update(zip(rows, sampled, strict=True))
    return [by_row[row] for row in range(count)]
