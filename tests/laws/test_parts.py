"""The laws of the parts of a weight: which there are, and that they give its slices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.parts import CUTS, MIXED, SIZE
from tests.support.users_laws import Shifted
from tiedparam.laws import Reason
from tiedparam.laws.layout import Layout
from tiedparam.laws.parts import Cut, Parts, parts_of


def tied(law, options, size=SIZE):
    return tp.get_tie(tp.register_tie(nn.Linear(size, size), law, init="rescale", **options))


def works_by_hand(rule, axis: int, count: int) -> bool:
    """Whether the numbers of the free values in each slice are one slice of them, or all alike."""
    slices = rule.orbit_labels().abs().chunk(count, axis)
    (shape,) = rule.free_shapes()
    numbers = torch.arange(1, rule.free_count + 1).view(shape)
    if all(torch.equal(each, slices[0]) for each in slices):
        return slices[0].unique().numel() == numbers.numel()
    own = [set(each.unique().tolist()) - {0} for each in slices]
    return any(
        numbers.shape[cut] % count == 0
        and all(
            set(part.flatten().tolist()) == mine
            for part, mine in zip(numbers.chunk(count, cut), own, strict=True)
        )
        for cut in range(numbers.dim())
    )


def judged(rule, axis, count):
    parts = parts_of(rule, axis, count)
    return parts if isinstance(parts, Reason) else parts.why_no_slices() or parts


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("count", [2, 3])
def test_laws_that_leave_an_axis_alone_are_computed_in_parts(axis, count):
    for law, options in CUTS.values():
        rule = tied(law, options)
        parts = judged(rule, axis, count)
        assert isinstance(parts, Parts) == works_by_hand(rule, axis, count), f"{rule}"
        if not isinstance(parts, Parts):
            continue
        free = [torch.randn(shape) for shape in rule.free_shapes()]
        for number, slice_ in enumerate(rule(*free).chunk(count, axis)):
            own = [c.part(f, count, number) for c, f in zip(parts.free, free, strict=True)]
            assert torch.equal(parts.rules[number](*own), slice_)
        again = rule(*free)  # the law of the whole was not bound anew
        assert again.shape == (SIZE, SIZE)


@pytest.mark.parametrize("axis", [0, 1])
def test_laws_that_mix_parts_are_not(axis):
    for law, options in MIXED.items():
        rule = tied(law, options)
        if law != "fixed":  # whose numbers are held whole, and may be loaded anew
            assert not works_by_hand(rule, axis, 2)
        reason = judged(rule, axis, 2)
        assert isinstance(reason, Reason)
        assert "entries of different parts are tied" in reason.fact


def test_a_size_that_cannot_be_shared_is_said():
    assert judged(tied("row_repeat", {"groups": 5}, 5), 1, 2) == Reason("5 is no multiple of 2.")


def test_a_law_that_reads_layers_is_judged_by_how_they_are_cut():
    rule = Shifted(nn.Linear(SIZE, SIZE))
    rule.bind(Layout((SIZE, SIZE)), torch.float32)
    for axis in (0, 1):
        parts = parts_of(rule, axis, 2)
        # the row is cut with the columns, and whole on each rank that has rows
        assert parts.free == (Cut((SIZE,), 0 if axis else None),)
        assert parts.why_no_slices([Cut((SIZE, SIZE), axis)]) is None
        for other in (1 - axis, None):
            assert parts.why_no_slices([Cut((SIZE, SIZE), other)]) is not None
