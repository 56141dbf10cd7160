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

from tiedparam.products.linear_rows import plus, rows_of, shaped_like
from tiedparam.products.opaque import Opaque


def _output(x: Tensor, upper: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], 2 * upper.shape[0])


# The input beside itself in reverse ---------------------------------------------------------


def _turned(x: Tensor, upper: Tensor, bias: Tensor | None) -> Tensor:
    above, below = torch.mm(_beside_reverse(rows_of(x)), upper.t()).chunk(2)
    return shaped_like(plus(torch.cat([above, below.flip(1)], 1), bias), x)


def _turned_gradients(
    needs: Sequence[bool], gradient: Tensor, x: Tensor, upper: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    rows = rows_of(gradient)
    above, below = rows.chunk(2, 1)
    both = torch.cat([above, below.flip(1)])
    of_x = None
    if needs[0]:
        straight, reverse = torch.mm(both, upper).chunk(2)
        of_x = (straight + reverse.flip(1)).view(x.shape)
    of_upper = torch.mm(both.t(), _beside_reverse(rows_of(x))) if needs[1] else None
    return of_x, of_upper, rows.sum(0) if needs[2] else None


def _beside_reverse(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.flip(1)])


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
    of_sums, of_differences = _quarters(upper)
    outputs = _joined(*_halves(rows_of(x)), of_sums.t(), of_differences.t())
    return shaped_like(plus(outputs, bias), x)


def _halved_gradients(
    needs: Sequence[bool], gradient: Tensor, x: Tensor, upper: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    rows = rows_of(gradient)
    sums, differences = _halves(rows)
    of_x = of_upper = None
    if needs[0]:  # the transpose is its own half turn, too
        of_x = _joined(sums, differences, *_quarters(upper)).view(x.shape)
    if needs[1]:
        own_sums, own_differences = _halves(rows_of(x))
        of_sums = torch.mm(sums.t(), own_sums)
        of_differences = torch.mm(differences.t(), own_differences)
        left, right = of_sums + of_differences, of_sums - of_differences
        of_upper = torch.cat([left, right.flip(1)], 1).mul_(2)
    return of_x, of_upper, rows.sum(0) if needs[2] else None


def _quarters(upper: Tensor) -> tuple[Tensor, Tensor]:
    """``P + QJ`` and ``P − QJ``."""
    left, right = upper.chunk(2, 1)
    right = right.flip(1)
    return left + right, left - right


def _halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``(u + v)/2`` and ``(u − v)/2`` of ``(u, Jv)``."""
    first, second = rows.chunk(2, 1)
    second = second.flip(1)
    return (first + second).mul_(0.5), (first - second).mul_(0.5)


def _joined(sums: Tensor, differences: Tensor, by_sums: Tensor, by_differences: Tensor) -> Tensor:
    even, odd = torch.mm(sums, by_sums), torch.mm(differences, by_differences)
    return torch.cat([even + odd, (even - odd).flip(1)], 1)


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
