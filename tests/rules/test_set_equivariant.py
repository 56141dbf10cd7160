"""set_equivariant: Kronecker products, permuted items, counts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.cases import assert_refused, canonical_entries, layer_id
from tests.support.tensors import free_value, stored, with_weight


@pytest.mark.parametrize(
    ("outputs", "inputs", "items"), [(1, 1, 2), (1, 1, 7), (3, 2, 4), (2, 5, 3), (16, 8, 10)]
)
def test_the_weight_is_a_sum_of_kronecker_products(outputs, inputs, items):
    layer = nn.Linear(inputs * items, outputs * items, bias=False, dtype=torch.float64)
    dense = layer.weight.detach().reshape(outputs, items, inputs, items).clone()
    tp.register_tie(layer, "set_equivariant", items=items)
    # means over the pairs of an item with itself, and of two items
    same = dense.diagonal(dim1=1, dim2=3).mean(-1)
    different = (dense.sum((1, 3)) - items * same) / (items * (items - 1))
    eye = torch.eye(items, dtype=torch.float64)
    expected = torch.kron(same - different, eye) + torch.kron(different, torch.ones_like(eye))
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-12, atol=1e-14)
    assert tp.get_tie(layer).free_shapes() == ((2 * outputs, inputs),)
    counts = tp.get_tie(layer).multiplicities()[0].unique().tolist()
    assert counts == sorted({items, items * (items - 1)})
    # and any two matrices give a lawful weight
    a, b = torch.randn(2, outputs, inputs, dtype=torch.float64)
    any_weight = torch.kron(a, eye) + torch.kron(b, torch.ones_like(eye))
    fresh = with_weight(nn.Linear(inputs * items, outputs * items, dtype=torch.float64), any_weight)
    assert tp.residual(fresh, "set_equivariant", items=items) < 1e-15


LAYERS = [
    (4, lambda: nn.Linear(8, 12)),
    (2, lambda: nn.Linear(6, 2)),
    (3, lambda: nn.Conv1d(6, 9, 3)),
    (3, lambda: nn.Conv2d(12, 6, (2, 3), groups=2)),
    (2, lambda: nn.ConvTranspose1d(4, 6, 3)),
    (2, lambda: nn.ConvTranspose2d(8, 4, 2, groups=2)),
]


@pytest.mark.parametrize(("items", "build"), LAYERS, ids=[layer_id(build) for _, build in LAYERS])
def test_the_layer_commutes_with_every_permutation(items, build):
    layer = build().double()
    dense = canonical_entries(layer)
    tp.register_tie(layer, "set_equivariant", items=items)
    tp.register_tie(layer, "repeat", "bias", outputs=items)
    kernel = getattr(layer, "kernel_size", ())
    inputs = getattr(layer, "in_channels", None) or layer.in_features
    x = torch.randn(2, inputs, *(5 for _ in kernel), dtype=torch.float64)
    answer = layer(x)
    for permutation in itertools.permutations(range(items)):
        moved = x.unflatten(1, (-1, items))[:, :, permutation].flatten(1, 2)
        expected = answer.unflatten(1, (-1, items))[:, :, permutation].flatten(1, 2)
        torch.testing.assert_close(layer(moved), expected, rtol=1e-12, atol=1e-12)
    # by loops: the mean over all pairs of one kind
    for (o, c, *x), value in canonical_entries(layer).items():
        alike = [
            dense[(o // items * items + i, c // items * items + j, *x)]
            for i in range(items) for j in range(items) if (i == j) == (o % items == c % items)
        ]  # fmt: skip
        assert value == pytest.approx(sum(alike) / len(alike), rel=1e-12, abs=1e-15)
    assert stored(layer) == 2 * len(dense) // items**2


def test_the_count_of_deep_sets_is_two():
    assert stored(tp.register_tie(nn.Linear(100, 100), "set_equivariant", items=100)) == 2


@pytest.mark.parametrize("items", [2, 16, 64])
def test_closed_counts_of_large_layers(items):
    layer = tp.register_tie(nn.Linear(16 * items, 24 * items), "set_equivariant", items=items)
    assert stored(layer) == 2 * 24 * 16
    conv = tp.register_tie(nn.Conv2d(2 * items, 3 * items, 3), "set_equivariant", items=items)
    assert stored(conv) == 2 * 3 * 2 * 9


def test_items_are_the_fastest():
    layer = tp.register_tie(nn.Linear(4, 2, bias=False), "set_equivariant", items=2)
    tp.assign_(layer, free=torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert layer.weight.tolist() == [[1, 3, 2, 4], [3, 1, 4, 2]]


def test_a_network_sees_a_set_and_not_its_order():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3 * 6, 8 * 6), nn.ReLU(), nn.Linear(8 * 6, 4 * 6)).double()
    for layer in (net[0], net[2]):
        tp.register_tie(layer, "set_equivariant", items=6, init="rescale")
        tp.register_tie(layer, "repeat", "bias", outputs=6, init="rescale")
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    answer = net(x.flatten(1)).unflatten(1, (4, 6)).sum(-1)
    shuffled = net(x[..., torch.randperm(6)].flatten(1)).unflatten(1, (4, 6)).sum(-1)
    torch.testing.assert_close(shuffled, answer, rtol=1e-12, atol=1e-12)
    assert answer.std() > 0.01


def test_saved_and_loaded_by_a_file(tmp_path):
    layer = tp.register_tie(nn.Linear(6, 9), "set_equivariant", items=3)
    tp.save(layer, tmp_path / "layer.safetensors")
    other = tp.load(tmp_path / "layer.safetensors", nn.Linear(6, 9))
    assert torch.equal(other.weight, layer.weight)
    assert str(tp.get_tie(other)) == "set_equivariant(items=3)"


def test_an_infinite_gradient_stays_in_its_orbit():
    layer = tp.register_tie(nn.Linear(3, 3), "set_equivariant", items=3)
    gradient = torch.zeros(3, 3)
    gradient[1, 1], gradient[0, 1] = torch.inf, 2
    layer.weight.backward(gradient)
    assert free_value(layer).grad.flatten().tolist() == [torch.inf, 2]
    assert tp.get_tie(layer).adjoint(gradient)[0].flatten().tolist() == [torch.inf, 2]


def test_scan_tries_the_largest_sets():
    layer = nn.Linear(30, 30)
    tp.remove_tie(tp.register_tie(layer, "set_equivariant", items=30))
    found = [c for c in tp.scan(layer, ["set_equivariant"]).candidates if c.residual < 1e-6]
    assert [str(c.rule) for c in found] == ["set_equivariant(items=30)"]
    variants = tp.available_rules()["set_equivariant"].variants
    assert variants(tp.Layout((12, 4, 3), groups=2)) == ({"items": 2},)


# What does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize("items", [1, 0, -3, True, 2.0, "2", None], ids=repr)
def test_refuses_fewer_than_two_items(items):
    assert_refused(
        nn.Linear(4, 4), "set_equivariant",
        f"items must be an integer of at least 2, not {items!r}", items=items,
    )  # fmt: skip


def test_refuses_what_is_not_made_of_sets():
    assert_refused(
        nn.Linear(8, 6), "set_equivariant", "the 6 outputs are not made of sets of 4 items",
        "Choose a divisor of 6", items=4,
    )  # fmt: skip
    assert_refused(
        nn.Linear(6, 8), "set_equivariant", "the 6 inputs are not made of sets of 4", items=4
    )
    assert_refused(
        nn.Conv1d(8, 8, 3, groups=4), "set_equivariant",
        "the 2 outputs of a group are not made of sets of 4 items", items=4,
    )  # fmt: skip
    assert_refused(
        nn.Linear(4, 4), "set_equivariant", "the tensor (4,) has no inputs", "'repeat'",
        tensor_name="bias", items=4,
    )  # fmt: skip
