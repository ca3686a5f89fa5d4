"""Log probabilities by the Triton kernels: against their twins and the host, bit for bit."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptbatch.pipeline.engine.logarithm import log, logs
from gptbatch.pipeline.engine.logprobs import MAX_TOP_LOGPROBS, token_logprobs
from gptbatch.pipeline.params.settings import SAMPLING_SETTINGS
from tests.conftest import has_kernels, tokenized
from tests.device_state import state_of
from tests.triton_interpreter import IS_INTERPRETED, interpreted

pytest.importorskip("triton")
from gptbatch.pipeline.engine import device_logprobs
from gptbatch.pipeline.kernels.cuda.adjust import adjust
from gptbatch.pipeline.kernels.cuda.adjustments import MAX_BIASES
from gptbatch.pipeline.kernels.cuda.logprobs import (
    MAX_TOP,
    WIDTH,
    look_up,
    look_up_twin,
    measure,
)
from gptbatch.pipeline.kernels.cuda.state import LOGPROBS, POSITION
from tests.fake_device import measure_twin
from tests.test_cuda_adjust import Rows, block_max, padded
from tests.test_row_settings import VOCAB_SIZE

pytestmark = pytest.mark.skipif(
    not IS_INTERPRETED, reason="with a CUDA device the kernels are compiled: make cuda-check"
)


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_the_logarithm_of_an_array_has_the_bits_of_that_of_a_number(x: float) -> None:
    assert logs(np.array([x])).tolist() == [log(x)]


def test_every_row_fits_what_the_kernels_hold() -> None:
    assert MAX_TOP == MAX_TOP_LOGPROBS == SAMPLING_SETTINGS["logprobs"].maximum
    assert SAMPLING_SETTINGS["logit_bias"].max_items == MAX_BIASES


def logits_with_ties(rows: int, vocab_size: int) -> Tensor:
    logits = torch.randn(rows, vocab_size) * 5
    logits[0] = logits[0].round()
    logits[1] = 0.0
    logits[2, vocab_size // 2 :] = -math.inf
    logits[3, 1:] = -math.inf
    return logits


@pytest.mark.parametrize("vocab_size", [2, 7, 128, 300, 70_000])
def test_log_probabilities_are_those_of_the_host(vocab_size: int) -> None:
    """With ties, and logits of -inf; 70,000 tokens have masses of fewer bits."""
    if has_kernels():
        from gptbatch.pipeline.kernels.build import load_kernels

        load_kernels()
    torch.manual_seed(vocab_size)
    n_top = [20, 3, 20, 5, 0, 1, 8][: 4 if vocab_size > 300 else None]
    logits = logits_with_ties(len(n_top), vocab_size)
    sampled = torch.randint(vocab_size, (len(n_top),)).int()
    sampled[2:4] = 0
    params = [tokenized(0, [1], max_new_tokens=1, logprobs=n).prompt.params for n in n_top]
    state = state_of([{"params": each} for each in params])
    found, twin = torch.full((2, len(n_top), WIDTH), 7)
    measure(logits, block_max(logits), state, found)
    measure_twin(logits, block_max(logits), state, twin)
    look_up(logits, sampled, state, None, found)
    look_up_twin(logits, sampled, state, None, twin)
    assert torch.equal(found, twin)
    computed = [
        logprobs
        for own, n in zip(found.numpy(), n_top, strict=True)
        for logprobs in device_logprobs.token_logprobs(own[None], n, vocab_size)
    ]
    tokens = sampled.tolist()
    assert computed == token_logprobs(logits, tokens, n_top, native=False)
    if has_kernels():
        assert computed == token_logprobs(logits, tokens, n_top, native=True)


def test_the_logit_of_a_token_is_that_before_its_adjustment() -> None:
    settings: list[dict[str, Any]] = [
        {"repetition_penalty": 1.7, "logprobs": 2},
        {"logit_bias": ((5, 3.0), (9, -2.0)), "logprobs": 2},
        {"allowed_token_ids": (5, 7, 9), "logprobs": 2},
        {"presence_penalty": 1.0},
    ]
    rows = Rows(settings, seed=3)
    found, twin = torch.full((2, 4, WIDTH), 7)
    rng = random.Random(0)
    for _ in range(4):
        rows.add()
        logits = torch.randn(4, VOCAB_SIZE)
        adjusted, maxima = padded(logits)
        measure(adjusted, maxima, rows.state, found)
        measure_twin(adjusted, maxima, rows.state, twin)
        adjust(adjusted, maxima, rows.state, rows.device)
        # The latest token of the first row is one whose logit was changed, as are 5 and 9.
        sampled = torch.tensor([rows.sequences[0].tokens[-1], 5, 9, rng.randrange(300)]).int()
        look_up(adjusted, sampled, rows.state, rows.device, found)
        look_up_twin(adjusted, sampled, rows.state, rows.device, twin)
        assert torch.equal(found, twin)
        computed = device_logprobs.token_logprobs(found[:3].numpy(), 2, VOCAB_SIZE)
        assert computed == token_logprobs(logits[:3], sampled[:3].tolist(), [2] * 3, native=False)
    assert (found[3] == 7).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_without_log_probabilities_or_a_token_write_nothing(value: float) -> None:
    params = tokenized(0, [1], max_new_tokens=1, logprobs=2).prompt.params
    state = state_of([{"params": params}] * 4)
    state[0, POSITION.value], state[1, LOGPROBS.value] = -1, 0
    logits = torch.randn(4, 300)
    logits[2, 5], logits[3] = value, -math.inf
    for first, second in ((measure, look_up), (measure_twin, look_up_twin)):
        found = torch.full((4, WIDTH), 7)
        first(logits, block_max(logits), state, found)
        second(logits, torch.tensor([5, 5, -1, -1]).int(), state, None, found)
        assert (found == 7).all()
