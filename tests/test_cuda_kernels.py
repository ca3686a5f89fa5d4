"""The Triton kernels under Triton's interpreter: against their torch twins, and bit for bit.

On whole numbers every sum is exact, so a kernel and its twin must be equal for every tile. With the
exact arithmetic of tests/triton_interpreter.py, the float32 kernels must give the bits of
docs/arithmetic.md. A GPU's own order of sums shows only there: `make cuda-check`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import arithmetic_reference
from tests.device_state import state_of
from tests.paths import REPOSITORY
from tests.triton_interpreter import IS_INTERPRETED, interpreted

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not IS_INTERPRETED, reason="with a CUDA device the kernels are compiled: make cuda-check"
)

HEADS, HEAD_SIZE = 3, 13
WIDTH = HEADS * HEAD_SIZE
SCALE = HEAD_SIZE**-0.5
ACTIVATION_NAMES = ("none", "gelu_tanh", "gelu", "relu", "silu", "tanh")


@pytest.fixture(scope="module")
def cuda() -> Iterator[Any]:
    """Import the kernels, interpreted."""
    from gptbatch.pipeline.kernels.cuda import (
        advance,
        attend,
        embed,
        linear,
        norm,
        state,
        store,
        tiles,
    )

    with interpreted():
        yield SimpleNamespace(
            **{module.__name__.rpartition(".")[2]: module for module in (advance, attend, embed)},
            **{module.__name__.rpartition(".")[2]: module for module in (linear, norm)},
            **{module.__name__.rpartition(".")[2]: module for module in (state, store, tiles)},
        )


@pytest.fixture(scope="module")
def exact(cuda: Any) -> Iterator[Any]:
    """Return the kernels with the arithmetic of a GPU."""
    with interpreted(exact=True):
        yield cuda


def whole(*shape: int, low: int = -4, high: int = 5) -> Tensor:
    return torch.randint(low, high, shape).float()


def bits_equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


# bm, bn, bk
TILES = [
    *((16, 16, 16), (16, 32, 32), (32, 16, 64), (64, 64, 16)),
    *(
        pytest.param(*tile, marks=pytest.mark.slow)
        for tile in ((16, 128, 16), (32, 64, 32), (128, 64, 64), (64, 128, 128), (128, 128, 16))
    ),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("bm", "bn", "bk"), TILES)
def test_linear_equals_its_twin_for_every_tile(
    cuda: Any, bm: int, bn: int, bk: int, transposed: bool
) -> None:
    torch.manual_seed(bm + bn)
    x, w, bias, residual = whole(34, 50), whole(75, 50), whole(75), whole(34, 75)
    weight = cuda.linear.column_major(w) if transposed else w
    for given, activation in ((residual, "none"), (None, "relu")):
        y, twin = torch.full((2, 34, 75), float("nan"))
        block_max = torch.empty(34, -(-75 // bn))
        tile = cuda.tiles.Tile(bm, bn, bk)
        cuda.linear.linear(x, weight, bias, given, y, activation, block_max, tile=tile)
        cuda.linear.linear_twin(x, w, bias, given, twin, activation)
        assert torch.equal(y, twin)
        padded = torch.nn.functional.pad(y, (0, -75 % bn), value=float("-inf"))
        assert torch.equal(block_max, padded.view(34, -1, bn).amax(dim=2))


@pytest.mark.parametrize("rows", [1, 16, 65])
def test_tiles_of_the_table_write_the_maxima_of_128_columns(cuda: Any, rows: int) -> None:
    x, w, y, twin = whole(rows, 20), whole(300, 20), torch.empty(rows, 300), torch.empty(rows, 300)
    maxima, twin_maxima = torch.empty(rows, 3), torch.empty(rows, 3)
    cuda.linear.linear(x, w, None, None, y, block_max=maxima)
    cuda.linear.linear_twin(x, w, None, None, twin, block_max=twin_maxima)
    assert torch.equal(y, twin)
    assert torch.equal(maxima, twin_maxima)


@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
def test_linear_has_the_bits_of_the_arithmetic(exact: Any, activation: str) -> None:
    torch.manual_seed(1)
    x, w, bias = torch.randn(5, WIDTH) * 3, torch.randn(70, WIDTH), torch.randn(70)
    y = torch.empty(5, 70)
    exact.linear.linear(
        x,
        exact.linear.column_major(w),
        bias,
        None,
        y,
        activation,
        tile=exact.tiles.Tile(16, 32, 16),
    )
    expected = arithmetic_reference.linear(x.numpy(), w.numpy()) + bias.numpy()
    if activation != "none":
        expected = arithmetic_reference.activate(activation, expected)  # type: ignore[arg-type]
    assert np.array_equal(y.numpy(), expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_activations_are_close_to_torch_over_a_wide_range(exact: Any) -> None:
    x = torch.cat([torch.linspace(-30, 30, 400), torch.tensor([0.0, 1e-30, 1e4, -1e4, 1e30])])
    for activation in ACTIVATION_NAMES:
        y, twin = torch.empty(len(x), 1), torch.empty(len(x), 1)
        exact.linear.linear(x[:, None], torch.ones(1, 1), None, None, y, activation)
        exact.linear.linear_twin(x[:, None], torch.ones(1, 1), None, None, twin, activation)
        torch.testing.assert_close(y, twin, rtol=2e-6, atol=2e-6)


# numpy, which the interpreter computes with, warns of NaN.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
def test_linear_keeps_nan(cuda: Any, activation: str) -> None:
    x, w = whole(16, 32), whole(32, 32)
    x[3, 4] = float("nan")
    y, block_max = torch.empty(16, 32), torch.empty(16, 1)
    cuda.linear.linear(x, w, None, None, y, activation, block_max)
    assert y[3].isnan().all()
    assert block_max[3].isnan().all()
    assert y[4].isfinite().all()


@pytest.mark.parametrize("width", [1, 5, 33, 100, 1041])
def test_norm_has_the_bits_of_the_arithmetic(exact: Any, width: int) -> None:
    torch.manual_seed(width)
    x, weight, bias = torch.randn(4, width) * 3 + 1, torch.randn(width), torch.randn(width)
    y, twin = torch.empty(4, width), torch.empty(4, width)
    exact.norm.norm(x, weight, bias, y, 1e-5)
    expected = arithmetic_reference.layer_norm(x.numpy(), weight.numpy(), bias.numpy(), 1e-5)
    assert np.array_equal(y.numpy(), expected)
    exact.norm.norm_twin(x, weight, bias, twin, 1e-5)
    torch.testing.assert_close(y, twin, rtol=1e-5, atol=1e-5)


def test_embed_takes_decode_rows_from_the_state_and_others_from_the_chunk(cuda: Any) -> None:
    wte, wpe = whole(20, WIDTH), whole(80, WIDTH)
    state = state_of([{"token": 3, "position": 7}, {"token": 9, "position": -1}, {"token": 19}])
    chunk = torch.tensor([[5, 6, 0, 1], [70, 71, -1, 2], [2, 2, 0, 7]])
    found = []
    for embed in (cuda.embed.embed, cuda.embed.embed_twin):
        x, seq_indices, positions = (
            torch.empty(6, WIDTH),
            torch.empty(6).int(),
            torch.empty(6).int(),
        )
        embed(state, chunk, 3, wte, wpe, x, seq_indices, positions)
        found.append((x, seq_indices, positions))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    x, seq_indices, positions = found[0]
    assert positions.tolist() == [7, -1, 0, 70, 71, -1]
    assert seq_indices.tolist() == [0, 1, 2, 2, 2, 0]
    assert torch.equal(x[3], wte[5] + wpe[70])
    assert torch.equal(x[1], torch.zeros(WIDTH))


def test_every_launch_can_be_compiled_ahead() -> None:
    """By `launch`; `kernel[grid](...)` would run on the buffers without memory of that time."""
    folder = REPOSITORY / "pipeline" / "kernels" / "cuda"
    texts = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert len(texts) > 9
    assert [name for name, text in texts.items() if re.search(r"_kernel\[", text)] == []


class Paged:
    """A cache filled with the keys and values of some sequences; all other places are garbage."""

    def __init__(self, cuda: Any, positions: list[int], *, int8: bool, whole_numbers: bool) -> None:
        rows, per_row = len(positions), max(positions) // 64 + 1
        self.positions = torch.tensor(positions).int()
        self.seq_indices = torch.randperm(rows).int()
        self.tables = torch.randperm(rows * per_row).view(rows, per_row)
        shape = (rows * per_row, 2, HEADS, 64)
        if int8:
            data = torch.full((*shape, HEAD_SIZE), 77, dtype=torch.int8)
            self.cache = cuda.store.LayerCache(data, torch.full(shape, float("nan")))
        else:
            self.cache = cuda.store.LayerCache(torch.full((*shape, HEAD_SIZE), float("nan")))
        make = whole if whole_numbers else torch.randn
        # All tokens of each row.
        self.qkv = [make(max(1, position + 1), 3 * WIDTH) for position in positions]

    def store(self, store: Any, last: int = 1000) -> None:
        """Store the last tokens of each row."""
        for row, position in enumerate(self.positions.tolist()):
            first, end = max(0, position + 1 - last), position + 1
            if end:
                seq_indices = self.seq_indices[row].expand(end - first).contiguous()
                positions = torch.arange(first, end).int()
                store(self.qkv[row][first:end], self.cache, self.tables, seq_indices, positions)

    def attend(self, attend: Any) -> Tensor:
        last = torch.stack([qkv[-1] for qkv in self.qkv])
        out = torch.full((len(last), WIDTH), float("nan"))
        attend(last, self.cache, self.tables, self.seq_indices, self.positions, out, SCALE)
        return out


@pytest.mark.parametrize("int8", [False, True])
def test_store_equals_its_twin(cuda: Any, int8: bool) -> None:
    torch.manual_seed(0)
    paged = Paged(cuda, [0, 66, -1, 70], int8=int8, whole_numbers=False)
    paged.qkv[1][-3, WIDTH : WIDTH + HEAD_SIZE] = 0
    written = []
    for store in (cuda.store.store, cuda.store.store_twin):
        paged.cache.data.fill_(77)
        paged.store(store, last=7)
        written.append((paged.cache.data.clone(), paged.cache.scales))
    assert torch.equal(written[0][0], written[1][0])
    if int8:
        assert torch.equal(written[0][1].nan_to_num(), written[1][1].nan_to_num())
    # Only the tokens that are there: 2 parts, 1 + 7 + 7 tokens.
    assert (written[0][0] != 77).any(dim=-1).sum() == 2 * HEADS * (1 + 7 + 7)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("positions", [[0, 62, -1, 130], [63, 64, 5]])
def test_attend_has_the_bits_of_the_arithmetic(
    exact: Any, positions: list[int], int8: bool
) -> None:
    torch.manual_seed(0)
    paged = Paged(exact, positions, int8=int8, whole_numbers=False)
    paged.store(exact.store.store_twin)
    out = paged.attend(exact.attend.attend)
    for row, position in enumerate(positions):
        if position < 0:
            assert torch.equal(out[row], torch.zeros(WIDTH))
            continue
        q, keys, values = (
            paged.qkv[row].numpy().reshape(-1, 3, HEADS, HEAD_SIZE).transpose(1, 2, 0, 3)
        )
        expected = arithmetic_reference.attend(
            np.ascontiguousarray(q[:, -1]), keys, values, np.float32(SCALE), int8=int8
        )
        assert np.array_equal(out[row].numpy(), expected.ravel())
    twin = paged.attend(exact.attend.attend_twin)
    torch.testing.assert_close(out, twin, rtol=1e-3 if int8 else 1e-5, atol=1e-4 if int8 else 1e-5)


def test_attend_of_half_precision_is_close_to_its_twin(cuda: Any) -> None:
    torch.manual_seed(0)
    paged = Paged(cuda, [0, 63, 64, -1], int8=False, whole_numbers=False)
    paged.cache = cuda.store.LayerCache(paged.cache.data.half())
    paged.qkv = [qkv.half() for qkv in paged.qkv]
    paged.store(cuda.store.store_twin)
    out, twin = paged.attend(cuda.attend.attend), paged.attend(cuda.attend.attend_twin)
    torch.testing.assert_close(out, twin, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_attend_gives_nan_for_a_key_that_is_not_finite(cuda: Any, value: float, int8: bool) -> None:
    """The row with such a key becomes an error row; it must not look like a good one."""
    torch.manual_seed(0)
    paged = Paged(cuda, [70, 70], int8=int8, whole_numbers=False)
    paged.qkv[0][5, WIDTH + HEAD_SIZE + 2] = value
    paged.qkv[0][-1, :WIDTH] = 1.0
    paged.store(cuda.store.store_twin)
    out = paged.attend(cuda.attend.attend)
    assert out[0].view(HEADS, HEAD_SIZE)[1].isnan().all()
    assert out[1].isfinite().all()


def test_advance_ends_rows_and_reports_their_tokens(cuda: Any) -> None:
    found = []
    for advance in (cuda.advance.advance, cuda.advance.advance_twin):
        state = state_of(
            [
                {"token": 1, "position": 10, "step": 2, "budget": 3},  # ends by length
                {"token": 1, "position": 20, "step": 2, "budget": 9},  # ends by EOS
                {"token": 1, "position": 30, "step": 2, "budget": 9},
                {"token": 1, "position": -1, "step": 2, "budget": 9},  # idle
                {"token": 1, "position": 7, "step": 2, "budget": 9, "top_k": -1},  # by the host
                {"token": 1, "position": 7, "step": 2, "budget": 9},  # an error
                {"token": 1, "position": 8, "step": 2, "budget": 9},  # of another call
            ]
        )
        sampled, out = torch.tensor([4, 99, 5, 6, 7, -1]).int(), torch.zeros(6, 2).long()
        advance(sampled, state, torch.tensor([98, 99]), out)
        found.append((state, out))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    state, out = found[0]
    assert out[:, 0].tolist() == [4, 99, 5, -3, -3, -1]
    assert state[:, cuda.state.POSITION.value].tolist() == [-1, -1, 31, -1, -1, -1, 8]
    assert state[:, cuda.state.TOKEN.value].tolist() == [4, 99, 5, 1, 1, -1, 1]
    assert state[:, cuda.state.STEP.value].tolist() == [3, 3, 3, 2, 2, 3, 2]
