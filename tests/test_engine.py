"""The engine against the reference loop and against transformers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from gptbatch.pipeline.engine import reference
from gptbatch.pipeline.engine.engine import Engine, SchedulingOptions
from gptbatch.pipeline.kv_cache import padded
from gptbatch.pipeline.kv_cache.padded import PaddedKVCache
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.types import Completion, RowError, TokenizedPrompt, WindowFull
from tests.conftest import our_model, random_model, tokenized

END_OF_TEXT = 0


@pytest.fixture(scope="module", params=["ragged", "padded"])
def model(request: pytest.FixtureRequest) -> GPT:
    return our_model(random_model(), attention=request.param)


def ragged_prompts(
    count: int, *, longest: int = 50, max_new_tokens: int = 24, greedy: bool = False
) -> list[TokenizedPrompt]:
    """Prompts of mixed lengths with parameters of their own."""
    rng = random.Random(count)
    return [
        tokenized(
            i,
            [
                rng.randrange(1, 300)
                for _ in range(rng.choice([1, 2, 5, 17, rng.randint(1, longest)]))
            ],
            temperature=0.0 if greedy else rng.choice([0.0, 0.5, 1.0, 1.5]),
            top_k=rng.choice([0, 1, 5, 40, 300, 9999]),
            max_new_tokens=rng.randint(1, max_new_tokens),
        )
        for i in range(count)
    ]


def run(
    model: GPT,
    prompts: Sequence[TokenizedPrompt],
    *,
    batch_size: int,
    eos_token_ids: tuple[int, ...] = (END_OF_TEXT,),
    window_full: WindowFull = "stop",
    step_tokens: int = 4096,
) -> list[Completion]:
    """All completions, in the order of the prompts' indices."""
    engine = Engine(
        model=model,
        batch_size=batch_size,
        eos_token_ids=eos_token_ids,
        window_full=window_full,
        scheduling=SchedulingOptions(step_tokens=step_tokens),
    )
    ended = [
        completion for completions in engine.generate(iter(prompts)) for completion in completions
    ]
    assert len(ended) == len(prompts)
    return sorted(ended, key=lambda completion: completion.prompt.index)


def expect(
    model: GPT,
    prompts: Sequence[TokenizedPrompt],
    *,
    eos_token_ids: tuple[int, ...] = (END_OF_TEXT,),
    window_full: WindowFull = "stop",
) -> list[tuple[list[int], str]]:
    return [
        reference.generate(
            model,
            p.token_ids,
            p.prompt.params,
            eos_token_ids=eos_token_ids,
            window_full=window_full,
        )
        for p in prompts
    ]


def outcome(completions: Sequence[Completion]) -> list[tuple[list[int], str | None]]:
    return [(completion.token_ids, completion.stop_reason) for completion in completions]


def test_engine_gives_the_tokens_of_the_reference(model: GPT) -> None:
    prompts = ragged_prompts(40)
    # the two commonest tokens of a first run, so that sequences end early
    first = run(model, prompts, batch_size=16, eos_token_ids=())
    counts = torch.bincount(torch.tensor([t for completion in first for t in completion.token_ids]))
    eos_token_ids = tuple(counts.topk(2).indices.tolist())
    expected = expect(model, prompts, eos_token_ids=eos_token_ids)
    assert {reason for _, reason in expected} >= {"end_of_text", "max_new_tokens"}
    for batch_size in (1, 3, 16):
        for step_tokens in (4096, 60):
            found = run(
                model,
                prompts,
                batch_size=batch_size,
                eos_token_ids=eos_token_ids,
                step_tokens=step_tokens,
            )
            assert outcome(found) == expected, (batch_size, step_tokens)
            random.Random(1).shuffle(prompts)


