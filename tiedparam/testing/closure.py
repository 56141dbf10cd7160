"""What the law makes equal, by following its equalities from entry to entry.

`symmetries` is run on numbers of which no two are equal, so each number in an image says which
entry it was. That is done here in plain Python, with none of the code by which the library finds
patterns, so that neither is proved by itself.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from tiedparam.laws.orbits import Orbits
from tiedparam.laws.rule import Rule
from tiedparam.testing.cases import Case, expansion_of
from tiedparam.testing.judge import hold
from tiedparam.testing.statement import states


@dataclass(frozen=True)
class Equalities:
    """What `symmetries` says of single entries, flat: for each image and entry one of them.

    Attributes:
        links: ``(entry, other, sign)``: the entry is ``sign`` times the other.
        values: ``(entry, number)``: the entry is that number, 0 mostly.
    """

    links: list[tuple[int, int, int]]
    values: list[tuple[int, float]]


def equalities_of(rule: Rule) -> Equalities | None:
    """Those of a bound rule; None where an image is no entry, minus one, or a fixed number."""
    shape = rule.bound_layout.shape
    count = math.prod(shape)
    # two sets of numbers: what is the same in both images is fixed, all else says where it was
    first = torch.arange(1, count + 1, dtype=torch.float64)
    second = first + count
    found = Equalities([], [])
    for one, other in zip(_images(rule, first, shape), _images(rule, second, shape), strict=True):
        for entry, (a, b) in enumerate(zip(one, other, strict=True)):
            if a == b:
                found.values.append((entry, a))
            elif a == round(a) and 1 <= abs(a) <= count and b - a == math.copysign(count, a):
                found.links.append((entry, int(abs(a)) - 1, 1 if a > 0 else -1))
            else:
                return None
    return found


def _images(rule: Rule, numbers: Tensor, shape: tuple[int, ...]) -> list[list[float]]:
    return [image.flatten().tolist() for image in rule.symmetries(numbers.reshape(shape))]


@dataclass(frozen=True)
class Partition:
    """The entries by orbit.

    Attributes:
        orbits: for each entry a number of its orbit and its sign there; None where it is fixed.
        fixed: the number of each entry that is fixed.
    """

    orbits: list[tuple[int, int] | None]
    fixed: dict[int, float]


def closed(equalities: Equalities, count: int) -> Partition:
    """Follow the equalities of so many entries, breadth first.

    An entry that meets its own negative is zero. So is one that meets a zero, and one that meets
    a number is that number, with the sign of the way.

    Raises:
        AssertionError: if an entry would have to be two numbers.
    """
    neighbours: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for entry, other, sign in equalities.links:
        neighbours[entry].append((other, sign))
        neighbours[other].append((entry, sign))
    given: dict[int, set[float]] = {}
    for entry, number in equalities.values:
        given.setdefault(entry, set()).add(number)
    signs: dict[int, int] = {}
    partition = Partition([None] * count, {})
    for start in range(count):
        if start in signs:
            continue
        signs[start], members, meets_itself = 1, [start], False
        waiting = deque([start])
        while waiting:
            entry = waiting.popleft()
            for other, sign in neighbours[entry]:
                if other not in signs:
                    signs[other] = signs[entry] * sign
                    members.append(other)
                    waiting.append(other)
                elif signs[other] != signs[entry] * sign:
                    meets_itself = True
        numbers = {number * signs[entry] for entry in members for number in given.get(entry, ())}
        numbers |= {0.0} if meets_itself else set()
        hold(len(numbers) <= 1, f"symmetries wants entry {start} to be {sorted(numbers)} at once")
        for entry in members:
            if numbers:
                partition.fixed[entry] = next(iter(numbers)) * signs[entry]
            else:
                partition.orbits[entry] = (start, signs[entry])
    return partition


@states(
    "laws with values",
    "Let forward() and symmetries() say the same law: what one makes equal, opposite or zero, the "
    "other must.",
)
def orbits_are_those_that_the_symmetries_close(case: Case) -> None:
    """Entries share a free value just where `symmetries` makes them equal or opposite.

    And just those have none which it makes zero, or fixes. Says nothing of laws whose symmetries
    are other than equalities of entries: averages, say.
    """
    rule = case.tied().rule
    equalities = equalities_of(rule)
    if equalities is None:
        return
    labels = rule.orbit_labels().flatten().tolist()
    compare(labels, closed(equalities, len(labels)), "symmetries")
    constant = expansion_of(rule).constant.tolist()
    for entry, number in closed(equalities, len(labels)).fixed.items():
        hold(
            constant[entry] == number,
            f"entry {entry} is {constant[entry]} and symmetries fixes it to {number}",
        )


def compare(labels: list[int], partition: Partition, by: str) -> None:
    """The labels say the same partition, signs and fixed entries.

    Args:
        labels: those of a rule, flat.
        partition: what they must say, whatever the numbers of its orbits.
        by: what the partition comes from, for the message.

    Raises:
        AssertionError: with the first entry where they differ.
    """
    number_of: dict[int, int] = {}
    orbit_of: dict[int, tuple[int, int]] = {}
    for entry, (label, place) in enumerate(zip(labels, partition.orbits, strict=True)):
        if place is None or label == 0:
            says = "fixes it" if place is None else "leaves it free"
            hold(
                place is None and label == 0,
                f"entry {entry} has the label {label}, and {by} {says}",
            )
            continue
        orbit, sign = place
        number, turned = abs(label), 1 if label * sign > 0 else -1
        other = number_of.setdefault(orbit, number)
        hold(
            other == number,
            f"entry {entry} has the label {label}, and by {by} it belongs to the orbit of {other}",
        )
        known, turn = orbit_of.setdefault(number, (orbit, turned))
        hold(
            known == orbit,
            f"entries {known} and {entry} share the free value {number}, and {by} leaves them "
            "independent",
        )
        hold(turn == turned, f"entry {entry} has the label {label}, with the wrong sign by {by}")


@states(
    "laws with values",
    "Leave out forward(), which is derived; or correct it: tie.derived_labels() says what the "
    "symmetries give, and orbit_labels() what it does.",
)
def forward_of_its_own_is_the_derived_one(case: Case) -> None:
    """A law that derives from `laws.Orbits` expands as its symmetries say.

    With a `forward` or a `find_pattern` of its own it may number its free values otherwise. Without
    one they are numbered by the first entry of each in the tensor's own order, where the sign is
    plus: files rely on that.
    """
    rule = case.tied().rule
    if not isinstance(rule, Orbits):
        return
    labels, derived = (
        each.flatten().tolist() for each in (rule.orbit_labels(), rule.derived_labels())
    )
    orbits = [(abs(label), 1 if label > 0 else -1) if label else None for label in derived]
    compare(labels, Partition(orbits, {}), "what is derived")
    equalities = equalities_of(rule)
    hold(equalities is not None, "symmetries() makes other numbers than ± entries and fixed ones")
    is_found = type(rule).find_pattern is Orbits.find_pattern
    if rule.is_derived and is_found and equalities is not None:
        numbered = numbered_by_occurrence(closed(equalities, len(labels)))
        hold(labels == numbered, f"the labels are {labels}, and in order they are {numbered}")


def numbered_by_occurrence(partition: Partition) -> list[int]:
    """Labels from 1, in the order in which orbits are met, with plus where they are met first."""
    numbers: dict[int, tuple[int, int]] = {}
    labels = []
    for place in partition.orbits:
        if place is None:
            labels.append(0)
            continue
        orbit, sign = place
        number, first = numbers.setdefault(orbit, (len(numbers) + 1, sign))
        labels.append(number * first * sign)
    return labels
