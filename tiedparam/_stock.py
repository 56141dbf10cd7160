"""Typed access to what torch's ``parametrize`` keeps on a layer."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam._sharded import gathered, is_sharded


def parametrization_lists(layer: nn.Module) -> nn.ModuleDict:
    """All parametrization lists of a parametrized layer, by tensor name."""
    return cast(nn.ModuleDict, layer.parametrizations)


def parametrization_list(layer: nn.Module, tensor_name: str) -> parametrize.ParametrizationList:
    """The parametrizations of one tensor, and its originals."""
    return cast(parametrize.ParametrizationList, parametrization_lists(layer)[tensor_name])


def effective(layer: nn.Module, tensor_name: str) -> Tensor:
    """The tensor that the layer computes with: computed if it is parametrized, else stored."""
    if parametrize.is_parametrized(layer, tensor_name):
        values = parametrization_list(layer, tensor_name)
        if any(map(is_sharded, values._parameters.values())):
            return _computed_whole(values)
        return cast(Tensor, values())
    return cast(Tensor, getattr(layer, tensor_name))


def _computed_whole(values: parametrize.ParametrizationList) -> Tensor:
    """What the list gives for sharded originals: no law has to know how a part is computed."""
    first, *others = values._modules.values()
    assert first is not None
    weight = first(*(gathered(original) for original in values._parameters.values()))
    for other in others:
        assert other is not None
        weight = other(weight)
    return cast(Tensor, weight)
