"""Parameters that keep, or get back, their place among those of a layer (S19)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.tie.write_guard import unguard
from tiedparam.util.torch_private import parameters_of

_ORDER = "_parameter_order"


def remember_order(layer: nn.Module) -> None:
    """Note the order of the parameters before the first tie moves one away."""
    if _ORDER not in layer.__dict__:
        layer.__dict__[_ORDER] = tuple(parameters_of(layer))


def in_order(layer: nn.Module, table: dict[str, nn.Parameter | None]) -> dict[str, Any]:
    """A table of all parameters in the order that they had before the ties.

    A layer that goes through them to initialise them then draws as the stock one does.
    """
    order = layer.__dict__.get(_ORDER, ())
    return {name: table[name] for name in (*order, *table) if name in table}


def insert_parameter(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Add a Parameter at the place that it had before the tie."""
    order = layer.__dict__.get(_ORDER, ())
    table = parameters_of(layer)
    table[name] = parameter
    later = order[order.index(name) + 1 :] if name in order else ()
    for follower in [n for n in table if n in later]:
        table[follower] = table.pop(follower)
    if not parametrize.is_parametrized(layer):
        layer.__dict__.pop(_ORDER, None)


def plain_parameter(value: Tensor, requires_grad: bool) -> nn.Parameter:
    """A contiguous Parameter of its own storage with the values of ``value``."""
    with torch.no_grad():
        dense = unguard(value).detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(dense, requires_grad)
