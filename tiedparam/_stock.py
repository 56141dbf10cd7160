"""Typed access to what torch's ``parametrize`` keeps on a layer."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize


def parametrization_lists(layer: nn.Module) -> nn.ModuleDict:
    """All parametrization lists of a parametrized layer, by tensor name."""
    return cast(nn.ModuleDict, layer.parametrizations)


def parametrization_list(layer: nn.Module, tensor_name: str) -> parametrize.ParametrizationList:
    """The parametrizations of one tensor, and its originals."""
    return cast(parametrize.ParametrizationList, parametrization_lists(layer)[tensor_name])


def effective(layer: nn.Module, tensor_name: str) -> Tensor:
    """The tensor that the layer computes with: computed if it is parametrized, else stored."""
    if parametrize.is_parametrized(layer, tensor_name):
        return cast(Tensor, parametrization_list(layer, tensor_name)())
    return cast(Tensor, getattr(layer, tensor_name))
