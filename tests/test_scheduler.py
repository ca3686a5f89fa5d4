"""The scheduler and the block pool, without a model, by hypothesis; then random work on the engine.

Every sequence runs once, no block is lost or read before it is written, and limits hold.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbatch.pipeline.engine import reference
from gptbatch.pipeline.engine.engine import Engine, SchedulingOptions
from gptbatch.pipeline.engine.scheduler import (
    MAX_PASSED_OVER_PER_SEQ,
    MIN_PREFILL_TOKENS,
    Scheduler,
)
from gptbatch.pipeline.kv_cache.block_pool import BlockPool, blocks_for
from gptbatch.pipeline.kv_cache.paged import PagedKVCache
from gptbatch.pipeline.kv_cache.quantization import BLOCK_SIZES
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.types import TokenizedPrompt
from tests.conftest import has_kernels, our_model, random_model, tokenized

N_POSITIONS = 96
BLOCK_TOKENS = 16


@st.composite
def work(draw: st.DrawFn) -> list[TokenizedPrompt]:
    """Draw prompts, many of which share a prefix or are equal."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    headers = [[rng.randrange(3) for _ in range(N_POSITIONS)] for _ in range(2)]
    prompts = []
    for index in range(draw(st.integers(1, 40))):
        shared, own = rng.randrange(70), rng.randrange(20)
        token_ids = rng.choice(headers)[:shared] + [rng.randrange(3) for _ in range(own)]
        prompts.append(tokenized(index, token_ids or [0], max_new_tokens=rng.randint(1, 60)))
    return prompts


