"""Products with ``A ⊗ I + B ⊗ 11ᵀ``: every item by one matrix, their sum by another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiedparam.products.linear_rows import rows_of, shaped_like
from tiedparam.products.opaque import Opaque

_WIDE = 32
"""Items of a set that are enough for a product of their own; with 4 that takes 7 times as long."""


def _product(x: Tensor, free: Tensor, bias: Tensor | None, items: int) -> Tensor:
    same, other = free.chunk(2)
    outputs = _through(rows_of(x), same - other, other, items, bias)
    return shaped_like(outputs, x)


def _through(
    rows: Tensor, each: Tensor, together: Tensor, items: int, bias: Tensor | None = None
) -> Tensor:
    """``(rows, inputs·items)`` → ``(rows, outputs·items)``."""
    count, (outputs, inputs) = rows.shape[0], each.shape
    sets = rows.view(count, inputs, items)
    added = torch.mm(sets.sum(2), together.t()).unsqueeze(2)
    if bias is not None:
        added = added + bias.view(outputs, items)
    if items >= _WIDE:
        each = each.expand(count, outputs, inputs)
        return torch.baddbmm(added, each, sets).view(count, outputs * items)
    # the items of all sets side by side, where the product of one set would be too narrow
    every = torch.mm(each, _side_by_side(sets)).view(outputs, count, items)
    answers = every.transpose(0, 1).contiguous()
    return answers.add_(added).view(count, outputs * items)


def _side_by_side(sets: Tensor) -> Tensor:
    """``(rows, channels, items)`` → ``(channels, rows·items)``."""
    count, channels, items = sets.shape
    return sets.transpose(0, 1).reshape(channels, count * items)


def _gradients(
    needs: Sequence[bool],
    gradient: Tensor,
    x: Tensor,
    free: Tensor,
    bias: Tensor | None,
    items: int,
) -> tuple[Tensor | None, ...]:
    rows = rows_of(gradient)
    same, other = free.chunk(2)
    of_x = of_free = None
    if needs[0]:
        of_x = _through(rows, (same - other).t(), other.t(), items).view(x.shape)
    if needs[1]:
        (outputs, inputs), count = same.shape, rows.shape[0]
        answers, sets = rows.view(count, outputs, items), rows_of(x).view(count, inputs, items)
        of_same = torch.mm(_side_by_side(answers), _side_by_side(sets).t())
        of_all = torch.mm(answers.sum(2).t(), sets.sum(2))
        of_free = torch.cat([of_same, of_all - of_same])
    return of_x, of_free, rows.sum(0) if needs[2] else None


set_product: Opaque = Opaque(
    "set_product(Tensor x, Tensor free, Tensor? bias, int items) -> Tensor",
    _product,
    _gradients,
    lambda x, free, bias, items: x.new_empty(*x.shape[:-1], free.shape[0] // 2 * items),
)
"""``(x, free, bias, items)``: ``(*, I·items)``, ``(2·O, I)``, ``(O·items,)`` → ``(*, O·items)``.

Features are (channel, item), the item fastest. ``free`` is first ``A + B``, what an item does to
itself, and below ``B``, what it does to another.
"""
