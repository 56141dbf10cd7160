"""The input of a Linear layer as a matrix of rows, and back; and rows some at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from tiedparam.util.torch_modes import autocast_dtype, is_ordinary, is_traced_or_transformed
from tiedparam.util.torch_private import reshaped_in_place

LITTLE = 1 << 18
"""Entries of buffers that are no matter, in memory and in cache."""


def rows_of(x: Tensor) -> Tensor:
    """``(*, n)`` as ``(rows, n)``, contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def shaped_like(rows: Tensor, x: Tensor) -> Tensor:
    """A fresh ``(rows, m)`` with the leading axes of ``x``; no view to autograd."""
    return reshaped_in_place(rows, (*x.shape[:-1], rows.shape[1]))


def plus(rows: Tensor, bias: Tensor | None) -> Tensor:
    """The bias added to fresh rows, in place."""
    return rows if bias is None else rows.add_(bias)


def must_be_few(x: Tensor, weight: Tensor, entries: int, room: int) -> bool:
    """Whether buffers of so many entries call for `row_blocks`, in a layer at home anywhere.

    In graphs, transforms and under autocast plain operations do it all at once.
    """
    # first, for sizes may be symbols, which are not to be compared
    if is_traced_or_transformed() or entries <= max(room, LITTLE):
        return False
    return is_ordinary(x, weight) and autocast_dtype(x.device) is None


def row_blocks(count: int, each: int, room: int) -> Iterator[slice]:
    """Rows that are taken at a time, as many each time.

    So a product takes no more memory than the dense layer: what the law saves of the weight's
    gradient is room for buffers.

    Args:
        count: how many rows there are.
        each: entries of the buffers for a row.
        room: entries that the buffers may have; a few they may always have.

    As in:
        >>> from tiedparam.products.linear_rows import row_blocks
        >>> [(rows.start, rows.stop) for rows in row_blocks(100, 1 << 12, 1 << 18)]
        [(0, 50), (50, 100)]
    """
    most = max(1, max(room, LITTLE) // max(1, each))
    step = -(-count // max(1, -(-count // most)))
    for start in range(0, count, max(1, step)):
        yield slice(start, min(count, start + step))
