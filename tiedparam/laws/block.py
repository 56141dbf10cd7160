"""A block of a tensor: some consecutive outputs and inputs, as if they were a weight themselves."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiedparam.laws.layout import Layout
from tiedparam.util.errors import Reason

Range = slice | Sequence[int]
"""``slice(start, stop)``, or both numbers, as files have it."""


@dataclass(frozen=True)
class Block:
    """Where a block lies, and how to cut a tensor into it and the rest.

    Attributes:
        layout: that of the block, as if it were a weight by itself.
        starts: where it begins, on the tensor's own first two axes, or one.
        shape: the tensor's.
        ranges: the rows and columns, counted from 0; None for all.
    """

    layout: Layout
    starts: tuple[int, ...]
    shape: tuple[int, ...]
    ranges: tuple[slice | None, slice | None]

    @property
    def rest_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of what is not in the block: the first axis outside of it, then the second beside it."""
        shapes = []
        for axis in range(len(self.starts)):
            count = self.shape[axis] - self.layout.shape[axis]
            if count:
                inside, outside = self.layout.shape[:axis], self.shape[axis + 1 :]
                shapes.append((*inside, count, *outside))
        return tuple(shapes)

    def cut(self, weight: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The block, and the rest; all in storage of their own."""
        rest = []
        for axis, start in enumerate(self.starts):
            size = self.layout.shape[axis]
            after = weight.shape[axis] - start - size
            if after or start:
                parts = [weight.narrow(axis, 0, start), weight.narrow(axis, start + size, after)]
                # cat copies: a slice would keep the full weight's storage alive (S15)
                outside = torch.cat([part for part in parts if part.numel()], axis)
                rest.append(outside.contiguous())  # also of a weight in channels_last
                weight = weight.narrow(axis, start, size)
        return weight.contiguous(), rest

    def joined(self, block: Tensor, rest: Sequence[Tensor]) -> Tensor:
        """The inverse of `cut`."""
        waiting = list(rest)
        for axis in reversed(range(len(self.starts))):
            if self.shape[axis] > self.layout.shape[axis]:
                start, other = self.starts[axis], waiting.pop()
                before, after = other.split([start, other.shape[axis] - start], axis)
                block = torch.cat([part for part in (before, block, after) if part.numel()], axis)
        return block


def block_of(layout: Layout, rows: Range | None, columns: Range | None) -> Block | Reason:
    """The block of some outputs and inputs of a tensor, or why there is none.

    Args:
        layout: that of the tensor.
        rows: the outputs; None is all.
        columns: the inputs within a group; None is all.
    """
    if not layout.shape:
        return Reason("a tensor without axes has no rows.", "Tie a weight or a bias.")
    outputs, *others = layout.canonical_shape
    if columns is not None and not others:
        return Reason(f"a vector of {outputs} has no columns.", "Leave out columns=.")
    bounds = []
    sizes = (outputs, others[0] if others else 1)
    for name, given, size in zip(("rows", "columns"), (rows, columns), sizes, strict=True):
        found = _bounds(name, given, size)
        if isinstance(found, Reason):
            return found
        bounds.append(found)
    ranges = (
        None if rows is None else slice(*bounds[0]),
        None if columns is None else slice(*bounds[1]),
    )
    if not others:
        start, stop = bounds[0]
        groups = _whole_groups(start, stop, outputs // layout.layer_groups)
        of_block = Layout((stop - start,), layer_groups=groups or 1)
        return Block(of_block, (start,), layout.shape, ranges)
    placed = _in_groups(layout, *bounds)
    return placed if isinstance(placed, Reason) else Block(*placed, layout.shape, ranges)


def _in_groups(
    layout: Layout, rows: tuple[int, int], columns: tuple[int, int]
) -> tuple[Layout, tuple[int, ...]] | Reason:
    """Layout and starts of the block by the tensor's own axes: in one group, or of whole ones."""
    (start, stop), (left, right) = rows, columns
    outputs, inputs = layout.canonical_shape[:2]
    of_group = outputs // layout.groups
    groups = _whole_groups(start, stop, of_group)
    if not groups and start // of_group != (stop - 1) // of_group:
        return Reason(
            f"rows {start}:{stop} end inside of a group, which has {of_group} outputs.",
            "Take whole groups, or a part of one; several can be tied as a list of laws.",
        )
    groups = groups or 1
    if not layout.transposed:
        shape = (stop - start, right - left, *layout.kernel)
        return Layout(shape, groups, False, groups), (start, left)
    if groups > 1 and right - left < inputs:
        return Reason(
            f"columns {left}:{right} of the {groups} groups do not lie side by side in a "
            "transposed convolution.",
            "Take all columns, or tie group by group, as a list of laws.",
        )
    first = start // of_group
    shape = (groups * (right - left), (stop - start) // groups, *layout.kernel)
    starts = (first * inputs + left, start - first * of_group)
    return Layout(shape, groups, True, groups), starts


def _whole_groups(start: int, stop: int, of_group: int) -> int:
    """How many groups of so many outputs these are; 0 if they are not whole."""
    whole = of_group and start % of_group == 0 and stop % of_group == 0
    return (stop - start) // of_group if whole else 0


# What the user gives ------------------------------------------------------------------------------


def as_slice(name: str, given: Any) -> slice | None:
    """What ``rows=`` or ``columns=`` takes, as a slice.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(given, (list, tuple)) and len(given) == 2:
        given = slice(*given)
    numbers = (given.start, given.stop, given.step) if isinstance(given, slice) else (given,)
    try:
        if not isinstance(given, slice) and given is not None:
            raise TypeError
        for number in numbers:
            if number is not None:
                operator.index(number)
    except TypeError:
        raise TypeError(
            f"{name}= takes a slice, such as slice(0, 64), or its two numbers, not {given!r}"
        ) from None
    return given


def _bounds(name: str, given: Range | None, size: int) -> tuple[int, int] | Reason:
    """Start and stop, counted from 0, or why there are none."""
    if given is None:
        return 0, size
    if not isinstance(given, slice):
        given = slice(*given)
    text = shown(given)
    if given.step not in (None, 1):
        return Reason(
            f"{name} {text} do not lie side by side: the step is {given.step}.",
            f"Give {name} without a step.",
        )
    start = 0 if given.start is None else operator.index(given.start)
    stop = size if given.stop is None else operator.index(given.stop)
    start, stop = (number + size if number < 0 else number for number in (start, stop))
    if start < 0 or stop > size or start > size:
        return Reason(
            f"{name} {text} reach beyond the {size} that there are.",
            f"Choose numbers from 0 to {size}.",
        )
    if start >= stop:
        return Reason(f"{name} {text} of {size} are none.", "Let them begin before they end.")
    return start, stop


def shown(given: slice) -> str:
    """``0:64``."""
    ends = ["" if number is None else str(number) for number in (given.start, given.stop)]
    return ":".join(ends if given.step is None else [*ends, str(given.step)])
