"""How the next token of each row is chosen from its logits.

    kept   = the tokens whose logit is at least the k-th largest (all ties kept; all tokens when top_k is 0 or >= V)
    score  = float64(logit) + temperature * g, with g the noise of (row seed, step, token id)
    winner = the kept token of the largest score, ties to the smallest id

With Gumbel noise this draws from softmax(logits / temperature) over the kept tokens (Maddison, Tarlow and Minka, "A*
sampling", NeurIPS 2014); temperature 0 is the same formula and greedy. Rows do not know each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.generation.noise import gumbel
from pipeline.records import SamplingParams

MOST_SCORES = 2**18  # computed at a time where the whole vocabulary is kept: what fits the caches of a CPU


def choose_tokens(logits: Tensor, params: Sequence[SamplingParams], steps: Sequence[int]) -> list[int | None]:
    """The next token id of each row, None for a row whose logits hold NaN or +inf (or nothing but -inf).

    logits (B, V) of any floating type; params and steps (the index of the new token in its row), one each a row.
    """
    device, vocab_size = logits.device, logits.shape[1]
    finite = torch.isfinite(logits.amax(dim=1))
    seeds = torch.tensor([p.seed for p in params], device=device)
    temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float64, device=device)
    step_index = torch.tensor(list(steps), device=device)
    # greedy draws no noise that matters: only ties at the largest logit can win
    kept_counts = [1 if p.temperature == 0 else min(p.top_k, vocab_size) or vocab_size for p in params]
    winners = torch.zeros(len(params), dtype=torch.long, device=device)

    few = [row for row, count in enumerate(kept_counts) if count < vocab_size]
    if few:
        counts = torch.tensor([kept_counts[row] for row in few], device=device)
        rows = torch.tensor(few, device=device)
        few_logits = logits if len(few) == len(params) else logits[rows]
        where, token_ids = _kept_tokens(few_logits, counts)
        owners = rows[where]
        scores = few_logits[where, token_ids].double() + temperatures[owners] * gumbel(seeds[owners], step_index[owners], token_ids)
        best = torch.full((len(few),), float("-inf"), dtype=torch.float64, device=device).scatter_reduce(0, where, scores, "amax")
        candidates = torch.where(scores == best[where], token_ids, vocab_size)
        smallest = torch.full((len(few),), vocab_size, device=device).scatter_reduce(0, where, candidates, "amin")
        winners[rows] = smallest
    whole = [row for row, count in enumerate(kept_counts) if count == vocab_size]
    for chunk in _chunks(whole, max(1, MOST_SCORES // vocab_size)):
        rows = torch.tensor(chunk, device=device)
        token_ids = torch.arange(vocab_size, device=device)
        noise = gumbel(seeds[rows, None], step_index[rows, None], token_ids[None])
        scores = logits[rows].double() + temperatures[rows, None] * noise
        winners[rows] = scores.argmax(dim=1)
    chosen = torch.where(finite, winners, -1).tolist()
    return [token if token >= 0 else None for token in chosen]


def _kept_tokens(logits: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(row, token id) of every kept token. logits (B, V); counts (B,), each below V: a row keeps as many, and all ties."""
    largest, token_ids = torch.topk(logits, int(counts.max()) + 1, dim=1)
    kth, next_ = largest.gather(1, counts[:, None] - 1), largest.gather(1, counts[:, None])
    if torch.any(kth == next_):  # ties at the k-th logit may reach beyond what topk lists
        where, tied_ids = torch.nonzero(logits >= kth, as_tuple=True)
        return where, tied_ids
    where, rank = torch.nonzero(torch.arange(largest.shape[1], device=logits.device) < counts[:, None], as_tuple=True)
    return where, token_ids[where, rank]


def _chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(rows), size):
        yield rows[first : first + size]
