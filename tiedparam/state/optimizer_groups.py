"""In which group of its optimizer a parameter stands: rates of decay, and places (S42).

Decay that is added to the gradient acts on a free value once, where the dense run has it in each
of the entries that share the value. So it has to be as many times stronger, and as a rate belongs
to a group, the free values go to a group of their own. It is like the one that they come from,
but for these rates, and holds two notes, which a state dict keeps:

* ``tied_multiplicity``: how many times stronger its decay is than the user has set it;
* ``tied_places``: for each of its parameters the group that it comes from, and its places there,
  counting what is away. So untying puts the parameter back where it stood (S19).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tiedparam.util.torch_private import is_scheduled

Group = dict[str, Any]

_TIMES = "tied_multiplicity"
_PLACES = "tied_places"
_OF_PARAMETERS = frozenset({"params", "param_names", _PLACES})


def among(parameter: Any, parameters: Iterable[Any]) -> bool:
    """Whether a parameter is one of these, by identity."""
    return id(parameter) in map(id, parameters)  # groups may be long, and Python's loops are slow


def positions(wanted: Iterable[Any], parameters: Sequence[Any]) -> list[int]:
    """Where some parameters stand among these, in order; those that do not stand there left out."""
    listed = list(map(id, parameters))
    return sorted(listed.index(id(p)) for p in wanted if id(p) in listed)


def times(group: Mapping[str, Any]) -> float:
    """How many times stronger the coupled decay of a group is than the user has set it."""
    return float(group.get(_TIMES, 1.0))


def destination(
    optimizer: Optimizer,
    group: Group,
    leaving: Sequence[Any],
    rates: Mapping[str, Any],
    factor: float,
) -> tuple[Group, dict[str, Any]] | None:
    """The group for parameters that decay ``factor`` times as strongly, and what changes in it.

    Args:
        optimizer: the optimizer; it is not changed.
        group: where the parameters stand.
        leaving: the parameters of the group that are exchanged.
        rates: the rates of decay that act in the group, by name.
        factor: by how much they are to be multiplied.

    Returns:
        The group itself with its new options, if nothing else stands in it; else one that is
        there already, or a new one. None if it would have to be a new one and a learning-rate
        scheduler holds the groups: its lists have one entry for each.
    """
    changes = {name: rate * factor for name, rate in rates.items()} | {
        _TIMES: times(group) * factor
    }
    if math.isclose(changes[_TIMES], 1.0):
        changes[_TIMES] = 1.0  # not 0.9999…: it is compared with what was never changed
    alone = bool(leaving) and all(among(p, leaving) for p in group["params"])
    number = _home(optimizer, group, leaving)[0]
    # others may come back to a group of the user's, and must find it as they left it
    awaits = _PLACES not in group and bool(_away(optimizer, number))
    if not alone or awaits or _PLACES in group:
        home = _numbered(optimizer, number)
        made = [other for other in optimizer.param_groups if _PLACES in other]
        for other in [home, *made]:  # not a group of the user's that is equal by chance
            if other is not None and other is not group and _alike(other, group, changes):
                return other, {}
    if alone and (not awaits or is_scheduled(optimizer)):
        return group, changes
    if is_scheduled(optimizer):
        return None
    # tensors are cloned: what scales the rate of each group in place would do so twice
    options = {k: _own(v) for k, v in {**group, **changes}.items() if k not in _OF_PARAMETERS}
    lists: Group = {name: [] for name in ("params", "param_names") if name in group}
    return {**lists, **options, _PLACES: []}, {}


def exchange(
    optimizer: Optimizer,
    group: Group,
    target: Group,
    old: Sequence[nn.Parameter],
    new: Sequence[nn.Parameter],
    names: Sequence[str],
    changes: Mapping[str, Any],
) -> None:
    """Take ``old`` out of a group and put ``new`` into one, where the old ones stood.

    Args:
        optimizer: the optimizer.
        group: the group of the old parameters.
        target: the group for the new ones; one that the optimizer has, or a new one.
        old: what goes; may be none.
        new: what comes; may be none.
        names: the names of the new ones, for groups that have names.
        changes: new options of the target.
    """
    home, slots = _home(optimizer, group, old)
    _take_out(group, old)  # in place: schedulers and LBFGS hold the lists
    if not among(target, optimizer.param_groups):
        optimizer.param_groups.append(target)
    if _PLACES in target:
        target[_PLACES] = [*target[_PLACES], *([home, list(slots)] for _ in new)]
        position = len(target["params"])
    elif target is _numbered(optimizer, home):
        away = _away(optimizer, home)
        end = len(target["params"])
        position = slots[0] - sum(a < slots[0] for a in away) if slots else end
        _shift(optimizer, home, slots, len(new) - len(slots))
    else:
        position = len(target["params"])
    target["params"][position:position] = new
    if "param_names" in target:
        target["param_names"][position:position] = names
    target.update(changes)
    if times(target) == 1.0:
        target.pop(_TIMES, None)
    if group is not target and _PLACES in group and not group["params"]:
        _dissolve(optimizer, group)


def _numbered(optimizer: Optimizer, number: int) -> Group | None:
    groups: list[Group] = optimizer.param_groups
    return groups[number] if number < len(groups) else None  # the user may have deleted some


def _home(optimizer: Optimizer, group: Group, old: Sequence[Any]) -> tuple[int, list[int]]:
    """The number of the group that parameters belong to, and their places in it."""
    found = positions(old, group["params"])
    if _PLACES in group:
        entries = [group[_PLACES][i] for i in found]
        (number, _), *_ = entries or group[_PLACES]
        return number, sorted({slot for _, slots in entries for slot in slots})
    number = next(i for i, g in enumerate(optimizer.param_groups) if g is group)
    slots = []
    for slot in found:
        for away in sorted(_away(optimizer, number)):
            slot += away <= slot
        slots.append(slot)
    return number, slots


def _away(optimizer: Optimizer, home: int) -> set[int]:
    """The places in a group whose parameters stand in groups of their own."""
    places = [entry for group in optimizer.param_groups for entry in group.get(_PLACES, ())]
    return {slot for number, slots in places if number == home for slot in slots}


def _shift(optimizer: Optimizer, home: int, slots: Sequence[int], by: int) -> None:
    """Count the places behind ``slots`` anew after as many more stand there."""
    if not slots or not by:
        return
    for group in optimizer.param_groups:
        if _PLACES in group:
            group[_PLACES] = [
                [number, [s + by if number == home and s > slots[0] else s for s in taken]]
                for number, taken in group[_PLACES]
            ]


def _take_out(group: Group, old: Sequence[Any]) -> None:
    if _PLACES in group:
        group[_PLACES] = list(group[_PLACES])  # whoever holds it may put it back
    found = positions(old, group["params"])
    for name in _OF_PARAMETERS & group.keys():
        for position in reversed(found):
            del group[name][position]


def _dissolve(optimizer: Optimizer, group: Group) -> None:
    if is_scheduled(optimizer):
        return  # the scheduler counts it
    number = next(i for i, g in enumerate(optimizer.param_groups) if g is group)
    del optimizer.param_groups[number]
    for other in optimizer.param_groups:
        if _PLACES in other:
            other[_PLACES] = [[home - (home > number), slots] for home, slots in other[_PLACES]]


def _alike(other: Group, group: Group, changes: Mapping[str, Any]) -> bool:
    """Whether a group has the options of another one after these changes."""
    here = {k: v for k, v in other.items() if k not in _OF_PARAMETERS and k != _TIMES}
    there = {k: v for k, v in group.items() if k not in _OF_PARAMETERS and k != _TIMES}
    if here.keys() != there.keys() or not math.isclose(times(other), changes[_TIMES]):
        return False
    return all(_equal(here[k], changes.get(k, there[k]), close=k in changes) for k in here)


def _equal(left: Any, right: Any, *, close: bool) -> bool:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            return False
        if left.shape != right.shape or left.dtype != right.dtype or left.device != right.device:
            return False
        return torch.allclose(left, right, atol=0) if close else torch.equal(left, right)
    return math.isclose(left, right) if close else bool(left == right)


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
