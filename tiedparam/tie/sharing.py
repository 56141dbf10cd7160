"""Ties that have values in common: who owns these, who reads them, and who owns them next."""

from __future__ import annotations

from torch import nn

from tiedparam.laws.sharing import Sharing
from tiedparam.tie.lookup import find_tie, ties_in
from tiedparam.tie.owner import tied_layers
from tiedparam.tie.reading import Reading, SourceWatch
from tiedparam.tie.record import Tie, TiedList
from tiedparam.util.errors import Reason, describe

SHARED = "original0"
"""What a list of parametrizations calls the values that its tie owns and others read."""


def shared_place(rule: Sharing, layer: nn.Module, name: str) -> tuple[nn.Module, str] | Reason:
    """Where the values stand that a layer shares, whether it owns them or not.

    Args:
        rule: the law that is to read them.
        layer: a layer; or such a place, which was found before.
        name: the name of its tensor.
    """
    if isinstance(layer, TiedList):
        return layer, name
    tie = find_tie(layer, name)
    if tie is None or type(tie.rule) is not type(rule):
        return Reason(
            f"the source {describe(layer, name)} is not tied by '{rule.name}'.",
            "Name a layer that is; tiedparam.tie_bank ties several layers at once.",
        )
    if not tie.rule.reads_layers:
        return tie.values, SHARED
    return next(tie.rule.sources())


def shared_by(tie: Tie) -> nn.Module | None:
    """The list that has what the tie shares with others, its own or another; None if nothing."""
    if not isinstance(tie.rule, Sharing):
        return None
    return next(tie.rule.sources())[0] if tie.rule.reads_layers else tie.values


def readers_of(owner: Tie) -> list[Tie]:
    """The ties that read what this one owns, as far as their layers live."""
    values = owner.values
    if shared_by(owner) is not values:
        return []  # and all the layers that live need not be looked at
    return [
        tie
        for layer in tied_layers()
        for tie in ties_in(layer)
        if isinstance(tie.rule, Sharing) and tie.rule.reads_layers and shared_by(tie) is values
    ]


def hand_over(tie: Tie) -> None:
    """Let the first of those who read it own what the tie shares; this one then reads it.

    The Parameter stays the same object, for the optimizers that hold it.
    """
    first, *others = readers_of(tie)
    place = first.record.own_reading().places[0]
    moved = [(tie, place.reversed())]
    moved += [(r, r.record.own_reading().places[0].of_reader_beside(place)) for r in others]
    shared = tie.record.take_first()
    first.record.law.own_shared()
    first.record.put_first(shared)
    first.record.reading = None
    for reader, there in moved:
        values = reader.record
        values.law.read_from([(first.values, SHARED)])
        watch = SourceWatch(first.values)
        values.reading = Reading(values, [there], [tuple(shared.shape)], [watch])
