"""Moving an optimizer between a dense parameter and its free values, state included.

What is known of its class stands in `_optimizer_laws`, how each kind of state follows in
`_optimizer_maps`, and in which group the new parameters stand is decided by `_optimizer_groups`.
Here a move is planned, with every reason against it, before anything is changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tiedparam.laws.rule import Rule
from tiedparam.state.optimizer_groups import among, destination, exchange, positions, times
from tiedparam.state.optimizer_guard import holds_retired, watch_rates
from tiedparam.state.optimizer_laws import OptimizerLaw, law_of, unwrapped
from tiedparam.state.optimizer_maps import Maps, has_orbits, is_linear, maps_to_dense, maps_to_free
from tiedparam.util.errors import Reason, TieError, warn


@dataclass(frozen=True)
class Exchange:
    """What a tie, or its end, puts into the place of what.

    Attributes:
        rule: the law.
        old: the Parameters that go: a dense one, or free values.
        new: those that come; none if a copy is tied.
        maps: how tensors of each kind become the new ones.
        tensor_name: the name of the tensor in its layer.
        tying: whether the free values come, or go.
    """

    rule: Rule
    old: list[nn.Parameter]
    new: list[nn.Parameter]
    maps: Maps
    tensor_name: str
    tying: bool

    @property
    def remedy(self) -> str:
        """How to do without the move."""
        return f"Build the optimizer after {'tying' if self.tying else 'untying'}."

    def multiplicities(self) -> tuple[float, float] | None:
        """The smallest and the largest, or None if the law has none."""
        if not has_orbits(self.rule):
            return None
        counts = torch.cat([count.flatten() for count in self.rule.multiplicities()])
        return float(counts.min()), float(counts.max())


def tying(rule: Rule, weight: nn.Parameter, free: list[nn.Parameter], name: str) -> Exchange:
    """The exchange of a dense weight for free values."""
    return Exchange(rule, [weight], free, maps_to_free(rule) if free else {}, name, True)


def untying(rule: Rule, free: list[nn.Parameter], weight: nn.Parameter, name: str) -> Exchange:
    """The exchange of free values for a dense weight."""
    return Exchange(rule, free, [weight], maps_to_dense(rule), name, False)


def _refuse_unmapped(change: Exchange, optimizers: list[Optimizer]) -> None:
    """The maps hold where entries are shared; what there is to move by another law is refused."""
    stepped = any(o.state.get(p) for o in optimizers for p in change.old)
    pending = any(p.grad is not None for p in change.old)
    if not change.new or not (stepped or pending) or has_orbits(change.rule):
        return
    if not stepped and change.tying and is_linear(change.rule):
        return  # the transpose of any linear law gives the gradient
    what = "optimizer state" if stepped else "a pending gradient"
    fact = "scales or mixes its free values" if is_linear(change.rule) else "is not linear"
    raise TieError(
        f"'{change.rule}'",
        f"the rule {fact}, and how {what} follows is not known.",
        "Call zero_grad, or build the optimizer afterwards.",
    )


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
        warning: what cannot be carried over, or "".
    """

    optimizer: Optimizer
    group: dict[str, Any]
    target: dict[str, Any]
    changes: dict[str, Any]
    old: list[nn.Parameter]
    new: list[nn.Parameter]
    state: list[dict[str, Any]]
    names: list[str]
    warning: str = ""

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
        groups = [
            group for group in optimizer.param_groups
            if any(among(p, group["params"]) for p in change.old)
        ]  # fmt: skip
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
        group, states = groups[0], _moved_state(optimizer, law, change)
        names = _new_names(group, change)
        move = Move(optimizer, group, group, {}, change.old, change.new, states, names)
        moves.append(_placed(move, law, change))
    if optimizers and change.old and not moves and any(p.requires_grad for p in change.old):
        if any(map(holds_retired, optimizers)):
            raise TieError(
                "optimizer=",
                "none of the optimizers holds it, and one holds what an earlier tie has replaced.",
                "Leave optimizer= out, and build the optimizer anew afterwards.",
            )
        raise TieError(
            "optimizer=",
            "none of the optimizers holds it.",
            "Pass all that were built from this model.",
        )
    return moves


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
        move.warning = _lost_decay(move.optimizer, rates, by, why)
    return move


