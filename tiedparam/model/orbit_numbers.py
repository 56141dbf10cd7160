"""Which stored value each entry of a weight comes from, as numbers in reading order."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tiedparam.laws.layout import Layout
from tiedparam.laws.rule import Rule
from tiedparam.model.mosaic import mosaic
from tiedparam.tie.write_guard import unguard

ZERO, FIXED, COMPUTED = "0", "v", "f"
"""What stands for an entry without a number: a zero, another fixed number, a function of several
values."""


@dataclass(frozen=True)
class Origins:
    """Where the entries of a bound rule's weight come from, in the canonical layout.

    Attributes:
        numbers: of the stored value: 1 for the first entry in reading order (kernel by kernel), 2
            for the next that is not of the same, and so on; negative where the entry is minus the
            value. For a copy the number of the source's entry, as this is read. 0 for an entry that
            comes from none, or from several.
        fixed: whether the law fixes it to another number than 0.
        computed: whether it is a function of several values.
    """

    numbers: Tensor
    fixed: Tensor
    computed: Tensor


def origins_of(rule: Rule) -> Origins:
    """Where the entries of a bound rule's weight come from."""
    layout = rule.bound_layout
    none = torch.zeros(layout.canonical_shape, dtype=torch.bool, device="cpu")
    if rule.has_orbits:
        numbers = in_reading_order(layout.canonical(rule.orbit_labels()))
        dtype = torch.complex128 if rule.complex_valued else torch.float64
        zeros = [torch.zeros(shape, dtype=dtype, device="cpu") for shape in rule.free_shapes()]
        with torch.no_grad():
            fixed = layout.canonical(rule.forward(*zeros)) != 0
        return Origins(numbers, fixed, none)
    if rule.free_count or len(list(rule.sources())) > 1:
        return Origins(none.long(), none, ~none)
    return _origins_of_copy(rule)


def orbit_numbers(rule: Rule) -> Tensor:
    """The `Origins.numbers` of a bound rule."""
    return origins_of(rule).numbers


def _origins_of_copy(rule: Rule) -> Origins:
    """Each entry is some f(source): the chain rule along several directions says of which entry."""
    ((source, name),) = rule.sources()
    shape = tuple(unguard(getattr(source, name)).shape)
    numbers = numbered(Layout.of(source, name, shape)).double()
    with torch.no_grad():
        copied = rule.forward(numbers)
    ones, once, twice = (
        torch.func.jvp(rule.forward, (numbers,), (along,))[1]
        for along in (torch.ones_like(numbers), numbers, numbers**2)
    )
    number, square = once / ones, twice / ones
    of_one = number.isfinite() & ((square - number**2).abs() <= 1e-6 * number**2)  # no spread
    number = number.round().where(of_one, 0)
    constant = (ones == 0) & (once == 0) & (twice == 0)
    sign = 1 - 2 * (copied == -number).long()
    layout = rule.bound_layout
    return Origins(
        layout.canonical(number.long() * sign),
        layout.canonical(constant & (copied != 0)),
        layout.canonical(~(of_one | constant)),
    )


def numbered(layout: Layout) -> Tensor:
    """1, 2, 3, … over the entries of a tensor as it is read, in the order in which it is stored."""
    shape = layout.canonical_shape
    return layout.native(torch.arange(1, prod(shape) + 1, device="cpu").reshape(shape))


def in_reading_order(labels: Tensor) -> Tensor:
    """The same orbits, numbered from 1 by where they first appear; signs and zeros stay."""
    flat = labels.abs().flatten()
    first = _first_places(flat)
    first[0] = -1  # the entries of none keep their 0
    return (first.argsort().argsort()[flat] * labels.flatten().sign()).reshape(labels.shape)


def first_of_each(numbers: Tensor) -> Tensor:
    """True at the first entry of every orbit; entries that are fixed, and have none, are 0."""
    flat = numbers.abs().flatten()
    order = torch.arange(len(flat), device="cpu")
    return ((_first_places(flat)[flat] == order) & (flat > 0)).reshape(numbers.shape)


def texts_of(origin: Origins, corner: int) -> list[tuple[int, int, str]]:
    """Row, column and text of every cell that the corner of a weight shows."""
    shown = mosaic(torch.ones_like(origin.computed), corner)
    numbers, fixed, computed = (
        mosaic(each, corner).tolist() for each in (origin.numbers, origin.fixed, origin.computed)
    )
    return [
        (y, x, text_of(numbers[y][x], fixed[y][x], computed[y][x]))
        for y, x in shown.nonzero().tolist()
    ]


def _first_places(flat: Tensor) -> Tensor:
    order = torch.arange(len(flat), device="cpu")
    none = torch.full((int(flat.max()) + 1,), len(flat), device="cpu")
    return none.scatter_reduce(0, flat, order, "amin")


def text_of(number: int, fixed: bool = False, computed: bool = False) -> str:
    """What a cell says of an entry."""
    if number:
        return str(number).replace("-", "−")
    return COMPUTED if computed else FIXED if fixed else ZERO
