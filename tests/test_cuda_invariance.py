"""Known failures of batch invariance in other engines on GPUs, each as a test here.

The numbers in the names are issues of vLLM and of transformers. Tests marked cuda need a GPU. The
others run the kernels by Triton's interpreter with the arithmetic of a GPU, or look at what triton
compiles (tests/test_cuda_compile.py), or replay the launches of a step as a graph does.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gptbatch.pipeline.engine.engine import Engine
from gptbatch.pipeline.kv_cache.spec import TRITON
from gptbatch.pipeline.model.gpt import GPT
from tests import arithmetic_reference
from tests.conftest import tokenized
from tests.triton_interpreter import IS_INTERPRETED, interpreted

pytest.importorskip("triton")
from gptbatch.pipeline.engine.device_engine import DeviceEngine
from gptbatch.pipeline.kernels.cuda.kernels import TRITON as KERNELS
from gptbatch.pipeline.kernels.cuda.linear import column_major, linear
from gptbatch.pipeline.kernels.cuda.tiles import tile_for
from tests.device_cases import device_engine, device_model, packed_model, random_prompts, run
from tests.fake_device import TWINS, GraphStream, LateStream

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_interpreter = pytest.mark.skipif(
    not IS_INTERPRETED, reason="with a CUDA device the kernels are compiled: make cuda-check"
)


@pytest.fixture(params=DTYPES, ids=str)
def gpu_model(request: pytest.FixtureRequest) -> GPT:
    return packed_model(TRITON, device="cuda", dtype=request.param, n_positions=700)


@pytest.fixture
def exact() -> Iterator[None]:
    """Interpret the kernels with the arithmetic of a GPU."""
    with interpreted(exact=True):
        yield


def bits(engine: Engine, prompts: list[Any]) -> list[tuple[list[int], float | None]]:
    return [(done.token_ids, done.min_decision_margin) for done in run(engine, prompts)]


@pytest.mark.slow
@needs_interpreter
@pytest.mark.usefixtures("exact")
# numpy, which the interpreter computes with, warns of infinity less infinity.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_vllm_51902_a_prefill_of_10_tokens_beside_a_row_instead_of_9() -> None:
    """The interpreter is slow, so the model is tiny, and the row decodes beside the prefill."""
    shape: dict[str, Any] = {"n_layer": 1, "n_embd": 16, "n_inner": 16, "vocab_size": 30}
    model = packed_model(TRITON, **shape)
    row = tokenized(0, [5, 9, 20], temperature=0.0, max_new_tokens=2)
    found = []
    for length in (9, 10):
        engine = device_engine(
            model, batch_size=2, lag=0, kernels=KERNELS, stream=LateStream(0), eos_token_ids=()
        )
        beside = tokenized(1, [*range(length)], temperature=0.0, max_new_tokens=1)
        found.append(bits(engine, [row, None, beside])[0])
    assert found[0] == found[1]


@pytest.mark.cuda
def test_vllm_51902_the_prefill_of_a_neighbour_changes_nothing(gpu_model: GPT) -> None:
    """Of 10 tokens instead of 9, and so on; 48391: 257 tokens instead of 256 in a step."""
    row = tokenized(0, [5, 9, 200], top_k=40, max_new_tokens=12)
    expected = bits(DeviceEngine(model=gpu_model, batch_size=1, eos_token_ids=()), [row])
    around = (32, 128, 256, 512)
    for length in (*range(1, 20), *(size + i for size in around for i in (-1, 0, 1))):
        neighbour = tokenized(1, [t % 300 for t in range(length)], top_k=40, max_new_tokens=9)
        engine = DeviceEngine(model=gpu_model, batch_size=2, eos_token_ids=())
        assert bits(engine, [row, neighbour])[:1] == expected, length


@needs_interpreter
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("depth", [1023, 1024, 4096])
def test_vllm_55131_products_over_a_power_of_2_are_one_chain(depth: int) -> None:
    """In every tile of the table."""
    torch.manual_seed(depth)
    x, w = torch.randn(33, depth), column_major(torch.randn(20, depth))
    expected = arithmetic_reference.linear(x[:17].numpy(), w.numpy())
    for rows in (1, 16, 17, 33):
        y = torch.empty(rows, 20)
        linear(x[:rows], w, None, None, y)
        assert np.array_equal(y[:17].numpy(), expected[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_vllm_55131_a_power_of_2_gets_the_tile_of_its_neighbours(dtype: torch.dtype) -> None:
    for depth in (1024, 4096):
        for rows in (1, 64, 1024):
            tiles = {tile_for(dtype, rows, 512, depth + i) for i in (-16, 0, 16)}
            assert len(tiles) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("depth", [768, 1024, 3072, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vllm_55131_and_55466_products_do_not_depend_on_the_number_of_rows(
    dtype: torch.dtype, depth: int
) -> None:
    """55131: K is a power of 2. 55466: float32 that is TF32."""
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


@pytest.mark.usefixtures("restored_precision")
def test_vllm_55466_float32_is_not_tf32_in_torch_either() -> None:
    """Where attention is padded, and a program around gptbatch has allowed TF32."""
    from gptbatch.pipeline.config import EngineConfig
    from gptbatch.pipeline.kv_cache.spec import PADDED
    from gptbatch.pipeline.model.loading import prepare_model

    torch.set_float32_matmul_precision("medium")
    prepare_model(
        EngineConfig(attention="padded"),
        torch.device("cpu"),
        lambda backend: packed_model(PADDED),
        batch_invariance="off",
    )
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.fixture
def restored_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_vllm_28131_and_transformers_45323_a_graph_keeps_no_length() -> None:
    """Launches are replayed with the arguments of their capture, while sequences grow and end."""
    model = device_model()
    prompts = random_prompts(random.Random(4), 24, longest=60)
    expected = bits(device_engine(model, stream=LateStream(0)), prompts)
    graphs = GraphStream()
    assert bits(device_engine(model, stream=graphs, kernels=graphs.kernels), prompts) == expected
    assert graphs.n_replays > 50


def test_transformers_45323_the_replay_finds_a_length_that_stays() -> None:
    def embed_once(*arguments: Any) -> None:
        """Write the positions of the capture."""
        TWINS.embed(*arguments)
        positions = arguments[-1]
        kept = lengths.setdefault(len(positions), positions.clone())
        positions.copy_(kept)

    lengths: dict[int, torch.Tensor] = {}
    prompts = [tokenized(i, [5, i], top_k=5, max_new_tokens=12) for i in range(3)]
    model = device_model()
    expected = bits(device_engine(model, stream=LateStream(0)), prompts)
    graphs = GraphStream(dataclasses.replace(TWINS, embed=embed_once))
    assert bits(device_engine(model, stream=graphs, kernels=graphs.kernels), prompts) != expected


@pytest.mark.cuda
def test_vllm_28131_and_transformers_45323_a_graph_has_the_bits_of_eager_steps(
    gpu_model: GPT,
) -> None:
    """At every length: graph against eager, and a length that stays in a graph."""
    prompts = [
        tokenized(i, [(7 * t + i) % 300 for t in range(length)], top_k=40, max_new_tokens=150)
        for i, length in enumerate((1, 60, 64, 120, 300))
    ]
    expected = bits(Engine(model=gpu_model, batch_size=5, eos_token_ids=()), prompts)
    engine = DeviceEngine(model=gpu_model, batch_size=5, eos_token_ids=())
    for _ in range(3):
        assert bits(engine, prompts) == expected
