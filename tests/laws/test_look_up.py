"""Small weights: one look-up, which is what the map itself computes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.cases import CASES
from tiedparam.laws.look_up import LookedUp


def maps_of(layer: nn.Module, tensor_name: str = "weight") -> list[tuple[LookedUp, torch.Tensor]]:
    """The maps that are asked whether a tensor is small, and what it is made of."""
    asked: list[tuple[LookedUp, torch.Tensor]] = []
    look_up = LookedUp.look_up

    def noted(self, free):
        asked.append((self, free.detach().clone()))
        return look_up(self, free)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LookedUp, "look_up", noted)
        getattr(layer, tensor_name)
    return asked


def results(compute, free: torch.Tensor) -> list[torch.Tensor]:
    """A weight, its gradient, and the gradient of that one's square."""
    free = free.clone().requires_grad_()
    weight = compute(free)
    seed = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype).view(weight.shape)
    seed.requires_grad_()
    (gradient,) = torch.autograd.grad((weight * seed).sum(), free, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), seed)
    return [weight.detach(), gradient.detach(), second]


SEEN = set()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_look_up_gives_the_same_bits_and_derivatives(case):
    host = case.tied()
    host.model.double()  # the layers that it reads, too
    for made, free in maps_of(host.layer, host.tensor_name):
        look_up = made.look_up(free)
        assert look_up is not None
        SEEN.add(type(made).__name__)
        otherwise = getattr(made, "recorded", made.expand)
        found, expected = results(look_up, free), results(otherwise, free)
        assert torch.equal(found[0], expected[0])
        assert found[0].shape == made.shape
        assert found[0].is_contiguous()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        infinite = torch.full_like(free, torch.inf)  # zeros stay zeros, whatever is beside them
        assert torch.equal(look_up(infinite), otherwise(infinite))


def test_every_kind_of_map_was_seen():
    assert {"AntiDiagonals", "Diagonals", "EntryTable", "Expansion", "WrappedDiagonals"} <= SEEN
    assert {"_Blocks", "_Components", "_Palindrome", "_Views"} <= SEEN


@pytest.mark.parametrize("rule", ["skew", "row_repeat", "toeplitz"])
def test_larger_weights_and_other_dtypes_are_computed_as_before(rule):
    ((made, free),) = maps_of(tp.register_tie(nn.Linear(64, 64), rule))
    assert made.look_up(free) is not None
    assert made.look_up(free.double()) is not None
    assert made.look_up(free.bfloat16()) is None  # in which sums lose digits
    larger = maps_of(tp.register_tie(nn.Linear(65, 65), rule))
    assert [made for made, free in larger if made.look_up(free) is not None] == []
    assert larger or rule == "skew"  # which does not even ask


def test_fixed_numbers_are_not_looked_up():
    mask = torch.eye(4).bool()
    assert (
        maps_of(tp.register_tie(nn.Linear(4, 4), "fixed", mask=mask, value=torch.ones(4, 4))) == []
    )
    assert maps_of(tp.register_tie(nn.Linear(4, 4), "masked", pattern="lower"))


@pytest.mark.parametrize("rule", ["flip_sym", "circulant", "row_repeat"])
def test_the_table_is_in_no_copy_and_no_file(rule):
    layer = tp.register_tie(nn.Linear(60, 60), rule)
    ((made, _),) = maps_of(layer)
    before = len(pickle.dumps(layer))
    del vars(made)["_look_up"]
    with torch.inference_mode():
        layer(torch.randn(1, 60))
    assert len(pickle.dumps(layer)) < before + 100  # the table has 28,800 bytes
    assert b"_look_up" not in pickle.dumps(layer)
    assert b"_look_up" not in pickle.dumps(copy.deepcopy(layer))
    layer(torch.randn(1, 60)).sum().backward()  # a table made in inference mode serves training
    assert layer.parametrizations.weight.original0.grad is not None


def test_no_table_is_made_of_fake_numbers():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
        layer = tp.register_tie(nn.Linear(6, 6), "toeplitz")
        assert layer.weight.shape == (6, 6)
    layer = tp.register_tie(nn.Linear(6, 6), "toeplitz")
    assert torch.equal(layer.weight[1:, 1:], layer.weight[:-1, :-1])
