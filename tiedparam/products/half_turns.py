"""Products with matrices that are their own half turn, ``W = JWJ``, by the upper rows.

``J`` reverses an order. With ``W = [[P, Q], [JQJ, JPJ]]`` and ``x = (u, Jv)``,

- ``W[x] = (P u + QJ v, J(QJ u + P v))``: the lower outputs are the upper rows' product with the
  input in reverse, `turned_product`, which reads half of the matrix for twice as many rows;
- ``P + QJ`` sees only ``u + v`` and ``P − QJ`` only ``u − v``, `halved_product`: two products of a
  quarter of the size, half of the multiplications.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiedparam.products.linear_rows import plus, row_blocks, rows_of, shaped_like
from tiedparam.products.opaque import Opaque


def _output(x: Tensor, upper: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], 2 * upper.shape[0])


# The input beside itself in reverse ---------------------------------------------------------


def _turned(x: Tensor, upper: Tensor, bias: Tensor | None) -> Tensor:
    rows, (half, inputs) = rows_of(x), upper.shape
    outputs = rows.new_empty(rows.shape[0], 2 * half)
    for few in row_blocks(rows.shape[0], 2 * inputs + 3 * half, upper.numel()):
        products = torch.mm(_beside_reverse(rows[few]), upper.t())
        count = len(products) // 2
        outputs[few, :half] = products[:count]
        outputs[few, half:] = products[count:].flip(1)
        del products  # or the next ones would be made beside them
    return shaped_like(plus(outputs, bias), x)


def _turned_gradients(
    needs: Sequence[bool], gradient: Tensor, x: Tensor, upper: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    answers, rows = rows_of(gradient), rows_of(x)
    half, inputs = upper.shape
    of_x = rows.new_empty(rows.shape) if needs[0] else None
    of_upper = torch.zeros_like(upper) if needs[1] else None
    each = 2 * half + 3 * inputs
    for few in row_blocks(rows.shape[0], each, upper.numel()) if needs[0] or needs[1] else ():
        both = _below_reversed(answers[few])
        if of_upper is not None:
            of_upper.addmm_(both.t(), _beside_reverse(rows[few]))
        if of_x is not None:
            products = torch.mm(both, upper)
            count = len(products) // 2
            of_x[few] = products[count:].flip(1).add_(products[:count])
            del products  # or the next ones would be made beside them
        del both
    of_x = None if of_x is None else of_x.view(x.shape)
    return of_x, of_upper, answers.sum(0) if needs[2] else None


def _beside_reverse(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.flip(1)])


def _below_reversed(rows: Tensor) -> Tensor:
    above, below = rows.chunk(2, 1)
    return torch.cat([above, below.flip(1)])


turned_product: Opaque = Opaque(
    "turned_product(Tensor x, Tensor upper, Tensor? bias) -> Tensor",
    _turned,
    _turned_gradients,
    _output,
)
"""``(x, upper, bias)``: ``(*, n)``, ``(m/2, n)``, ``(m,)`` → ``(*, m)``, for even ``m``.

Every output is the sum that the dense layer takes.
"""


# Sums and differences -----------------------------------------------------------------------


def _halved(x: Tensor, upper: Tensor, bias: Tensor | None) -> Tensor:
    return shaped_like(plus(_through(rows_of(x), upper, transposed=True), bias), x)


def _halved_gradients(
    needs: Sequence[bool], gradient: Tensor, x: Tensor, upper: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    answers = rows_of(gradient)
    # the room of the input's gradient is still free
    of_upper = _of_upper(answers, rows_of(x), x.numel() if needs[0] else 0) if needs[1] else None
    of_x = None
    if needs[0]:  # the transpose is its own half turn, too
        of_x = _through(answers, upper, transposed=False).view(x.shape)
    return of_x, of_upper, answers.sum(0) if needs[2] else None


def _through(rows: Tensor, upper: Tensor, *, transposed: bool) -> Tensor:
    """Products with both quarters, one after the other, and what they say of both halves.

    Beside the gradient of the upper rows there is room for a quarter, and one for the rows.
    """
    half, inputs = upper.shape
    made, room = (half if transposed else inputs // 2), upper.numel() // 2
    answers = rows.new_empty(rows.shape[0], 2 * made)
    even, odd = answers[:, :made], answers[:, made:]  # not chunks, which gradients take for one
    blocks = list(row_blocks(len(rows), rows.shape[1] // 2, room))
    quarter = _sum(upper)
    for few in blocks:
        _multiply(_sum(rows[few]), quarter, even[few], transposed)
    left = upper[:, : inputs // 2]
    # the other one, in the place of this one if that was not recorded
    quarter = quarter - 2 * left if quarter.requires_grad else quarter.sub_(left, alpha=2)
    for few in blocks:
        _multiply(_difference(rows[few]), quarter, odd[few], transposed)
    del quarter
    for few in row_blocks(len(rows), 2 * made, 2 * room):
        below = (even[few] - odd[few]).flip(1)
        even[few] += odd[few]
        odd[few] = below
        del below  # or the next one would be made beside it
    return answers


def _multiply(rows: Tensor, quarter: Tensor, answers: Tensor, transposed: bool) -> None:
    answers.addmm_(rows, quarter.t() if transposed else quarter, beta=0, alpha=0.5)


def _of_upper(answers: Tensor, rows: Tensor, room: int) -> Tensor:
    """The gradient of the upper rows."""
    (count, outputs), inputs = answers.shape, rows.shape[1]
    half, middle = outputs // 2, inputs // 2
    if not count:
        return rows.new_zeros(half, inputs)
    of_upper, of_differences = rows.new_empty(half, inputs), rows.new_empty(half, middle)
    of_sums = of_upper[:, :middle]
    for few in row_blocks(count, outputs + inputs, room + of_differences.numel()):
        beta = int(few.start > 0)
        of_sums.addmm_(_sum(answers[few]).t(), _sum(rows[few]), beta=beta, alpha=0.5)
        left, right = _difference(answers[few]), _difference(rows[few])
        of_differences.addmm_(left.t(), right, beta=beta, alpha=0.5)
        del left, right  # or the next ones would be made beside them
    for few in row_blocks(half, inputs, 0):
        of_upper[few, middle:] = (of_sums[few] - of_differences[few]).flip(1)
        of_sums[few] += of_differences[few]
    return of_upper


def _sum(rows: Tensor) -> Tensor:
    """``u + v`` of ``(u, Jv)``."""
    first, second = rows.chunk(2, 1)
    return second.flip(1).add_(first)


def _difference(rows: Tensor) -> Tensor:
    """``v − u`` of ``(u, Jv)``; it always meets another one, so that the sign is no matter."""
    first, second = rows.chunk(2, 1)
    return second.flip(1).sub_(first)


halved_product: Opaque = Opaque(
    "halved_product(Tensor x, Tensor upper, Tensor? bias) -> Tensor",
    _halved,
    _halved_gradients,
    _output,
)
"""``(x, upper, bias)``: ``(*, n)``, ``(m/2, n)``, ``(m,)`` → ``(*, m)``, for even ``m`` and ``n``.

It rounds sums of entries and of inputs before they are multiplied: the error is at most about
twice the dense layer's bound, ``n·ε·|W||x|``, in the norm of the whole output and not entry by
entry.
"""
