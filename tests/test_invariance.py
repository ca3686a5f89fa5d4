"""Batch invariance: tokens and logits of a row are equal bit for bit whatever is batched with it.

Small models take few of the kernels that a library has. So the demo model runs here, and gpt2's
shape in the tests marked slow.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from gptbatch.pipeline.engine import reference
from gptbatch.pipeline.engine.engine import Engine, SchedulingOptions
from gptbatch.pipeline.input.tokenizer import PromptTokenizer
from gptbatch.pipeline.input.tokenizer_loading import load_tokenizer
from gptbatch.pipeline.kv_cache.interface import Attention, KVCache
from gptbatch.pipeline.kv_cache.paged import PagedAttention, PagedKVCache
from gptbatch.pipeline.kv_cache.quantization import CacheDtype
from gptbatch.pipeline.kv_cache.spec import BACKENDS, BackendName
from gptbatch.pipeline.model.checkpoint import find_checkpoint
from gptbatch.pipeline.model.config import parse_config
from gptbatch.pipeline.model.gpt import GPT, Block
from gptbatch.pipeline.model.linear import QKVProjection
from gptbatch.pipeline.model.lm_head import logits_bytes
from gptbatch.pipeline.model.packing import padding_plans, use_padding_plan
from gptbatch.pipeline.model.padding import AS_IS, PADDING_PLANS, PaddingPlan
from gptbatch.pipeline.model.self_test import select_batch_invariant_kernels
from gptbatch.pipeline.model.weights import load_gpt
from gptbatch.pipeline.system.bundled import locate
from gptbatch.pipeline.types import Completion, TokenizedPrompt, WindowFull
from tests.conftest import has_kernels, our_model, random_model, tokenized
from tests.pairwise import grid

BATCH_SIZES = (1, 2, 3, 5, 8, 17, 64)
# two layers have every product of the twelve of gpt2
GPT2_SHAPE = {"n_layer": 2, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 1024}

Outcome = tuple[list[int], str | None, float | None, str | None]


def outcome(completion: Completion) -> Outcome:
    """Return tokens, stop reason, decision margin and the hash of all logits."""
    assert completion.logits_digest is not None
    return (
        completion.token_ids,
        completion.stop_reason,
        completion.min_decision_margin,
        completion.logits_digest,
    )


def run(
    model: GPT,
    prompts: Sequence[TokenizedPrompt],
    *,
    batch_size: int,
    eos_token_ids: tuple[int, ...] = (0,),
    window_full: WindowFull = "stop",
    step_tokens: int = 4096,
) -> dict[int, Outcome]:
    engine = Engine(
        model=model,
        batch_size=batch_size,
        eos_token_ids=eos_token_ids,
        window_full=window_full,
        scheduling=SchedulingOptions(step_tokens=step_tokens),
        record_logits=True,
    )
    ended = [
        completion for completions in engine.generate(iter(prompts)) for completion in completions
    ]
    assert len(ended) == len(prompts)
    return {completion.prompt.index: outcome(completion) for completion in ended}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["ragged", "padded"])
def backend(request: pytest.FixtureRequest) -> BackendName:
    if request.param == "ragged" and not has_kernels():
        pytest.skip("no C++ compiler")
    chosen: BackendName = request.param
    return chosen


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture(scope="module")
def demo(backend: BackendName, dtype: torch.dtype) -> GPT:
    """Load the bundled model and apply the self-test."""
    checkpoint = find_checkpoint("bundled:demo/model")
    config = parse_config(checkpoint.config, "config")
    return checked(
        load_gpt(
            config,
            list(checkpoint.weights),
            dtype=dtype,
            device=torch.device("cpu"),
            backend=BACKENDS[backend],
        )
    )


@pytest.fixture(scope="module")
def gpt2(backend: BackendName, dtype: torch.dtype) -> GPT:
    """Return the widths of gpt2 with random weights and biases."""
    return checked(our_model(random_model(**GPT2_SHAPE), attention=backend, dtype=dtype))


def checked(model: GPT) -> GPT:
    """Apply the self-test, as a run does."""
    report = select_batch_invariant_kernels(model)
    assert report.passed, report.failures
    return model


def demo_prompts(count: int, *, max_new_tokens: int = 12) -> list[TokenizedPrompt]:
    """Return the first bundled prompts with random parameters."""
    checkpoint = find_checkpoint("bundled:demo/model")
    tokenizer = PromptTokenizer(load_tokenizer(checkpoint.folder), start_token=0)
    lines = Path(locate("bundled:demo/prompts.jsonl")).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines[:count]]
    rng = random.Random(7)
    return [
        with_parameters(i, prompt.token_ids, rng, max_new_tokens)
        for i, prompt in enumerate(tokenizer.encode(texts))
    ]


def random_prompts(
    count: int, vocab_size: int, *, longest: int, max_new_tokens: int, first_index: int = 0
) -> list[TokenizedPrompt]:
    rng = random.Random(count)
    lengths = [rng.choice([1, 2, 9, 30, rng.randint(1, longest)]) for _ in range(count)]
    return [
        with_parameters(
            first_index + i,
            [rng.randrange(1, vocab_size) for _ in range(length)],
            rng,
            max_new_tokens,
        )
        for i, length in enumerate(lengths)
    ]


def with_parameters(
    index: int, token_ids: list[int], rng: random.Random, max_new_tokens: int
) -> TokenizedPrompt:
    return tokenized(
        index,
        token_ids,
        temperature=rng.choice([0.0, 0.7, 1.0, 1.4]),
        top_k=rng.choice([0, 1, 5, 40]),
        max_new_tokens=rng.randint(2, max_new_tokens),
    )


# The demo model


def test_batch_sizes_and_orders(demo: GPT, backend: BackendName) -> None:
    # padded attention is slow
    count = 66 if backend == "ragged" else 24
    prompts = demo_prompts(count, max_new_tokens=8)
    expected = run(demo, prompts, batch_size=1)
    assert len({digest for *_, digest in expected.values()}) == count, (
        "rows that are alike show little"
    )
    for batch_size in BATCH_SIZES:
        random.Random(batch_size).shuffle(prompts)
        assert run(demo, prompts, batch_size=batch_size) == expected, batch_size


@pytest.mark.parametrize("fillers", [1, 4, 60, 200])
def test_a_needle_among_fillers(demo: GPT, fillers: int) -> None:
    """Other sequences have other lengths, seeds and parameters, and finish early."""
    needle = tokenized(
        10_000, [5, 77, 300, 41, 8, 900], seed=3, temperature=0.9, top_k=20, max_new_tokens=20
    )
    alone = run(demo, [needle], batch_size=1)[10_000]
    rng = random.Random(fillers)
    others = random_prompts(fillers, 1024, longest=60, max_new_tokens=5)
    for _ in range(2):
        others.insert(rng.randrange(len(others) + 1), needle)
        assert run(demo, others, batch_size=rng.choice([2, 16, 64]))[10_000] == alone
        others.remove(needle)


def test_threads(demo: GPT) -> None:
    prompts = demo_prompts(30)
    with threads(1):
        expected = run(demo, prompts, batch_size=8)
    for count in (2, 3, 4):
        with threads(count):
            assert run(demo, prompts, batch_size=8) == expected, count


def test_cache_widths_and_prefill_groups(demo: GPT) -> None:
    """A full context makes the cache as wide as possible; small steps chunk prefill differently."""
    prompts = demo_prompts(24)
    expected = run(demo, prompts, batch_size=6)
    long = tokenized(999, [9] * 250, max_new_tokens=6)
    wide = run(demo, [long, *prompts], batch_size=6)
    assert {index: row for index, row in wide.items() if index != 999} == expected
    for step_tokens in (1, 40):
        assert run(demo, prompts, batch_size=6, step_tokens=step_tokens) == expected


def test_windows_that_slide(demo: GPT) -> None:
    prompts = [tokenized(i, [3 + i] * (250 + 2 * i), max_new_tokens=8 + i) for i in range(4)]
    expected = run(demo, prompts, batch_size=1, eos_token_ids=(), window_full="slide")
    assert {len(tokens) for tokens, *_ in expected.values()} == {8, 9, 10, 11}
    assert (
        run(
            demo,
            [*prompts[::-1], *demo_prompts(10)[4:]],
            batch_size=5,
            eos_token_ids=(),
            window_full="slide",
        ).items()
        >= expected.items()
    )


def test_the_reference_gives_the_same_bits(demo: GPT) -> None:
    """The whole context through the network for each token, against the engine's cache."""
    prompts = demo_prompts(8, max_new_tokens=8)
    for index, (token_ids, stop_reason, _, digest) in run(demo, prompts, batch_size=8).items():
        prompt = prompts[index]
        assert reference.generate(
            demo, prompt.token_ids, prompt.prompt.params, eos_token_ids=(0,)
        ) == (token_ids, stop_reason)
        assert digest == reference_digest(demo, prompt.token_ids, token_ids)


