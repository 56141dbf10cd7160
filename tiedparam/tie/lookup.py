"""What is tied: the questions that every other part asks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.utils import parametrize

from tiedparam.laws.rule import Rule
from tiedparam.tie.record import Tie
from tiedparam.util.errors import TieError, describe, some_of
from tiedparam.util.parametrized import parametrization_list, parametrization_lists
from tiedparam.util.torch_private import WRAPPED, parameters_of


def is_tied(module: nn.Module, tensor_name: str | None = None, *, recurse: bool = True) -> bool:
    """Whether anything in a module is tied.

    Args:
        module: a layer, or a whole model.
        tensor_name: ask for this tensor of this very layer.
        recurse: whether layers inside the module count too, or only its own tensors.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> _ = tp.register_tie(model[0], "flip_sym")
        >>> tp.is_tied(model), tp.is_tied(model, recurse=False), tp.is_tied(model[0], "bias")
        (True, False, False)
    """
    if tensor_name is None:
        return any(ties_in(part) for part in (module.modules() if recurse else (module,)))
    return find_tie(module, tensor_name) is not None


def get_tie(layer: nn.Module, tensor_name: str = "weight") -> Rule:
    """The rule that ties a tensor.

    Raises:
        TieError: if the tensor is not tied.

    Example:
        >>> rule = tp.get_tie(tp.register_tie(nn.Linear(4, 4), "flip_sym"))
        >>> rule.law, rule.free_count
        ('W[i, j, x] = W[j, i, flip(x)]', 10)
    """
    return tie_of(layer, tensor_name).rule


def find_tie(layer: nn.Module, tensor_name: str) -> Tie | None:
    """The tie of a tensor, or None if it is not tied."""
    if not parametrize.is_parametrized(layer, tensor_name):
        return None
    values = parametrization_list(layer, tensor_name)
    return Tie(layer, tensor_name, values) if isinstance(values[0], Rule) else None


def tie_of(layer: nn.Module, tensor_name: str = "weight") -> Tie:
    """The tie of a tensor.

    Raises:
        TieError: if the tensor is not tied.
    """
    tie = find_tie(layer, tensor_name)
    if tie is None:
        where = describe(layer, tensor_name)
        tied = [f"'{key}{other.tensor_name}'" for key, other in named_ties_in(layer)]
        remedy = f"Tied in it: {some_of(tied)}." if tied else "Tie it with register_tie first."
        raise TieError(where, f"{where} is not tied.", remedy)
    return tie


def ties_in(layer: nn.Module) -> list[Tie]:
    """The ties of one layer."""
    if not parametrize.is_parametrized(layer):
        return []
    found = (find_tie(layer, name) for name in parametrization_lists(layer))
    return [tie for tie in found if tie is not None]


def named_ties_in(model: nn.Module) -> Iterator[tuple[str, Tie]]:
    """All ties of a model, each with what the state-dict keys of its layer begin with."""
    for path, module in model.named_modules(remove_duplicate=False):
        for tie in ties_in(module):
            yield key_prefix(path), tie


def origins(layer: nn.Module, tensor_name: str) -> Iterator[nn.Parameter]:
    """The Parameters that hold a tensor's numbers; a copy's are at the end of its chain."""
    tie = find_tie(layer, tensor_name)
    if tie is None:
        parameter = parameters_of(layer).get(tensor_name)
        yield from [parameter] if parameter is not None else []
        return
    yield from tie.free
    for source, name in tie.rule.sources():
        yield from origins(source, name)


def key_prefix(path: str) -> str:
    """What the state-dict keys of the module at ``path`` begin with."""
    if "_wrapped_module" in path:
        # wrappers of FSDP1 and of activation checkpointing
        path = ".".join(name for name in path.split(".") if name not in WRAPPED)
    return f"{path}." if path else ""
