"""The engine of a device against the engine of the CPU, on a device that works late.

The twins round another way than the C++ kernels, so margins are compared with a tolerance here.
`test_the_kernels_give_the_bits_of_the_cpu` compares bits, by Triton's interpreter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbatch.pipeline.engine.device_changes import PendingChanges
from gptbatch.pipeline.engine.engine import Engine, SchedulingOptions
from gptbatch.pipeline.errors import OutOfMemoryError
from gptbatch.pipeline.kv_cache.spec import RAGGED, TRITON
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.types import Completion, TokenizedPrompt
from tests.conftest import has_kernels, our_model, random_model, tokenized
from tests.triton_interpreter import IS_INTERPRETED, interpreted

pytest.importorskip("triton")
from gptbatch.pipeline.engine.device_engine import DeviceEngine
from gptbatch.pipeline.kernels.cuda.kernels import Kernels
from gptbatch.pipeline.model.device_step import CHUNK_SIZES, StepShape
from tests.device_cases import (
    EOS,
    SHAPE,
    TOKEN_BYTES,
    assert_equal,
    cpu_completions,
    device_engine,
    device_model,
    packed_model,
    random_prompts,
    run,
)
from tests.fake_device import LateStream


@pytest.fixture(scope="module")
def model() -> GPT:
    return device_model()


@pytest.fixture(scope="module")
def cpu_model() -> GPT:
    return our_model(random_model(**SHAPE), attention="ragged" if has_kernels() else "padded")


@settings(max_examples=5, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    lag=st.sampled_from([0, 1, 4]),
    batch_size=st.integers(1, 9),
    late=st.sampled_from([0, 3, 10**9]),
    step_tokens=st.sampled_from([16, 40, 512]),
    nones=st.booleans(),
)
def test_completions_are_those_of_the_cpu(
    model: GPT,
    cpu_model: GPT,
    seed: int,
    lag: int,
    batch_size: int,
    late: int,
    step_tokens: int,
    nones: bool,
) -> None:
    prompts = random_prompts(random.Random(seed), 10)
    engine = device_engine(
        model,
        batch_size=batch_size,
        lag=lag,
        stream=LateStream(late),
        scheduling=SchedulingOptions(step_tokens=step_tokens),
    )
    given_prompts = [p for prompt in prompts for p in ((prompt, None) if nones else (prompt,))]
    assert_equal(run(engine, given_prompts), cpu_completions(cpu_model, prompts))


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    lag=st.integers(0, 5),
    batch_size=st.integers(1, 40),
    late=st.sampled_from([0, 1, 3, 10**9]),
    step_tokens=st.sampled_from([16, 40, 512]),
    blocks=st.integers(3, 20),
)
def test_completions_are_those_of_the_cpu_in_many_cases(
    model: GPT,
    cpu_model: GPT,
    seed: int,
    lag: int,
    batch_size: int,
    late: int,
    step_tokens: int,
    blocks: int,
) -> None:
    """With few blocks sequences wait, and cached prefixes are evicted."""
    prompts = random_prompts(random.Random(seed), 20, longest=30)
    engine = device_engine(
        model,
        batch_size=batch_size,
        lag=lag,
        stream=LateStream(late),
        scheduling=SchedulingOptions(step_tokens=step_tokens),
        memory_bytes=blocks * 64 * model.cache_spec.bytes_per_token,
    )
    assert_equal(run(engine, prompts), cpu_completions(cpu_model, prompts))


# Where the handle of a sequence that had none yet was taken from the one before it, rows were lost.
@pytest.mark.parametrize("seed", [13, 15, 19, 44])
def test_sequences_that_wait_for_a_prefix_are_not_lost(model: GPT, seed: int) -> None:
    rng = random.Random(seed)
    shared = [rng.randrange(300) for _ in range(129)]
    prompts = []
    for index in range(24):
        own = [rng.randrange(300) for _ in range(rng.randint(1, 6))]
        tokens = [*shared, own[0]] if rng.random() < 0.6 else own
        budget = rng.choice([1, 2, 3, 5, 8, 12])
        prompts.append(tokenized(index, tokens, max_new_tokens=budget, top_k=5))
        if len(tokens) > 100 and rng.random() < 0.5:
            shared = [rng.randrange(300) for _ in range(129)]
    for batch_size, lag, step_tokens in ((3, 1, 3), (5, 2, 7), (8, 4, 11), (4, 1, 10)):
        engine = device_engine(
            model,
            batch_size=batch_size,
            lag=lag,
            scheduling=SchedulingOptions(step_tokens=step_tokens),
        )
        assert [done.prompt.index for done in run(engine, prompts)] == [*range(24)]


def test_rows_that_still_run_are_returned_as_far_as_they_came(model: GPT) -> None:
    prompts = [tokenized(i, [5, 6, 7 + i], max_new_tokens=10, top_k=5) for i in range(4)]
    whole = {done.prompt.index: done for done in run(device_engine(model), prompts)}
    engine = device_engine(model, lag=2)
    steps = engine.generate(iter(prompts))
    longest = 0
    for _ in range(6):
        next(steps)
        for done in engine.unfinished():
            count = len(done.token_ids)
            assert done.token_ids == whole[done.prompt.index].token_ids[:count]
            assert done.timing is not None
            assert done.timing.prefill_s >= 0
            longest = max(longest, count)
    assert longest >= 2
    assert engine.stats.decode_context > 0


def test_an_engine_that_is_dropped_leaves_no_work_to_the_device(model: GPT) -> None:
    """Another engine may get its memory."""
    prompts = [tokenized(i, [5, i], max_new_tokens=20) for i in range(4)]
    stream = LateStream()
    steps = device_engine(model, lag=2, stream=stream).generate(iter(prompts))
    for _ in range(5):
        next(steps)
    assert stream._works
    del steps
    assert not stream._works

    def broken_input() -> Iterator[TokenizedPrompt | None]:
        yield from [*prompts, None, None, None]
        raise ValueError("no more input")

    with pytest.raises(ValueError, match="no more input"):
        [*device_engine(model, lag=2, stream=stream).generate(broken_input())]
    assert not stream._works


def test_a_device_that_fails_hides_no_other_failure(model: GPT) -> None:
    is_lost = False

    def fails() -> None:
        if is_lost:
            raise RuntimeError("the device is lost")

    def prompts() -> Iterator[TokenizedPrompt | None]:
        nonlocal is_lost
        yield from [tokenized(0, [5], max_new_tokens=20), None, None, None]
        is_lost = True
        raise ValueError("no more input")

    engine = device_engine(model, lag=2, stream=LateStream(fails=fails))
    with pytest.raises(ValueError, match="no more input"):
        [*engine.generate(prompts())]


def of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def of_capture() -> None:
    """Fail as the capture of a CUDA graph, whose end hides why."""
    try:
        of_memory()
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("failure", [of_memory, of_capture])
@pytest.mark.parametrize("lag", [0, 4])
@pytest.mark.parametrize("at_wait", [False, True])
def test_out_of_memory_halves_the_batch_and_loses_nothing(
    model: GPT, cpu_model: GPT, lag: int, at_wait: bool, failure: Callable[[], None]
) -> None:
    left = [9, 25, 40]

    def fails() -> None:
        left[:] = [count - 1 for count in left]
        if 0 in left:
            failure()

    prompts = random_prompts(random.Random(7), 24)
    stream = LateStream(10**9 if at_wait else 0, fails)
    engine = device_engine(model, batch_size=16, lag=lag, stream=stream)
    assert_equal(run(engine, prompts), cpu_completions(cpu_model, prompts))
    assert engine.stats.halvings == 3
    assert engine.batch_size <= 2
    counted = sum(len(done.token_ids) for done in cpu_completions(cpu_model, prompts))
    assert engine.stats.new_tokens == counted


def test_out_of_memory_with_one_row_names_it(model: GPT) -> None:
    engine = device_engine(model, batch_size=2, stream=LateStream(0, of_memory))
    with pytest.raises(OutOfMemoryError, match="even with row '0' alone"):
        run(engine, [tokenized(0, [1, 2])])


def test_an_end_by_eos_in_flight_frees_the_index_for_the_next_sequence(
    model: GPT, cpu_model: GPT
) -> None:
    """Every third token or so ends a row, and one index serves all of them."""
    prompts = [tokenized(i, [5, i], max_new_tokens=30) for i in range(12)]
    eos_token_ids = tuple(range(0, 300, 3))
    expected = run(Engine(model=cpu_model, batch_size=4, eos_token_ids=eos_token_ids), prompts)
    assert {each.stop_reason for each in expected} == {"end_of_text"}
    for batch_size in (1, 3):
        engine = device_engine(model, batch_size=batch_size, lag=4, eos_token_ids=eos_token_ids)
        assert_equal(run(engine, prompts), expected)
        assert engine.stats.new_tokens == sum(len(each.token_ids) for each in expected)


@pytest.mark.parametrize("lag", [0, 4])
def test_rows_that_the_host_ends_stop_on_the_device(model: GPT, cpu_model: GPT, lag: int) -> None:
    """They would write to their blocks, which another sequence has now."""
    every_token = tuple(range(300))
    ended = [
        tokenized(i, [5, i, 7], max_new_tokens=100, stop_token_ids=every_token) for i in range(6)
    ]
    last = tokenized(6, [(7 * t) % 300 for t in range(100)], max_new_tokens=20, top_k=5)
    engine = device_engine(model, batch_size=6, lag=lag, eos_token_ids=())
    found = run(engine, [*ended, *[None] * 12, last])
    host = Engine(model=cpu_model, batch_size=7, eos_token_ids=())
    assert_equal(found, run(host, [*ended, last]))


def test_ends_by_length_are_replaced_without_lag(model: GPT) -> None:
    """8 rows of 10 tokens through 2 indices: 40 steps, and what fills and empties the pipeline."""
    prompts = [tokenized(i, [5], max_new_tokens=10) for i in range(8)]
    engine = device_engine(model, batch_size=2, lag=4, eos_token_ids=())
    run(engine, prompts)
    assert engine.stats.steps == 40
    assert engine.stats.decoded_tokens == 80


def test_prefixes_are_shared_and_counted(model: GPT, cpu_model: GPT) -> None:
    prompts = [tokenized(i, [*range(70), i], top_k=40, max_new_tokens=4) for i in range(6)]
    engine = device_engine(model, batch_size=3)
    assert_equal(run(engine, prompts), cpu_completions(cpu_model, prompts))
    assert engine.stats.cached_tokens == 5 * 64
    assert engine.stats.prefilled_tokens == 6 * 70 - 5 * 64


def test_a_stopped_engine_goes_on_where_it_was(model: GPT, cpu_model: GPT) -> None:
    prompts = random_prompts(random.Random(3), 12)
    engine, source = device_engine(model, lag=4), iter(prompts)
    ended: list[Completion] = []
    for _ in range(40):
        for completions in engine.generate(source):
            ended += completions
            break
        if len(ended) == len(prompts):
            break
        for _ in range(3):
            ended += engine.step() if not engine._is_idle() else []
    assert_equal(
        sorted(ended, key=lambda done: done.prompt.index), cpu_completions(cpu_model, prompts)
    )


def test_rows_held_are_bounded(model: GPT) -> None:
    taken = 0

    def counted() -> Iterator[TokenizedPrompt]:
        nonlocal taken
        for prompt in [tokenized(i, [5], max_new_tokens=1 + i % 3) for i in range(60)]:
            taken += 1
            yield prompt

    engine = device_engine(model, batch_size=4, lag=4)
    ended = 0
    for completions in engine.generate(counted()):
        ended += len(completions)
        assert taken - ended <= engine.max_rows_held
    assert ended == taken == 60


def test_a_row_alone_holds_no_other(model: GPT) -> None:
    """The crash journal names the row that ran alone, so the next one must not be taken."""
    taken: list[int] = []

    def counted() -> Iterator[TokenizedPrompt]:
        for i in range(5):
            taken.append(i)
            yield tokenized(i, [5, i], max_new_tokens=3)

    for completions in device_engine(model, batch_size=1, lag=4).generate(counted()):
        for completion in completions:
            assert taken[-1] <= completion.prompt.index + 1


@pytest.mark.parametrize("lag", [0, 4])
def test_rows_whose_logits_are_not_finite_are_errors(model: GPT, lag: int) -> None:
    broken = device_model()
    with torch.no_grad():
        broken.wte.weight[9] = float("nan")
    broken.lm_head.weight = torch.nn.Parameter(model.wte.weight.clone(), requires_grad=False)
    prompts = [tokenized(i, [9 if i == 1 else 8, 7], top_k=40) for i in range(3)]
    found = run(device_engine(broken, lag=lag), prompts)
    assert [done.error is not None for done in found] == [False, True, False]
    assert found[1].error is not None
    assert found[1].error.kind == "not_finite"
    assert found[1].token_ids == []


@pytest.mark.parametrize("lag", [0, 1, 4])
def test_filters_take_no_step_on_the_host(
    model: GPT, cpu_model: GPT, lag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with and without filters in one batch."""

    def refuse(*args: Any) -> None:
        raise AssertionError("the host samples")

    monkeypatch.setattr(DeviceEngine, "_sample_on_host", refuse)
    filters: list[dict[str, Any]] = [
        *({"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}, {"top_k": 0}, {"top_k": 200}),
        *({"top_k": 65, "top_p": 0.5}, {"top_p": 0.95, "min_p": 0.01}, {"temperature": 0.0}),
        {"top_k": 90, "top_p": 0.99, "min_p": 0.001, "temperature": 2.0},
    ]
    prompts = [
        tokenized(i, [5, i], max_new_tokens=1 + i % 7, **filters[i % len(filters)])
        for i in range(18)
    ]
    engine = device_engine(model, batch_size=5, lag=lag)
    assert_equal(run(engine, prompts), cpu_completions(cpu_model, prompts))


def test_steps_launch_only_the_samplers_of_their_rows(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the key of their CUDA graph."""
    shapes: list[StepShape] = []
    repeat = LateStream.repeat

    def record(self: LateStream, key: Any, work: Any) -> None:
        shapes.append(key)
        repeat(self, key, work)

    monkeypatch.setattr(LateStream, "repeat", record)
    expected: list[tuple[dict[str, Any], tuple[bool, bool]]] = [
        *(({"top_k": 40}, (False, False)), ({"min_p": 0.1}, (False, False))),
        *(({"top_p": 0.9}, (False, True)), ({"top_k": 0}, (True, False))),
    ]
    for filters, flags in expected:
        run(device_engine(model), [tokenized(0, [5, 6], max_new_tokens=3, **filters)])
        assert {(shape.full_vocab, shape.top_p) for shape in shapes if shape.decode_rows} == {flags}
        shapes.clear()


def test_all_logits_equal(cpu_model: GPT) -> None:
    """Every token ties with the k-th."""
    same, expected_model = device_model(), our_model(random_model(**SHAPE), attention="padded")
    for model in (same, expected_model):
        model.lm_head.weight = torch.nn.Parameter(
            torch.zeros_like(model.wte.weight), requires_grad=False
        )
        model.lm_head._packed, model.lm_head.kind = None, "plain"
    prompts = [tokenized(i, [5, i], top_k=40, max_new_tokens=6) for i in range(7)]
    expected = run(Engine(model=expected_model, batch_size=4, eos_token_ids=()), prompts)
    engine = device_engine(same, batch_size=3, lag=4, eos_token_ids=())
    assert_equal(run(engine, prompts), expected)
    assert engine.stats.new_tokens == 7 * 6


def test_prompts_that_fill_the_context(model: GPT, cpu_model: GPT) -> None:
    lengths = (150, 149, 130, 86, 65, 64, 1)
    prompts = [
        tokenized(
            i, [(7 * t + i) % 300 for t in range(length)], max_new_tokens=200 if length > 80 else 4
        )
        for i, length in enumerate(lengths)
    ]
    engine = device_engine(model, batch_size=3, lag=1)
    assert_equal(run(engine, prompts), cpu_completions(cpu_model, prompts))
    assert sum(lengths[:3]) < CHUNK_SIZES[-1]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("mss."), st.integers(0, 7), st.integers(0, 7))))
def test_changes_come_to_what_their_steps_come_to(steps: list[tuple[str, int, int]]) -> None:
    """Against a state that changes at once; only the rows that run count."""
    before = np.arange(8)
    now: list[int | None] = [int(value) for value in before]
    changes = PendingChanges()
    for number, (kind, source, target) in enumerate(steps):
        if kind == "m" and now[source] is not None and now[target] is None:
            changes.move(source, target)
            now[target], now[source] = now[source], None
        elif kind == "s":
            changes.set(source, np.array([100 + number]))
            now[source] = 100 + number
        elif kind == ".":
            changes.stop(source)
            now[source] = None
    state = before.copy()
    state[[*changes.moves]] = before[[*changes.moves.values()]]
    state[[*changes.empty]] = -1
    for index, row in changes.rows.items():
        state[index] = row[0]
    assert state.tolist() == [-1 if value is None else value for value in now]


@pytest.mark.slow
@pytest.mark.skipif(not IS_INTERPRETED, reason="with a CUDA device the kernels are compiled")
@pytest.mark.skipif(not has_kernels(), reason="no C++ compiler")
# numpy, which the interpreter computes with, warns of lanes beyond the end, which hold -inf.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("int8", [False, True])
def test_the_kernels_give_the_bits_of_the_cpu(int8: bool) -> None:
    """Tokens and decision margins of float32, through the Triton kernels and through the C++ ones.

    By Triton's interpreter with the arithmetic of a GPU: chunks, shared prefixes, two lags.
    """
    chosen: list[dict[str, Any]] = [{"top_k": 5}, {"top_k": 0}, {"temperature": 0.0}]
    chosen += [{"top_k": 40, "min_p": 0.01}, {"top_p": 0.8}, {"min_p": 0.05}]
    chosen += [{"top_k": 100}, {"top_k": 70, "top_p": 0.6}]
    prompts = [
        tokenized(i, [*range(64 if i < 2 else 3), 70 + i], max_new_tokens=2, **each)
        for i, each in enumerate(chosen)
    ]
    shape: dict[str, Any] = {"n_embd": 24, "n_inner": 40, "vocab_size": 140}
    cpu, device = (packed_model(backend, int8=int8, **shape) for backend in (RAGGED, TRITON))
    expected = run(Engine(model=cpu, batch_size=4, eos_token_ids=()), prompts)
    with interpreted(exact=True):
        engine = device_engine(
            device, batch_size=4, lag=1, eos_token_ids=(), kernels=Kernels(), stream=LateStream()
        )
        found = run(engine, prompts)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.min_decision_margin == theirs.min_decision_margin


def tokens_and_margins(completions: list[Completion]) -> list[tuple[list[int], float | None]]:
    return [(done.token_ids, done.min_decision_margin) for done in completions]


@pytest.mark.cuda
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_on_a_gpu_depend_on_no_other(dtype: torch.dtype, int8: bool) -> None:
    """Alone and among up to 1,024, at every lag, shuffled, eagerly and as replayed graphs."""
    model = packed_model(TRITON, int8=int8, device="cuda", dtype=dtype)
    prompts = random_prompts(random.Random(1), 120, longest=40)
    options: dict[str, Any] = {"model": model, "eos_token_ids": EOS, "token_bytes": TOKEN_BYTES}
    expected = tokens_and_margins(run(DeviceEngine(batch_size=1, lag=0, **options), prompts))
    for batch_size, lag in ((7, 0), (64, 1), (120, 4), (1024, 2)):
        engine = DeviceEngine(batch_size=batch_size, lag=lag, **options)
        for seed in range(2):
            random.Random(seed).shuffle(prompts)
            assert tokens_and_margins(run(engine, prompts)) == expected


@pytest.mark.cuda
@pytest.mark.parametrize("int8", [False, True])
def test_a_gpu_gives_the_bits_of_the_cpu(int8: bool) -> None:
    prompts = random_prompts(random.Random(2), 60, longest=40)
    options: dict[str, Any] = {"eos_token_ids": EOS, "token_bytes": TOKEN_BYTES}
    cpu = packed_model(RAGGED, int8=int8)
    expected = run(Engine(model=cpu, batch_size=16, record_logits=True, **options), prompts)
    gpu = packed_model(TRITON, int8=int8, device="cuda")
    device = run(DeviceEngine(model=gpu, batch_size=16, **options), prompts)
    assert tokens_and_margins(device) == tokens_and_margins(expected)
    host = run(Engine(model=gpu, batch_size=16, record_logits=True, **options), prompts)
    assert [done.logits_digest for done in host] == [done.logits_digest for done in expected]
