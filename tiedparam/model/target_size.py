"""How much each tensor of a plan may store so that the whole model has a given size.

Every tensor whose law has sizes is tried with each of them: how many bytes it stores, and how much
of its weight is lost. The least convex curve through these points says what the next bytes bring.
All tensors start with their smallest size; then bytes go where they bring most, step by step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, sqrt
from typing import NamedTuple

import torch
from torch import nn

from tiedparam.laws.choices import is_whole
from tiedparam.laws.coded import data_of
from tiedparam.laws.fitted import why_no_numbers
from tiedparam.laws.rule import Rule
from tiedparam.layer.checks import Init, why_refused, why_untieable
from tiedparam.layer.initial_values import InitialValues, initial_values
from tiedparam.model.report import tie_rows
from tiedparam.model.selection import Selected
from tiedparam.model.size_curve import SizeStep
from tiedparam.model.totals import totals_of
from tiedparam.tie.binding import bind
from tiedparam.tie.parameter_paths import Places
from tiedparam.tie.target import Target
from tiedparam.util.errors import Reason, TieError, key_of, some_of

TargetSize = str | int
"""A share of the dense model, such as ``"25%"``, or a number of bytes."""


@dataclass(frozen=True)
class _Point:
    """One size of one tensor: what it stores in bytes, and which share of its square is lost."""

    rule: Rule
    size: int
    lost: float


class Choice(NamedTuple):
    """What was chosen.

    Attributes:
        curve: the sizes that the model can have, those that were taken first.
        unfit: the tensors, by their number among the wanted, whose law has sizes of which none
            fits; and why.
    """

    curve: tuple[SizeStep, ...]
    unfit: Mapping[int, Reason]


def choose_sizes(
    model: nn.Module,
    wanted: Sequence[Selected],
    places: Places,
    target: TargetSize | None,
    *,
    skip: bool,
) -> Choice:
    """Give each of the wanted ties the size that it has in a model of the target's size.

    Args:
        model: the model.
        wanted: the ties, which get other rules.
        places: where everything lies in the model.
        target: the size; without one the ties stay as they are.
        skip: whether tensors that do not fit are left as they are; if not, and there are any,
            nothing is chosen.

    Raises:
        TieError: if the target is no size, no law has sizes, or even the smallest are too large.
    """
    if target is None:
        return Choice((), {})
    dense, other = _bytes_of(model, wanted)
    budget = _bytes_meant(target, dense)
    curves, unfit = dict[int, list[_Point]](), dict[int, Reason]()
    all_fit = True
    for number, each in enumerate(wanted):
        found, reason = _points(each, Target.among(places, each.layer, each.tensor_name))
        points = _hull(found)
        other += points[0].size if points else each.stored_bytes
        all_fit = all_fit and reason is None
        if each.rule.sizes() and points:
            curves[number] = points
        elif each.rule.sizes() and reason is not None:
            unfit[number] = reason
    if unfit and not skip:
        return Choice((), unfit)
    if not curves and not all_fit and not skip:
        return Choice((), unfit)  # whoever ties says why
    if not curves and not unfit:
        raise TieError(
            "target_size=",
            "no law of the plan has sizes to choose from.",
            "Tie some tensors by 'cluster', whose n is then the most values that are tried, or by "
            "'shared_delta', whose rank is then the highest.",
        )
    if other > budget:
        share = ceil(1000 * other / dense) / 10
        left = [f"{wanted[number].skipped(why).place}: {why}" for number, why in unfit.items()]
        listed = "\n".join(["", "These cannot be tied:", some_of(left, "\n")]) if left else ""
        raise TieError(
            "target_size=",
            f"the smallest checkpoint that the plan can make has {other:,} bytes, {share:g}% of "
            f"{dense:,} dense, and target_size={target!r} is {budget:,}.",
            f"Choose a larger one, or tie more tensors.{listed}",
        )
    return Choice(tuple(_spent(wanted, curves, other, budget)) if curves else (), unfit)


def _spent(
    wanted: Sequence[Selected], curves: dict[int, list[_Point]], size: int, budget: int
) -> Iterator[SizeStep]:
    """Spend the budget where the next bytes bring most; then go on as if there were more."""
    steps = [
        (number, before, after)
        for number, points in curves.items()
        for before, after in pairwise(points)
    ]
    steps.sort(key=lambda step: _slope(step[1], step[2]))
    taken, left, full = [], [], set[int]()
    room = budget - size
    chosen = {number: points[0] for number, points in curves.items()}
    for number, before, after in steps:
        if number in full or after.size - before.size > room:
            full.add(number)  # what comes after a step that is too large needs that step
            left.append((number, before, after))
        else:
            room -= after.size - before.size
            taken.append((number, before, after))
            chosen[number] = after
    for number, point in chosen.items():
        wanted[number].rule = point.rule
    lost = {number: points[0].lost for number, points in curves.items()}
    yield SizeStep(size, _mean(lost), "", "", True)
    for position, (number, before, after) in enumerate([*taken, *left]):
        size += after.size - before.size
        lost[number] = after.lost
        key = key_of(wanted[number].path, wanted[number].tensor_name)
        yield SizeStep(size, _mean(lost), key, str(after.rule), position < len(taken))


def _mean(lost: dict[int, float]) -> float:
    return sqrt(sum(lost.values()) / len(lost))


def _points(each: Selected, target: Target) -> tuple[list[_Point], Reason | None]:
    """What each size of a law stores of a tensor and loses; or why it cannot be tied by any.

    Of several sizes, those are left out that take as much as the dense tensor.
    """
    points = list[_Point]()
    if target.tie() is not None and each.rule.reads_layers:
        return points, None  # it may have lost its source, and be tied again
    reason = why_untieable(target) or why_refused(target, each.rule)
    weight = target.parameter
    if reason is not None or weight is None:
        return points, reason
    sizes = each.rule.sizes()
    for size in sizes or [{}]:
        rule, trial = each.again(size), each.again(size)
        found = _tried(trial, target, weight, each.init)
        if isinstance(found, Reason):
            reason = found  # the last is that of the size in the plan
        elif sizes and found.residual is None:
            fact = "it has no values by which to choose a size."
            return [], Reason(fact, "Initialise or load them first.")
        elif sizes and (reason := why_no_numbers(weight, trial.read())) is not None:
            return [], reason  # smaller sizes may need no fit, and lose what cannot be compared
        else:
            stored = sum(value.nbytes for value in (*found.free, *data_of(trial).values()))
            if not points or stored < weight.nbytes:
                points.append(_Point(rule, stored, (found.residual or 0.0) ** 2))
    return points, reason


def _tried(rule: Rule, target: Target, weight: nn.Parameter, init: Init) -> InitialValues | Reason:
    try:
        with torch.no_grad():
            return bind(rule, target) or initial_values(rule, weight, init, None)
    except TieError as error:
        return error.reason


def _hull(points: Iterable[_Point]) -> list[_Point]:
    """The lower convex hull, from the smallest on: each step brings less for a byte than before."""
    hull: list[_Point] = []
    for point in sorted(points, key=lambda point: (point.size, point.lost)):
        if hull and point.lost >= hull[-1].lost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(one: _Point, other: _Point) -> float:
    """How fast the loss changes; negative."""
    return (other.lost - one.lost) / (other.size - one.size)


def _bytes_of(model: nn.Module, wanted: Sequence[Selected]) -> tuple[int, int]:
    """What a checkpoint of the dense model has, and all but the tensors that are to be tied."""
    totals = totals_of(model, tie_rows(model), [])
    own = sum(each.stored_bytes for each in wanted)
    return totals.checkpoint_dense, totals.checkpoint_stored - own


def _bytes_meant(target: TargetSize, dense: int) -> int:
    if is_whole(target, 1):
        return target
    share = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", target) if isinstance(target, str) else None
    if share is None or not 0 < float(share[1]) <= 100:
        raise TieError(
            "target_size=",
            f"target_size={target!r} is no size.",
            "Give a share of the dense model, such as '25%', or a number of bytes."
            f"{_meant(target)}",
        )
    return int(dense * float(share[1]) / 100)


def _meant(target: object) -> str:
    """The share that somebody probably meant by a number that is no size, as a question."""
    try:
        number = float(target) if isinstance(target, (float, str)) else 0.0
    except ValueError:
        return ""
    number *= 100 if number < 1 else 1
    return f" Did you mean '{number:g}%'?" if 0 < number <= 100 else ""
