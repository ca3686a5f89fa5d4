"""The Triton kernels under Triton's interpreter, against their torch twins.

The interpreter shows indexing, masks, block tables and the sampler's logic. It says nothing of the
order of sums on a GPU: `make cuda-check` does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptbatch.pipeline.engine.sampling import sample_tokens
from gptbatch.pipeline.params.sampling_params import SamplingParams

triton = pytest.importorskip("triton")

HEADS, HEAD_SIZE, WIDTH = 3, 16, 48


@pytest.fixture(scope="module")
def cuda() -> Iterator[Any]:
    """Import the kernels, interpreted: tests/__init__.py sets TRITON_INTERPRET."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("with a CUDA device the kernels are compiled: make cuda-check")
    from triton.runtime import interpreter

    from gptbatch.pipeline.kernels.cuda import attend, linear, norm, sample

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        """Take a loop's bound from an array of one number, which numpy 2.4 refuses."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
        yield SimpleNamespace(attend=attend, linear=linear, norm=norm, sample=sample)


def whole(*shape: int, low: int = -4, high: int = 5) -> Tensor:
    return torch.randint(low, high, shape).float()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("segment", [None, 32])
@pytest.mark.parametrize(
    ("bm", "bn", "bk"), [(16, 16, 16), (16, 32, 32), (32, 16, 64), (64, 64, 16)]
)
def test_linear_equals_its_twin_for_every_tile(
    cuda: Any, bm: int, bn: int, bk: int, segment: int | None, transposed: bool
) -> None:
    torch.manual_seed(bm + bn)
    x, w, bias, residual = whole(64, 96), whole(70, 96), whole(70), whole(64, 70)
    if transposed:
        w = w.t().contiguous().t()
    if segment is not None and bk > segment:
        pytest.skip("a step of K is at most a segment")
    tile = cuda.linear.Tile(bm, bn, bk)
    for given, activation in ((residual, 0), (None, cuda.linear.RELU)):
        y, block_max = torch.full((64, 70), float("nan")), torch.empty(64, -(-70 // bn))
        cuda.linear.linear(
            x,
            w,
            bias,
            given,
            y,
            tile=tile,
            activation=activation,
            segment=segment,
            block_max=block_max,
        )
        assert torch.equal(y, cuda.linear.linear_twin(x, w, bias, given, activation))
        padded = torch.nn.functional.pad(y, (0, -70 % bn), value=float("-inf"))
        assert torch.equal(block_max, padded.view(64, -1, bn).amax(dim=2))


@pytest.mark.parametrize("segments", [1, 3])
def test_segments_over_the_grid_add_up_to_the_same(cuda: Any, segments: int) -> None:
    x, w, linear_bias, old = (whole(32, 96), whole(WIDTH, 96), whole(WIDTH), whole(32, WIDTH))
    weight, bias, new = torch.randn(WIDTH), torch.randn(WIDTH), old.clone()
    partials, y = torch.empty(segments, 32, WIDTH), torch.empty(32, WIDTH)
    tile = cuda.linear.Tile(16, 32, 16)
    cuda.linear.partial_kernel[2, 2, segments](
        x, w, partials, 32, WIDTH, *w.stride(), 96, 96 // segments, **tile.options
    )
    cuda.norm.add_norm_kernel[(32,)](
        partials, linear_bias, new, weight, bias, y, 1e-5, 32, C=WIDTH, SIZE=64, SEGMENTS=segments
    )
    assert torch.equal(new, cuda.linear.linear_twin(x, w, linear_bias, old, 0))
    twin = cuda.norm.norm_twin(new, weight, bias, 1e-5)
    torch.testing.assert_close(y, twin, rtol=1e-5, atol=1e-5)


def test_gelu_is_close_to_torch(cuda: Any) -> None:
    x, w = torch.randn(16, 32) * 4, torch.randn(32, 32)
    y = torch.empty(16, 32)
    cuda.linear.linear(
        x, w, None, None, y, tile=cuda.linear.Tile(16, 16, 16), activation=cuda.linear.GELU_TANH
    )
    twin = cuda.linear.linear_twin(x, w, None, None, cuda.linear.GELU_TANH)
    torch.testing.assert_close(y, twin, rtol=1e-5, atol=1e-5)


def test_norm_is_close_to_torch(cuda: Any) -> None:
    x, weight, bias = torch.randn(5, WIDTH) * 3 + 1, torch.randn(WIDTH), torch.randn(WIDTH)
    y = torch.empty_like(x)
    cuda.norm.norm_kernel[(5,)](x, weight, bias, y, 1e-5, C=WIDTH)
    torch.testing.assert_close(y, cuda.norm.norm_twin(x, weight, bias, 1e-5), rtol=1e-5, atol=1e-5)


def test_embed_adds_and_normalizes(cuda: Any) -> None:
    wte, wpe, weight, bias = whole(20, WIDTH), whole(8, WIDTH), whole(WIDTH), whole(WIDTH)
    tokens, positions = torch.tensor([3, 19, 0]).int(), torch.tensor([7, 0, -1]).int()
    x, y = torch.empty(3, WIDTH), torch.empty(3, WIDTH)
    cuda.norm.embed_kernel[(3,)](
        tokens,
        positions,
        wte,
        wpe,
        weight,
        bias,
        x,
        y,
        1e-5,
        C=WIDTH,
        SIZE=64,
    )
    assert torch.equal(x, wte[tokens.long()] + wpe[positions.long().clamp(min=0)])
    twin = cuda.norm.norm_twin(x, weight, bias, 1e-5)
    torch.testing.assert_close(y, twin, rtol=1e-5, atol=1e-5)


def paged(positions: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return cache, block_tables, seq_indices and positions; what no query may read is NaN."""
    per_row = max(position // 64 + 1 for position in positions)
    block_tables = torch.randperm(len(positions) * per_row).view(len(positions), per_row).int()
    cache = torch.full((block_tables.numel(), 2, HEADS, 64, HEAD_SIZE), float("nan"))
    for row, position in enumerate(positions):
        for token in range(position + 1):
            block = block_tables[row, token // 64]
            cache[block, :, :, token % 64] = torch.randn(2, HEADS, HEAD_SIZE)
    seq_indices = torch.arange(len(positions)).int()
    return cache, block_tables, seq_indices, torch.tensor(positions).int()


@pytest.mark.parametrize("dot", [False, True])
def test_attend_equals_softmax_over_the_keys_up_to_the_position(cuda: Any, dot: bool) -> None:
    torch.manual_seed(0)
    case = paged([0, 62, 63, 64, 130, -1])
    q, out = torch.randn(6, WIDTH), torch.full((6, WIDTH), float("nan"))
    cuda.attend.attend_kernel[6, HEADS](
        q, *case, out, 0.25, case[1].shape[1], C=WIDTH, H=HEADS, SIZE=16, DOT=dot
    )
    torch.testing.assert_close(
        out, cuda.attend.attend_twin(q, *case, scale=0.25), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(out[5], torch.zeros(WIDTH))


# numpy, which the interpreter computes with, warns of NaN.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_attend_gives_nan_for_a_key_that_is_not_finite(cuda: Any, dot: bool, value: float) -> None:
    """The row with such a key becomes an error row; it must not look like a good one."""
    cache, block_tables, seq_indices, positions = paged([70, 70])
    cache[block_tables[0, 0], 0, 1, 5, 3] = value
    q, out = torch.ones(2, WIDTH), torch.zeros(2, WIDTH)
    cuda.attend.attend_kernel[2, HEADS](
        *(q, cache, block_tables, seq_indices, positions, out, 0.25, block_tables.shape[1]),
        C=WIDTH,
        H=HEADS,
        SIZE=16,
        DOT=dot,
    )
    assert out[0].view(HEADS, HEAD_SIZE)[1].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("activation", ["NO_ACTIVATION", "GELU_TANH", "RELU"])
def test_linear_keeps_nan(cuda: Any, activation: str) -> None:
    x, w = whole(16, 32), whole(32, 32)
    x[3, 4] = float("nan")
    y, block_max = torch.empty(16, 32), torch.empty(16, 2)
    cuda.linear.linear(
        *(x, w, None, None, y),
        tile=cuda.linear.Tile(16, 16, 16),
        activation=getattr(cuda.linear, activation),
        block_max=block_max,
    )
    assert y[3].isnan().all()
    assert block_max[3].isnan().all()
    assert y[4].isfinite().all()


def test_qkv_writes_keys_and_values_to_the_blocks_of_their_tokens(cuda: Any) -> None:
    x, w, bias = whole(32, WIDTH), whole(3 * WIDTH, WIDTH), whole(3 * WIDTH)
    block_tables = torch.tensor([[2, 0], [3, 1]]).int()
    seq_indices = torch.tensor([0, 1, 1] + [0] * 29).int()
    positions = torch.tensor([63, 64, 5] + [-1] * 29).int()
    cache, q = torch.full((4, 2, HEADS, 64, HEAD_SIZE), 7.0), torch.empty(32, WIDTH)
    tile = cuda.linear.Tile(16, 32, 16)
    tables = (block_tables, seq_indices, positions, 2)
    cuda.linear.qkv_kernel[2, -(-3 * WIDTH // 32)](
        *(x, w, bias, q, cache, *tables, *w.stride(), WIDTH, HEADS, WIDTH),
        **tile.options,
    )
    expected = x @ w.T + bias
    keys_values = expected[:, WIDTH:].view(32, 2, HEADS, HEAD_SIZE)
    written = torch.full_like(cache, 7.0)
    for row, (block, place) in enumerate([(2, 63), (1, 0), (3, 5)]):
        written[block, :, :, place] = keys_values[row]
    assert torch.equal(q, expected[:, :WIDTH])
    assert torch.equal(cache, written)


def sample(cuda: Any, logits: Tensor, top_k: list[int], temperature: float) -> Any:
    """Run the kernel with blocks of 16 columns; return tokens and margins."""
    rows, vocab_size = logits.shape
    blocks = -(-vocab_size // 16)
    padded = torch.nn.functional.pad(logits, (0, blocks * 16 - vocab_size), value=float("-inf"))
    tokens, margins = torch.zeros(rows).int(), torch.full((rows,), float("inf")).double()
    cuda.sample.sample_kernel[(rows,)](
        logits,
        padded.view(rows, blocks, 16).amax(dim=2),
        torch.zeros(rows).int(),
        torch.arange(rows) + 2**40,
        torch.arange(rows),
        torch.full((rows,), temperature, dtype=torch.float64),
        torch.tensor(top_k).int(),
        torch.zeros(rows, 16).int(),
        torch.zeros(rows, 64).int(),
        tokens,
        margins,
        vocab_size,
        vocab_size,
        blocks,
        BN=16,
        SIZE=16,
        GATHERED=16,
        KEPT=64,
    )
    return tokens.tolist(), margins.tolist()


@pytest.mark.parametrize("temperature", [0.7, 3.0])
def test_sample_takes_the_tokens_that_torch_takes(cuda: Any, temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 200) * 3
    logits[1] = logits[1].round()  # ties
    logits[2, :30] = 9.0
    top_k = [1, 3, 5, 8, 12, 13]
    tokens, margins = sample(cuda, logits, top_k, temperature)
    params = [
        SamplingParams(seed=2**40 + row, temperature=temperature, top_k=k, max_new_tokens=9)
        for row, k in enumerate(top_k)
    ]
    expected = sample_tokens(logits, params, range(6))
    assert tokens == [sampled.token for sampled in expected]
    for margin, sampled in zip(margins, expected, strict=True):
        assert sampled.decision_margin is not None
        assert margin >= sampled.decision_margin - 1e-9


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sample_flags_logits_that_are_not_finite(cuda: Any, value: float) -> None:
    logits = torch.randn(2, 100)
    logits[0, 37] = value
    tokens, _ = sample(cuda, logits, [5, 5], 1.0)
    assert tokens[0] == cuda.sample.NO_TOKEN.value
    assert tokens[1] >= 0


def test_sample_flags_more_ties_than_it_can_hold(cuda: Any) -> None:
    tokens, _ = sample(cuda, torch.zeros(1, 100), [5], 1.0)
    assert tokens == [cuda.sample.OVERFLOW.value]


def test_advance_ends_rows_and_records_their_tokens(cuda: Any) -> None:
    sampled, tokens = torch.tensor([4, 9, 5, 6]).int(), torch.tensor([1, 1, 1, 1]).int()
    positions = torch.tensor([10, 20, 30, -1]).int()
    steps, budgets = torch.tensor([2, 2, 2, 2]), torch.tensor([3, 9, 9, 9])
    ring = torch.full((4, 8), -1).int()
    cuda.sample.advance_kernel[(1,)](
        sampled, tokens, positions, steps, budgets, ring, 9, 4, SIZE=16, RING=8
    )
    assert positions.tolist() == [-1, -1, 31, -1]
    assert tokens.tolist() == [4, 9, 5, 1]
    assert steps.tolist() == [3, 3, 3, 2]
    assert ring[:, 2].tolist() == [4, 9, 5, -1]