@pytest.mark.parametrize("window_full", ["stop", "slide"])
def test_windows_that_fill(model: GPT, window_full: WindowFull) -> None:
    prompts = ragged_prompts(6, longest=64, max_new_tokens=90)
    prompts.append(tokenized(6, [7] * 64, max_new_tokens=5))
    prompts.append(tokenized(7, [7] * 64, max_new_tokens=1))
    prompts.append(tokenized(8, [7] * 63, max_new_tokens=2))
    expected = expect(model, prompts, window_full=window_full)
    for batch_size in (1, 3, 16):
        found = run(model, prompts, batch_size=batch_size, window_full=window_full)
        assert outcome(found) == expected, batch_size
    reasons = {reason for _, reason in expected}
    assert ("window" in reasons) == (window_full == "stop")
    for prompt, (tokens, reason) in zip(prompts, expected, strict=True):
        if reason == "window":
            assert len(tokens) == 64 - len(prompt.token_ids) + 1
    if window_full == "slide":
        assert (
            max(
                len(p.token_ids) + len(tokens)
                for p, (tokens, _) in zip(prompts, expected, strict=True)
            )
            > 64
        )


def test_greedy_tokens_are_those_of_transformers() -> None:
    theirs: Any = random_model(seed=5, n_layer=3)
    prompts = ragged_prompts(32, greedy=True)
    ours = our_model(theirs)
    completions = run(ours, prompts, batch_size=32, eos_token_ids=())
    for batch_size in (1, 7):
        found = run(ours, prompts, batch_size=batch_size, eos_token_ids=())
        assert outcome(found) == outcome(completions), batch_size
    with torch.inference_mode():
        for prompt, completion in zip(prompts, completions, strict=True):
            idx = torch.tensor([prompt.token_ids])
            expected = theirs.generate(
                idx,
                attention_mask=torch.ones_like(idx),
                max_new_tokens=len(completion.token_ids),
                min_new_tokens=len(completion.token_ids),
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert completion.token_ids == expected[0, idx.shape[1] :].tolist()
    assert len({tuple(completion.token_ids) for completion in completions}) > 16, (
        "rows that are all alike show little"
    )


@pytest.mark.parametrize("n_layer", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_greedy_tokens_are_those_of_transformers_on_the_gpt2_shape(n_layer: int) -> None:
    """Two layers have the shape of every product of twelve."""
    theirs = random_model(
        n_layer=n_layer, n_head=12, n_embd=768, vocab_size=50257, n_positions=1024
    )
    rng = random.Random(0)
    prompts = [
        tokenized(
            i,
            [rng.randrange(50257) for _ in range(rng.choice([1, 3, 9, 30]))],
            temperature=0,
            max_new_tokens=4,
        )
        for i in range(64)
    ]
    ours = our_model(theirs)
    completions = run(ours, prompts, batch_size=32, eos_token_ids=())
    for batch_size in (1, 7):
        found = run(ours, prompts, batch_size=batch_size, eos_token_ids=())
        assert outcome(found) == outcome(completions), batch_size
    with torch.inference_mode():
        for prompt, completion in zip(prompts, completions, strict=True):
            # teacher-forced: each token is the argmax after all before it
            tokens = prompt.token_ids + completion.token_ids
            logits = theirs(torch.tensor([tokens[:-1]])).logits[0, len(prompt.token_ids) - 1 :]
            assert completion.token_ids == logits.argmax(-1).tolist()


def test_a_row_with_nan_logits_is_an_error_and_harms_no_other() -> None:
    theirs = random_model()
    with torch.no_grad():
        theirs.transformer.wte.weight[13] = float("nan")
        theirs.lm_head.weight = torch.nn.Parameter(
            theirs.transformer.wte.weight.detach().clone().nan_to_num()
        )
    theirs.config.tie_word_embeddings = False
    broken = our_model(theirs)
    healthy = [
        tokenized(i, [1 + i % 12] * (1 + i % 30), max_new_tokens=20, temperature=0)
        for i in range(30)
    ]
    sick = [tokenized(100 + i, [5] * (3 * i) + [13] + [6] * 5) for i in range(6)]
    prompts = healthy + sick
    random.Random(0).shuffle(prompts)
    expected = outcome(run(broken, healthy, batch_size=4))
    assert all(13 not in tokens for tokens, _ in expected), "token 13 would make a healthy row sick"
    completions = run(broken, prompts, batch_size=4)
    assert outcome(completions[:30]) == expected
    for completion in completions[30:]:
        assert completion.finish_reason == "error"
        assert completion.error == RowError(
            kind="not_finite", reason="the logits of new token 0 hold NaN or infinity"
        )
        assert completion.token_ids == []


def test_timings_add_up(model: GPT) -> None:
    completions = run(model, ragged_prompts(20), batch_size=4)
    for completion in completions:
        timing = completion.timing
        assert timing is not None
        assert timing.prefill_s > 0
        assert (timing.decode_s > 0) == (len(completion.token_ids) > 1)
        assert timing.total_s == pytest.approx(timing.queue_s + timing.prefill_s + timing.decode_s)
        assert 1 <= timing.mean_batch_size <= 4


def test_no_prompts_no_completions(model: GPT) -> None:
    assert run(model, [], batch_size=4) == []


def test_prompts_are_taken_as_sequences_finish(model: GPT) -> None:
    """Never more prompts are read than fit and may wait."""
    taken = ended = 0

    def counted() -> Iterator[TokenizedPrompt]:
        nonlocal taken
        for prompt in ragged_prompts(50):
            taken += 1
            yield prompt

    engine = Engine(
        model=model, batch_size=8, eos_token_ids=(), scheduling=SchedulingOptions(max_waiting=5)
    )
    for completions in engine.generate(counted()):
        ended += len(completions)
        assert taken - ended <= engine.max_rows_held == 13
    assert taken == ended == 50


@pytest.mark.cuda
@pytest.mark.parametrize("window_full", ["stop", "slide"])
def test_engine_on_cuda_gives_the_tokens_of_the_reference_on_cuda(window_full: WindowFull) -> None:
    on_cuda = our_model(random_model(), packed=False).to("cuda")
    prompts = ragged_prompts(20, longest=64, max_new_tokens=80)
    expected = expect(on_cuda, prompts, window_full=window_full)
    assert outcome(run(on_cuda, prompts, batch_size=8, window_full=window_full)) == expected


@pytest.mark.parametrize("window_full", ["stop", "slide"])
def test_a_padded_cache_may_grow_while_rows_run(
    window_full: WindowFull, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache starts small; sequences then finish and move in the grown one."""
    monkeypatch.setattr(padded, "RESERVED_NEW_TOKENS", 2)
    model = our_model(random_model(), attention="padded")
    prompts = ragged_prompts(20, longest=20, max_new_tokens=60)
    assert outcome(run(model, prompts, batch_size=8, window_full=window_full)) == expect(
        model, prompts, window_full=window_full
    )


@pytest.mark.parametrize("failures", [1, 3])
def test_memory_that_runs_out_in_allocate_halves_the_batch(
    failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even before any sequence runs, if the allocation of the cache fails."""
    left = failures
    original = PaddedKVCache.allocate

    def allocate(
        self: PaddedKVCache,
        seq_index: int,
        token_ids: Sequence[int],
        length: int,
        *,
        share_prefix: bool,
    ) -> int | None:
        nonlocal left
        if left:
            left -= 1
            raise MemoryError("not enough memory")
        return original(self, seq_index, token_ids, length, share_prefix=share_prefix)

    model = our_model(random_model(), attention="padded")
    prompts = ragged_prompts(20)
    expected = outcome(run(model, prompts, batch_size=8))
    monkeypatch.setattr(PaddedKVCache, "allocate", allocate)
    engine = Engine(model=model, batch_size=8, eos_token_ids=(END_OF_TEXT,))
    ended = [
        completion for completions in engine.generate(iter(prompts)) for completion in completions
    ]
    assert outcome(sorted(ended, key=lambda completion: completion.prompt.index)) == expected
    assert (engine.batch_size, engine.stats.halvings) == (8 >> failures, failures)
