"""Whether two tensors hold the same bits."""

from __future__ import annotations

import pytest
import torch

from tiedparam.util.bits import same_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize(("start", "count"), [(0, 8), (1, 8), (3, 4), (2, 4), (1, 3)])
def test_views_into_larger_tensors(dtype, start, count):
    whole = torch.arange(12.0).to(dtype)
    part = whole[start : start + count]
    assert same_bits(part, part.clone())
    assert same_bits(part.clone(), part)
    other = part.clone()
    other[-1] = -1.0
    assert not same_bits(part, other)
    assert not same_bits(other, part)
    negative = torch.full((12,), -0.0, dtype=dtype)[start : start + count]
    assert torch.equal(negative, torch.zeros_like(negative))
    assert not same_bits(torch.zeros_like(negative), negative)
