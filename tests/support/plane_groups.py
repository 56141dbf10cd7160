"""Flips and turns as integer matrices on positions: not by torch's flip and rot90."""

from __future__ import annotations

Matrix = tuple[tuple[int, ...], ...]

# on (row, column) about the centre, rows going down
LEFT_RIGHT: Matrix = ((1, 0), (0, -1))
UP_DOWN: Matrix = ((-1, 0), (0, 1))
DIAGONAL: Matrix = ((0, 1), (1, 0))
QUARTER: Matrix = ((0, -1), (1, 0))  # against the clock: what is right goes up


def identity(dims: int) -> Matrix:
    return tuple(tuple(int(i == j) for j in range(dims)) for i in range(dims))


def times(left: Matrix, right: Matrix) -> Matrix:
    """The product: first ``right``, then ``left``."""
    columns = list(zip(*right, strict=True))
    return tuple(
        tuple(sum(a * b for a, b in zip(row, column, strict=True)) for column in columns)
        for row in left
    )


def inverse(element: Matrix) -> Matrix:
    """The transpose: the matrices are orthogonal."""
    return tuple(zip(*element, strict=True))


def image(element: Matrix, position: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Where a position of a kernel goes, about the kernel's centre."""
    centred = [2 * x - (size - 1) for x, size in zip(position, kernel, strict=True)]
    moved = [sum(a * c for a, c in zip(row, centred, strict=True)) for row in element]
    return tuple((c + size - 1) // 2 for c, size in zip(moved, kernel, strict=True))
