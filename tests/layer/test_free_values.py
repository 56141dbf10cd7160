"""The free values: found by name, and given instead of a weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import tiedparam as tp
from tests.support.rule_of_two_tensors import TwoHalves
from tests.support.unchanged import snapshot, unchanged
from tiedparam.laws import Linked

FIRST, SECOND = (f"parametrizations.weight.original{number}" for number in range(2))


class Scaled(Linked):
    """Rows of the source, each times a value of its own."""

    law = "W[o] = s[o] · source.W[o]"

    def free_shapes(self):
        return ((self.bound_layout.shape[0], 1),)

    def forward(self, source, scale):
        return source * scale

    def fit(self, weight, source):
        return ((weight * source).sum(1, keepdim=True) / (source * source).sum(1, keepdim=True),)


class Minus(tp.Rule):
    """Free values of the weight's shape, which are not the weight."""

    law = "W = −w"

    def free_shapes(self):
        return (self.bound_layout.shape,)

    def forward(self, *free):
        return -free[0]

    def right_inverse(self, weight):
        return (-weight.detach(),)


class Joined(tp.Rule):
    """Free values that stand one above the other."""

    law = "W = [a; b]"

    def free_shapes(self):
        rows, *rest = self.bound_layout.shape
        return ((rows // 2, *rest),) * 2

    def forward(self, *free):
        return torch.cat(free)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def rows() -> nn.Linear:
    return tp.register_tie(nn.Linear(3, 4), "row_repeat")


def halves() -> nn.Linear:
    return tp.register_tie(nn.Linear(3, 4), TwoHalves)


def pair(rule, **options) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tp.register_tie(model[1], rule, source=model[0], **options)
    return model


# What they are -------------------------------------------------------------------------------


def test_they_are_the_parameters_by_their_names_in_the_layer():
    layer = halves()
    tp.register_tie(layer, "row_repeat", "bias")
    found = tp.free_values(layer)
    assert list(found) == [FIRST, SECOND]
    named = dict(layer.named_parameters())
    assert all(named[name] is value for name, value in found.items())
    assert list(tp.free_values(layer, "bias")) == ["parametrizations.bias.original0"]
    assert len(named) == 3


def test_a_copy_has_none_and_a_law_of_its_own_values_has_those():
    assert tp.free_values(pair("copy")[1]) == {}
    (scale,) = tp.free_values(pair(Scaled)[1]).values()
    assert scale.shape == (3, 1)


def test_there_must_be_a_tie():
    with pytest.raises(tp.TieError, match=r"'weight' of Linear\(.*\) is not tied"):
        tp.free_values(nn.Linear(3, 4))


def test_who_asks_the_model_or_another_tensor_hears_what_is_tied():
    model = nn.Sequential(nn.Linear(2, 2), tp.register_tie(nn.Linear(3, 4), "row_repeat"))
    with pytest.raises(tp.TieError, match=r"is not tied\. Tied in it: '1\.weight'\.$"):
        tp.free_values(model)
    with pytest.raises(tp.TieError, match=r"is not tied\. Tied in it: 'weight'\.$"):
        tp.free_values(model[1], "bias")


# Giving them ---------------------------------------------------------------------------------


def test_my_vector_is_what_every_row_starts_from():
    layer = rows()
    vector = torch.tensor([1.0, 2.0, 3.0])
    (parameter,) = tp.free_values(layer).values()
    assert tp.assign_(layer, free=vector.reshape(1, 3)) is layer
    assert layer.weight.tolist() == [[1.0, 2.0, 3.0]] * 4
    assert tp.free_values(layer) == {FIRST: parameter}
    vector.zero_()  # theirs, not ours
    assert layer.weight.tolist() == [[1.0, 2.0, 3.0]] * 4


def test_several_are_given_in_their_order():
    layer = halves()
    tp.assign_(layer, free=[torch.full((1, 3), 1.0), torch.full((1, 3), 2.0)])
    assert layer.weight.tolist() == [[1.0] * 3] * 2 + [[2.0] * 3] * 2


def test_some_are_given_by_their_names():
    layer = halves()
    first = layer.weight[:2].tolist()
    tp.assign_(layer, free={SECOND: torch.full((1, 3), 7.0)})
    assert layer.weight[:2].tolist() == first
    assert layer.weight[2:].tolist() == [[7.0] * 3] * 2


def test_what_free_values_gave_can_be_given_back():
    layer = halves()
    saved = {name: value.detach().clone() for name, value in tp.free_values(layer).items()}
    weight = layer.weight.detach().clone()
    tp.init_(layer, nn.init.zeros_)
    tp.assign_(layer, free=saved)
    assert torch.equal(layer.weight, weight)
    assert weight.any()


def test_they_may_change_places():
    layer = halves()
    top, bottom = layer.weight.detach().chunk(2)
    tp.assign_(layer, free=reversed(tp.free_values(layer).values()))
    assert torch.equal(layer.weight, torch.cat([bottom, top]))
    assert not torch.equal(top, bottom)


@pytest.mark.filterwarnings("ignore:the tie of .* frees nothing")
def test_a_weight_of_the_same_shape_is_not_taken_for_them():
    layer = tp.register_tie(nn.Linear(2, 2), Minus)
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    tp.assign_(layer, value)
    assert torch.equal(layer.weight, value)
    tp.assign_(layer, free=value)
    assert torch.equal(layer.weight, -value)


def test_what_is_stacked_on_the_tie_computes_from_them():
    layer = rows()
    parametrize.register_parametrization(layer, "weight", Doubled())
    tp.assign_(layer, free=torch.ones(1, 3))
    assert torch.equal(layer.weight, torch.full((4, 3), 2.0))
    assert list(tp.free_values(layer)) == [FIRST]


def test_a_law_that_reads_a_layer_takes_those_of_its_own():
    model = pair(Scaled)
    tp.assign_(model[1], free=torch.full((3, 1), 3.0))
    assert torch.equal(model[1].weight, 3 * model[0].weight)


def test_a_copy_takes_none_and_stays():
    model = pair("copy")
    before = snapshot(model[1])
    for nothing in ([], {}):
        assert tp.assign_(model[1], free=nothing) is model[1]
    assert unchanged(before, snapshot(model[1]))
    with pytest.raises(tp.TieError, match=r"has 0 free values, and 1 was given\. .* its source"):
        tp.assign_(model[1], free=torch.ones(3, 3))


def test_training_goes_on_with_the_state_that_the_optimizer_has():
    layer = rows()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    (parameter,) = tp.free_values(layer).values()
    state = copy.deepcopy(optimizer.state[parameter])
    gradient = parameter.grad
    tp.assign_(layer, free=torch.zeros(1, 3))
    assert parameter.grad is gradient
    assert all(torch.equal(optimizer.state[parameter][key], state[key]) for key in state)
    assert len(state) == 3
    optimizer.step()
    assert layer.weight.any()


def test_a_kept_weight_is_computed_anew():
    layer = tp.register_tie(nn.Linear(256, 256), "flip_sym", cache=True).eval()
    with torch.no_grad():
        layer(torch.ones(1, 256))
        tp.assign_(layer, free=torch.zeros_like(next(iter(tp.free_values(layer).values()))))
        assert torch.equal(layer(torch.ones(1, 256))[0], layer.bias)


def test_shapes_alone_stay_shapes():
    layer = rows().to("meta")
    tp.assign_(layer, free=torch.empty(1, 3, device="meta"))
    assert layer.weight.is_meta


# What is refused -----------------------------------------------------------------------------

REFUSED = {
    "count": (
        lambda: [torch.ones(1, 3)],
        r"has 2 free values, and 1 was given\. Give them in this order: \(1, 3\), \(1, 3\)\.",
    ),
    "order": (
        lambda: [torch.ones(1, 3), torch.ones(3, 1)],
        r"'parametrizations\.weight\.original1' is torch\.float32 \(3, 1\), and the free value "
        r"torch\.float32 \(1, 3\)\. Convert the value first: value\.reshape\(1, 3\)\.",
    ),
    "dtype": (
        lambda: [torch.ones(1, 3), torch.ones(1, 3, dtype=torch.float64)],
        r"Convert the value first: value\.to\(torch\.float32\)\.",
    ),
    "weight": (
        lambda: {FIRST: torch.ones(1, 3), SECOND: torch.ones(4, 3)},
        "a weight is given as value=, not as free=",
    ),
    "name": (
        lambda: {FIRST: torch.ones(1, 3), "weight": torch.ones(1, 3)},
        r"no free value 'weight'",
    ),
    "sparse": (
        lambda: [torch.ones(1, 3), torch.ones(1, 3).to_sparse()],
        r"the value is torch\.sparse_coo\. Convert the value first: value\.to_dense\(\)\.",
    ),
    "nested": (
        lambda: [torch.ones(1, 3), torch.nested.nested_tensor([torch.ones(3)])],
        r"the value is a nested tensor\.",
    ),
    "meta": (
        lambda: [torch.ones(1, 3), torch.ones(1, 3, device="meta")],
        "the value is on the meta device and has no numbers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_changes_nothing(case):
    values, message = REFUSED[case]
    layer = halves()
    before = snapshot(layer)
    with pytest.raises(tp.TieError, match=message):
        tp.assign_(layer, free=values())
    assert unchanged(before, snapshot(layer))


def test_a_sparse_weight_is_told_how_to_become_a_dense_one():
    layer = rows()
    before = snapshot(layer)
    with pytest.raises(tp.TieError, match=r"value\.to_dense\(\)"):
        tp.assign_(layer, torch.ones(4, 3).to_sparse())
    assert unchanged(before, snapshot(layer))


def test_a_model_without_numbers_keeps_none():
    layer = rows().to("meta")
    with pytest.raises(tp.TieError, match="meta device, where numbers are lost"):
        tp.assign_(layer, free=torch.ones(1, 3))


def test_nothing_is_written_while_the_model_is_frozen():
    layer = rows().eval()
    before = layer.weight.detach().clone()
    with tp.frozen(layer), pytest.raises(tp.TieError, match="assigning"):
        tp.assign_(layer, free=torch.ones(1, 3))
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"free": 3.0},
        {"value": torch.ones(4, 3), "free": torch.ones(1, 3)},
        {"free": [1.0]},
        {"free": [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]},
        {"free": torch.ones(1, 3), "project": True},
    ],
    ids=["neither", "one number", "both", "number", "rows", "project"],
)
def test_arguments_of_a_wrong_kind(arguments):
    said = r"assign_ takes a weight|a free value is a tensor|free= takes tensors, .* not float"
    with pytest.raises(TypeError, match=said):
        tp.assign_(rows(), **arguments)


def test_a_weight_that_has_the_shape_of_free_values_is_told_where_these_go():
    layer = tp.register_tie(nn.Conv2d(4, 4, 3, groups=2), "channel_shared", over="groups")
    value = torch.ones(2, 2, 3, 3)
    with pytest.raises(tp.TieError, match=r"assign_\(layer, free=value\)"):
        tp.assign_(layer, value)
    tp.assign_(layer, free=value)
    assert torch.equal(layer.weight, torch.ones(4, 2, 3, 3))


@pytest.mark.filterwarnings("ignore:the tie of .* frees nothing")
def test_one_of_several_free_values_is_told_so_too():
    layer = tp.register_tie(nn.Linear(3, 4), Joined)
    with pytest.raises(tp.TieError, match=r"free=\{name: value\.to\(torch\.float32\)\}\)"):
        tp.assign_(layer, torch.ones(2, 3, dtype=torch.float64))
