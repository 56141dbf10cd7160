"""From a free value back to the layer and the weight that it belongs to.

The layers are remembered here, weakly, and their free values are looked up on demand:
so whatever makes other Parameters of them (a copy, a pickle, ``load_state_dict(assign=True)``,
``.to()``, ``fully_shard``) leaves nothing behind that is wrong. A note on the Parameter itself
would be lost by some of these, and a reference to it would keep torch from swapping its contents.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import nn

from tiedparam.laws.rule import Rule
from tiedparam.tie.lookup import find_tie, ties_in
from tiedparam.util.torch_private import lists_in_tables, parameters_of


@dataclass(frozen=True)
class Owner:
    """What a free value belongs to.

    Attributes:
        layer: the tied layer.
        tensor_name: which of its tensors.
        shape: the shape of the dense tensor, which is what the values mean; they are stored in
            another one.
        rule: the rule that ties it.
        index: which of the rule's free values it is: `rule.multiplicities` are in that order.

    Example:
        >>> layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
        >>> found = tp.owner(layer.parametrizations.weight.original0)
        >>> found.layer is layer, found.tensor_name, found.shape, str(found.rule), found.index
        (True, 'weight', (4, 4), 'flip_sym', 0)
        >>> int(found.rule.multiplicities()[found.index].max())
        2
    """

    layer: nn.Module
    tensor_name: str
    shape: tuple[int, ...]
    rule: Rule
    index: int


# by layer, in the order of tying; a dictionary, as there is no ordered weak set
_tied_layers: weakref.WeakKeyDictionary[nn.Module, None] = weakref.WeakKeyDictionary()


# by the id of a Parameter, where it stood when all layers were last searched: looked at first, so
# that asking for each Parameter of a model does not search them each time
_last_seen: dict[int, tuple[weakref.ref[nn.Module], str]] = {}


def remember_layer(layer: nn.Module) -> None:
    """Let `owner` find a layer that is tied now, or was made from one that is."""
    _tied_layers[layer] = None


def tied_layers() -> list[nn.Module]:
    """All layers that live and are tied, or were, in the order of tying."""
    return list(_tied_layers)


def owner(parameter: nn.Parameter) -> Owner | None:
    """What a free value belongs to, or None for a Parameter that is not one.

    Use it to build parameter groups of a tied model: the shape of a free value does not tell
    whether its weight is a matrix or a vector.

    Args:
        parameter: any Parameter. The source of a copy is an ordinary one, unless it is tied.

    Returns:
        The layer, the tensor's name, its dense shape, its rule and the place; None for a Parameter
        that no tied tensor is computed from, one that a tie has replaced, or one that `remove_tie`
        has.

    Raises:
        TypeError: if it is not a Parameter.

    Example:
        >>> layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
        >>> for value in layer.parameters():
        ...     found = tp.owner(value)
        ...     print(tuple(value.shape), found.shape if found else "not tied")
        (4,) not tied
        (5, 2) (4, 4)
    """
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"owner takes a Parameter, not {type(parameter).__name__}")
    found = _where(parameter)
    if found is None and _is_held_by_any(parameter):
        _look_at_all()
        found = _where(parameter)
    tie = find_tie(*found) if found is not None else None
    if tie is None:
        return None
    index = [value is parameter for value in tie.free].index(True)
    return Owner(tie.layer, tie.tensor_name, tie.rule.bound_layout.shape, tie.rule, index)


def _where(parameter: nn.Parameter) -> tuple[nn.Module, str] | None:
    """In which tensor of which layer it was last seen, if it still stands there."""
    seen, name = _last_seen.get(id(parameter), (None, ""))
    layer = seen() if seen is not None else None
    if layer is None:
        return None
    tie = find_tie(layer, name)
    held = tie.free if tie is not None else [parameters_of(layer).get(name)]
    return (layer, name) if any(value is parameter for value in held) else None


def _is_held_by_any(parameter: nn.Parameter) -> bool:
    """Whether a remembered layer has it in a list of parametrizations, of a tie or another one.

    By the tables alone: every Parameter that is not tied takes this walk.
    """
    wanted = id(parameter)
    for layer in tied_layers():
        for values in lists_in_tables(layer).values():
            if wanted in map(id, parameters_of(values).values()):
                return True
    return False


def _look_at_all() -> None:
    """Note where each Parameter of the remembered layers stands; a shared one, in the first."""
    _last_seen.clear()
    for layer in tied_layers():
        for tie in ties_in(layer):
            for value in tie.free:
                _last_seen.setdefault(id(value), (weakref.ref(layer), tie.tensor_name))
    for layer in tied_layers():  # after all free values, in case one is shared
        for name, parameter in parameters_of(layer).items():
            _last_seen.setdefault(id(parameter), (weakref.ref(layer), name))
