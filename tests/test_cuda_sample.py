"""The sampler of the device under Triton's interpreter: the tokens and margins of the engine.

Where the C++ kernels can be built they are the reference, and margins must be equal bit for bit.
torch takes its logarithms from another library, so that margins may differ in the last bit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gptbatch.pipeline.engine.sampling import sample_tokens
from gptbatch.pipeline.params.sampling_params import SamplingParams
from tests.conftest import has_kernels
from tests.device_state import state_of
from tests.triton_interpreter import IS_INTERPRETED, interpreted

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(
        not IS_INTERPRETED, reason="with a CUDA device the kernels are compiled: make cuda-check"
    ),
    # numpy, which the interpreter computes with, warns of infinity and NaN.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

INFINITE = math.inf
FILTERS: tuple[dict[str, Any], ...] = ({}, {"top_k": 5}, {"top_p": 0.5})


@pytest.fixture(scope="module")
def cuda() -> Iterator[Any]:
    """Import the sampler, interpreted."""
    from gptbatch.pipeline.kernels.cuda import sample

    with interpreted():
        yield sample


@pytest.fixture
def small(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the sampler with small tiles and lists, so that few tokens overflow them."""
    for name, size in (("TILE", 128), ("SCORES", 64), ("CAPACITY", 16)):
        monkeypatch.setattr(cuda, name, size)
    return cuda


def settings(**given: Any) -> SamplingParams:
    defaults = {"seed": 2**40, "temperature": 1.0, "top_k": 0, "max_new_tokens": 9}
    return SamplingParams(**{**defaults, **given})


def sample(
    cuda: Any,
    logits: Tensor,
    params: Sequence[SamplingParams],
    bounds: Sequence[float],
    **changes: int,
) -> tuple[list[int], list[float]]:
    """Run the kernels over scratch memory with garbage in it; return tokens and margins."""
    from gptbatch.pipeline.kernels.cuda.state import MARGIN

    rows, vocab_size = logits.shape
    padded = torch.nn.functional.pad(logits, (0, -vocab_size % 128), value=-INFINITE)
    # amax keeps NaN, as the head's maxima do.
    block_max = padded.view(rows, -1, 128).amax(dim=2)
    state = state_of(
        [
            {"position": 5, "step": row, "params": each, "margin": bound, **changes}
            for row, (each, bound) in enumerate(zip(params, bounds, strict=True))
        ],
        vocab_size=vocab_size,
    )
    tokens = torch.full((rows,), -9).int()
    sizes = cuda.scratch_sizes(block_max.shape[1])
    scratch = torch.full((rows, sizes[0]), 77).int(), torch.full((rows, sizes[1]), 2**40)
    cuda.sample(logits, block_max, state, scratch, tokens, full_vocab=True, top_p=True)
    margins = state[:, MARGIN.value].contiguous().view(torch.float64)
    return tokens.tolist(), margins.tolist()


def check(
    cuda: Any, logits: Tensor, params: Sequence[SamplingParams], bounds: Sequence[float] = ()
) -> None:
    """Compare with the engine's sampler."""
    bounds = bounds or [INFINITE] * len(params)
    native = has_kernels()
    if native:
        from gptbatch.pipeline.kernels.build import load_kernels

        load_kernels()
    expected = sample_tokens(logits, params, range(len(params)), bounds, native=native)
    tokens, margins = sample(cuda, logits, params, bounds)
    assert tokens == [sampled.token for sampled in expected]
    expected_margins = [
        min(bound, INFINITE if sampled.decision_margin is None else sampled.decision_margin)
        for bound, sampled in zip(bounds, expected, strict=True)
    ]
    assert margins == (expected_margins if native else pytest.approx(expected_margins, abs=1e-9))


def normal(vocab_size: int) -> Tensor:
    return torch.randn(vocab_size) * 3


def ties(vocab_size: int) -> Tensor:
    return normal(vocab_size).round()


def flat(vocab_size: int) -> Tensor:
    return torch.randn(vocab_size) * 0.1 - 50


def masked(vocab_size: int) -> Tensor:
    logits = normal(vocab_size)
    logits[torch.rand(vocab_size) < 0.9] = -INFINITE
    logits[vocab_size // 2] = 1.0
    return logits


def peaked(vocab_size: int) -> Tensor:
    logits = normal(vocab_size)
    logits[vocab_size // 3] = 30.0
    return logits


KINDS = (normal, ties, flat, masked, peaked)
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0, "top_p": 0.9, "min_p": 0.5},
    {"top_k": 1},
    {"top_k": 64, "min_p": 0.01},
    {"top_k": 190, "temperature": 0.7},
    {"min_p": 0.05},
    {"top_p": 0.9},
    {"top_p": 0.01, "temperature": 2.0},
    {"top_p": 0.999999, "temperature": 0.1},
    {"top_k": 40, "top_p": 0.7},
    {"top_k": 150, "top_p": 0.95, "min_p": 0.02},
)


