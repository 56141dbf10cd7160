"""What is tied, and by which rule: the questions that every other part asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import nn
from torch.nn.utils import parametrize

from tiedparam.laws.rule import Rule
from tiedparam.tie.record import Tie
from tiedparam.util.errors import TieError, describe
from tiedparam.util.torch_private import parametrization_list, parametrization_lists


def is_tied(module: nn.Module, tensor_name: str | None = None, *, recurse: bool = True) -> bool:
    """Whether anything in a module is tied.

    Args:
        module: a layer, or a whole model.
        tensor_name: ask for this tensor of this very layer.
        recurse: whether layers inside of the module count; if not, its own tensors alone.

    Example::

        is_tied(model)  # any layer of it
        [layer for layer in model.modules() if is_tied(layer, recurse=False)]
        is_tied(model.conv, "bias")
    """
    if tensor_name is None:
        return any(ties_of(part) for part in (module.modules() if recurse else (module,)))
    if not parametrize.is_parametrized(module, tensor_name):
        return False
    return isinstance(parametrization_list(module, tensor_name)[0], Rule)


def get_tie(layer: nn.Module, tensor_name: str = "weight") -> Rule:
    """The rule that ties a tensor.

    Raises:
        TieError: if the tensor is not tied.
    """
    if not is_tied(layer, tensor_name):
        raise TieError(
            f"{describe(layer, tensor_name)} is not tied. Tie it with register_tie first."
        )
    return cast(Rule, parametrization_list(layer, tensor_name)[0])


def tie_of(layer: nn.Module, tensor_name: str = "weight") -> Tie:
    """The tie of a tensor that is known to be tied."""
    return Tie(layer, tensor_name, parametrization_list(layer, tensor_name))


def free_values(layer: nn.Module, tensor_name: str) -> list[nn.Parameter]:
    """The Parameters that a tied tensor is computed from; none for a copy."""
    values = parametrization_list(layer, tensor_name)
    return [getattr(values, f"original{index}") for index in range(values.ntensors)]


def origins(layer: nn.Module, tensor_name: str) -> Iterator[nn.Parameter]:
    """The Parameters that hold a tensor's numbers; a copy's are at the end of its chain."""
    if not is_tied(layer, tensor_name):
        parameter = layer._parameters.get(tensor_name)
        yield from [parameter] if parameter is not None else []
        return
    yield from free_values(layer, tensor_name)
    for source, name in get_tie(layer, tensor_name).sources():
        yield from origins(source, name)


def is_stacked(layer: nn.Module, tensor_name: str) -> bool:
    """Whether another parametrization works on what the tie gives."""
    return len(parametrization_list(layer, tensor_name)) > 1


def ties_of(layer: nn.Module) -> dict[str, Rule]:
    """The tied tensors of one layer and their rules."""
    if not parametrize.is_parametrized(layer):
        return {}
    names = parametrization_lists(layer)
    return {name: get_tie(layer, name) for name in names if is_tied(layer, name)}


def named_ties(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Rule]]:
    """Every tied tensor: key prefix of its layer, layer, tensor name, rule."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, rule in ties_of(module).items():
            yield key_prefix(path), module, name, rule


def key_prefix(path: str) -> str:
    """What the state-dict keys of the module at ``path`` begin with."""
    if "_wrapped_module" in path:
        # torch's wrappers for FSDP1 and activation checkpointing leave their names out of the keys
        wrappers = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
        path = ".".join(name for name in path.split(".") if name not in wrappers)
    return f"{path}." if path else ""
