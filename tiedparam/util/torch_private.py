"""What torch does not promise, one function for each fact: the only file that may rely on it.

Each fact has a test in ``tests/util/test_torch_private.py``, which says in which versions of torch
it was seen. The lint of private names (ruff's SLF) holds everywhere else.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.util.sharded import computed, is_sharded

F = TypeVar("F", bound=Callable[..., Any])

# The tables of a module -----------------------------------------------------------------------


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The table of a module's own Parameters, to be read or written."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The table of a module's own buffers, to be read or written."""
    return module._buffers


def submodules_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The table of a module's own submodules, to be read or written."""
    return module._modules


# Parametrizations ------------------------------------------------------------------------------


def parametrization_lists(layer: nn.Module) -> nn.ModuleDict:
    """All parametrization lists of a parametrized layer, by tensor name."""
    return cast(nn.ModuleDict, layer.parametrizations)


def parametrization_list(layer: nn.Module, tensor_name: str) -> parametrize.ParametrizationList:
    """The parametrizations of one tensor, and its originals."""
    return cast(parametrize.ParametrizationList, parametrization_lists(layer)[tensor_name])


def effective(layer: nn.Module, tensor_name: str) -> Tensor:
    """The tensor that the layer computes with: computed if it is parametrized, else stored."""
    # by the tables: this runs at every call, and an attribute of a module is found last there
    if tensor_name in layer._parameters:
        return cast(Tensor, layer._parameters[tensor_name])
    lists = layer._modules.get("parametrizations")
    values = lists._modules.get(tensor_name) if lists is not None else None
    if values is None:
        return cast(Tensor, getattr(layer, tensor_name))
    for original in values._parameters.values():
        if is_sharded(original):
            return computed(partial(_called_with, values), values._parameters.values())
    return cast(Tensor, values())


def is_watched(module: nn.Module) -> bool:
    """Whether calling this module does more than its class's ``forward``."""
    kept = module.__dict__  # by the table: this runs at every call
    return bool(
        kept["_forward_hooks"]
        or kept["_forward_pre_hooks"]
        or kept["_backward_hooks"]
        or kept["_backward_pre_hooks"]
        or "forward" in kept
    )


def _called_with(values: nn.Module, *originals: Tensor) -> Tensor:
    """What calling a list of parametrizations gives, with these tensors as its originals."""
    if not is_watched(values):
        return through(values, *originals)
    named = dict(zip(values._parameters, originals, strict=True))
    return cast(Tensor, torch.func.functional_call(values, named, ()))


def through(parametrizations: nn.Module, *originals: Tensor) -> Tensor:
    """What a list of parametrizations computes from these originals."""
    first, *others = parametrizations._modules.values()
    value: Tensor = first(*originals)  # type: ignore[misc]
    for other in others:
        value = other(value)  # type: ignore[misc]
    return value


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers: those on the meta device and in fake mode do not."""
    fakes: Any = sys.modules.get("torch._subclasses.fake_tensor")  # not imported: there are none
    return not (tensor.is_meta or (fakes is not None and isinstance(tensor, fakes.FakeTensor)))


def never_compiled(function: F) -> F:
    """Keep torch.compile out of a function, and of all that it calls, at no cost to an import.

    What changes the structure of a model cannot be traced. Inside a compiled function it runs as
    it is, between two graphs.
    """
    disabled: list[Any] = []  # made once, when there is something to keep out

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        dynamo: Any = sys.modules.get("torch._dynamo")  # not imported: nothing is compiled
        if dynamo is None:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(dynamo.disable(function))
        return disabled[0](*args, **kwargs)

    outside._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast(F, outside)
