"""Kernels that mirror each other: copied in rows, in plain operations, and by reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import tiedparam as tp
from tests.support.cases import same_bits
from tiedparam.laws.mirrored_kernels import (
    Kernels,
    expand,
    fold,
    free_of,
    shape_of_layout_2,
    shapes_of_layout_1,
)

SIZES = [
    Kernels(groups, c, positions, sign)
    for groups, c, positions, sign in itertools.product((1, 3), range(1, 9), (2, 3, 4, 9), (1, -1))
    if Kernels(groups, c, positions, sign).free_count
]


def lawful(sizes: Kernels) -> Tensor:
    groups, c, positions, sign = sizes
    blocks = torch.randn(groups, c, c, positions, dtype=torch.float64)
    blocks += sign * blocks.transpose(1, 2).flip(-1)
    return blocks.view(groups * c, c, positions) + 0.0  # no negative zeros


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_both_ways_expand_to_the_weight_and_their_adjoints_agree(sizes):
    weight = lawful(sizes)
    free = free_of(weight, sizes)
    assert len(free) == sizes.free_count
    recorded = free.clone().requires_grad_()
    in_rows, plainly = expand(free, sizes), expand(recorded, sizes)
    assert same_bits(in_rows, weight)
    assert same_bits(plainly.detach(), weight)
    assert in_rows.is_contiguous()
    cotangent = torch.randn_like(weight)
    (gradient,) = torch.autograd.grad(plainly, recorded, cotangent)
    folded = fold(cotangent, sizes)
    torch.testing.assert_close(folded, gradient, rtol=0, atol=1e-14)
    assert same_bits(folded, fold(cotangent, sizes))


def test_free_values_need_not_be_contiguous():
    sizes = Kernels(1, 4, 3, 1)
    weight = lawful(sizes)
    free = free_of(weight, sizes)
    spread = torch.stack([free, free], 1)[:, 0]
    assert same_bits(expand(spread, sizes), weight)


def test_no_shape_of_one_layout_is_that_of_another_unless_the_order_is_the_same():
    """For small sizes, and for large ones by the same formulas."""
    sizes = itertools.product((1, 2, 3), (1, 2, 3, 4, 5, 6, 7, 64), range(2, 10), (1, -1))
    for groups, c, positions, sign in sizes:
        kernels = Kernels(groups, c, positions, sign)
        if kernels.free_count == 0:
            continue
        conv = nn.Conv1d(groups * c, groups * c, positions, groups=groups, device="meta")
        rule = tp.get_tie(tp.register_tie(conv, "flip_sym", **({"sign": -1} if sign < 0 else {})))
        (now,) = rule.free_shapes()
        assert now[0] * now[1] == kernels.free_count
        assert [now] != shapes_of_layout_1(kernels)
        if now == shape_of_layout_2(kernels):
            assert (c, kernels.half, kernels.middles) == (1, 1, 0)