class Model:
    """Stands in for the model: tracks the content of blocks and checks every read."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        # (block, offset) -> the tokens up to there
        self.content: dict[tuple[int, int], tuple[int, ...]] = {}

    def step(self, seq_index: int, first: int, tokens: list[int], context: list[int]) -> None:
        for position in range(first, first + len(tokens)):
            block, _ = self.pool.ensure_block(seq_index, position)
            self.content[block, position % self.pool.block_size] = tuple(context[: position + 1])

    def check(self, seq_index: int, last: int, context: list[int]) -> None:
        for position in range(last):
            block, new = self.pool.ensure_block(seq_index, position)
            assert not new
            assert self.content[block, position % self.pool.block_size] == tuple(
                context[: position + 1]
            )


@settings(max_examples=80, deadline=None)
@given(
    prompts=work(),
    max_seqs=st.integers(1, 9),
    block_size=st.sampled_from([1, 16, 64]),
    extra_blocks=st.integers(0, 60),
    step_tokens=st.integers(1, 200),
    window=st.integers(0, 20),
    share=st.booleans(),
    spread=st.booleans(),
)
def test_every_sequence_runs_once_and_no_block_is_lost(
    prompts: list[TokenizedPrompt],
    max_seqs: int,
    block_size: int,
    extra_blocks: int,
    step_tokens: int,
    window: int,
    share: bool,
    spread: bool,
) -> None:
    n_blocks = blocks_for(N_POSITIONS, block_size) + extra_blocks
    pool = BlockPool(max_seqs, n_blocks, block_size)
    model = Model(pool)
    scheduler = Scheduler(
        cache=pool,
        max_seqs=max_seqs,
        n_positions=N_POSITIONS,
        max_step_tokens=step_tokens,
        interleave_prefill=spread,
        share_prefixes=share,
    )
    incoming, ended = iter(prompts), []
    reused = 0
    while True:
        while len(scheduler.running) + len(scheduler.waiting) < max_seqs + window and (
            source := next(incoming, None)
        ):
            scheduler.add(source)
        if not scheduler.running and not scheduler.waiting:
            break
        chunks = scheduler.schedule()
        assert chunks, "something moves in every step"
        assert len({chunk.seq_index for chunk in chunks}) == len(chunks) <= max_seqs
        assert sum(len(chunk.tokens) for chunk in chunks) <= max(
            step_tokens, max_seqs + MIN_PREFILL_TOKENS
        ) + (max_seqs if spread else 0)
        # All chunks are written before any is read, as in attention.
        for chunk in chunks:
            model.step(chunk.seq_index, chunk.first, chunk.tokens, chunk.sequence.tokens)
        for chunk in chunks:
            sequence = chunk.sequence
            model.check(chunk.seq_index, chunk.first + len(chunk.tokens), sequence.tokens)
            if chunk.needs_logits:
                sequence.tokens.append(sum(sequence.tokens) % 3)
                if (
                    sequence.n_new_tokens == sequence.source.prompt.params.max_new_tokens
                    or len(sequence.tokens) > N_POSITIONS
                ):
                    sequence.stop_reason = "max_new_tokens"
        assert pool.n_in_use + pool.n_evictable <= n_blocks
        for sequence in scheduler.free_finished():
            ended.append(sequence.source.prompt.index)
            reused += sequence.n_cached_tokens
    assert sorted(ended) == list(range(len(prompts)))
    assert pool.n_in_use == 0
    free = [
        pool.ensure_block(0, position)[0]
        for position in range(0, n_blocks * block_size, block_size)
    ]
    assert sorted(free) == list(range(n_blocks)), "every block can be had again"
    if not share:
        assert reused == 0


def test_the_longest_starts_first_but_none_waits_for_ever() -> None:
    pool = BlockPool(1, 6, BLOCK_TOKENS)
    scheduler = Scheduler(cache=pool, max_seqs=1, n_positions=N_POSITIONS, max_step_tokens=100)
    scheduler.add(tokenized(0, [0], max_new_tokens=1))
    for index in range(1, 4):
        scheduler.add(tokenized(index, [0], max_new_tokens=10 * index))
    order = []
    for index in range(4, 20):
        (chunk,) = scheduler.schedule()
        order.append(chunk.sequence.source.prompt.index)
        chunk.sequence.stop_reason = "max_new_tokens"
        scheduler.free_finished()
        scheduler.add(tokenized(index, [0], max_new_tokens=50))
    assert order[:4] == [3, 4, 5, 6], "of equals the first"
    assert order.index(0) == MAX_PASSED_OVER_PER_SEQ, "passed over so often, and no more"


def test_waiting_sequences_share_a_prefix_that_is_not_computed_yet() -> None:
    header = list(range(40))
    pool = BlockPool(3, 30, BLOCK_TOKENS)
    scheduler = Scheduler(cache=pool, max_seqs=3, n_positions=N_POSITIONS, max_step_tokens=1000)
    for index in range(3):
        scheduler.add(tokenized(index, [*header, 100 + index], max_new_tokens=5))
    chunks = scheduler.schedule()
    assert [(chunk.first, len(chunk.tokens)) for chunk in chunks] == [(0, 41), (32, 9), (32, 9)], (
        "in the same step, whole blocks"
    )
    small = Scheduler(
        cache=BlockPool(3, 30, BLOCK_TOKENS),
        max_seqs=3,
        n_positions=N_POSITIONS,
        max_step_tokens=32,
    )
    for index in range(3):
        small.add(tokenized(index, [*header, *range(100 + index, 120)], max_new_tokens=5))
    assert [(chunk.seq_index, len(chunk.tokens)) for chunk in small.schedule()] == [(0, 32)]
    assert [(chunk.seq_index, chunk.first) for chunk in small.schedule()] == [(0, 32), (1, 32)], (
        "the others come once the prefix is there"
    )


@pytest.mark.parametrize("seed", range(6))
def test_random_work_gives_the_tokens_of_the_reference(seed: int) -> None:
    """Random prompts with shared prefixes, budgets, windows and memory; all blocks are freed."""
    if not has_kernels():
        pytest.skip("no C++ compiler")
    rng = random.Random(seed)
    model: GPT = our_model(
        random_model(n_positions=N_POSITIONS),
        attention="ragged",
        dtype=rng.choice([torch.float32, torch.bfloat16]),
        cache_dtype=rng.choice(["auto", "int8"]),
    )
    vocab_size = model.config.vocab_size
    header = [rng.randrange(vocab_size) for _ in range(80)]
    prompts = []
    for index in range(25):
        token_ids = header[: rng.choice([rng.randrange(80), 70])] + [
            rng.randrange(vocab_size) for _ in range(rng.randint(1, 12))
        ]
        prompts.append(
            tokenized(
                index, token_ids, max_new_tokens=rng.randint(1, 30), top_k=rng.choice([0, 1, 5])
            )
        )
    expected = [
        reference.generate(
            model, p.token_ids, p.prompt.params, eos_token_ids=(7,), window_full="slide"
        )
        for p in prompts
    ]
    engine = Engine(
        model=model,
        batch_size=rng.randint(1, 12),
        eos_token_ids=(7,),
        window_full="slide",
        scheduling=SchedulingOptions(
            step_tokens=rng.randint(1, 150), max_waiting=rng.randrange(20)
        ),
        memory_bytes=rng.randint(8, 60)
        * BLOCK_SIZES[model.cache_dtype]
        * model.cache_spec.bytes_per_token,
    )
    for _ in range(2):  # the second time with what the first has left in the cache
        ended = [
            completion
            for completions in engine.generate(iter(prompts))
            for completion in completions
        ]
        assert len(ended) == len(prompts)
        for completion in ended:
            assert (completion.token_ids, completion.stop_reason) == expected[
                completion.prompt.index
            ]
    assert engine.stats.cached_tokens > 0 or engine.batch_size == 1
    cache = engine._cache
    assert isinstance(cache, PagedKVCache)
    assert cache.pool.n_in_use == 0
