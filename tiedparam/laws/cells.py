"""The part of a weight that a law treats alone, and how often the weight has it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tiedparam.laws.layout import Layout
from tiedparam.util.errors import Reason


@dataclass(frozen=True)
class Cells:
    """Equal parts that lie one after the other in a tensor.

    Attributes:
        count: how many there are.
        layout: that of one, as if it were a weight by itself.
    """

    count: int
    layout: Layout


def why_no_cell(cell: tuple[int, ...] | None, layout: Layout) -> Reason | None:
    """Why a weight is not made of such cells, or None."""
    shape = layout.canonical_shape
    if cell is None or (
        isinstance(cell, (tuple, list))
        and len(cell) == len(shape)
        and all(isinstance(size, int) for size in cell)
        and all(size > 0 and n % size == 0 for n, size in zip(shape, cell, strict=True))
    ):
        return None
    return Reason(
        f"its cell() is {cell}, of which the canonical weight {shape} is not made.",
        "Correct the rule: every size must divide that of the weight.",
    )


def consecutive_cells(cell: tuple[int, ...] | None, layout: Layout) -> Cells:
    """The smallest parts of a tensor that are made of whole cells and lie one after the other.

    Args:
        cell: the shape of a cell in the canonical layout; None is the whole weight.
        layout: that of the tensor.
    """
    whole = Cells(1, layout)
    if cell is None:
        return whole
    sizes = _native(cell, layout)
    if sizes is None:
        return whole
    shape, axis = list(layout.shape), 0
    while axis < len(shape) - 1 and sizes[axis] == 1:
        shape[axis] = 1
        axis += 1
    shape[axis] = sizes[axis]
    groups = max(1, cell[0] * layout.groups // layout.canonical_shape[0])
    count = prod(layout.shape) // prod(shape)
    if count == 1:
        return whole
    return Cells(count, Layout(tuple(shape), groups, layout.transposed, groups))


def _native(cell: tuple[int, ...], layout: Layout) -> tuple[int, ...] | None:
    """The shape of a cell by the tensor's own axes; None if it lies across groups."""
    outputs_of_group = layout.canonical_shape[0] // layout.groups
    if outputs_of_group % cell[0] == 0:
        if not layout.transposed:
            return cell
        outputs, inputs, *kernel = cell
        return (inputs, outputs, *kernel)
    if cell[0] % outputs_of_group == 0 and not layout.transposed:
        return cell
    return None
