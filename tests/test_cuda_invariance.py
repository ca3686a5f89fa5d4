"""Known failures of batch invariance in other engines on GPUs, each as a test on a GPU.

The numbers are issues of vLLM; 45323 is one of transformers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.kv_cache.spec import TRITON
from gptbatch.pipeline.model.gpt import GPT
from tests.conftest import tokenized

pytest.importorskip("triton")
from gptbatch.pipeline.engine.device_engine import DeviceEngine
from tests.device_cases import packed_model, run

pytestmark = pytest.mark.cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=DTYPES, ids=str)
def model(request: pytest.FixtureRequest) -> GPT:
    return packed_model(TRITON, device="cuda", dtype=request.param, n_positions=700)


def bits(engine: Engine, prompts: list[Any]) -> list[tuple[list[int], float | None]]:
    return [(done.token_ids, done.min_decision_margin) for done in run(engine, prompts)]


def test_the_prefill_of_a_neighbour_changes_nothing(model: GPT) -> None:
    """51902: a prefill of 10 tokens instead of 9. 48391: 257 tokens instead of 256 in a step."""
    row = tokenized(0, [5, 9, 200], top_k=40, max_new_tokens=12)
    expected = bits(DeviceEngine(model=model, batch_size=1, eos_token_ids=()), [row])
    for length in (
        *range(1, 20),
        31,
        32,
        33,
        127,
        128,
        129,
        254,
        255,
        256,
        257,
        258,
        511,
        512,
        513,
    ):
        neighbour = tokenized(1, [t % 300 for t in range(length)], top_k=40, max_new_tokens=9)
        engine = DeviceEngine(model=model, batch_size=2, eos_token_ids=())
        assert bits(engine, [row, neighbour])[:1] == expected, length


@pytest.mark.parametrize("depth", [768, 1024, 3072, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_do_not_depend_on_the_number_of_rows(dtype: torch.dtype, depth: int) -> None:
    """55131: K is a power of 2. 55466: float32 that is TF32."""
    from gptbatch.pipeline.kernels.cuda.linear import column_major, linear

    torch.manual_seed(depth)
    x, w = (torch.randn(1024, depth, device="cuda").to(dtype) for _ in range(2))
    w = column_major(w[:256]) if dtype == torch.float32 else w[:256]
    expected = torch.empty(1024, 256, device="cuda")
    linear(x, w, None, None, expected)
    for rows in (*range(1, 66), 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023):
        y = torch.empty(rows, 256, device="cuda")
        linear(x[:rows], w, None, None, y)
        assert torch.equal(y, expected[:rows]), rows
    if dtype == torch.float32:
        chain = torch.zeros(64, 256, dtype=torch.float32, device="cuda")
        for k in range(depth):
            # The product is exact in float64; the sum is rounded twice, which may differ rarely.
            product = x[:64, k, None].double() * w[None, :, k].double()
            chain = (product + chain.double()).float()
        assert (expected[:64] != chain).float().mean() < 1e-3


def test_a_graph_gives_the_bits_of_eager_steps_at_every_length(model: GPT) -> None:
    """28131: graph against eager. 45323: a length that stays in a graph."""
    prompts = [
        tokenized(i, [(7 * t + i) % 300 for t in range(length)], top_k=40, max_new_tokens=150)
        for i, length in enumerate((1, 60, 64, 120, 300))
    ]
    expected = bits(Engine(model=model, batch_size=5, eos_token_ids=()), prompts)
    engine = DeviceEngine(model=model, batch_size=5, eos_token_ids=())
    for _ in range(3):
        assert bits(engine, prompts) == expected
