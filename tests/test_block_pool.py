"""Prefix caching: the block pool against a naive model of it, then prompts on the engine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gptbatch.pipeline.engine import reference
from gptbatch.pipeline.engine.engine import Engine, SchedulingOptions
from gptbatch.pipeline.kv_cache import block_pool, paged
from gptbatch.pipeline.kv_cache.block_pool import BlockPool, CachedBlock, blocks_for
from gptbatch.pipeline.kv_cache.paged import PagedKVCache
from gptbatch.pipeline.kv_cache.quantization import BLOCK_SIZES, CacheDtype
from gptbatch.pipeline.types import Completion, TokenizedPrompt
from tests.conftest import our_model, random_model, tokenized

MAX_SEQS, BLOCK_SIZE, MAX_LENGTH = 4, 2, 10
# The most blocks of one sequence.
BLOCKS_PER_SEQ = MAX_LENGTH // BLOCK_SIZE

Path = tuple[int, ...]


class NaiveSequence:
    """A running sequence: its prefixes of full blocks, and the number of its other blocks."""

    def __init__(self, token_ids: list[int], length: int, shared: list[Path], reused: int) -> None:
        self.token_ids, self.shared, self.n_reused = token_ids, shared, reused
        self.max_blocks = blocks_for(length, BLOCK_SIZE)
        self.n_own = 0
        self.n_computed = reused * BLOCK_SIZE

    @property
    def n_blocks(self) -> int:
        return len(self.shared) + self.n_own


class NaivePool:
    """The pool without blocks: prefixes, who holds them, and when each was freed.

    Evicts the prefix that was freed first; of those freed at once, the longest.
    """

    def __init__(self, n_blocks: int, max_grown: int) -> None:
        self.n_blocks, self.max_grown = n_blocks, max_grown
        self.n_touched = 0
        self.sequences: dict[int, NaiveSequence] = {}
        self.scheduled: set[Path] = set()
        self.freed_at: dict[Path, int] = {}
        self.clock = 0

    def held(self) -> set[Path]:
        return {path for sequence in self.sequences.values() for path in sequence.shared}

    def cached(self) -> set[Path]:
        return self.held() | set(self.freed_at)

    def n_in_use(self) -> int:
        return len(self.held()) + sum(sequence.n_own for sequence in self.sequences.values())

    def n_free(self) -> int:
        return self.n_touched - self.n_in_use() - len(self.freed_at)

    def take(self) -> None:
        """Make sure that a block is free."""
        if self.n_free():
            return
        if self.n_touched < self.n_blocks and (
            not self.freed_at or self.n_touched + 1 <= self.max_grown
        ):
            self.n_touched += 1
            return
        evicted = min(self.freed_at, key=lambda path: (self.freed_at[path], -len(path)))
        longer = [path for path in self.cached() if path[: len(evicted)] == evicted]
        assert longer == [evicted], "a child is evicted before its parent"
        del self.freed_at[evicted]
        self.scheduled.discard(evicted)

    def allocate(
        self, seq_index: int, token_ids: list[int], length: int, *, share: bool
    ) -> int | None:
        end = (len(token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE if share else 0
        paths = [tuple(token_ids[:n]) for n in range(BLOCK_SIZE, end + 1, BLOCK_SIZE)]
        reused = [path for path in paths if path in self.cached()]
        assert reused == paths[: len(reused)], "no gaps"
        sequence = NaiveSequence(token_ids, length, paths, len(reused))
        running = self.sequences.values()
        n_reserved = sum(other.max_blocks - other.n_blocks for other in running)
        n_needed = len({*self.held(), *reused}) + sum(other.n_own for other in running)
        if n_needed + n_reserved + sequence.max_blocks - len(reused) > self.n_blocks:
            return None
        for path in reused:
            self.freed_at.pop(path, None)
        sequence.shared = reused
        self.sequences[seq_index] = sequence
        for path in paths[len(reused) :]:
            self.take()
            sequence.shared = [*sequence.shared, path]
        return len(reused) * BLOCK_SIZE

    def is_ready(self, seq_index: int) -> bool:
        sequence = self.sequences[seq_index]
        return all(path in self.scheduled for path in sequence.shared[: sequence.n_reused])

    def compute(self, seq_index: int, end: int) -> None:
        sequence = self.sequences[seq_index]
        sequence.n_computed = end
        self.scheduled |= {path for path in sequence.shared if len(path) <= end}
        while sequence.n_blocks < blocks_for(end, BLOCK_SIZE):
            self.take()
            sequence.n_own += 1

    def free(self, seq_index: int) -> None:
        sequence = self.sequences.pop(seq_index)
        self.clock += 1
        for path in set(sequence.shared) - self.held():
            if path in self.scheduled:
                self.freed_at[path] = self.clock


class PoolMachine(RuleBasedStateMachine):
    """Random calls of the pool, in an order that the scheduler may give them."""

    @initialize(
        n_blocks=st.integers(BLOCKS_PER_SEQ, 3 * BLOCKS_PER_SEQ),
        max_grown=st.integers(0, 3 * BLOCKS_PER_SEQ),
    )
    def begin(self, n_blocks: int, max_grown: int) -> None:
        self.pool = BlockPool(
            MAX_SEQS, n_blocks, BLOCK_SIZE, may_grow_to=lambda n_blocks: n_blocks <= max_grown
        )
        self.naive = NaivePool(n_blocks, max_grown)

    @precondition(lambda self: len(self.naive.sequences) < MAX_SEQS)
    @rule(
        token_ids=st.lists(st.integers(0, 1), min_size=1, max_size=MAX_LENGTH),
        n_new=st.integers(0, 4),
        share=st.integers(0, 3).map(bool),
    )
    def allocate(self, token_ids: list[int], n_new: int, share: bool) -> None:
        is_alone = not self.naive.sequences
        seq_index = min(set(range(MAX_SEQS)) - set(self.naive.sequences))
        length = min(MAX_LENGTH, len(token_ids) + n_new)
        found = self.pool.allocate(seq_index, token_ids, length, share_prefix=share)
        assert found == self.naive.allocate(seq_index, token_ids, length, share=share)
        assert found is not None or not is_alone, "a sequence that runs alone gets its blocks"

    @precondition(lambda self: self.naive.sequences)
    @rule(data=st.data(), count=st.integers(1, MAX_LENGTH))
    def compute(self, data: st.DataObject, count: int) -> None:
        seq_index = data.draw(st.sampled_from(sorted(self.naive.sequences)))
        assert self.pool.is_ready(seq_index) == self.naive.is_ready(seq_index)
        sequence = self.naive.sequences[seq_index]
        first = sequence.n_computed
        end = min(first + count, sequence.max_blocks * BLOCK_SIZE)
        if not self.naive.is_ready(seq_index):
            return
        # As the engine does: all blocks are marked before the step, and taken in it.
        self.pool.mark_scheduled(seq_index, first, end)
        for position in range(first, end):
            self.pool.ensure_block(seq_index, position)
        self.naive.compute(seq_index, end)

    @precondition(lambda self: self.naive.sequences)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq_index = data.draw(st.sampled_from(sorted(self.naive.sequences)))
        self.pool.free(seq_index)
        self.naive.free(seq_index)

    @precondition(lambda self: 0 < len(self.naive.sequences) < MAX_SEQS)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(self.naive.sequences)))
        target = data.draw(st.sampled_from(sorted(set(range(MAX_SEQS)) - {*self.naive.sequences})))
        self.pool.move(source, target)
        self.naive.sequences[target] = self.naive.sequences.pop(source)

    @invariant()
    def the_tree_is_that_of_the_naive_model(self) -> None:
        assert {path for path, _ in tree(self.pool)} == self.naive.cached()
        assert self.pool.n_in_use == self.naive.n_in_use()
        assert self.pool.n_evictable == len(self.naive.freed_at)

    @invariant()
    def every_block_has_one_owner(self) -> None:
        blocks = {path: node.block for path, node in tree(self.pool)}
        own = []
        for seq_index, sequence in self.naive.sequences.items():
            held = self.pool.blocks(seq_index)
            n_shared = len(sequence.shared)
            assert held[:n_shared] == [blocks[path] for path in sequence.shared]
            own += held[n_shared:]
        free = self.pool._free
        touched = range(self.pool._n_touched)
        assert sorted([*blocks.values(), *own, *free]) == list(touched)
        assert len(touched) == self.naive.n_touched <= self.pool.n_blocks


def tree(pool: BlockPool) -> Iterator[tuple[Path, CachedBlock]]:
    """Yield each node of the prefix tree, with the tokens up to its end."""
    pending: list[tuple[Path, CachedBlock]] = [((), pool._root)]
    while pending:
        path, node = pending.pop()
        for token_ids, child in node.children.items():
            pending.append((path + token_ids, child))
            yield pending[-1]


def test_the_pool_is_that_of_the_naive_model() -> None:
    with mock.patch.object(block_pool, "BLOCKS_PER_MEMORY_CHECK", 1):
        run_state_machine_as_test(
            PoolMachine,
            settings=settings(max_examples=60, stateful_step_count=40, deadline=None),
        )


def run_alone(pool: BlockPool, token_ids: list[int]) -> int:
    """Compute a prompt and free it; return its cached tokens."""
    found = pool.allocate(0, token_ids, len(token_ids), share_prefix=True)
    assert found is not None
    pool.mark_scheduled(0, found, len(token_ids))
    for position in range(found, len(token_ids)):
        pool.ensure_block(0, position)
    pool.free(0)
    return found


def test_the_least_recently_used_blocks_are_evicted_deepest_first() -> None:
    pool = BlockPool(1, 10, 16)
    old, recent = [1] * 65, [2] * 65
    assert (run_alone(pool, old), run_alone(pool, recent)) == (0, 0)
    assert (pool.n_evictable, pool._n_touched) == (8, 9)
    assert run_alone(pool, old) == 64, "now the other one is the least recently used"
    assert run_alone(pool, [3] * 33) == 0, "a free block, an unused one, an evicted one"
    assert (pool.n_evictable, pool._n_touched) == (9, 10)
    assert run_alone(pool, recent) == 48, "its deepest block was evicted"
    assert run_alone(pool, old) == 48, "for which its own was"


def test_blocks_are_evicted_instead_of_growing_where_memory_is_short() -> None:
    has_memory = True
    checked = []

    def may_grow_to(n_blocks: int) -> bool:
        checked.append(n_blocks)
        return has_memory

    pool = BlockPool(1, 1000, 16, may_grow_to=may_grow_to)
    for token in range(70):
        assert run_alone(pool, [token] * 33) == 0
    assert (pool.n_evictable, pool._n_touched) == (140, 141), "two of each, and the last free one"
    assert checked[0] == 3 + block_pool.BLOCKS_PER_MEMORY_CHECK
    has_memory = False
    for token in range(70, 200):
        run_alone(pool, [token] * 33)
    assert pool._n_touched < 141 + block_pool.BLOCKS_PER_MEMORY_CHECK
    assert run_alone(pool, [199] * 33) == 32, "the memory that the pool has is still used"
    n_touched = pool._n_touched
    assert run_alone(pool, [200] * 10000) == 0, "a sequence gets its blocks"
    assert pool._n_touched > n_touched
    has_memory = True
    for token in range(200, 500):
        run_alone(pool, [token] * 33)
    assert pool._n_touched == 1000


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_a_cache_stays_within_its_memory_and_within_that_which_is_free(
    monkeypatch: pytest.MonkeyPatch, cache_dtype: CacheDtype
) -> None:
    model = our_model(random_model(n_positions=256), attention="ragged", cache_dtype=cache_dtype)
    block_bytes = BLOCK_SIZES[cache_dtype] * model.cache_spec.bytes_per_token
    memory_bytes = 100 * block_bytes + 1
    cache = model.new_cache(64, capacity=memory_bytes // model.cache_spec.bytes_per_token)
    assert isinstance(cache, PagedKVCache)
    assert cache.pool.n_blocks == 100
    assert sum(layer.nbytes for layer in cache.layers) == 100 * block_bytes <= memory_bytes
    monkeypatch.setattr(paged, "free_memory_bytes", lambda: 90 * block_bytes)
    prompt_tokens = BLOCK_SIZES[cache_dtype] + 1
    for token in range(200):
        run_alone(cache.pool, [token] * prompt_tokens)
    assert cache.pool._n_touched <= 90
    monkeypatch.setattr(paged, "free_memory_bytes", lambda: None)
    for token in range(200):
        run_alone(cache.pool, [token] * prompt_tokens)
    assert cache.pool._n_touched == 100


def complete(engine: Engine, prompts: list[TokenizedPrompt]) -> list[Completion]:
    """Return the completions of the prompts, in their order."""
    ended = [
        completion for completions in engine.generate(iter(prompts)) for completion in completions
    ]
    return sorted(ended, key=lambda completion: completion.prompt.index)


def test_prompts_repeated_in_order_share_nearly_all_tokens() -> None:
    """435 prompts, far more than run or wait at once, so the first round is over before the next.

    The cache has space for all of them.
    """
    model = our_model(random_model(n_positions=256), attention="ragged")
    rng = random.Random(0)
    distinct = [[rng.randrange(300) for _ in range(33)] for _ in range(435)]
    prompts = [tokenized(i, distinct[i % 435], max_new_tokens=2) for i in range(2 * 435)]
    engine = Engine(model=model, batch_size=64, eos_token_ids=())
    ended = complete(engine, prompts)
    cached = [completion.timing.cached_tokens for completion in ended if completion.timing]
    assert cached == [0] * 435 + [32] * 435
    assert engine.stats.cached_tokens == 435 * 32
    assert engine.stats.prefilled_tokens == 435 * 33 + 435


def test_samples_of_one_prompt_compute_it_once() -> None:
    """Full blocks once, the rest of the prompt per sample; tokens are those of the reference."""
    model = our_model(random_model(), attention="ragged")
    rng = random.Random(0)
    n_samples, n_tokens = 6, 41
    distinct = [[rng.randrange(1, 300) for _ in range(n_tokens)] for _ in range(5)]
    prompts = [
        tokenized(i, distinct[i // n_samples], seed=i, max_new_tokens=8)
        for i in range(5 * n_samples)
    ]
    expected = [
        reference.generate(model, p.token_ids, p.prompt.params, eos_token_ids=()) for p in prompts
    ]
    for batch_size in (1, 4, 64):
        engine = Engine(model=model, batch_size=batch_size, eos_token_ids=())
        ended = complete(engine, prompts)
        assert [(c.token_ids, c.stop_reason) for c in ended] == expected
        assert engine.stats.cached_tokens == 5 * (n_samples - 1) * 32
        assert engine.stats.prefilled_tokens == 5 * (n_tokens + (n_samples - 1) * (n_tokens - 32))


@pytest.mark.parametrize("seed", range(4))
def test_a_small_pool_gives_the_tokens_of_the_reference(seed: int) -> None:
    """One context and little more: prefixes are evicted and computed again, again and again."""
    rng = random.Random(seed)
    model = our_model(
        random_model(n_positions=96),
        attention="ragged",
        dtype=rng.choice([torch.float32, torch.bfloat16]),
    )
    headers = [[rng.randrange(1, 300) for _ in range(48)] for _ in range(3)]
    prompts = []
    for index in range(40):
        own = [rng.randrange(1, 300) for _ in range(rng.randint(1, 20))]
        token_ids = rng.choice(headers)[: rng.choice([16, 32, 48])] + own
        prompts.append(tokenized(index, token_ids, max_new_tokens=rng.randint(1, 12)))
    expected = [
        reference.generate(model, p.token_ids, p.prompt.params, eos_token_ids=()) for p in prompts
    ]
    for n_blocks in (6, 9, 14):
        engine = Engine(
            model=model,
            batch_size=8,
            eos_token_ids=(),
            memory_bytes=n_blocks * 16 * model.cache_spec.bytes_per_token,
            scheduling=SchedulingOptions(step_tokens=rng.choice([16, 50, 500])),
        )
        ended = complete(engine, prompts)
        assert [(c.token_ids, c.stop_reason) for c in ended] == expected
        assert engine.stats.cached_tokens > 0
        cache = engine._cache
        assert isinstance(cache, PagedKVCache)
        assert (cache.pool.n_blocks, cache.pool.n_in_use) == (n_blocks, 0)
        assert cache.pool._n_touched <= n_blocks
