"""`tie_bank`: several layers that share templates, tied all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tiedparam.laws.choices import is_whole
from tiedparam.laws.registry import find_rule
from tiedparam.laws.sharing import Sharing
from tiedparam.layer.checks import check_arguments, why_untieable
from tiedparam.layer.rollback import rolled_back_on_error
from tiedparam.layer.tie_one import Settings, tie_one
from tiedparam.state.optimizer_moves import as_optimizers
from tiedparam.tie.parameter_paths import Places
from tiedparam.tie.target import Target
from tiedparam.util.errors import Reason, TieError, raise_if, some_of, warn
from tiedparam.util.never_compiled import never_compiled


@never_compiled
def tie_bank(
    layers: Iterable[nn.Module | str],
    templates: int,
    tensor_name: str = "weight",
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    root: nn.Module | None = None,
) -> list[nn.Module]:
    """Let several layers share templates: ``W_l = Σᵢ α_lᵢ·Tᵢ``. All or nothing.

    The weights become the nearest ones that are sums of ``templates`` matrices: the truncated
    singular value decomposition of the layers' weights, one a row. The first layer stores the
    templates, every layer its coefficients; the law of each is ``bank``. `remove_tie` gives a layer
    its weight back and leaves the others whole: if it is the first, the next one stores the
    templates from then on.

    Args:
        layers: layers of one canonical shape, dtype and device; or, with ``root=``, their paths.
        templates: how many; from 1 to the number of layers.
        tensor_name: which tensor of each.
        optimizer: the optimizer or optimizers that hold the dense parameters; they are moved to
            templates and coefficients, whose state begins anew.
        root: the model that holds the layers, as for `register_tie`.

    Returns:
        The layers.

    Raises:
        TieError: if anything does not fit. Nothing was changed then.
        TypeError: for arguments of a wrong type.

    Warns:
        TieWarning: if an optimizer's state begins anew, or its coupled decay acts otherwise.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
        >>> layers = tp.tie_bank(model, templates=2)
        >>> [tp.get_tie(layer).free_count for layer in layers]  # of 64 each
        [130, 2, 2, 2, 2, 2]
    """
    found = _found(layers, tensor_name, root)
    targets = _targets(found, tensor_name, root)
    place = f"cannot tie {len(found)} tensors '{tensor_name}' by 'bank(templates={templates!r})'"
    raise_if(place, _why_no_bank(targets, templates))
    optimizers, losses = as_optimizers(optimizer), list[str]()
    touched = {id(part): part for layer in found for part in layer.modules()}
    with rolled_back_on_error(touched.values(), optimizers):
        kind: Any = find_rule("bank")
        values = _start(kind(templates), targets, place)
        for number, (target, own) in enumerate(zip(targets, values, strict=True)):
            rule = kind(templates) if number == 0 else kind(templates, found[0], tensor_name)
            settings = Settings(optimizers=optimizers, values=own, lost=losses.append)
            tie_one(target, rule, settings)
        doing = f"tying {len(found)} tensors by '{rule}'"
        for loss in dict.fromkeys(losses):
            warn(f"{doing}: {loss}.")
    return found


def _found(
    layers: Iterable[nn.Module | str], tensor_name: str, root: nn.Module | None
) -> list[nn.Module]:
    """The layers, those that were given by their paths looked up."""
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers= takes several layers or paths, not {layers!r}")
    found = list[nn.Module]()
    for each in layers:
        if isinstance(each, str):
            if root is None:
                fact = f"'{each}' is a path, and the model is unknown."
                raise TieError("layers=", fact, "Pass root=model.")
            try:
                each = root.get_submodule(each)
            except AttributeError:
                raise TieError("layers=", f"the model has no layer '{each}'.", "") from None
        check_arguments(each, tensor_name, "project", root)
        found.append(each)
    return found


def _targets(layers: list[nn.Module], tensor_name: str, root: nn.Module | None) -> list[Target]:
    if root is None:
        return [Target(layer, tensor_name) for layer in layers]
    places = Places(root)
    return [Target.among(places, layer, tensor_name) for layer in layers]


def _why_no_bank(targets: Sequence[Target], templates: object) -> Reason | None:
    """Why these tensors cannot be tied together, each one's own reasons included."""
    if len(targets) < 2:
        return Reason("it takes at least two layers to share.", "Pass several.")
    if not is_whole(templates, 1) or templates > len(targets):
        return Reason(
            f"templates={templates!r} is not a number from 1 to {len(targets)}, the number of "
            "layers.",
            "With as many templates as layers nothing is lost, and nothing saved.",
        )
    if len({id(target.layer) for target in targets}) < len(targets):
        return Reason("a layer is listed twice.", "List each once.")
    for target in targets:
        reason = why_untieable(target)
        if reason is not None:
            return Reason(f"{target.describe()}: {reason.fact}", reason.remedy)
    return (
        _why_different(targets, "shapes", lambda t: t.layout.canonical_shape)
        or _why_different(targets, "dtypes", lambda t: t.tensor.dtype)
        or _why_different(targets, "devices", lambda t: t.tensor.device)
        or _why_different(targets, "requires_grad", lambda t: t.tensor.requires_grad)
    )


def _why_different(
    targets: Sequence[Target], what: str, of: Callable[[Target], Any]
) -> Reason | None:
    """The reason against tensors that are not alike in something."""
    kinds: dict[Any, str] = {}
    for target in targets:
        kinds.setdefault(of(target), target.describe())
    if len(kinds) == 1:
        return None
    shown = some_of([f"{kind} of {where}" for kind, where in kinds.items()])
    return Reason(f"they have different {what}: {shown}.", "Tie those that are alike.")


def _start(rule: Sharing, targets: Sequence[Target], place: str) -> list[tuple[torch.Tensor, ...]]:
    """The free values of each tensor, by the best approximation of them all."""
    first = targets[0]
    raise_if(place, rule.bind(first.layout, first.tensor.dtype))
    weights = [target.layout.canonical(target.tensor.detach()) for target in targets]
    started = rule.start(weights)
    if started is None:
        fact = "not all of their entries are finite numbers."
        raise TieError(place, fact, "Initialise or load them first.")
    shared, fitted = started
    return [(shared, *own) if number == 0 else own for number, own in enumerate(fitted)]
