"""Rows with bias, penalties, masks and log probabilities in the engine of a device.

The device is one on the CPU that works late.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.engine.sequence import Sequence
from gptbatch.pipeline.kv_cache.spec import RAGGED, TRITON
from gptbatch.pipeline.model.gpt import GPT
from gptbatch.pipeline.types import TokenizedPrompt
from tests.conftest import has_kernels, our_model, random_model, tokenized
from tests.test_row_settings import random_settings
from tests.triton_interpreter import IS_INTERPRETED, interpreted

pytest.importorskip("triton")
from gptbatch.pipeline.engine import device_automata
from gptbatch.pipeline.engine.device_automata import DeviceAutomata
from gptbatch.pipeline.engine.device_engine import DeviceEngine
from gptbatch.pipeline.engine.device_rows import DeviceRows
from gptbatch.pipeline.kernels.cuda.adjustments import AdjustmentLayout
from gptbatch.pipeline.kernels.cuda.logprobs import WIDTH
from tests.device_cases import (
    SHAPE,
    TOKEN_BYTES,
    assert_equal,
    cpu_completions,
    device_engine,
    device_model,
    packed_model,
    run,
)
from tests.fake_device import LateStream

# Settings that the host samples, alone or with others.
OF_THE_HOST = ("top_p", "min_p")


@pytest.fixture(scope="module")
def model() -> GPT:
    return device_model()


@pytest.fixture(scope="module")
def cpu_model() -> GPT:
    return our_model(random_model(**SHAPE), attention="ragged" if has_kernels() else "padded")


@pytest.fixture
def host_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each step that the host samples."""
    steps: list[int] = []
    sample = DeviceEngine._sample_on_host

    def counted(engine: DeviceEngine, launched: Any, now: float) -> None:
        steps.append(len(launched.host_rows))
        sample(engine, launched, now)

    monkeypatch.setattr(DeviceEngine, "_sample_on_host", counted)
    return steps


def prompts_of(rng: random.Random, count: int) -> list[TokenizedPrompt]:
    """Return rows with settings of every kind that the device samples, and plain ones."""
    prompts = []
    for index in range(count):
        settings = random_settings(rng) if rng.random() < 0.8 else {"top_k": 40}
        settings = {name: value for name, value in settings.items() if name not in OF_THE_HOST}
        tokens = [rng.randrange(300) for _ in range(rng.randint(1, 20))]
        budget = rng.choice([1, 4, 9, 20])
        settings["min_new_tokens"] = min(budget, settings.get("min_new_tokens", 0))
        prompts.append(tokenized(index, tokens, max_new_tokens=budget, **settings))
    return prompts


@pytest.mark.parametrize("lag", [0, 1, 4])
@pytest.mark.parametrize("batch_size", [3, 8])
def test_settings_of_every_kind_need_no_host(
    model: GPT, cpu_model: GPT, host_steps: list[int], lag: int, batch_size: int
) -> None:
    """Rows move between indices, and give their places to others."""
    prompts = prompts_of(random.Random(100 * lag + batch_size), 14)
    expected = cpu_completions(cpu_model, prompts)
    assert all(done.error is None for done in expected)
    engine = device_engine(model, batch_size=batch_size, lag=lag, stream=LateStream(lag))
    # The second time its places hold what the first rows left.
    for _ in range(2):
        assert_equal(run(engine, prompts), expected)
    assert not host_steps


@pytest.mark.parametrize("lag", [0, 4])
def test_rows_start_again_when_memory_runs_out(
    model: GPT, cpu_model: GPT, host_steps: list[int], lag: int
) -> None:
    left = [9, 40, 80]

    def fails() -> None:
        left[:] = [count - 1 for count in left]
        if 0 in left:
            raise torch.OutOfMemoryError("CUDA out of memory")

    prompts = prompts_of(random.Random(lag), 16)
    engine = device_engine(model, batch_size=16, lag=lag, stream=LateStream(0, fails))
    assert_equal(run(engine, prompts), cpu_completions(cpu_model, prompts))
    assert engine.stats.halvings == 3
    assert not host_steps


@pytest.mark.parametrize("lag", [0, 4])
def test_a_row_whose_settings_forbid_every_token_is_an_error(
    model: GPT, cpu_model: GPT, lag: int
) -> None:
    """As the third new token, when both tokens that are allowed were generated."""
    settings: list[dict[str, Any]] = [{"top_k": 40} for _ in range(3)]
    settings[1] |= {"allowed_token_ids": (7, 8), "no_repeat_ngram_size": 1}
    settings[2]["presence_penalty"] = 1.0
    prompts = [tokenized(i, [5, i], max_new_tokens=9, **each) for i, each in enumerate(settings)]
    found = run(device_engine(model, lag=lag), prompts)
    expected = cpu_completions(cpu_model, prompts)
    assert_equal(found, expected)
    error = found[1].error
    assert error is not None
    assert error.kind == "no_token_allowed"
    assert "new token 2" in error.reason


