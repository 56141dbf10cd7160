"""fixed: a loop of torch.where, numbers that are cast and saved, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.cases import DTYPES, assert_refused
from tests.support.tensors import free_value

MASK = torch.tensor([[True, False, False], [False, True, False], [True, True, False]])


@pytest.mark.parametrize("value", [None, 0.25, torch.linspace(-1, 1, 9).view(3, 3).double()])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_training_is_that_of_a_loop_with_where(kind, value):
    torch.manual_seed(0)
    dense = nn.Linear(3, 3).double()
    tied = copy.deepcopy(dense)
    given = dense.weight.detach().clone() if value is None else torch.as_tensor(value).double()
    tp.register_tie(tied, "fixed", mask=MASK, value=value)
    options = {"lr": 0.05, "weight_decay": 0.1} | ({"momentum": 0.9} if kind == "SGD" else {})
    optimizers = [
        getattr(torch.optim, kind)(layer.parameters(), **options) for layer in (dense, tied)
    ]
    x = torch.randn(8, 3, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(torch.where(MASK, given, dense.weight))
    start = dense.weight.detach().clone()
    for _ in range(20):
        for layer, optimizer in zip((dense, tied), optimizers, strict=True):
            optimizer.zero_grad()
            layer(x).pow(3).mean().backward()
            optimizer.step()
        with torch.no_grad():
            dense.weight.copy_(torch.where(MASK, given, dense.weight))
    torch.testing.assert_close(tied.weight, dense.weight, rtol=0, atol=1e-14)
    fixed = given.expand(3, 3)[MASK]
    assert torch.equal(tied.weight[MASK], fixed)
    assert (tied.weight != start)[~MASK].all()
    assert free_value(tied).shape == (1, 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_rounded_to_the_layers_dtype(dtype):
    for value in (1 / 3, torch.full((3, 3), 1 / 3, dtype=torch.float64)):
        layer = tp.register_tie(nn.Linear(3, 3, dtype=dtype), "fixed", mask=MASK, value=value)
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.weight[MASK], torch.full((4,), 1 / 3, dtype=dtype))
        held = tp.get_tie(layer).data().get("values")
        assert (held is None) == isinstance(value, float)
        assert held is None or held.dtype == dtype  # as state dicts have it


def test_numbers_are_cast_with_the_layer():
    layer = tp.register_tie(nn.Linear(3, 3).double(), "fixed", mask=MASK)
    before = layer.weight.detach().clone()
    layer.half()
    assert torch.equal(layer.weight, before.half())
    layer.double()
    assert torch.equal(layer.weight, before.half().double())
    held = tp.get_tie(layer).data()
    assert {name: value.dtype for name, value in held.items()} == {
        "values": torch.float64,
        "mask_bits": torch.uint8,
    }


def test_masks_and_values_of_the_first_axes():
    rows = torch.tensor([True, False, False, True])
    chess = torch.arange(12).view(4, 3) % 2 == 0
    numbers, kernels = torch.randn(4), torch.randn(4, 3, 2)
    for mask, value, expected in (
        (rows, numbers, numbers[:, None, None].expand(4, 3, 2)),
        (rows, kernels, kernels),
        (chess, kernels, kernels),
        (chess, 2.0, torch.full((4, 3, 2), 2.0)),
    ):
        layer = nn.Conv1d(3, 4, 2)
        dense = layer.weight.detach().clone()
        tp.register_tie(layer, "fixed", mask=mask, value=value)
        spread = mask.view(*mask.shape, *(1,) * (3 - mask.dim())).expand(4, 3, 2)
        assert torch.equal(layer.weight, torch.where(spread, expected, dense))
        assert torch.equal(tp.get_tie(layer).fixed_entries, spread)


def test_fixed_numbers_of_any_kind_reach_no_other_entry():
    layer = tp.register_tie(nn.Linear(3, 3), "fixed", mask=MASK, value=-3.0)
    rule = tp.get_tie(layer)
    (sums,) = rule.adjoint(torch.where(MASK, torch.nan, 1.0))
    assert torch.equal(sums, torch.ones(1, 5))
    assert torch.equal(rule.spread(torch.ones(1, 5)), (~MASK).float())
    assert rule.orbit_labels()[MASK].eq(0).all()
    layer.reset_parameters()
    assert layer.weight[MASK].eq(-3).all()
    tp.init_(layer, nn.init.zeros_)
    assert torch.equal(layer.weight, torch.where(MASK, -3.0, 0.0))


def test_an_update_of_the_fixed_entries_is_refused_and_can_be_left_out():
    layer = tp.register_tie(nn.Linear(3, 3), "fixed", mask=MASK)
    before = layer.weight.detach().clone()
    with pytest.raises(tp.TieError, match="breaks the law"):
        layer.weight = before + 1
    tp.assign_(layer, before + 1, project=True)
    assert torch.equal(layer.weight, torch.where(MASK, before, before + 1))


@pytest.mark.parametrize("value", [None, 0.5, torch.randn(3, 3)])
def test_a_file_brings_mask_and_numbers_back(tmp_path, value):
    layer = tp.register_tie(nn.Linear(3, 3), "fixed", mask=MASK, value=value)
    tp.save(layer, tmp_path / "fixed.safetensors")
    fresh = tp.load(tmp_path / "fixed.safetensors", nn.Linear(3, 3))
    assert torch.equal(fresh.weight, layer.weight)
    assert str(tp.get_tie(fresh)) == str(tp.get_tie(layer))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"mask": torch.ones(3, 3) > 0}, ("all of its 9 places",)),
        ({"mask": torch.zeros(3, 3) > 0}, ("False", "9")),
        ({"mask": torch.ones(2, 3) > 0}, ("(2, 3)", "(3, 3)")),
        ({"mask": MASK.int()}, ("torch.int32",)),
        ({"mask": MASK, "value": torch.ones(3, 4)}, ("(3, 4)", "(3, 3)")),
        ({"mask": MASK, "value": torch.inf}, ("inf",)),
        ({"mask": MASK, "value": 10**400}, ("not finite",)),
        ({"mask": MASK, "value": torch.full((3, 3), torch.nan)}, ("4 of 4",)),
        ({"mask": MASK, "value": "much"}, ("'much'",)),
        ({"mask": MASK, "value": 1e39}, ("1 of 1", "torch.float32")),
        ({"mask": MASK, "value": torch.full((3, 3), -1e39, dtype=torch.float64)}, ("4 of 4",)),
        ({"mask": MASK, "value": torch.ones(3, 3) * 1j}, ("complex",)),
        ({"mask": MASK, "value": True}, ("True",)),
    ],
)
def test_refusals(options, parts):
    assert_refused(nn.Linear(3, 3), "fixed", *parts, **options)


def test_the_weight_as_it_is_must_be_there():
    message = assert_refused_on_meta(mask=MASK)
    assert "value=" in message
    with torch.device("meta"):
        layer = nn.Linear(3, 3)
    tp.register_tie(layer, "fixed", mask=MASK, value=1.0)
    with pytest.warns(tp.TieWarning, match="not lawful"):
        layer.load_state_dict(nn.Linear(3, 3).state_dict(), assign=True)
    assert layer.weight[MASK].eq(1).all()


def assert_refused_on_meta(**options) -> str:
    with torch.device("meta"):
        layer = nn.Linear(3, 3)
    with pytest.raises(tp.TieError) as caught:
        tp.register_tie(layer, "fixed", **options)
    assert not tp.is_tied(layer)
    return str(caught.value)
