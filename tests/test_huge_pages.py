"""Memory for packed weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptbatch.pipeline.estimate.resources import resident_bytes
from gptbatch.pipeline.kernels import huge_pages
from gptbatch.pipeline.kernels.constants import CACHE_LINE_BYTES
from gptbatch.pipeline.kernels.huge_pages import (
    ARRAY_BYTES,
    HUGE_PAGE_BYTES,
    HugePages,
    lazy_zeros,
    memory_of_ranges,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_are_aligned_and_one_behind_the_other(dtype: torch.dtype) -> None:
    memory = HugePages()
    tensors = [memory.empty((3, n), dtype) for n in (1, 7, 1000, 33)]
    for index, tensor in enumerate(tensors):
        tensor.fill_(index)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % CACHE_LINE_BYTES == 0
    assert [tensor.unique().tolist() for tensor in tensors] == [[0], [1], [2], [3]]
    assert tensors[-1].data_ptr() - tensors[0].data_ptr() < 3 * 1041 * dtype.itemsize + 256


def test_a_large_tensor_gets_an_array_of_its_own() -> None:
    memory = HugePages()
    memory.empty((10,), torch.float32)
    large = memory.empty((ARRAY_BYTES + 1,), torch.uint8)
    assert large.shape == (ARRAY_BYTES + 1,)
    assert large.data_ptr() % HUGE_PAGE_BYTES == 0


MIB = 2**20
RANGES = [
    # bytes per range, stride, ranges, bytes with huge pages: each range takes whole ones
    (16 * 1024, 8 * MIB, 12, 24 * MIB),
    (2 * MIB + 1, 8 * MIB, 3, 12 * MIB),
    # neighbours share one: at 0, 3 and 6 MiB
    (MIB, 3 * MIB, 3, 6 * MIB),
    (2 * MIB, 3 * MIB, 3, 8 * MIB),
    (MIB, MIB, 5, 6 * MIB),
    (0, MIB, 5, 0),
    # too small for huge pages
    (1000, 10_000, 12, 12_000),
]


@pytest.mark.parametrize(("n_bytes", "stride", "n_ranges", "expected"), RANGES)
@pytest.mark.parametrize("setting", ["always [madvise] never", "always madvise [never]", None])
def test_memory_of_the_first_blocks(
    n_bytes: int,
    stride: int,
    n_ranges: int,
    expected: int,
    setting: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huge_pages, "_SETTING", tmp_path / "enabled")
    if setting is not None:
        (tmp_path / "enabled").write_text(f"{setting}\n")
    is_on = setting == "always [madvise] never"
    found = memory_of_ranges(n_bytes, stride, n_ranges)
    assert found == (expected if is_on else n_bytes * n_ranges)


@pytest.mark.skipif(not huge_pages.are_offered(), reason="no huge pages")
def test_a_process_takes_no_more_memory() -> None:
    n_bytes, stride, n_ranges = 1000, 4 * MIB, 8
    memory = lazy_zeros((n_ranges, stride), torch.uint8)
    before = resident_bytes()
    memory[:, :n_bytes] = 1
    taken = resident_bytes() - before
    # A system that has no huge page left gives small ones.
    # torch and other threads take about 1 MiB meanwhile; ranges that straddle two take 16 more.
    assert taken < memory_of_ranges(n_bytes, stride, n_ranges) + 6 * MIB
