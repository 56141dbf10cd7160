"""Untying one tensor of one layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from tiedparam.compute.frozen import refuse_if_frozen
from tiedparam.laws.layout import declare_shape
from tiedparam.layer import host
from tiedparam.layer.moves import planned_moves
from tiedparam.layer.parameter_order import plain_parameter
from tiedparam.layer.rollback import rolled_back_on_error
from tiedparam.state import optimizer_guard, optimizer_moves, optimizer_names
from tiedparam.state.optimizer_exchange import untying
from tiedparam.state.optimizer_moves import Move
from tiedparam.tie.changed_source import why_unlike
from tiedparam.tie.lookup import find_tie, is_tied, origins
from tiedparam.tie.marks import carry_attributes
from tiedparam.tie.offloaded import why_offloaded
from tiedparam.tie.record import Tie
from tiedparam.tie.sharing import hand_over, readers_of
from tiedparam.tie.sources import overlooking_sources
from tiedparam.tie.wrapped import why_wrapped
from tiedparam.util.errors import Reason, TieError, describe, raise_if, warn
from tiedparam.util.never_compiled import never_compiled
from tiedparam.util.torch_private import has_gradient_hooks

Layer = TypeVar("Layer", bound=nn.Module)


@never_compiled
@torch.inference_mode(False)
def remove_tie(
    layer: Layer,
    tensor_name: str = "weight",
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
) -> Layer:
    """Make a tied tensor a plain, contiguous Parameter again, with the same values.

    Args:
        layer: the tied layer; with its last tie gone it has its stock class again.
        tensor_name: which tensor.
        optimizer: the optimizer or optimizers that hold the free values; they are moved to
            the dense parameter, state included. The parameter of an untied copy joins the
            group of its source.

    Returns:
        The layer itself.

    Raises:
        TieError: if the tensor is not tied, if another parametrization is stacked on the
            tie, or if an optimizer cannot follow. Nothing was changed then.

    Warns:
        TieWarning: if decay that the optimizer adds to the gradient becomes stronger.
        TieWarning: if the source of a copy was resized: the tensor then has that size.

    Example:
        >>> layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
        >>> weight = layer.weight.detach()
        >>> type(tp.remove_tie(layer)) is nn.Linear, torch.equal(layer.weight, weight)
        (True, True)
    """
    tie = find_tie(layer, tensor_name)
    where = describe(layer, tensor_name)
    if tie is None:
        within = "Name what is tied in it, or call untie_model." if is_tied(layer) else ""
        raise TieError(where, f"{where} is not tied, so there is no tie to remove.", within)
    refuse_if_frozen(layer, "remove_tie")
    optimizers = optimizer_moves.as_optimizers(optimizer)
    readers = readers_of(tie)
    if not readers:
        _untie(tie, where, optimizers)
        return layer
    for reader in readers:
        refuse_if_frozen(reader.layer, "remove_tie")
    raise_if(f"cannot untie {where}", _why_not_handed_over(tie, readers[0]))
    touched = [part for each in (tie, *readers) for part in each.layer.modules()]
    with rolled_back_on_error(touched, optimizers):
        hand_over(tie)
        for each in (tie, readers[0]):
            optimizer_names.number_again(optimizers, each)
        _untie(tie, where, optimizers)
        optimizer_guard.watch_free_values(readers[0].free, readers[0].describe())
    return layer


def _untie(tie: Tie, where: str, optimizers: list[Optimizer]) -> None:
    """`remove_tie`, of a tie that others read nothing of but its tensor."""
    layer, tensor_name, place = tie.layer, tie.tensor_name, f"cannot untie {where}"
    raise_if(place, _why_not_untied(tie))
    with overlooking_sources(tie.values):
        dense, moves = _plan_untying(tie, optimizers, place)
        optimizer_moves.warn_of_losses(moves, f"untying {where}")
        if tie.free:
            optimizer_moves.move_gradient(untying(tie, dense))
    _tell_resized(tie, dense, where)
    stored = tie.free
    for parameter in stored:
        carry_attributes(parameter, dense)
    host.remove_host(layer, tensor_name, dense)
    for move in moves:
        move.apply()
    optimizer_guard.retire(
        stored,
        f"a free value of {where}",
        "Rebuild the optimizer; to keep its state, pass optimizer= to remove_tie when you untie.",
    )


def _why_not_handed_over(tie: Tie, reader: Tie) -> Reason | None:
    """Why a layer cannot own what it has only read until now: it would not compute with it."""
    unlike = why_unlike(tie.free[:1], reader.free)
    if unlike is None:
        return None
    return Reason(
        f"{reader.describe()} is to have the values that both share, and is of another dtype or "
        "on another device.",
        "Convert all layers that share them to one first, as model.to(...) does, or untie that one "
        "first.",
    )


def _why_not_untied(tie: Tie) -> Reason | None:
    if tie.is_stacked:
        return Reason(
            f"another parametrization is stacked on '{tie.rule}'.",
            f"Remove that one first (del layer.parametrizations.{tie.tensor_name}[1:]), or use "
            "torch's remove_parametrizations to fix the combined weight.",
        )
    if any(has_gradient_hooks(parameter) for parameter in tie.free):
        return Reason(
            "its free values carry gradient hooks, which would be lost.", "Remove them first."
        )
    return None


def _plan_untying(
    tie: Tie, optimizers: list[Optimizer], place: str
) -> tuple[nn.Parameter, list[Move]]:
    """The dense Parameter, and how the optimizers take it up."""
    origin = list(origins(tie.layer, tie.tensor_name))
    raise_if(place, why_wrapped(tie.layer, origin, "untie") or why_offloaded(tie.layer))
    with torch.enable_grad():
        weight = tie.weight()
    # where a law left nothing to train, the weight was not frozen for that
    nothing_left = not tie.free and not tie.rule.reads_layers
    dense = plain_parameter(weight, weight.requires_grad or nothing_left)
    if tie.free:
        return dense, planned_moves(optimizers, untying(tie, dense), place)
    try:
        return dense, optimizer_moves.plan_addition(optimizers, dense, origin)
    except TieError as error:
        raise TieError(place, *error.reason) from error


def _tell_resized(tie: Tie, dense: nn.Parameter, where: str) -> None:
    """Warn of a copy that leaves in another size; here, before anything has changed."""
    shape = tie.rule.bound_layout.shape
    if dense.shape != shape:
        warn(
            f"{where} was tied as {shape} and its source was resized since: it is "
            f"{tuple(dense.shape)} now.",
            "Resize what else the layer has, such as its bias.",
        )
        declare_shape(tie.layer, tie.tensor_name, tuple(dense.shape))