@pytest.mark.parametrize("lag", [0, 4])
def test_adjusted_rows_whose_logits_are_not_finite_are_errors(model: GPT, lag: int) -> None:
    """Also where the settings forbid the tokens with such logits."""
    broken = device_model()
    with torch.no_grad():
        broken.wte.weight[9] = float("nan")
    broken.lm_head.weight = torch.nn.Parameter(model.wte.weight.clone(), requires_grad=False)
    settings: dict[str, Any] = {"top_k": 5, "presence_penalty": 1.0, "allowed_token_ids": (7, 8)}
    prompts = [tokenized(i, [9 if i == 1 else 8, 7], **settings) for i in range(3)]
    found = run(device_engine(broken, lag=lag), prompts)
    assert [done.error and done.error.kind for done in found] == [None, "not_finite", None]


def test_bad_words_that_the_device_has_no_memory_for_are_those_of_the_host(
    model: GPT, cpu_model: GPT, host_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_automata, "MAX_STATES", 4)
    words = (("ab",), ("ba",), ("ab",), ("abcd",), ("c",))
    prompts = [
        tokenized(i, [5, i], top_k=5, max_new_tokens=6 + i, bad_words=each)
        for i, each in enumerate(words)
    ]
    engine = device_engine(model, batch_size=3, lag=1)
    assert_equal(run(engine, prompts), cpu_completions(cpu_model, prompts))
    assert host_steps


def test_bad_words_without_space_make_no_automaton(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = AdjustmentLayout(rows=2, n_positions=8, vocab_size=300, n_token_bytes=900)
    automata = DeviceAutomata(layout, TOKEN_BYTES)
    monkeypatch.setattr(device_automata, "MAX_STATES", 6)
    assert automata.hold(("abc",))

    def refuse(words: object) -> None:
        raise AssertionError("an automaton is made")

    monkeypatch.setattr(device_automata, "automaton_table", refuse)
    assert not automata.hold(("ab", "c"))


def test_log_probabilities_of_a_row_keep_no_others() -> None:
    """A view would keep the numbers of all rows of a step while the row runs."""
    rows = DeviceRows(3, 1, n_positions=8, vocab_size=300)
    sequences = [Sequence(tokenized(index, [5, index])) for index in range(3)]
    handles = np.array([rows.start(index, each) for index, each in enumerate(sequences)])
    rows.has_logprobs[handles] = True
    found = np.arange(3 * WIDTH).reshape(3, WIDTH)
    rows.keep_logprobs(handles, found)
    found[:] = 0
    for index, handle in enumerate(handles.tolist()):
        (own,) = rows.logprobs[handle]
        assert own.base is None
        assert own[0] == index * WIDTH


@pytest.mark.slow
@pytest.mark.skipif(not IS_INTERPRETED, reason="with a CUDA device the kernels are compiled")
@pytest.mark.skipif(not has_kernels(), reason="no C++ compiler")
def test_the_kernels_give_the_bits_of_the_cpu() -> None:
    """Tokens and decision margins of float32, through the Triton kernels and the C++ ones."""
    chosen: list[dict[str, Any]] = [
        {"top_k": 5, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
        {"top_k": 0, "presence_penalty": 0.7, "no_repeat_ngram_size": 2},
        {"temperature": 0.0, "logit_bias": ((5, 1.5), (6, -0.1))},
        {"top_k": 40, "allowed_token_ids": tuple(range(30)), "min_new_tokens": 2},
        {"top_k": 40, "bad_words": ("ab", "cb")},
    ]
    chosen = [{**each, "logprobs": 3 * number} for number, each in enumerate(chosen)]
    prompts = [
        tokenized(i, [*range(3), 70 + i, 71], max_new_tokens=4, stop_token_ids=(3, 4, 5), **each)
        for i, each in enumerate(chosen)
    ]
    shape: dict[str, Any] = {"n_embd": 24, "n_inner": 40, "vocab_size": 140}
    cpu, device = (packed_model(backend, **shape) for backend in (RAGGED, TRITON))
    options: dict[str, Any] = {"batch_size": 5, "eos_token_ids": (9,)}
    options["token_bytes"] = TOKEN_BYTES[:140]
    expected = run(Engine(model=cpu, **options), prompts)
    with interpreted(exact=True):
        engine = DeviceEngine(model=device, lag=1, stream=LateStream(), **options)
        found = run(engine, prompts)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.min_decision_margin == theirs.min_decision_margin
        assert ours.logprobs == theirs.logprobs