BOUNDS = (INFINITE, 0.5, INFINITE, 0.05, INFINITE, INFINITE, INFINITE, 1e-3, *[INFINITE] * 3)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_margins_are_those_of_the_engine(
    cuda: Any, kind: Callable[[int], Tensor], first: int
) -> None:
    torch.manual_seed(1)
    chosen = SETTINGS[first::2]
    logits = torch.stack([kind(700) for _ in chosen])
    check(cuda, logits, [settings(**each) for each in chosen], BOUNDS[first::2])


@pytest.mark.parametrize("kind", KINDS)
def test_lists_that_overflow_change_nothing(small: Any, kind: Callable[[int], Tensor]) -> None:
    torch.manual_seed(2)
    chosen = (*SETTINGS[3:7], *SETTINGS[9:])
    check(
        small,
        torch.stack([kind(200) for _ in chosen]),
        [settings(**each) for each in chosen],
    )


@pytest.mark.parametrize("vocab_size", [2, 129])
def test_small_vocabularies(cuda: Any, vocab_size: int) -> None:
    torch.manual_seed(vocab_size)
    chosen: list[dict[str, Any]] = [*SETTINGS[1::2], {"top_k": vocab_size // 2 + 1}]
    chosen += [{"top_k": vocab_size - 1}, {"top_k": vocab_size, "top_p": 0.5}]
    logits = torch.stack([normal(vocab_size) for _ in chosen])
    check(cuda, logits, [settings(**each) for each in chosen])


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 100.0])
def test_temperatures_far_from_1(cuda: Any, temperature: float) -> None:
    torch.manual_seed(3)
    chosen: list[dict[str, Any]] = [{"top_p": 0.9}, {"top_p": 0.3, "top_k": 150}]
    chosen += [{"min_p": 0.5}, {"top_k": 200}]
    logits = torch.stack([normal(400) for _ in chosen])
    check(cuda, logits, [settings(**{**each, "temperature": temperature}) for each in chosen])


def test_all_logits_equal(small: Any) -> None:
    """More ties with the k-th than any list can hold."""
    chosen: list[dict[str, Any]] = [{"top_k": 5}, {"top_k": 200}, {"top_p": 0.5}]
    chosen += [{"top_k": 3, "top_p": 0.1}]
    check(small, torch.zeros(4, 300), [settings(**each) for each in chosen])


def random_case(rng: random.Random) -> tuple[Tensor, SamplingParams, float]:
    """Return logits (1, V), settings, and a bound of the margin."""
    vocab_size = rng.choice([5, 130, 200, 700, 1300])
    top_k = rng.choice([0, 0, 1, 2, 10, 64, 65, 150, vocab_size - 1, vocab_size // 2])
    params = settings(
        seed=rng.randrange(2**60),
        temperature=rng.choice([0.0, 1e-3, 0.1, 0.7, 1.0, 2.0, 50.0]),
        top_k=top_k,
        top_p=rng.choice([1.0, 1.0, 0.9, 0.9, 0.5, 0.01, 0.999999, 1e-9]),
        min_p=rng.choice([0.0, 0.0, 0.001, 0.05, 0.5, 1.0]),
    )
    bound = rng.choice([INFINITE, INFINITE, 0.5, 0.05, 1e-3, 0.0])
    return rng.choice(KINDS)(vocab_size)[None], params, bound


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_random_settings(small: Any, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(25):
        logits, params, bound = random_case(rng)
        check(small, logits, [params], [bound])


@pytest.mark.parametrize("value", [math.nan, INFINITE])
def test_logits_that_are_not_finite_are_flagged(cuda: Any, value: float) -> None:
    from gptbatch.pipeline.kernels.cuda.state import NO_TOKEN

    for given in FILTERS:
        logits = torch.randn(3, 300)
        logits[0, 137] = value
        logits[2] = -INFINITE
        tokens, margins = sample(cuda, logits, [settings(**given)] * 3, [0.5] * 3)
        assert tokens[0] == tokens[2] == NO_TOKEN.value
        assert margins[0] == margins[2] == 0.5
        assert tokens[1] >= 0


def test_empty_rows_and_those_of_the_host_stay_as_they_are(cuda: Any) -> None:
    from gptbatch.pipeline.kernels.cuda.state import HOST_SAMPLES

    for given in FILTERS:
        for changes in ({"position": -1}, {"top_k": HOST_SAMPLES.value}):
            found = sample(cuda, torch.randn(1, 300), [settings(**given)], [0.5], **changes)
            assert found == ([-9], [0.5])
