"""What the symmetries of a law say: which entries are one value, which are fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import Any

import torch
from torch import Tensor

from tiedparam.laws import components
from tiedparam.util.errors import Reason
from tiedparam.util.torch_modes import plain_numbers

Symmetries = Callable[[Tensor], Iterable[Tensor]]


@dataclass(frozen=True)
class Pattern:
    """The orbits of one weight, or of one of its cells.

    Attributes:
        labels: for each entry the number of its orbit, from 1 in the order of first occurrence;
            negative where the entry is minus the orbit's first member, 0 where it is fixed. int32.
        count: how many orbits there are.
        fixed: for each entry the number that it is fixed to, in float64, or 0; None if all are 0.
    """

    labels: Tensor
    count: int
    fixed: Tensor | None


def find_pattern(
    symmetries: Symmetries, shape: tuple[int, ...], *, group: bool
) -> Pattern | Reason:
    """Run the symmetries on numbers, from which every equality can be read.

    The numbers 1, 2, … show which entry another one equals, and its sign. What stays the same
    when all numbers change their signs is fixed. Random numbers show that nothing else is stated,
    and minus the numbers that it is stated of every weight.

    Args:
        symmetries: the law, as `Rule.symmetries` states it.
        shape: the weight's shape.
        group: whether they are all elements of a group, which is only believed if it is so.

    Returns:
        The pattern; or why there is none.
    """
    with plain_numbers():
        numbers = torch.arange(1, prod(shape) + 1, dtype=torch.float64, device="cpu")
        # others, by which a sum that happens to be a number of an entry is told apart
        random = torch.Generator("cpu").manual_seed(0)
        others = torch.rand(numbers.shape, dtype=torch.float64, device="cpu", generator=random)
        images, fixed = [], []
        # in storage of their own: a law may write to the weight that it is given
        probes = (numbers.clone(), -numbers, others.clone())
        found = [symmetries(probe.view(shape)) for probe in probes]
        if any(each is None for each in found):
            return _misstated("they give None")
        for three in zip_longest(*found):
            wrong = next((wrong for wrong in (_why_no_image(x, shape) for x in three) if wrong), "")
            if wrong:
                return _misstated(wrong)
            image, negative, other = (each.to(torch.float64).flatten() for each in three)
            constant = image == negative
            number = torch.where(constant, 0.0, image)
            at = (number.abs() - 1).nan_to_num().clamp(0, len(numbers) - 1).to(torch.int64)
            expected = torch.where(constant, image, others[at] * number.sign())
            if not torch.equal(other, expected) or not torch.equal(number.trunc(), number):
                return _misstated("an entry of theirs is computed from several, or scaled")
            if not torch.equal(negative, torch.where(constant, image, -image)):
                return _misstated("they say other things of a weight and of minus that weight")
            images.append(number.to(torch.int64))
            fixed.append(torch.where(constant, image, torch.nan))
        one_pass = group and not any(bool((~values.isnan()).any()) for values in fixed)
        first = components.of_group(images, len(numbers)) if one_pass else None
        if first is None or not components.are_closed(first, images):
            first = components.of_equalities(images, len(numbers))
        return _numbered(first, fixed)


def _why_no_image(image: Any, shape: tuple[int, ...]) -> str:
    """What is wrong with a tensor that should be an image of the numbers; empty if nothing is."""
    if image is None:
        return "they give None, or not as many tensors for every weight"
    if not isinstance(image, Tensor):
        return f"they give a {type(image).__name__} and no tensor"
    if tuple(image.shape) != shape:
        return f"they give {tuple(image.shape)} for a weight of {shape}"
    if image.is_complex() or image.device.type != "cpu":
        return f"they give {image.dtype} on {image.device} for real numbers on the CPU"
    return ""


def _misstated(fact: str) -> Reason:
    return Reason(
        f"its symmetries state no equalities of entries: {fact}.",
        "Let them give every entry as another one, as minus another one, or as a fixed number; or "
        "derive the law from tiedparam.Rule.",
    )


def _numbered(first: Tensor, fixed: list[Tensor]) -> Pattern | Reason:
    """The orbits by numbers, without those that are fixed."""
    value = _fixed_orbits(first, fixed)
    if isinstance(value, Reason):
        return value
    entry = torch.arange(1, len(first) + 1, device="cpu")
    free = value.isnan()
    is_first = (first == entry) & free
    number = is_first.cumsum(0)
    at = (first.abs() - 1).clamp(min=0)
    labels = torch.where(free, number[at] * first.sign(), 0).to(torch.int32)
    constants = torch.where(free, 0.0, value)
    return Pattern(labels, int(number[-1]), constants if bool(constants.any()) else None)


def _fixed_orbits(first: Tensor, fixed: list[Tensor]) -> Tensor | Reason:
    """For each entry the number that its orbit is fixed to, or NaN."""
    count = len(first)
    # what an orbit meets: itself and its negative at 0, and the fixed numbers of its members
    least = torch.full((count,), torch.inf, dtype=torch.float64, device="cpu")
    most = -least
    at, sign = (first.abs() - 1).clamp(min=0), first.sign().double()
    for values in fixed:
        said = ~values.isnan()
        zero = said & (first == 0)
        if bool((values[zero] != 0).any()):
            return _contradiction(0.0, float(values[zero].abs().max()))
        said &= first != 0
        place, number = at[said], values[said] * sign[said]
        least.scatter_reduce_(0, place, number, "amin")
        most.scatter_reduce_(0, place, number, "amax")
    if bool((most > least).any()):
        where = (most > least).nonzero()[0, 0]
        return _contradiction(float(least[where]), float(most[where]))
    value = torch.where(least == most, least, torch.nan)[at] * sign
    return torch.where(first == 0, 0.0, value + 0.0)  # never −0.0


def _contradiction(one: float, other: float) -> Reason:
    return Reason(
        f"it fixes one entry to {one:g} and to {other:g}.",
        "Leave out one of the laws, or correct the fixed numbers.",
    )
