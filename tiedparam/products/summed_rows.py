"""Linear layers with equal rows and columns, some rows of input at a time.

By plain operations the sums of inputs and the smaller layer's outputs are there as a whole. Where
few share they are large, and so many rows take more memory than the law saves of the weight's
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from tiedparam.products.linear_rows import (
    LITTLE,
    must_be_few,
    plus,
    row_blocks,
    rows_of,
    shaped_like,
)
from tiedparam.products.opaque import Opaque
from tiedparam.util.torch_modes import is_traced_or_transformed

Sizes = Sequence[int]
"""Of the parts of an axis; where one is kept with the size 1, all along it are equal."""


def are_many(x: Tensor, weight: Tensor, inputs: int, outputs: int) -> bool:
    """Whether plain operations would take more memory than the dense layer.

    Args:
        x: ``(*, inputs)``.
        weight: of the smaller layer.
        inputs: how many there are.
        outputs: how many there are.
    """
    if is_traced_or_transformed() or x.numel() // inputs * (2 * inputs + outputs) <= LITTLE:
        return False  # at once, for small layers are called often
    taken = x.numel() // inputs * _each(weight, inputs, outputs)
    return must_be_few(x, weight, taken, _room(weight, inputs, outputs))


def _each(weight: Tensor, inputs: int, outputs: int) -> int:
    """Entries of buffers for a row: its sums, their gradients, and those of the outputs."""
    made, inner = weight.shape
    return (2 * inner if inner < inputs else 0) + (made if made < outputs else 0)


def _room(weight: Tensor, inputs: int, outputs: int) -> int:
    return inputs * outputs - weight.numel()


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Sizes,
    kept_inputs: Sizes,
    outputs: Sizes,
    kept_outputs: Sizes,
) -> Tensor:
    rows, each = rows_of(x), _each(weight, prod(inputs), prod(outputs))
    answers = rows.new_empty(len(rows), *outputs)
    for few in row_blocks(len(rows), each, _room(weight, prod(inputs), prod(outputs))):
        _spread(answers[few], _summed(rows[few], inputs, kept_inputs), weight.t(), kept_outputs)
    return shaped_like(plus(answers.view(len(rows), -1), bias), x)


def _gradients(
    needs: Sequence[bool],
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Sizes,
    kept_inputs: Sizes,
    outputs: Sizes,
    kept_outputs: Sizes,
) -> tuple[Tensor | None, ...]:
    answers, rows = rows_of(gradient), rows_of(x)
    each, room = (f(weight, prod(inputs), prod(outputs)) for f in (_each, _room))
    of_x = rows.new_empty(len(rows), *inputs) if needs[0] else None
    of_weight = torch.zeros_like(weight) if needs[1] else None
    for few in row_blocks(len(rows), each, room) if needs[0] or needs[1] else ():
        made = _summed(answers[few], outputs, kept_outputs)
        if of_weight is not None:
            of_weight.addmm_(made.t(), _summed(rows[few], inputs, kept_inputs))
        if of_x is not None:
            _spread(of_x[few], made, weight, kept_inputs)
        del made  # or the next ones would be made beside it
    of_x = None if of_x is None else of_x.view(x.shape)
    return of_x, of_weight, answers.sum(0) if needs[2] else None


def _summed(rows: Tensor, sizes: Sizes, kept: Sizes) -> Tensor:
    pairs = enumerate(zip(sizes, kept, strict=True), 1)
    shared = [axis for axis, (size, left) in pairs if size != left]
    if not shared:
        return rows
    return rows.view(len(rows), *sizes).sum(shared).view(len(rows), prod(kept))


def _spread(answers: Tensor, rows: Tensor, matrix: Tensor, kept: Sizes) -> None:
    """Write products to ``(rows, *sizes)``, each to all that it stands for."""
    if matrix.shape[1] == prod(answers.shape[1:]):
        answers.view(len(rows), -1).addmm_(rows, matrix, beta=0)
    else:
        answers.copy_(torch.mm(rows, matrix).view(len(rows), *kept))


summed_product: Opaque = Opaque(
    "summed_product(Tensor x, Tensor weight, Tensor? bias,"
    " int[] inputs, int[] kept_inputs, int[] outputs, int[] kept_outputs) -> Tensor",
    _product,
    _gradients,
    lambda x, weight, bias, inputs, kept_inputs, outputs, kept_outputs: x.new_empty(
        *x.shape[:-1], prod(outputs)
    ),
)
"""``(x, weight, bias, …)``: ``(*, inputs)``, that of the smaller layer → ``(*, outputs)``."""
