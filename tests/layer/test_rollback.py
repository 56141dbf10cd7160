"""What a failure leaves: all that a layer keeps is as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.unchanged import everything
from tiedparam.layer.rollback import rolled_back_on_error


class Interrupt(BaseException):
    pass


def test_whatever_a_layer_keeps_in_lists_tables_and_sets_is_rolled_back():
    layer = nn.Linear(2, 2)
    layer.listed, layer.tabled, layer.held = [1], {"a": 1}, {1}
    layer.weight.note = "mine"
    before = everything(layer)
    kept = layer.held

    @rolled_back_on_error([layer], [])
    def interrupted():
        layer.listed[:] = [2, 3]
        layer.tabled["b"] = layer.tabled.pop("a")
        layer.held.add(2)
        layer.added = nn.Parameter(torch.ones(1))
        layer.weight.note = "theirs"
        layer.register_forward_hook(print)
        layer.eval()
        raise Interrupt

    with pytest.raises(Interrupt):
        interrupted()
    assert everything(layer) == before
    assert (layer.listed, layer.tabled, layer.held) == ([1], {"a": 1}, {1})
    assert layer.held is kept
    assert layer.weight.note == "mine"
    assert not hasattr(layer, "added")
    with rolled_back_on_error([layer], []):
        layer.listed.append(2)
    assert layer.listed == [1, 2]
