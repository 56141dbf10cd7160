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

from tiedparam.products.linear_rows import plus, row_blocks, rows_of, shaped_like
from tiedparam.products.opaque import Opaque

# e[p]·e[q] = SIGNS[p][q]·e[p ^ q], for 1, i, j, k; those of 1, i are the complex ones
SIGNS = ((1, 1, 1, 1), (1, -1, 1, -1), (1, -1, -1, 1), (1, 1, -1, -1))


def _output(x: Tensor, columns: Tensor, bias: Tensor | None, n: int = 2) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns.shape[0])


# Every component by every component ---------------------------------------------------------


def _by_components(x: Tensor, columns: Tensor, bias: Tensor | None, n: int) -> Tensor:
    rows, inputs = rows_of(x), columns.shape[1]
    count, outputs = rows.shape[0], columns.shape[0] // n
    answer = x.new_empty(count, n, outputs)
    for few in row_blocks(count, n * n * outputs, columns.numel()):
        numbers = rows[few].view(-1, inputs)
        every = torch.mm(numbers, columns.t()).view(-1, n, n, outputs)
        for made in range(n):
            own = answer[few, made]
            own.copy_(every[:, 0, made])  # e[made]·1
            for q in range(1, n):
                own.add_(every[:, q, made ^ q], alpha=SIGNS[made ^ q][q])
        del every  # or the next one would be made beside it
    return shaped_like(plus(answer.view(count, n * outputs), bias), x)


def _gradients_by_components(
    needs: Sequence[bool], gradient: Tensor, x: Tensor, columns: Tensor, bias: Tensor | None, n: int
) -> tuple[Tensor | None, ...]:
    rows, own = rows_of(gradient), rows_of(x)
    (_, inputs), outputs = columns.shape, columns.shape[0] // n
    of_x = own.new_empty(own.shape) if needs[0] else None
    of_columns = torch.zeros_like(columns) if needs[1] else None
    room = (n - 1) * columns.numel()
    blocks = row_blocks(len(rows), n * (n + 1) * outputs, room) if needs[0] or needs[1] else ()
    for few in blocks:
        made = rows[few].view(-1, n, outputs).unbind(1)
        every = torch.stack(
            [made[p ^ q] if SIGNS[p][q] > 0 else -made[p ^ q] for q in range(n) for p in range(n)],
            1,
        ).view(-1, n * outputs)
        if of_x is not None:
            of_x[few].view(-1, inputs).addmm_(every, columns, beta=0)
        if of_columns is not None:
            of_columns.addmm_(every.t(), own[few].view(-1, inputs))
        del every  # or the next one would be made beside it
    of_x = None if of_x is None else of_x.view(x.shape)
    return of_x, of_columns, rows.sum(0) if needs[2] else None


component_product: Opaque = Opaque(
    "component_product(Tensor x, Tensor columns, Tensor? bias, int n) -> Tensor",
    _by_components,
    _gradients_by_components,
    _output,
)
"""``(x, columns, bias, n)``: ``(*, n·c)``, ``(n·o, c)``, ``(n·o,)`` → ``(*, n·o)``."""


# Three products for four --------------------------------------------------------------------


def _complex(x: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    by_real, by_imaginary = columns.t().chunk(2, 1)
    outputs = _through(rows_of(x), by_real, by_imaginary)
    return shaped_like(plus(outputs, bias), x)


def _complex_gradients(
    needs: Sequence[bool], gradient: Tensor, x: Tensor, columns: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    rows = rows_of(gradient)
    # first, while the room of the input's gradient is free
    of_columns = _of_columns(rows, rows_of(x), x.numel() if needs[0] else 0) if needs[1] else None
    of_x = None
    if needs[0]:  # gradients are multiplied by the conjugate
        by_real, by_imaginary = columns.chunk(2)
        of_x = _through(rows, by_real, by_imaginary, -1).view(x.shape)
    return of_x, of_columns, rows.sum(0) if needs[2] else None


def _through(rows: Tensor, by_real: Tensor, by_imaginary: Tensor, sign: int = 1) -> Tensor:
    """``(a + bi)(c ± di)``, of matrices: ``ac``, ``bd`` and ``(a + b)(c ± d)``.

    Of the ways with three products this one adds up the fewest matrices.
    """
    (inner, made), count = by_real.shape, rows.shape[0]
    outputs = rows.new_empty(count, 2 * made)
    real, imaginary = outputs[:, :made], outputs[:, made:]
    both = torch.add(by_real, by_imaginary, alpha=sign)
    for few in row_blocks(count, max(inner, made), by_real.numel()):
        a, b = rows[few, :inner], rows[few, inner:]
        imaginary[few].addmm_(a + b, both, beta=0)
        real[few].addmm_(a, by_real, beta=0)
        imaginary[few].sub_(real[few])
        product = torch.mm(b, by_imaginary)
        real[few].sub_(product, alpha=sign)
        imaginary[few].sub_(product, alpha=sign)
        del product  # or the next sum would be made beside it
    return outputs


def _of_columns(rows: Tensor, own: Tensor, room: int) -> Tensor:
    """The gradient of the components: the conjugate of the input times that of the output."""
    (count, outputs), inputs = rows.shape, own.shape[1]
    made, inner = outputs // 2, inputs // 2
    of_columns = own.new_zeros(outputs, inner)
    blocks = list(row_blocks(count, max(made, inner), room + outputs * inner))
    for few in blocks:
        common = rows[few, :made] + rows[few, made:]
        of_columns[made:].addmm_(common.t(), own[few, :inner])
        del common
    of_columns[:made] = of_columns[made:]
    for few in blocks:
        real, imaginary = rows[few, :made], rows[few, made:]
        by_real, by_imaginary = own[few, :inner], own[few, inner:]
        of_columns[:made].addmm_(imaginary.t(), by_real - by_imaginary, alpha=-1)
        of_columns[made:].addmm_(real.t(), by_real + by_imaginary, alpha=-1)
    return of_columns


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
