"""`recluster`: other clusters for tensors that are tied by clusters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tiedparam.laws.coded import Coded
from tiedparam.laws.rule import Rule
from tiedparam.layer.register import register_tie
from tiedparam.layer.remove import remove_tie
from tiedparam.layer.rollback import rolled_back_on_error
from tiedparam.state.optimizer_moves import as_optimizers
from tiedparam.tie.lookup import ties_in
from tiedparam.tie.record import Tie
from tiedparam.util.errors import Reason, TieError, raise_if
from tiedparam.util.never_compiled import never_compiled
from tiedparam.util.torch_private import has_values

Model = TypeVar("Model", bound=nn.Module)


@never_compiled
def recluster(
    model: Model,
    n: int | None = None,
    *,
    per: Literal["tensor", "output"] | None = None,
    value: Tensor | None = None,
    weights: Tensor | None = None,
    tensor_name: str | None = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
) -> Model:
    """Find clusters anew, of trained values or of another weight. All or nothing.

    Clusters never change by themselves. With a smaller ``n`` the trained values are joined, each
    counted as often as it has entries, as one does who goes from 8 bits to 4 in steps. More
    clusters than there are values need a ``value``, or ``per="output"``, by which each output gets
    values of its own.

    Args:
        model: a layer or a model; all of its tensors that are tied by ``cluster`` are meant.
        n: how many values from now on; None is as many as now.
        per: as of ``cluster``, from now on; None is as now.
        value: a dense weight to take and to cluster, instead of the present one.
        weights: how much each entry matters, as of ``cluster``.
        tensor_name: only tensors of this name.
        optimizer: the optimizer or optimizers that hold the values. Their state follows as it does
            where a tensor is untied and tied: averages of gradients as exactly as the gradients
            themselves, those of squares as if all entries of a cluster had the same.

    Returns:
        The model itself, with new Parameters for the values.

    Raises:
        TieError: if nothing is tied by clusters, ``value`` or ``weights`` are given for several
            tensors, or one cannot be clustered so, also because it has fewer different numbers
            than ``n``. Nothing was changed then.
        TypeError: if none of ``n``, ``per`` and ``value`` says what is to change, or ``value`` is
            no tensor.

    Example:
        >>> layer = tp.register_tie(nn.Linear(32, 32), "cluster", n=64)
        >>> tp.get_tie(tp.recluster(layer, 16)).free_count
        16
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"recluster takes an nn.Module, not {type(model).__name__}")
    if n is None and per is None and value is None:
        raise TypeError("recluster takes n=, per= or value=: of one weight, clusters are the same")
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"value= takes a dense weight, not {type(value).__name__}")
    found = [
        (tie, rule)
        for layer in model.modules()
        for tie in ties_in(layer)
        if tensor_name in (None, tie.tensor_name)
        and (rule := _anew(tie.rule, n, per, weights)) is not None
    ]
    if not found:
        named = "" if tensor_name is None else f" '{tensor_name}'"
        raise TieError(
            "the model", f"no tensor{named} of it is tied by clusters.", "Tie one by 'cluster'."
        )
    if len(found) > 1 and not (value is None and weights is None):
        fact = f"value= and weights= are for one tensor, and {len(found)} are tied by clusters."
        raise TieError("the model", fact, "Give the layer, and tensor_name= if it has several.")
    optimizers = as_optimizers(optimizer)
    with rolled_back_on_error(model.modules(), optimizers):
        for tie, rule in found:
            _tie_anew(tie, rule, value, optimizers, tie.describe(model))
    return model


def _anew(rule: Rule, n: int | None, per: str | None, weights: Tensor | None) -> Rule | None:
    changes: dict[str, Any] = {"n": n, "per": per, "weights": weights}
    changes = {name: change for name, change in changes.items() if change is not None}
    return rule.anew(changes) if isinstance(rule, Coded) else None


def _tie_anew(
    tie: Tie, rule: Rule, value: Tensor | None, optimizers: list[Optimizer], where: str
) -> None:
    layer, name = tie.layer, tie.tensor_name
    cache = bool(tie.kept is not None and tie.kept.checked)
    many = _why_too_many(tie, rule) if value is None else None
    try:
        remove_tie(layer, name, optimizer=optimizers)
        dense = getattr(layer, name)
        if value is not None and not has_values(value):
            raise TieError(where, "value has no numbers.", "Initialise or load it first.")
        if value is not None and (value.shape != dense.shape or value.is_complex()):
            fact = f"value is {value.dtype} {tuple(value.shape)}, and it is {tuple(dense.shape)}."
            raise TieError(where, fact, "Give a weight of its shape.")
        if value is not None:
            with torch.no_grad():
                dense.copy_(value.detach())
        register_tie(layer, rule, name, cache=cache, optimizer=optimizers)
        raise_if(where, many)  # after what the tensor cannot have at all
    except TieError as error:
        raise TieError(f"cannot find other clusters for {where}", *error.reason) from error


def _why_too_many(tie: Tie, rule: Any) -> Reason | None:
    """Why the tensor has no numbers for so many values: others would have one entry, or none."""
    (values,) = tie.free
    if rule.n <= tie.rule.n or not has_values(values):
        return None
    apart = rule.per == tie.rule.per == "output"
    rows = values.detach() if apart else values.detach().flatten()[None]
    count = max(row.unique().numel() for row in rows)
    if rule.n <= count:
        return None
    return Reason(f"n={rule.n} values for {count} different numbers.", "Pass value=.")
