"""Log probabilities of tokens at temperature 1, over the whole vocabulary.

    log p(token) = (x - x_max) - ln(Z * 2^-bits)

x is the logit as the model computes it, before temperature and filters. Z is the sum of the masses
of all tokens (nucleus.py), a whole number. It does not depend on an order of the sum, so a log
probability depends on nothing but its row: C++, torch and the oracle give equal bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gptbatch.pipeline.engine.logarithm import log
from gptbatch.pipeline.engine.nucleus import mass_bits, masses
from gptbatch.pipeline.types import TokenLogprobs

# The most tokens that a row may list.
MAX_TOP_LOGPROBS = 20
# Masses computed at once in torch: they fit the caches of a CPU.
MAX_MASSES = 2**18
# Tokens of a group whose maximum bounds the largest logits.
GROUP = 64


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], n_top: Sequence[int], *, native: bool
) -> list[TokenLogprobs]:
    """Compute the log probability of one token per row.

    Args:
        logits: (S, V) of any floating dtype.
        tokens: A token id per row (S,).
        n_top: How many of the most likely tokens to list per row (S,), 0 to 20.
        native: Use the C++ kernels, for float32 and bfloat16 on a CPU.
    """
    if not tokens:
        return []
    totals, max_logits = total_masses(logits, native=native)
    columns = torch.tensor(tokens, device=logits.device)[:, None]
    values = logits.gather(1, columns)[:, 0].double().tolist()
    tops = _most_likely(logits, n_top)
    rows = zip(values, tops, totals.tolist(), max_logits.double().tolist(), strict=True)
    exact: list[float] = []
    for value, top, total, largest in rows:
        log_total = log(float(total) * 2.0 ** -mass_bits(logits.shape[1])) if total else 0.0
        exact += [(x - largest) - log_total for x in (value, *(logit for _, logit in top))]
    numbers = iter(torch.tensor(exact, dtype=torch.float64).float().tolist())
    found = []
    for top, total in zip(tops, totals.tolist(), strict=True):
        logprob, *others = [next(numbers) for _ in range(1 + len(top))]
        is_known = total > 0
        found.append(
            TokenLogprobs(
                logprob=logprob if is_known else math.nan,
                top_ids=[token for token, _ in top] if is_known else [],
                top_logprobs=others if is_known else [],
            )
        )
    return found


def total_masses(logits: Tensor, *, native: bool) -> tuple[Tensor, Tensor]:
    """Return the mass of all tokens per row, (S,) int64, and the largest logit (S,).

    The mass is 0 if the logits hold NaN or +inf, or only -inf.

    Args:
        logits: (S, V) of any floating dtype.
        native: Use the C++ kernels, for float32 and bfloat16 on a CPU.
    """
    if native and logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16):
        totals, max_logits = torch.ops.gptbatch.total_masses(logits.contiguous())
        return totals, max_logits
    max_logits = logits.amax(dim=1)
    bits, rows = mass_bits(logits.shape[1]), max(1, MAX_MASSES // logits.shape[1])
    pieces = [
        masses(piece.double() - largest.double()[:, None], bits).sum(dim=1)
        for piece, largest in zip(logits.split(rows), max_logits.split(rows), strict=True)
    ]
    return torch.where(max_logits.isfinite(), torch.cat(pieces), 0), max_logits


def is_most_likely(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return whether each token has the largest logit of its row, and the smallest id of these.

    Args:
        logits: (S, V).
        tokens: (S,) int64.
    """
    largest = logits.amax(dim=1)
    reaches = logits.gather(1, tokens[:, None])[:, 0] == largest
    rows = reaches.nonzero()[:, 0]
    ids = torch.arange(logits.shape[1], device=logits.device)
    is_smaller = (logits[rows] == largest[rows, None]) & (ids < tokens[rows, None])
    reaches[rows] = ~is_smaller.any(dim=1)
    return reaches


def _most_likely(logits: Tensor, n_top: Sequence[int]) -> list[list[tuple[int, float]]]:
    """Return the (id, logit) of the n_top most likely tokens of each row."""
    vocab_size = logits.shape[1]
    sizes = [min(n, vocab_size) for n in n_top]
    found: list[list[tuple[int, float]]] = [[] for _ in sizes]
    rows = [row for row, size in enumerate(sizes) if size > 0]
    if not rows:
        return found
    chosen = logits if len(rows) == len(sizes) else logits[rows]
    for number, token, value in _largest(chosen, [sizes[row] for row in rows]):
        found[rows[number]].append((token, value))
    for row in rows:
        found[row] = sorted(found[row], key=lambda item: (-item[1], item[0]))[: sizes[row]]
    return found


def _largest(logits: Tensor, sizes: list[int]) -> Iterator[tuple[int, int, float]]:
    """Yield (row, id, logit) of the `size` largest logits of each row, and of more tokens.

    A lower bound of the size-th largest logit is the size-th largest maximum of disjoint groups of
    tokens. Every token that reaches it is listed, so that none of several tied tokens is left out.
    """
    n_grouped = logits.shape[1] // GROUP * GROUP
    groups, rest = logits[:, :n_grouped].unflatten(1, (-1, GROUP)), logits[:, n_grouped:]
    group_maxima = groups.amax(dim=2)
    maxima = torch.cat([group_maxima, rest], dim=1)
    n_listed = min(max(sizes), maxima.shape[1])
    last = torch.tensor(sizes, device=logits.device)[:, None] - 1
    bounds = maxima.topk(n_listed, dim=1).values.gather(1, last.clamp(max=n_listed - 1))
    bounds = torch.where(last < n_listed, bounds, -math.inf)
    rows, numbers = (group_maxima >= bounds).nonzero(as_tuple=True)
    values = groups[rows, numbers]
    hits, offsets = (values >= bounds[rows]).nonzero(as_tuple=True)
    ids = numbers[hits] * GROUP + offsets
    yield from _triples(rows[hits], ids, values[hits, offsets])
    rows, offsets = (rest >= bounds).nonzero(as_tuple=True)
    yield from _triples(rows, offsets + n_grouped, rest[rows, offsets])


def _triples(rows: Tensor, ids: Tensor, values: Tensor) -> Iterator[tuple[int, int, float]]:
    return zip(rows.tolist(), ids.tolist(), values.double().tolist(), strict=True)
