"""Computes the log probabilities of continuations, by one prefill per pair.

Pairs are sorted by their tokens, so that the choices of a prompt lie beside each other and share
its keys and values in the prefix cache. The scores of a pair do not depend on the order or on the
other pairs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from gptbatch.pipeline.params.sampling_params import SamplingParams

if TYPE_CHECKING:
    from gptbatch.pipeline.model.gpt import GPT

Payload = TypeVar("Payload")

PAIRS_PER_BATCH = 64
# Windows whose pairs are in work: the threads begin the next one before the last one is done.
MAX_OPEN_WINDOWS = 2
# step_hidden does not read them.
_UNUSED = SamplingParams(seed=0, temperature=0.0, top_k=0, max_new_tokens=1)


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A context and a continuation, each of at least one token id."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True, slots=True)
class PairScore:
    """The scores of a continuation.

    Attributes:
        token_logprobs: Natural logarithms, float32. NaN where logits are not finite.
        is_greedy: Whether every token is the most likely one of its step, ties by smaller id.
    """

    token_logprobs: list[float]
    is_greedy: bool

    @property
    def logprob(self) -> float:
        """The sum of token_logprobs, rounded once to float64."""
        return math.fsum(self.token_logprobs)

    @property
    def is_finite(self) -> bool:
        """Whether all logits could be used."""
        return not any(map(math.isnan, self.token_logprobs))


def score_pairs(model: GPT, pairs: Sequence[TokenPair]) -> list[PairScore]:
    """Return the scores of pairs in order."""
    ((_, scores),) = score_windows(model, [(None, pairs)])
    return scores


def score_windows(
    model: GPT, windows: Iterable[tuple[Payload, Sequence[TokenPair]]]
) -> Iterator[tuple[Payload, list[PairScore]]]:
    """Yield the scores of windows of pairs, in order. Memory holds MAX_OPEN_WINDOWS windows.

    On a CPU each thread computes a batch of pairs by itself, as in `verify`.

    Args:
        model: A packed model.
        windows: Each window is any value, and pairs that are sorted and divided into batches.
    """
    import torch

    on_cpu = model.device.type == "cpu"
    threads = torch.get_num_threads()
    running: deque[tuple[Payload, list[int], list[Future[list[PairScore]]]]] = deque()
    pool = ThreadPoolExecutor(
        threads if on_cpu else 1,
        initializer=torch.set_num_threads,
        initargs=(1,) if on_cpu else (threads,),
    )
    try:
        for payload, pairs in windows:
            keys = [(pair.context, pair.continuation) for pair in pairs]
            order = sorted(range(len(pairs)), key=keys.__getitem__)
            batches = [
                [pairs[i] for i in order[first : first + PAIRS_PER_BATCH]]
                for first in range(0, len(order), PAIRS_PER_BATCH)
            ]
            futures = [pool.submit(_score_batch, model, batch) for batch in batches]
            running.append((payload, order, futures))
            if len(running) == MAX_OPEN_WINDOWS:
                yield _result(*running.popleft())
        while running:
            yield _result(*running.popleft())
    finally:
        pool.shutdown(cancel_futures=True)
        # Threads that start later inherit the last value set.
        torch.set_num_threads(threads)


def _result(
    payload: Payload, order: list[int], futures: list[Future[list[PairScore]]]
) -> tuple[Payload, list[PairScore]]:
    """Wait for the batches of a window, and return their scores in the order of its pairs."""
    scored = [score for future in futures for score in future.result()]
    by_index = dict(zip(order, scored, strict=True))
    return payload, [by_index[index] for index in range(len(order))]


def _score_batch(model: GPT, pairs: list[TokenPair]) -> list[PairScore]:
    import torch

    from gptbatch.pipeline.audit.trace import RecordedRow, step_hidden
    from gptbatch.pipeline.engine.logprobs import is_most_likely, token_logprobs
    from gptbatch.pipeline.model.lm_head import MAX_HEAD_ROWS

    rows = [RecordedRow(prompt=p.context, new=p.continuation, params=_UNUSED) for p in pairs]
    logprobs = [[math.nan] * len(pair.continuation) for pair in pairs]
    is_greedy = [True] * len(pairs)
    native = model.backend.native
    for segments, hidden in step_hidden(model, rows):
        steps = [(segment.row, step) for segment in segments for step in segment.steps]
        for first in range(0, len(steps), MAX_HEAD_ROWS):
            chunk = steps[first : first + MAX_HEAD_ROWS]
            tokens = [pairs[index].continuation[step] for index, step in chunk]
            with torch.inference_mode():
                logits = model.logits(hidden[first : first + MAX_HEAD_ROWS])
                found = token_logprobs(logits, tokens, [0] * len(tokens), native=native)
                greedy = is_most_likely(logits, torch.tensor(tokens, device=logits.device))
            for (index, step), token, is_first in zip(chunk, found, greedy.tolist(), strict=True):
                logprobs[index][step] = token.logprob
                is_greedy[index] = is_greedy[index] and is_first
    return [PairScore(*item) for item in zip(logprobs, is_greedy, strict=True)]
