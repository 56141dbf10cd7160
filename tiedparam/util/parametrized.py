"""The tensors and the lists of parametrizations of a layer, as torch offers them to everybody."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.util.torch_private import effective


def parametrization_lists(layer: nn.Module) -> nn.ModuleDict:
    """All parametrization lists of a parametrized layer, by tensor name."""
    return cast(nn.ModuleDict, layer.parametrizations)


def parametrization_list(layer: nn.Module, tensor_name: str) -> parametrize.ParametrizationList:
    """The parametrizations of one tensor, and its originals."""
    return cast(parametrize.ParametrizationList, parametrization_lists(layer)[tensor_name])


def tensor_at(path: str, name: str) -> tuple[str, str]:
    """The path of a layer and the name of its tensor, as people know them.

    Args:
        path: of a layer, or of the list of parametrizations that a tensor is computed from.
        name: of a tensor there.
    """
    lists, _, tensor_name = path.rpartition(".")
    if lists.rpartition(".")[2] != "parametrizations":
        return path, name
    return lists.removesuffix("parametrizations").removesuffix("."), tensor_name


def tensor_of(layer: nn.Module, tensor_name: str) -> Tensor | None:
    """`effective`, or None if the layer has no tensor of that name."""
    try:
        present = effective(layer, tensor_name)
    except AttributeError:
        if parametrize.is_parametrized(layer, tensor_name):
            raise  # an error in what computes it (S26)
        return None
    return present if isinstance(present, Tensor) else None
