"""Memory for packed weights."""

from __future__ import annotations

import pytest
import torch

from gptbatch.pipeline.kernels.constants import CACHE_LINE_BYTES
from gptbatch.pipeline.kernels.huge_pages import ARRAY_BYTES, HUGE_PAGE_BYTES, HugePages


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
