"""Walks through a run without a model: the engine's scheduler and block pool, with given lengths.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptbatch.pipeline.engine.scheduler import Scheduler
from gptbatch.pipeline.estimate.step_cost import Array
from gptbatch.pipeline.kv_cache.block_pool import BlockPool
from gptbatch.pipeline.types import TokenizedPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How the engine of a run schedules.

    Attributes:
        batch_size: The most sequences that run at once.
        max_waiting: The most sequences that wait.
        step_tokens: The most tokens of a step.
        n_positions: Length of the context.
        n_blocks: Blocks of the KV cache.
        block_size: Positions per block.
        interleave_prefill: See `Scheduler`.
        share_prefixes: See `Scheduler`.
        slide: See `Scheduler`.
    """

    batch_size: int
    max_waiting: int
    step_tokens: int
    n_positions: int
    n_blocks: int
    block_size: int
    interleave_prefill: bool
    share_prefixes: bool
    slide: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """The work of a run.

    Attributes:
        work: The sums of `step_cost.WORK`.
        mean_batch_size: Sequences that decode, per step while rows are waiting.
        drain_steps: Steps at the end beyond those that a full batch would take.
    """

    work: Array
    mean_batch_size: float
    drain_steps: float


def walk(prompts: Sequence[TokenizedPrompt], lengths: Sequence[int], batching: Batching) -> Walk:
    """Schedule the prompts, whose completions have these lengths, step by step."""
    scheduler = Scheduler(
        cache=BlockPool(batching.batch_size, batching.n_blocks, batching.block_size),
        max_seqs=batching.batch_size,
        n_positions=batching.n_positions,
        max_step_tokens=batching.step_tokens,
        interleave_prefill=batching.interleave_prefill,
        share_prefixes=batching.share_prefixes,
        slide=batching.slide,
    )
    new_tokens = {id(prompt): length for prompt, length in zip(prompts, lengths, strict=True)}
    feed = iter(prompts)
    steps = decoding = decoded = context = prefilled = 0
    full = None
    while True:
        while len(scheduler.running) + len(scheduler.waiting) < (
            batching.batch_size + batching.max_waiting
        ):
            if (prompt := next(feed, None)) is None:
                break
            scheduler.add(prompt)
        if full is None and not scheduler.waiting:
            full = steps, decoding
        chunks = scheduler.schedule()
        if not chunks:
            break
        steps += 1
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.n_new_tokens:
                decoding += 1
                decoded += len(chunk.tokens)
                context += chunk.context
            else:
                prefilled += len(chunk.tokens)
            if chunk.needs_logits:
                sequence.tokens.append(0)
                if len(sequence.tokens) > batching.n_positions:
                    sequence.n_computed_tokens = 0
                if sequence.n_new_tokens >= new_tokens[id(sequence.source)]:
                    sequence.stop_reason = "max_new_tokens"
        scheduler.free_finished()
    assert full is not None
    mean = full[1] / full[0] if full[1] else decoding / max(steps, 1)
    drain_steps = (steps - full[0]) - (decoding - full[1]) / mean if mean else 0.0
    return Walk(
        work=np.array([steps, decoded, context, prefilled], dtype=np.float64),
        mean_batch_size=mean,
        drain_steps=max(0.0, drain_steps),
    )
