"""How far a tensor is from a law, before anybody ties it."""

from __future__ import annotations

from copy import copy
from typing import Any

from torch import Tensor, nn

from tiedparam.laws.registry import make_rule
from tiedparam.laws.rule import Rule
from tiedparam.layer.checks import check_arguments, why_no_values
from tiedparam.tie.binding import bind
from tiedparam.tie.target import Target
from tiedparam.tie.write_guard import unguard
from tiedparam.util.errors import TieError, raise_if
from tiedparam.util.torch_private import has_values


def residual(
    layer: nn.Module,
    rule: str | type[Rule] | Rule,
    tensor_name: str = "weight",
    *,
    root: nn.Module | None = None,
    **options: Any,
) -> float:
    """How far a tensor is from a law: ``‖W − project(W)‖ / ‖W‖``. Look before you tie.

    Args:
        layer: the layer, tied or not; it is not changed.
        rule: as in `register_tie`.
        tensor_name: which tensor.
        root: the model, to find a ``source=`` given as a path.
        **options: the rule's own options.

    Returns:
        0 for a lawful (or zero) weight. For a rule with free values at most 1, and about
        ``sqrt(1 − free/entries)`` for i.i.d. entries; for a copy unbounded, and about √2 for
        unrelated weights of equal scale.

    Raises:
        TieError: if the tensor cannot carry the rule.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = nn.init.eye_(layer.weight)
        >>> tp.residual(layer, "flip_sym")
        0.0
        >>> round(tp.residual(layer, "row_repeat"), 3)
        0.707
    """
    check_arguments(layer, tensor_name, "project", root)
    made = make_rule(rule, options)
    target = Target(layer, tensor_name, root)
    place = f"cannot compare {target.describe()} with '{made}'"
    weight = target.tensor
    if (
        not isinstance(weight, Tensor)
        or isinstance(weight, nn.UninitializedParameter)
        or not has_values(weight)
    ):
        raise TieError(place, *why_no_values(target))
    looked_through = copy(made)  # an instance that was given can still tie
    raise_if(place, bind(looked_through, target))
    return looked_through.residual(unguard(weight).detach())
