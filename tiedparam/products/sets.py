"""Products with ``A ⊗ I + B ⊗ 11ᵀ``: every item by one matrix, their sum by another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiedparam.products.linear_rows import row_blocks, rows_of, shaped_like
from tiedparam.products.opaque import Opaque

_WIDE = 16
"""Items of a set that are enough for a product of their own; with 4 that takes 4 times as long."""


def _product(x: Tensor, free: Tensor, bias: Tensor | None, items: int) -> Tensor:
    same, other = free.chunk(2)
    outputs = _through(rows_of(x), same - other, other, items, free.numel(), bias)
    return shaped_like(outputs, x)


def _through(
    rows: Tensor,
    each: Tensor,
    together: Tensor,
    items: int,
    values: int,
    bias: Tensor | None = None,
) -> Tensor:
    """``(rows, inputs·items)`` → ``(rows, outputs·items)``.

    Some rows at a time: the free values, which are so many, their gradients and the buffers take
    no more than the gradient of the whole weight would.
    """
    count, (outputs, inputs) = rows.shape[0], each.shape
    answers = rows.new_empty(count, outputs, items)
    sets = rows.view(count, inputs, items)
    room = each.numel() * items**2 - values - each.numel()
    for few in row_blocks(count, (outputs + inputs) * (items + 1), room):
        added = torch.mm(sets[few].sum(2), together.t()).unsqueeze(2)
        own = answers[few]
        if items >= _WIDE:
            own.copy_(added).baddbmm_(each.expand(len(own), outputs, inputs), sets[few])
        else:  # the items of all sets side by side, where one set's product would be too narrow
            every = torch.mm(each, _side_by_side(sets[few])).view(outputs, len(own), items)
            own.copy_(every.transpose(0, 1)).add_(added)
            del every  # or the next one would be made beside it
        if bias is not None:
            own += bias.view(outputs, items)
    return answers.view(count, outputs * items)


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
    # first, while the room of the input's gradient is free
    of_free = _of_free(rows, rows_of(x), free, items, needs[0]) if needs[1] else None
    of_x = None
    if needs[0]:
        same, other = free.chunk(2)
        each = (same - other).t()
        of_x = _through(rows, each, other.t(), items, free.numel()).view(x.shape)
    return of_x, of_free, rows.sum(0) if needs[2] else None


def _of_free(rows: Tensor, own: Tensor, free: Tensor, items: int, spare: bool) -> Tensor:
    of_free, count = torch.zeros_like(free), rows.shape[0]
    outputs, inputs = free.shape[0] // 2, free.shape[1]
    answers, sets = rows.view(count, outputs, items), own.view(count, inputs, items)
    room = outputs * inputs * (items**2 - 2) + (own.numel() if spare else 0)
    for few in row_blocks(count, (outputs + inputs) * (items + 1), room):
        of_free[:outputs].addmm_(_side_by_side(answers[few]), _side_by_side(sets[few]).t())
        of_free[outputs:].addmm_(answers[few].sum(2).t(), sets[few].sum(2))
    of_free[outputs:] -= of_free[:outputs]
    return of_free


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
