"""Laws that scale or mix their values: what has no meaning for them is said, not computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.cases import assert_refused
from tiedparam.laws import Orbits


class Balanced(tp.Rule):
    law = "W[o, n − 1] = −Σ W[o, c] over c < n − 1"

    def free_shapes(self):
        outputs, inputs = self.bound_layout.shape
        return ((outputs, inputs - 1),)

    def forward(self, w):
        return torch.cat([w, -w.sum(1, keepdim=True)], 1)

    def symmetries(self, weight):
        first = weight[:, :-1]
        yield torch.cat([first, -first.sum(1, keepdim=True)], 1)

    def right_inverse(self, weight):
        self.bind_shape(weight)
        return ((weight - weight.mean(1, keepdim=True))[:, :-1].clone(),)

    def representatives(self, weight):
        return (weight[:, :-1].clone(),)


class Odd(Orbits):
    """An expansion of its own, with zeros in it."""

    law = "W[o, c] = −W[o, n − 1 − c]"

    def symmetries(self, weight):
        yield -weight.flip(1)

    def free_shapes(self):
        outputs, inputs = self.bound_layout.shape
        return ((outputs, inputs // 2),)

    def forward(self, half):
        zeros = half.new_zeros(half.shape[0], self.bound_layout.shape[1] % 2)
        return torch.cat([half, zeros, -half.flip(1)], 1)


class OddRule(Odd, tp.Rule):
    """The same, as a law that knows no orbits by its class."""

    has_orbits = tp.Rule.has_orbits
    multiplicities = tp.Rule.multiplicities


def test_a_law_that_mixes_has_no_orbits():
    layer = tp.register_tie(nn.Linear(5, 3), Balanced)
    rule = tp.get_tie(layer)
    assert not rule.has_orbits
    for ask in (rule.orbit_labels, rule.multiplicities):
        with pytest.raises(NotImplementedError, match="scales or mixes"):
            ask()
    assert_refused(nn.Linear(5, 3), Balanced, "none can be rescaled", init="rescale")
    (row,) = tp.report(nn.Sequential(layer)).rows()
    assert row["multiplicity"] is None
    candidates = tp.scan(nn.Linear(5, 3, bias=False), [Balanced]).candidates
    assert [candidate.multiplicity for candidate in candidates] == [None]


@pytest.mark.parametrize("law", [Odd, OddRule])
@pytest.mark.parametrize("inputs", [4, 5])
def test_zeros_in_an_expansion_of_ones_own_belong_to_no_orbit(law, inputs):
    weight = torch.randn(3, inputs, dtype=torch.float64)
    layer = nn.Linear(inputs, 3).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    tp.register_tie(layer, law)
    torch.testing.assert_close(layer.weight, (weight - weight.flip(1)) / 2)
    rule = tp.get_tie(layer)
    assert rule.has_orbits
    assert rule.orbit_labels().eq(0).sum() == 3 * (inputs % 2)
    assert torch.equal(rule.multiplicities()[0], torch.full((3, inputs // 2), 2.0).double())
    assert torch.equal(rule.representatives(weight)[0], weight[:, : inputs // 2])
    tp.init_(layer, nn.init.ones_)
    assert layer.weight.abs().sum() == 3 * 2 * (inputs // 2)