_SCHEDULED = (
    "it needs a group of its own, and a learning-rate scheduler counts the groups, so that none "
    "can be added. Give the tensor a group of its own beforehand, or build the scheduler afterwards"
)


def _lost_decay(optimizer: Optimizer, rates: dict[str, Any], by: str, why: str) -> str:
    named = " and ".join(f"{name}={float(rate):g}" for name, rate in rates.items())
    way = "" if why is _SCHEDULED else (
        ". Set the rate to what you want, or use AdamW, whose decay is decoupled"
    )  # fmt: skip
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
            move.warning = _lost_decay(
                optimizer, rates, f"{stronger:g} times stronger than you have set it", _SCHEDULED
            )
    return move


def warn_of_losses(moves: Iterable[Move], doing: str) -> None:
    """Say what the moves do not carry over, before anything is changed."""
    for move in moves:
        if move.warning:
            warn(f"{doing}: {move.warning}.")


def move_gradient(change: Exchange) -> None:
    """Carry a pending ``.grad`` over."""
    if change.new and any(parameter.grad is not None for parameter in change.old):
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in change.old]
        with torch.no_grad():
            moved = change.maps["gradient"](gradients)
        for parameter, gradient in zip(change.new, moved, strict=True):
            parameter.grad = gradient


def share_gradient(
    weight: nn.Parameter, compute: Callable[[], Tensor], origin: Sequence[nn.Parameter]
) -> None:
    """Add the pending ``.grad`` of a tensor that is a copy now to what it is computed from."""
    trained = [parameter for parameter in origin if parameter.requires_grad]
    if weight.grad is None or not trained:
        return
    with torch.enable_grad():
        shares = torch.autograd.grad(compute(), trained, weight.grad, allow_unused=True)
    for parameter, share in zip(trained, shares, strict=True):
        if share is not None:
            parameter.grad = share if parameter.grad is None else parameter.grad + share


def _moved_state(optimizer: Optimizer, law: OptimizerLaw, change: Exchange) -> list[dict[str, Any]]:
    """The state of each new parameter.

    Raises:
        TieError: with the reason, if an entry is not known, or not what it should be.
    """
    kind = f"the {type(optimizer).__name__}"
    states: list[dict[str, Any]] = [optimizer.state.get(p) or {} for p in change.old]
    moved: list[dict[str, Any]] = [{} for _ in change.new]
    if not moved or not any(states):
        return moved
    if len({frozenset(state) for state in states}) > 1:
        raise TieError(
            kind,
            f"{kind} holds state for some of its free values only, as after a step with the "
            "others frozen, and how that follows is not known.",
            "Build the optimizer afterwards.",
        )
    for key in states[0]:
        values = [state[key] for state in states]
        follows = law.state.get(key)
        known = follows is not None and all(
            _is_scalar(v) if follows == "scalar" or v is None else _is_like(v, p)
            for v, p in zip(values, change.old, strict=True)
        )
        if follows is None or not known:
            fact = f"{kind} holds the state '{key}', and how it follows a tie is not known."
            raise TieError(kind, fact, change.remedy)
        if follows == "scalar" or values[0] is None:
            if any(bool(value != values[0]) for value in values):
                raise TieError(
                    kind,
                    f"the free values have made different numbers of steps ('{key}' of {kind}), "
                    "and a dense weight has one.",
                    "Build the optimizer afterwards.",
                )
            mapped = [_copied(values[0]) for _ in moved]
        else:
            with torch.no_grad():
                mapped = change.maps[follows](values)
        for state, value in zip(moved, mapped, strict=True):
            state[key] = value
    return moved


def _is_like(value: Any, parameter: Tensor) -> bool:
    """Whether it is an ordinary tensor of the parameter's shape; 8-bit states are not."""
    return type(value) is Tensor and value.shape == parameter.shape


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0
    return value is None or isinstance(value, (bool, int, float, str))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _new_names(group: dict[str, Any], change: Exchange) -> list[str]:
    """The new entries of ``param_names``, which torch keeps beside ``params``."""
    if "param_names" not in group:
        return []
    first: str = group["param_names"][positions(change.old, group["params"])[0]]
    name = change.tensor_name
    stored = f"parametrizations.{name}.original"
    if not change.tying:
        return [first[: first.index(stored)] + name if stored in first else first]
    return [f"{first.removesuffix(name)}{stored}{index}" for index in range(len(change.new))]
