"""Typed access to what torch's ``parametrize`` keeps on a layer."""

from __future__ import annotations

from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam._sharded import computed, is_sharded


def parametrization_lists(layer: nn.Module) -> nn.ModuleDict:
    """All parametrization lists of a parametrized layer, by tensor name."""
    return cast(nn.ModuleDict, layer.parametrizations)


def parametrization_list(layer: nn.Module, tensor_name: str) -> parametrize.ParametrizationList:
    """The parametrizations of one tensor, and its originals."""
    return cast(parametrize.ParametrizationList, parametrization_lists(layer)[tensor_name])


def effective(layer: nn.Module, tensor_name: str) -> Tensor:
    """The tensor that the layer computes with: computed if it is parametrized, else stored."""
    # by the tables: this runs at every call, and an attribute of a module is found last there
    lists = layer._modules.get("parametrizations")
    values = lists._modules.get(tensor_name) if lists is not None else None
    if values is None:
        return cast(Tensor, getattr(layer, tensor_name))
    for original in values._parameters.values():
        if is_sharded(original):
            return computed(partial(through, values), values._parameters.values())
    return cast(Tensor, values())


def through(parametrizations: nn.Module, *originals: Tensor) -> Tensor:
    """What a list of parametrizations computes from these originals."""
    first, *others = parametrizations._modules.values()
    value: Tensor = first(*originals)  # type: ignore[misc]
    for other in others:
        value = other(value)  # type: ignore[misc]
    return value
