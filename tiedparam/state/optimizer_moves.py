"""Moving an optimizer between a dense parameter and its free values, state included.

`optimizer_laws` knows its class, `optimizer_maps` how each kind of state follows, and
`optimizer_groups` chooses the group of the new parameters. Here a move is planned, with every
reason against it, before anything is changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tiedparam.laws.fitted import is_fitted
from tiedparam.state.optimizer_earlier import renew_state
from tiedparam.state.optimizer_exchange import Exchange, moved_state, new_names
from tiedparam.state.optimizer_groups import among, destination, exchange, times
from tiedparam.state.optimizer_guard import holds_retired, watch_rates
from tiedparam.state.optimizer_laws import OptimizerLaw, law_of, unwrapped
from tiedparam.state.optimizer_maps import is_linear
from tiedparam.util.errors import Reason, TieError, warn


def _refuse_unmapped(change: Exchange, optimizers: list[Optimizer]) -> None:
    """Raise if there is state or a gradient to move by a law that the maps do not hold for."""
    stepped = any(o.state.get(p) for o in optimizers for p in change.old)
    pending = any(p.grad is not None for p in change.old)
    if not change.new or not (stepped or pending) or change.rule.has_orbits:
        return
    if not stepped and change.tying and is_linear(change.rule):
        return  # the transpose of any linear law gives the gradient
    what = "optimizer state" if stepped else "a pending gradient"
    if is_fitted(change.rule):
        if change.tying or not pending:
            return  # state starts anew, and a gradient follows the chain rule
        fact = f"many gradients of a weight fit those of the values of '{change.rule}'."
        raise TieError(f"'{change.rule}'", fact, "Call zero_grad first.")
    why = "scales or mixes its free values" if is_linear(change.rule) else "is not linear"
    fact = f"the rule {why}, and how {what} follows is not known."
    raise TieError(f"'{change.rule}'", fact, change.remedy if stepped else "Call zero_grad first.")


@dataclass
class Move:
    """One planned exchange of parameters in one optimizer; nothing is changed until `apply`.

    Attributes:
        optimizer: the optimizer.
        group: where the old parameters stand.
        target: where the new ones will.
        changes: new options of the target.
        old: what goes.
        new: what comes.
        state: the state of each new one.
        names: their names, for groups that have names.
        warnings: what cannot be carried over.
    """

    optimizer: Optimizer
    group: dict[str, Any]
    target: dict[str, Any]
    changes: dict[str, Any]
    old: list[nn.Parameter]
    new: list[nn.Parameter]
    state: list[dict[str, Any]]
    names: list[str]
    warnings: list[str] = field(default_factory=list)

    def apply(self) -> None:
        """Exchange the parameters, in place, and their state."""
        exchange(
            self.optimizer, self.group, self.target, self.old, self.new, self.names, self.changes
        )
        if times(self.target) != 1:
            watch_rates(self.optimizer)
        for parameter in self.old:
            self.optimizer.state.pop(parameter, None)
        for parameter, state in zip(self.new, self.state, strict=True):
            if state:
                self.optimizer.state[parameter] = state


def as_optimizers(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """The ``optimizer=`` argument as a list: each one once, out of its wrapper.

    Raises:
        TypeError: if something in it is not an optimizer.
    """
    if optimizer is None:
        return []
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    if not isinstance(optimizers, Iterable):
        raise TypeError(f"optimizer= takes torch optimizers, not {type(optimizer).__name__}")
    optimizers = list(optimizers)
    for item in optimizers:
        if not isinstance(item, Optimizer):
            raise TypeError(f"optimizer= takes torch optimizers, not {type(item).__name__}")
    return list({id(inner): inner for inner in map(unwrapped, optimizers)}.values())


def plan_moves(optimizers: Sequence[Optimizer], change: Exchange) -> list[Move]:
    """Plan the exchange in every optimizer that holds what goes.

    Raises:
        TieError: with the reason, if no optimizer holds it, if it stands in several groups, or
            if how an optimizer follows is not known.
    """
    _refuse_unmapped(change, list(optimizers))
    moves = []
    for optimizer in optimizers:
        renew_state(optimizer)
        groups = [
            group
            for group in optimizer.param_groups
            if any(among(p, group["params"]) for p in change.old)
        ]
        if not groups:
            continue
        if len(groups) > 1 or not all(among(p, groups[0]["params"]) for p in change.old):
            place = f"the {type(optimizer).__name__}"
            raise TieError(
                place,
                f"{place} holds its free values in several groups, or only some of them.",
                "Put them into one group.",
            )
        law = _law_for(optimizer, change.old, change.new, change.remedy)
        group, states = groups[0], moved_state(optimizer, law, change)
        names = new_names(group, change)
        move = Move(optimizer, group, group, {}, change.old, change.new, states, names)
        _tell_restart(move)
        moves.append(_placed(move, law, change))
    if optimizers and change.old and not moves and any(p.requires_grad for p in change.old):
        if any(map(holds_retired, optimizers)):
            raise TieError(
                "optimizer=",
                "none of the optimizers holds it, and one holds what an earlier tie has replaced.",
                "Leave optimizer= out, and rebuild the optimizer afterwards.",
            )
        raise TieError(
            "optimizer=",
            "none of the optimizers holds it.",
            "Pass all that were built from this model.",
        )
    return moves


def _tell_restart(move: Move) -> None:
    """Note that what the optimizer knew is given up, if nothing of it can be moved."""
    held = any(move.optimizer.state.get(parameter) for parameter in move.old)
    if held and move.new and not any(move.state):
        move.warnings.append(
            f"the {type(move.optimizer).__name__} starts the state of its new Parameters anew: no "
            "stored value is an entry of the weight"
        )


def _law_for(
    optimizer: Optimizer, old: list[nn.Parameter], new: list[nn.Parameter], remedy: str
) -> OptimizerLaw:
    """What is known of the optimizer.

    Raises:
        TieError: with the reason, if this does not allow the exchange.
    """
    place = f"the {type(optimizer).__name__}"
    law = law_of(optimizer)
    if isinstance(law, Reason):
        way = f"{remedy.removesuffix('.')}, or register its law with tiedparam.register_optimizer."
        raise TieError(place, law.fact, way)
    if law.refused is not None:
        if new and law.even_fresh:
            raise TieError(place, *law.refused)
        # where nothing takes its place, the state of a parameter is dropped, not moved
        held = optimizer.state if law.joint else [p for p in old if new and optimizer.state.get(p)]
        if held:
            raise TieError(place, law.refused.fact, f"{law.refused.remedy} {remedy}".strip())
    return law


def _placed(move: Move, law: OptimizerLaw, change: Exchange) -> Move:
    """The move, to a group in which coupled decay is as strong as before (S42)."""
    rates = law.rates(move.group)
    if not change.new or (not rates and times(move.group) == 1):
        return move
    counts = change.multiplicities()
    least, most = counts if counts is not None else (0, 0)
    weaker = "weaker" if change.tying else "stronger"
    by, why = f"{most:g} times {weaker} than before", _SCHEDULED
    if counts is None:
        by, why = "otherwise than before", "the free values are not entries of the weight"
    elif least != most:
        by = f"up to {by}"
        why = f"between {least:g} and {most:g} entries share a value, and a group has one rate"
    elif most == 1:
        return move
    else:
        factor = most if change.tying else 1 / most
        found = destination(move.optimizer, move.group, change.old, rates, factor)
        if found is not None:
            move.target, move.changes = found
            return move
    if rates:
        move.warnings.append(_lost_decay(move.optimizer, rates, by, why))
    return move


_SCHEDULED = (
    "it needs a group of its own, and a learning-rate scheduler counts the groups, so that none "
    "can be added. Give the tensor a group of its own beforehand, or build the scheduler afterwards"
)


def _lost_decay(optimizer: Optimizer, rates: dict[str, Any], by: str, why: str) -> str:
    named = " and ".join(f"{name}={float(rate):g}" for name, rate in rates.items())
    way = (
        ""
        if why is _SCHEDULED
        else (". Set the rate to what you want, or use AdamW, whose decay is decoupled")
    )
    return (
        f"the {type(optimizer).__name__} adds its decay ({named}) to the gradient, and from now "
        f"on it acts {by}: {why}{way}"
    )


def plan_addition(
    optimizers: Sequence[Optimizer], new: nn.Parameter, beside: list[nn.Parameter]
) -> list[Move]:
    """Plan to add a parameter that no optimizer held, to the group that holds its source.

    Args:
        optimizers: the optimizers to look through.
        new: the parameter.
        beside: what its source is computed from.

    Raises:
        TieError: with the reason, if no optimizer holds the source and there is a choice.
    """
    moves = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(among(p, group["params"]) for p in beside):
                moves.append(_addition(optimizer, group, new))
                break
    if optimizers and not moves:
        if len(optimizers) > 1 or len(optimizers[0].param_groups) > 1:
            raise TieError(
                "optimizer=",
                "there are several groups and none holds its source.",
                "Call remove_tie without optimizer= and add the parameter to the group you want.",
            )
        moves.append(_addition(optimizers[0], optimizers[0].param_groups[0], new))
    return moves


def _addition(optimizer: Optimizer, group: dict[str, Any], new: nn.Parameter) -> Move:
    law = _law_for(optimizer, [], [], "Build the optimizer after untying.")  # nothing is moved
    names = []
    if "param_names" in group:
        taken = {name for g in optimizer.param_groups for name in g["param_names"]}
        names = [next(n for i in itertools.count(1) if (n := f"untied_{i}") not in taken)]
    move = Move(optimizer, group, group, {}, [], [new], [{}], names)
    rates, stronger = law.rates(group), times(group)
    if rates and stronger != 1:  # those of the source's free values are not its own
        found = destination(optimizer, group, [], rates, 1 / stronger)
        if found is not None:
            move.target, move.changes = found
        else:
            by = f"{stronger:g} times stronger than you have set it"
            move.warnings.append(_lost_decay(optimizer, rates, by, _SCHEDULED))
    return move


def warn_of_losses(moves: Iterable[Move], doing: str) -> None:
    """Warn of what the moves do not carry over, before anything is changed."""
    tell_losses(moves, lambda loss: warn(f"{doing}: {loss}."))


def tell_losses(moves: Iterable[Move], tell: Callable[[str], None]) -> None:
    """Say each thing that the moves do not carry over."""
    for move in moves:
        for warning in move.warnings:
            tell(warning)


def move_gradient(change: Exchange) -> None:
    """Carry a pending ``.grad`` over, where stored values are entries of the weight."""
    if is_fitted(change.rule):
        return  # `share_gradient` does
    if change.new and any(parameter.grad is not None for parameter in change.old):
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in change.old]
        with torch.no_grad():
            moved = change.maps["gradient"](gradients)
        for parameter, gradient in zip(change.new, moved, strict=True):
            parameter.grad = gradient


def share_gradient(
    weight: nn.Parameter, compute: Callable[[], Tensor], origin: Sequence[nn.Parameter]
) -> None:
    """Add the pending ``.grad`` of a tensor that is computed now to what it is computed from."""
    trained = [parameter for parameter in origin if parameter.requires_grad]
    if weight.grad is None or not trained:
        return
    with torch.enable_grad():
        shares = torch.autograd.grad(compute(), trained, weight.grad, allow_unused=True)
    for parameter, share in zip(trained, shares, strict=True):
        if share is not None:
            parameter.grad = share if parameter.grad is None else parameter.grad + share
