"""From a free value back to the layer and the weight that it belongs to.

The layers are remembered here, weakly, and their free values are looked up when somebody asks:
so whatever makes other Parameters of them (a copy, a pickle, ``load_state_dict(assign=True)``,
``.to()``, ``fully_shard``) leaves nothing behind that is wrong. A note on the Parameter itself
would be lost by some of these, and a reference to it would keep torch from swapping its contents.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import nn

from tiedparam._rule import Rule
from tiedparam._ties import get_tie, is_tied


@dataclass(frozen=True)
class Owner:
    """What a free value belongs to.

    Attributes:
        layer: the tied layer.
        tensor_name: which of its tensors.
        shape: the shape of the dense tensor, which is what the values mean; they are stored in
            another one.
        rule: the rule that ties it.
    """

    layer: nn.Module
    tensor_name: str
    shape: tuple[int, ...]
    rule: Rule


# by layer, in the order of tying; a dictionary, as there is no ordered weak set
_tied_layers: weakref.WeakKeyDictionary[nn.Module, None] = weakref.WeakKeyDictionary()


def remember(layer: nn.Module) -> None:
    """Let `owner` find a layer that is tied now, or was made from one that is."""
    _tied_layers[layer] = None


def owner(parameter: nn.Parameter) -> Owner | None:
    """What a free value belongs to, or None for a Parameter that is not one.

    Use it to build parameter groups of a tied model: the shape of a free value does not tell
    whether its weight is a matrix or a vector.

    Args:
        parameter: any Parameter. The source of a copy is an ordinary one, unless it is tied.

    Returns:
        The layer, the tensor's name, its dense shape and its rule; None for a Parameter that no
        tied tensor is computed from, one that a tie has replaced, or one that `remove_tie` has.

    Raises:
        TypeError: if it is not a Parameter.

    Example:
        >>> layer = tiedparam.register_tie(nn.Linear(4, 4), "flip_sym")
        >>> for value in layer.parameters():
        ...     found = tiedparam.owner(value)
        ...     print(tuple(value.shape), found.shape if found else "not tied")
        (4,) not tied
        (10, 1) (4, 4)
    """
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"owner takes a Parameter, not {type(parameter).__name__}")
    for layer in list(_tied_layers):
        # by the tables: for a model of many ties, attributes of modules would take a minute
        lists = layer.__dict__.get("_modules", {}).get("parametrizations")
        for name, values in lists._modules.items() if lists is not None else ():
            held = any(value is parameter for value in values._parameters.values())
            if held and is_tied(layer, name):  # not another parametrization, beside a tie
                rule = get_tie(layer, name)
                return Owner(layer, name, rule.bound_layout.shape, rule)
    return None
