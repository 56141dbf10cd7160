"""Matrices that are transposed at the speed of memory."""

from __future__ import annotations

import pytest
import torch

from tiedparam.products.transposition import transposed


@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 5, 1), (2, 3, 4), (1, 40, 70), (5, 64, 33)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_transposed(shape, dtype):
    matrices = torch.randn(shape).to(dtype)
    for swift in (True, False):
        result = transposed(matrices, swift)
        assert result.is_contiguous()
        assert torch.equal(result, matrices.transpose(1, 2))
    strided = torch.randn(shape[0], shape[1], 2 * shape[2])[..., ::2]
    assert torch.equal(transposed(strided, True), strided.transpose(1, 2))