def reference_digest(model: GPT, prompt: list[int], new: list[int]) -> str:
    digest = hashlib.sha256()
    with torch.inference_mode():
        for step in range(len(new)):
            digest.update(logits_bytes(model(torch.tensor([prompt + new[:step]]))[0, -1]))
    return digest.hexdigest()


# Other shapes

ODD_SHAPES: dict[str, dict[str, Any]] = {
    "odd-inner": {"n_inner": 37},
    "head-size-5": {"n_embd": 20},
    "head-size-33": {"n_embd": 66, "n_head": 2},
    "one-head-of-100": {"n_embd": 100, "n_head": 1},
    "gelu": {"activation_function": "gelu", "n_inner": 51},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu", "n_inner": 51},
    "tanh": {"activation_function": "tanh", "n_inner": 51},
    "upcast": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
}


@pytest.mark.parametrize(
    ("name", "onednn", "backend", "dtype"),
    grid(tuple(ODD_SHAPES), (True, False), ("ragged", "padded"), (torch.float32, torch.bfloat16)),
)
def test_odd_shapes(
    name: str,
    onednn: bool,
    backend: BackendName,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With oneDNN and without it; ragged attention uses the C++ kernels in both cases."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    model = our_model(random_model(**ODD_SHAPES[name]), attention=backend, dtype=dtype)
    assert (model.linear_kind == "plain") == (not onednn and backend == "padded")
    # Batch invariance of such shapes holds where the self-test passes.
    if not (report := select_batch_invariant_kernels(model)).passed:
        pytest.skip(f"this machine is not exact: {report.failures}")
    prompts = random_prompts(20, 300, longest=40, max_new_tokens=6)
    with threads(1):
        expected = run(model, prompts, batch_size=1)
    for batch_size, count in ((3, 2), (20, 3)):
        with threads(count):
            assert run(model, prompts, batch_size=batch_size) == expected


@pytest.mark.parametrize("plan", [AS_IS, *PADDING_PLANS], ids=lambda plan: plan.name)
def test_every_padding_plan_keeps_the_bits(plan: PaddingPlan, backend: BackendName) -> None:
    """Under each plan on its own; bits may differ between plans."""
    model = our_model(random_model(), attention=backend)
    if plan not in padding_plans(model):
        pytest.skip("for our own kernel alone")
    assert select_batch_invariant_kernels(model).passed
    use_padding_plan(model, plan)
    prompts = random_prompts(20, 300, longest=40, max_new_tokens=6)
    assert run(model, prompts, batch_size=20) == run(model, prompts, batch_size=1)


# Prefill, chunks and decode


def check_chunks(model: GPT, sequences: list[list[int]], seed: int) -> None:
    """Compare logits of whole sequences, token by token, and in random chunks batched at random."""
    rng = random.Random(seed)
    with torch.inference_mode():
        alone = [
            model.logits(
                model.hidden(
                    model.new_cache(1), tokens=s, seq_indices=[0] * len(s), positions=range(len(s))
                )
            )
            for s in sequences
        ]
        cache = model.new_cache(1)
        for position, token in enumerate(sequences[0]):
            assert torch.equal(
                model.logits(
                    model.hidden(cache, tokens=[token], seq_indices=[0], positions=[position])
                )[0],
                alone[0][position],
            )
        cache = model.new_cache(len(sequences) + 3)
        seq_indices = rng.sample(range(len(sequences) + 3), len(sequences))
        done = [0] * len(sequences)
        while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
            batch: list[tuple[int, int]] = []
            for i in rng.sample(range(len(sequences)), len(sequences)):
                end = min(len(sequences[i]), done[i] + rng.choice([0, 1, 1, 1, 4, 7, 19]))
                batch += [(i, position) for position in range(done[i], end)]
                done[i] = end
            if batch:
                logits_indices = rng.sample(
                    range(len(batch)), rng.choice([0, len(batch) // 2, len(batch)])
                )
                logits = model.logits(
                    model.hidden(
                        cache,
                        tokens=[sequences[i][position] for i, position in batch],
                        seq_indices=[seq_indices[i] for i, _ in batch],
                        positions=[position for _, position in batch],
                        logits_indices=logits_indices,
                    )
                )
                assert len(logits) == len(logits_indices)
                assert all(
                    torch.equal(row, alone[batch[at][0]][batch[at][1]])
                    for row, at in zip(logits, logits_indices, strict=True)
                )


def test_prefill_decode_and_chunks(demo: GPT) -> None:
    rng = random.Random(0)
    check_chunks(
        demo,
        [[rng.randrange(1024) for _ in range(length)] for length in (60, 1, 17, 33, 100)],
        seed=1,
    )


def test_a_growing_cache_keeps_what_it_holds(backend: BackendName) -> None:
    model = our_model(random_model(), attention=backend)
    tokens = list(range(1, 61))
    with torch.inference_mode():
        whole = model.logits(
            model.hidden(
                model.new_cache(1), tokens=tokens, seq_indices=[0] * 60, positions=range(60)
            )
        )
        cache = model.new_cache(3)
        rows = [
            model.logits(
                model.hidden(cache, tokens=[t] * 3, seq_indices=[0, 1, 2], positions=[p] * 3)
            )[1]
            for p, t in enumerate(tokens)
        ]
    assert torch.equal(torch.stack(rows), whole)


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_freed_memory_reaches_no_other_sequence(
    backend: BackendName, cache_dtype: CacheDtype
) -> None:
    """0 times NaN is NaN: an unwritten position must not enter a sum."""
    healthy = our_model(random_model(), attention=backend)
    healthy.cache_dtype = cache_dtype
    with torch.inference_mode():

        def both(cache: KVCache) -> Tensor:
            tokens = [7, 8, 9, *[10] * 35]
            return healthy.logits(
                healthy.hidden(
                    cache,
                    tokens=tokens,
                    seq_indices=[0] * 3 + [1] * 35,
                    positions=[*range(3), *range(35)],
                )
            )

        expected = both(healthy.new_cache(2))
        used = healthy.new_cache(2)
        attention = used.attention_for([0] * 40 + [1] * 30, [*range(40), *range(30)])
        for layer in range(2):
            attention(
                layer,
                torch.full((70, 3, healthy.config.n_head, healthy.config.head_size), float("nan")),
                1.0,
            )
        used.free(0)
        used.move(1, 0)
        used.free(0)
        assert torch.equal(both(used), expected)


def test_blocks_are_freed() -> None:
    if not has_kernels():
        pytest.skip("no C++ compiler")
    model = our_model(random_model(), attention="ragged")
    engine = Engine(model=model, batch_size=4, eos_token_ids=())
    for _ in engine.generate(iter(random_prompts(40, 300, longest=50, max_new_tokens=10))):
        pass
    cache = engine._cache
    assert isinstance(cache, PagedKVCache)
    pool = cache.pool
    assert (pool.n_in_use, pool.n_blocks) == (0, 4 * 4)


# An int8 cache


@pytest.mark.parametrize(
    "shape", [{}, {"n_embd": 100, "n_head": 1}, {"n_embd": 30, "n_head": 10}], ids=["8", "100", "3"]
)
def test_an_int8_cache_is_batch_invariant(
    shape: dict[str, int], backend: BackendName, dtype: torch.dtype
) -> None:
    """Logits differ a little from a full cache's, but not with the batch or the chunks."""
    model = our_model(random_model(n_positions=160, **shape), attention=backend, dtype=dtype)
    prompts = random_prompts(20, 300, longest=140, max_new_tokens=6)
    full = run(model, prompts, batch_size=5)
    sequence = max((prompt.token_ids for prompt in prompts), key=len)
    with torch.inference_mode():
        logits_indices = model(torch.tensor([sequence]))[0].float()
        model.cache_dtype = "int8"
        found = model(torch.tensor([sequence]))[0].float()
    assert 0 < (found - logits_indices).abs().max() < 0.05 * logits_indices.abs().max()
    assert select_batch_invariant_kernels(model).passed
    expected = run(model, prompts, batch_size=1)
    assert {digest for *_, digest in expected.values()}.isdisjoint(
        {digest for *_, digest in full.values()}
    )
    for batch_size, step_tokens in ((3, 7), (20, 64)):
        assert run(model, prompts, batch_size=batch_size, step_tokens=step_tokens) == expected
    check_chunks(model, [prompt.token_ids for prompt in prompts[:6]], seed=3)


def test_both_backends_keep_the_same_int8() -> None:
    """Over several blocks and numbers of any size, within the rounding of queries and weights."""
    count, heads = 200, 2
    caches = []
    for attention in ("ragged", "padded"):
        model = our_model(
            random_model(n_embd=80, n_head=heads, n_positions=256), attention=attention
        )
        model.cache_dtype = "int8"
        caches.append(model.new_cache(2))
    qkv = torch.randn(count, 3, heads, 40, generator=torch.Generator().manual_seed(0))
    q, k, v = qkv.unbind(1)
    qkv[5, 1:] = 0
    qkv[6, 1:] *= 1e-3
    v[7] *= 1e3
    v[8] = 1e-40
    q[:, :, 0] = 5
    # Scores rise in the second block and fall again.
    k[70:130, :, 0] += 2
    # Large values with a weight of 0.
    k[20, :, 0], k[150, :, 0] = -60, -60
    v[20] *= 1e4
    v[150] *= 1e4
    paged, padded = (
        torch.cat(
            [
                cache.attention_for([1] * count, range(count))(0, qkv, 0.3),
                cache.attention_for([0] * 5, range(5))(0, qkv[:5], 0.3),
            ]
        )
        for cache in caches
    )
    seen = torch.ones(count, count, dtype=torch.bool).tril()
    weights = (torch.einsum("qhd,khd->hqk", q, k) * 0.3).where(seen, -math.inf).softmax(-1)
    size = torch.einsum("hqk,khd->qhd", weights, v.abs().amax(-1, keepdim=True))[
        ..., 0
    ]  # of what a query sums
    apart = (paged - padded).view(count + 5, heads, 40).abs().amax(-1)
    assert (apart <= 3e-4 * torch.cat([size, size[:5]])).all()
    assert apart.max() > 0


def test_what_is_not_finite_in_an_int8_cache_reaches_those_that_see_it(
    backend: BackendName,
) -> None:
    """NaN, infinity and overflow in one head reach only the queries that attend to them.

    Padded attention rounds widths up and 0 times NaN is NaN, so a value also reaches up to 15
    earlier queries of its own sequence.
    """
    model = our_model(random_model(n_embd=80, n_head=2, n_positions=256), attention=backend)
    model.cache_dtype = "int8"
    cache = model.new_cache(2)
    clean = torch.randn(200, 3, 2, 40, generator=torch.Generator().manual_seed(0))
    faults = [(9, 80, math.nan), (70, 80, math.inf), (130, 165, math.nan), (20, 165, -math.inf)]
    for position, column, number in faults:
        qkv = clean.clone()
        qkv.view(200, -1)[position, column] = number
        lost = (
            cache.attention_for([1] * 200, range(200))(0, qkv, 0.3).view(200, 2, 40).isnan().any(-1)
        )
        first = position // 16 * 16 if backend == "padded" and column >= 160 else position
        assert lost[:, 0].tolist() == [i >= first for i in range(200)]
        assert not lost[:, 1].any()
    qkv = clean.clone()
    qkv[100, 0, 0] = qkv[90, 1, 0] = 1e19
    lost = cache.attention_for([1] * 200, range(200))(0, qkv, 0.3).view(200, 2, 40).isnan().any(-1)
    assert lost[:, 0].nonzero().flatten().tolist() == [100]
    assert not lost[:, 1].any()
    assert cache.attention_for([1] * 200, range(200))(0, clean, 0.3).isfinite().all()


# The shape of gpt2


bfloat16_is_slow = pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
    ids=["float32", "bfloat16"],
    scope="module",
)


@bfloat16_is_slow
def test_gpt2_batch_sizes_orders_and_fillers(gpt2: GPT) -> None:
    prompts = random_prompts(12, 50257, longest=60, max_new_tokens=3)
    expected = run(gpt2, prompts, batch_size=1)
    assert len({digest for *_, digest in expected.values()}) == 12
    fillers = random_prompts(60, 50257, longest=12, max_new_tokens=2, first_index=1000)
    for batch_size in (3, 8, 64):
        rows = [*prompts, *(fillers if batch_size == 64 else [])]
        random.Random(batch_size).shuffle(rows)
        assert run(gpt2, rows, batch_size=batch_size).items() >= expected.items(), batch_size


@pytest.mark.slow
def test_gpt2_threads(gpt2: GPT) -> None:
    prompts = random_prompts(9, 50257, longest=60, max_new_tokens=3)
    with threads(1):
        expected = run(gpt2, prompts, batch_size=9)
    for count in (2, 3, 4):
        with threads(count):
            assert run(gpt2, prompts, batch_size=5) == expected, count


@pytest.mark.slow
def test_gpt2_chunks_and_the_reference(gpt2: GPT) -> None:
    """Test one sequence beyond 192 positions, where products may change their reduction order."""
    rng = random.Random(0)
    check_chunks(
        gpt2, [[rng.randrange(50257) for _ in range(length)] for length in (12, 210, 40)], seed=2
    )
    prompt = random_prompts(1, 50257, longest=30, max_new_tokens=3)[0]
    token_ids, stop_reason, _, digest = run(gpt2, [prompt], batch_size=1)[0]
    assert reference.generate(gpt2, prompt.token_ids, prompt.prompt.params, eos_token_ids=(0,)) == (
        token_ids,
        stop_reason,
    )
    assert digest == reference_digest(gpt2, prompt.token_ids, token_ids)


# Teeth


class FlashCache:
    """What most programs do: torch's fused attention over keys padded to the longest sequence."""

    def __init__(self, model: GPT) -> None:
        self.model = model

    def allocate(
        self, seq_index: int, token_ids: Sequence[int], length: int, *, share_prefix: bool
    ) -> int | None:
        raise NotImplementedError

    def is_ready(self, seq_index: int) -> bool:
        raise NotImplementedError

    def mark_scheduled(self, seq_index: int, first: int, end: int) -> None:
        raise NotImplementedError

    def attention_for(self, seq_indices: Sequence[int], positions: Sequence[int]) -> Attention:
        batch, length = max(seq_indices) + 1, max(positions) + 1
        place = torch.tensor(
            [
                seq_index * length + position
                for seq_index, position in zip(seq_indices, positions, strict=True)
            ]
        )

        class FlashAttention:
            def __call__(self, layer: int, qkv: Tensor, scale: float) -> Tensor:
                padded = qkv.new_zeros(batch * length, *qkv.shape[1:]).index_copy_(0, place, qkv)
                q, k, v = padded.unflatten(0, (batch, length)).permute(2, 0, 3, 1, 4)
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
                return out.transpose(1, 2).reshape(batch * length, -1)[place]

        return FlashAttention()

    def move(self, source: int, target: int) -> None:
        raise NotImplementedError

    def free(self, seq_index: int) -> None:
        raise NotImplementedError


def test_the_comparison_has_teeth() -> None:
    """Plain linears without padding and fused attention are not batch-invariant."""
    model = our_model(
        random_model(n_layer=2, n_head=4, n_embd=256, vocab_size=1000, n_positions=128),
        packed=False,
    )
    use_padding_plan(model, AS_IS)
    rng = random.Random(0)
    sequences = [
        [rng.randrange(1000) for _ in range(length)] for length in (1, 2, 3, 5, 6, 7, 9, 40, 41, 90)
    ]
    with torch.inference_mode():
        together = model.logits(
            model.hidden(
                FlashCache(model),
                tokens=[token for s in sequences for token in s],
                seq_indices=[i for i, s in enumerate(sequences) for _ in s],
                positions=[position for s in sequences for position in range(len(s))],
            )
        )
        first, differing = 0, 0
        for sequence in sequences:
            count = len(sequence)
            alone = model.logits(
                model.hidden(
                    FlashCache(model),
                    tokens=sequence,
                    seq_indices=[0] * count,
                    positions=range(count),
                )
            )
            assert torch.allclose(alone, together[first : first + count], atol=1e-4)
            differing += not torch.equal(alone, together[first : first + count])
            first += count
    assert differing >= 3


@pytest.mark.parametrize(
    ("heads", "n_threads", "cache_dtype"),
    grid(((6, 32), (12, 16), (6, 48), (5, 32), (3, 20)), (1, 2, 3), ("auto", "int8")),
)
def test_blocks_in_one_call_are_what_they_are_one_by_one(
    heads: tuple[int, int], n_threads: int, cache_dtype: CacheDtype, dtype: torch.dtype
) -> None:
    """Outputs and caches are equal, with and without prefetch of KV blocks."""
    if not has_kernels():
        pytest.skip("no C++ compiler")
    n_head, head_size = heads
    width = n_head * head_size
    others: dict[str, Any] = {
        "activation_function": "relu",
        "layer_norm_epsilon": 1e-3,
        "scale_attn_by_inverse_layer_idx": True,
    }
    model = our_model(
        random_model(n_embd=width, n_head=n_head, n_positions=512, **others),
        attention="ragged",
        dtype=dtype,
    )
    model.cache_dtype = cache_dtype
    if not model.blocks.fused:
        pytest.skip("the C++ linear does not support this dtype here")
    together, separate = model.new_cache(12), model.new_cache(12)
    assert isinstance(together, PagedKVCache)
    assert isinstance(separate, PagedKVCache)
    rng, lengths = random.Random(0), [0] * 12
    with (
        threads(n_threads),
        torch.inference_mode(),
        profile(activities=[ProfilerActivity.CPU]) as profiler,
    ):
        # The most tokens of one sequence in a call: prefill in chunks, decode, and both.
        for max_tokens in (1, 40, 1, 300, 1, 1, 5, 1):
            counts = [max_tokens, *(rng.choice([0, 1, max_tokens]) for _ in range(11))]
            seq_indices = [
                seq_index for seq_index, count in enumerate(counts) for _ in range(count)
            ]
            positions = [
                p
                for count, length in zip(counts, lengths, strict=True)
                for p in range(length, length + count)
            ]
            lengths = [length + count for count, length in zip(counts, lengths, strict=True)]
            logits_indices = (
                None
                if max_tokens == 5
                else torch.tensor(
                    sorted(rng.sample(range(len(seq_indices)), rng.randint(1, len(seq_indices))))
                )
            )
            x = torch.randn(len(seq_indices) + 3, width, dtype=dtype)
            y, attention = x, separate.attention_for(seq_indices, positions)
            for block in model.blocks:
                y = block(y, attention, logits_indices if block is model.blocks[-1] else None)
            assert torch.equal(
                model.blocks(x, together.attention_for(seq_indices, positions), logits_indices), y
            )
            assert all(
                torch.equal(*blocks)
                for blocks in zip(together.layers, separate.layers, strict=True)
            )
    assert max(lengths) > 300
    names = {event.key for event in profiler.key_averages()}
    assert {
        "gptbatch::transformer_blocks",
        "gptbatch::paged_attention",
        "gptbatch::linear",
        "gptbatch::layer_norm",
    } <= names
    rounds = -(-n_head // n_threads)
    by_head = (
        rounds > 1
        and rounds * n_threads <= 1.1 * n_head
        and 3 * head_size % torch.ops.gptbatch.pack_weight(torch.zeros(1, 1)).shape[2] == 0
    )
    assert ("gptbatch::qkv_paged_attention" in names) == by_head


def test_padding_rows_get_no_attention() -> None:
    if not has_kernels():
        pytest.skip("no C++ compiler")
    model = our_model(random_model(n_embd=64, n_head=4), attention="ragged")
    attention, projection = (
        model.new_cache(1).attention_for([0, 0], [0, 1]),
        model.blocks[0].get_submodule("attn_qkv"),
    )
    assert isinstance(attention, PagedAttention)
    assert isinstance(projection, QKVProjection)
    x = torch.randn(5, 64)
    for out in (
        attention(0, projection(x), 0.2),
        qkv_paged_attention(attention, x, projection, 0.2),
    ):
        assert out[:2].all()
        assert not out[2:].any()


def qkv_paged_attention(
    attention: PagedAttention, x: Tensor, projection: QKVProjection, scale: float
) -> Tensor:
    cache = attention.cache
    of_call = (cache.block_table, attention.seq_indices, attention.positions, scale)
    out: Tensor = torch.ops.gptbatch.qkv_paged_attention(
        x, projection.packed, projection.bias, cache.layers[0], *of_call
    )
    return out


def test_the_last_block_computes_only_tokens_that_need_logits(backend: BackendName) -> None:
    model = our_model(random_model(), attention=backend)
    linears = (
        "gptbatch::linear",
        "gptbatch::qkv_paged_attention",
        "mkldnn::_linear_pointwise",
        "aten::addmm",
    )
    with (
        torch.inference_mode(),
        profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler,
    ):
        model.hidden(
            model.new_cache(1),
            tokens=[5] * 40,
            seq_indices=[0] * 40,
            positions=range(40),
            logits_indices=[3, 39],
        )
    rows = [event.input_shapes[0][0] for event in profiler.events() if event.name in linears]
    few = model.padding_plan.padded(2)
    assert rows == [40] * 5 + [few] * 3, "four linears of each block, and keys and values for all"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("projected", [False, True], ids=["attention", "with its projection"])
def test_two_threads_work_in_the_kernel(projected: bool) -> None:
    """Two threads take CPU time while the kernel runs; without -fopenmp only one would."""
    if not has_kernels():
        pytest.skip("no C++ compiler")
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one CPU")
    model = our_model(
        random_model(n_layer=1, n_head=12, n_embd=768, n_positions=512), attention="ragged"
    )
    seq_indices = [seq_index for seq_index in range(16) for _ in range(512)]
    x, qkv = torch.randn(len(seq_indices), 768), torch.randn(len(seq_indices), 3, 12, 64)
    block = model.blocks[0]
    assert isinstance(block, Block)
    with threads(2):
        attention = model.new_cache(16).attention_for(seq_indices, [*range(512)] * 16)
        assert isinstance(attention, PagedAttention)

        def attend() -> None:
            qkv_paged_attention(attention, x, block.attn_qkv, 0.1) if projected else attention(
                0, qkv, 0.1
            )

        attend()
        before = cpu_times()
        began = time.monotonic()
        while time.monotonic() - began < 1.0:
            attend()
    busy = sorted(after - before.get(thread, 0) for thread, after in cpu_times().items())
    assert busy[-2] > 0.1 * busy[-1] > 0, [time / 1e9 for time in busy]


def cpu_times() -> dict[str, int]:
    """Nanoseconds on a CPU of each thread of this process."""
    return {
        task.name: int((task / "schedstat").read_text().split()[0])
        for task in Path("/proc/self/task").iterdir()
    }


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_the_kernel_shares_the_threads_of_torch() -> None:
    """A second OpenMP runtime would have threads of its own, which spin beside torch's."""
    if not has_kernels():
        pytest.skip("no C++ compiler")
    libraries = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "libgomp" in line or "libomp" in line
    }
    assert len(libraries) == 1


@pytest.mark.cuda
def test_rows_on_cuda_do_not_depend_on_the_batch() -> None:
    model = our_model(random_model(), packed=False).to("cuda")
    if not select_batch_invariant_kernels(model).passed:
        pytest.skip("this GPU is not exact")
    prompts = random_prompts(40, 300, longest=40, max_new_tokens=10)
    assert run(model, prompts, batch_size=16) == run(model, prompts, batch_size=1)


@pytest.mark.cuda
def test_cpu_and_cuda_rows_that_differ_have_small_margins() -> None:
    theirs = random_model(n_layer=4, n_embd=128, vocab_size=2000, n_positions=128)
    prompts = random_prompts(200, 2000, longest=40, max_new_tokens=30)
    on_cpu = run(our_model(theirs), prompts, batch_size=64)
    on_cuda = run(our_model(theirs, packed=False).to("cuda"), prompts, batch_size=64)
    differing = [index for index in on_cpu if on_cpu[index][0] != on_cuda[index][0]]
    print(f"{len(differing)} of {len(prompts)} rows differ")
    assert len(differing) < 0.1 * len(prompts)
    assert all((on_cpu[index][2] or 0) < 1e-2 for index in differing)
