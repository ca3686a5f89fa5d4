"""Raw log probabilities: the formula, ties, and bits that do not depend on the batch."""

from __future__ import annotations

import math
import random
import struct

import pytest
import torch
from torch import Tensor

from gptbatch.pipeline.engine.logprobs import is_most_likely, token_logprobs
from gptbatch.pipeline.engine.reference import token_logprob
from gptbatch.pipeline.types import TokenLogprobs
from tests.conftest import has_kernels


@pytest.fixture(params=[False, True], ids=["torch", "kernels"])
def native(request: pytest.FixtureRequest) -> bool:
    if request.param and not has_kernels():
        pytest.skip("no C++ compiler")
    return bool(request.param)


def random_logits(rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab_size, generator=generator) * 4 - 35


def float32(number: float) -> float:
    (rounded,) = struct.unpack("f", struct.pack("f", number))
    return float(rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 2, 65, 700])
def test_logprobs_are_those_of_the_oracle_and_of_softmax(
    native: bool, vocab_size: int, dtype: torch.dtype
) -> None:
    logits = random_logits(20, vocab_size).to(dtype)
    logits[3, :] = -35
    tokens = [row % vocab_size for row in range(20)]
    found = token_logprobs(logits, tokens, [0] * 20, native=native)
    softmax = torch.log_softmax(logits.double(), dim=1)
    for row, (token, logprob) in enumerate(zip(tokens, found, strict=True)):
        assert logprob.logprob == float32(token_logprob(logits[row], token))
        assert logprob.logprob == pytest.approx(softmax[row, token].item(), rel=1e-6, abs=1e-7)
        assert (logprob.top_ids, logprob.top_logprobs) == ([], [])


def test_the_most_likely_tokens_are_sorted_and_ties_go_to_the_smaller_id(native: bool) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, -math.inf]] * 9)
    n_top = [0, 1, 2, 3, 4, 5, 6, 7, 20]
    found = token_logprobs(logits, [2] * 9, n_top, native=native)
    order = [1, 3, 2, 4, 5, 0, 6]
    for n, item in zip(n_top, found, strict=True):
        assert item.top_ids == order[:n]
        assert item.top_logprobs == [float32(token_logprob(logits[0], t)) for t in order[:n]]
    assert sum(math.exp(x) for x in found[-1].top_logprobs) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("vocab_size", [1, 5, 63, 64, 65, 129, 1500])
def test_the_most_likely_tokens_are_those_of_a_sort(vocab_size: int) -> None:
    logits = random_logits(63, vocab_size, seed=vocab_size)
    logits[::3] = logits[::3].round()
    logits[1] = -35
    logits[2, vocab_size // 2 :] = -math.inf
    n_top = [row % 21 for row in range(63)]
    found = token_logprobs(logits, [0] * 63, n_top, native=False)
    for row, n, item in zip(logits.tolist(), n_top, found, strict=True):
        order = sorted(range(vocab_size), key=lambda token: (-row[token], token))
        assert item.top_ids == (order[:n] if max(row) > -math.inf else [])


def test_bits_do_not_depend_on_the_batch(native: bool) -> None:
    logits = random_logits(40, 3001, seed=1)
    logits[5:9] = logits[5:9].round()
    rng = random.Random(2)
    tokens = [rng.randrange(3001) for _ in range(40)]
    n_top = [rng.choice([0, 0, 1, 5, 20]) for _ in range(40)]
    found = token_logprobs(logits, tokens, n_top, native=native)
    order = rng.sample(range(40), 40)
    for size in (1, 7):
        for first in range(0, 40, size):
            rows = order[first : first + size]
            again = token_logprobs(
                logits[rows], [tokens[i] for i in rows], [n_top[i] for i in rows], native=native
            )
            assert again == [found[i] for i in rows]


def test_torch_and_kernels_give_equal_bits_on_the_vocabulary_of_gpt2() -> None:
    if not has_kernels():
        pytest.skip("no C++ compiler")
    for dtype in (torch.float32, torch.bfloat16):
        logits = random_logits(6, 50257, seed=3).to(dtype)
        tokens = logits.argmax(dim=1).tolist()
        expected, found = (
            token_logprobs(logits, tokens, [20] * 6, native=native) for native in (False, True)
        )
        assert found == expected
        assert [len(item.top_ids) for item in found] == [20] * 6


def test_rows_that_are_not_finite_have_no_logprobs(native: bool) -> None:
    logits = random_logits(4, 100)
    logits[0, 3], logits[1, 3], logits[2] = math.nan, math.inf, -math.inf
    found = token_logprobs(logits, [5] * 4, [2] * 4, native=native)
    assert all(math.isnan(item.logprob) and item.top_ids == [] for item in found[:3])
    assert found[3] == token_logprobs(logits[3:], [5], [2], native=native)[0]
    assert token_logprobs(logits[:0], [], [], native=native) == []


def test_a_token_without_probability_has_minus_infinity(native: bool) -> None:
    logits = torch.tensor([[0.0, -math.inf], [0.0, -3e38]])
    found = token_logprobs(logits, [1, 1], [2, 0], native=native)
    assert found[0] == TokenLogprobs(-math.inf, [0, 1], [0.0, -math.inf])
    assert found[1].logprob == float32(-3e38)


def test_is_most_likely_takes_the_smallest_id_of_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0]] * 4)
    assert is_most_likely(logits, torch.arange(4)).tolist() == [False, True, False, False]
