"""Tensors that hold the same bits, wherever in a storage they begin."""

from __future__ import annotations

import pytest
import torch

from tiedparam.util.bits import same_bits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("length", [3, 8])
@pytest.mark.parametrize("start", range(5))
def test_a_part_of_a_storage_is_compared_wherever_it_begins(dtype, length, start):
    values = torch.randn(length).to(dtype)
    part = torch.zeros(16, dtype=dtype)[start : start + length].copy_(values)
    assert same_bits(part, values)
    assert same_bits(values, part)
    part[-1] += 1
    assert not same_bits(part, values)


def test_the_sign_of_zero_counts_and_a_nan_is_itself():
    zeros = torch.zeros(9)[1:]
    assert not same_bits(zeros, -torch.zeros(8))
    assert same_bits(zeros + torch.nan, torch.full((8,), torch.nan))
