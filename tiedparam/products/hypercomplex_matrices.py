"""Products with complex and quaternion matrices, from one block of columns: ``A, B, …``.

``columns`` holds the components of the matrix one below the other, ``(n·o, c)``; an input has the
components of its numbers side by side, ``(*, n·c)``.

- `component_product` multiplies every component of the input by every component of the matrix, in
  one product, and adds up what belongs together: as many multiplications as a dense layer, and
  no matrix is laid out.
- `complex_product` takes three products of a quarter of the size, and not four.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiedparam.products.linear_rows import plus, rows_of, shaped_like
from tiedparam.products.opaque import Opaque

# e[p]·e[q] = SIGNS[p][q]·e[p ^ q], for 1, i, j, k; those of 1, i are the complex ones
SIGNS = ((1, 1, 1, 1), (1, -1, 1, -1), (1, -1, -1, 1), (1, 1, -1, -1))


def _output(x: Tensor, columns: Tensor, bias: Tensor | None, n: int = 2) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns.shape[0])


# Every component by every component ---------------------------------------------------------


def _by_components(x: Tensor, columns: Tensor, bias: Tensor | None, n: int) -> Tensor:
    rows = rows_of(x)
    count, outputs = rows.shape[0], columns.shape[0] // n
    every = torch.mm(rows.view(count * n, columns.shape[1]), columns.t()).view(count, n, n, outputs)
    answer = x.new_empty(count, n, outputs)
    for made in range(n):
        own = answer[:, made]
        own.copy_(every[:, 0, made])  # e[made]·1
        for q in range(1, n):
            own.add_(every[:, q, made ^ q], alpha=SIGNS[made ^ q][q])
    return shaped_like(plus(answer.view(count, n * outputs), bias), x)


def _gradients_by_components(
    needs: Sequence[bool], gradient: Tensor, x: Tensor, columns: Tensor, bias: Tensor | None, n: int
) -> tuple[Tensor | None, ...]:
    rows = rows_of(gradient)
    count, outputs = rows.shape[0], columns.shape[0] // n
    of_x = of_columns = None
    if needs[0] or needs[1]:
        made = rows.view(count, n, outputs).unbind(1)
        every = torch.stack(
            [made[p ^ q] if SIGNS[p][q] > 0 else -made[p ^ q] for q in range(n) for p in range(n)],
            1,
        ).view(count * n, n * outputs)
        if needs[0]:
            of_x = torch.mm(every, columns).view(x.shape)
        if needs[1]:
            of_columns = torch.mm(every.t(), rows_of(x).view(count * n, columns.shape[1]))
    return of_x, of_columns, rows.sum(0) if needs[2] else None


component_product: Opaque = Opaque(
    "component_product(Tensor x, Tensor columns, Tensor? bias, int n) -> Tensor",
    _by_components,
    _gradients_by_components,
    _output,
)
"""``(x, columns, bias, n)``: ``(*, n·c)``, ``(n·o, c)``, ``(n·o,)`` → ``(*, n·o)``."""


# Three products for four --------------------------------------------------------------------


def _three(
    real: Tensor, imaginary: Tensor, by_real: Tensor, by_imaginary: Tensor
) -> tuple[Tensor, Tensor]:
    """``(a + bi)(c + di)``, of matrices: Gauss's way."""
    common = torch.mm(real + imaginary, by_real)
    return (
        common - torch.mm(imaginary, by_real + by_imaginary),
        common + torch.mm(real, by_imaginary - by_real),
    )


def _complex(x: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    # as `_three`, into one output
    real, imaginary = rows_of(x).chunk(2, 1)
    by_real, by_imaginary = columns.t().chunk(2, 1)
    outputs = real.new_empty(real.shape[0], columns.shape[0])
    one, other = outputs.chunk(2, 1)
    torch.mm(real + imaginary, by_real, out=other)
    one.copy_(other)
    plus(outputs, bias)
    one.addmm_(imaginary, by_real + by_imaginary, alpha=-1)
    other.addmm_(real, by_imaginary - by_real)
    return shaped_like(outputs, x)


def _complex_gradients(
    needs: Sequence[bool], gradient: Tensor, x: Tensor, columns: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    rows = rows_of(gradient)
    real, imaginary = rows.chunk(2, 1)
    of_x = of_columns = None
    if needs[0]:  # gradients are multiplied by the conjugate
        by_real, by_imaginary = columns.chunk(2)
        of_x = torch.cat(_three(real, imaginary, by_real, -by_imaginary), 1).view(x.shape)
    if needs[1]:
        by_real, by_imaginary = rows_of(x).chunk(2, 1)
        of_columns = torch.cat(_three(real.t(), imaginary.t(), by_real, -by_imaginary))
    return of_x, of_columns, rows.sum(0) if needs[2] else None


complex_product: Opaque = Opaque(
    "complex_product(Tensor x, Tensor columns, Tensor? bias) -> Tensor",
    _complex,
    _complex_gradients,
    _output,
)
"""``(x, columns, bias)``: ``(*, 2c)``, ``(2o, c)``, ``(2o,)`` → ``(*, 2o)``.

It rounds sums of real and imaginary parts before they are multiplied: the error is at most a few
times the dense layer's bound, ``2c·ε·|W||x|``, in the norm of the whole output, so that a small
imaginary part beside a large real one loses digits (Higham 2002, section 23.2.4).
"""
