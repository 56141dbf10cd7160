"""Products with block-diagonal matrices: batches of small products, and nothing for the zeros."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiedparam.products.linear_rows import must_be_few, row_blocks, rows_of, shaped_like
from tiedparam.products.opaque import Opaque
from tiedparam.util.torch_modes import is_traced
from tiedparam.util.torch_private import reshaped_in_place


def block_diagonal_product(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    """Each part of the input by its own matrix.

    By plain operations; but so many rows that their outputs, which are made part by part and then
    copied, would take more memory than the zeros, by a few at a time.

    Args:
        x: ``(*, count·inputs)``.
        blocks: ``(count, outputs, inputs)``.
        bias: ``(count·outputs,)`` or None.

    Returns:
        ``(*, count·outputs)``, in memory of its own.
    """
    count, outputs, inputs = blocks.shape
    if must_be_few(x, blocks, max(x.numel(), x.numel() // inputs * outputs), _room(blocks)):
        return _IN_BLOCKS(x, blocks, bias)
    parts = x.reshape(-1, count, inputs).transpose(0, 1)
    y = _multiplied(parts, blocks, bias).transpose(0, 1).contiguous()
    if is_traced():  # which would write the sizes down as constants
        return y.flatten(1).unflatten(0, x.shape[:-1]) if x.dim() != 2 else y.flatten(1)
    return reshaped_in_place(y, (*x.shape[:-1], count * outputs))


def _multiplied(parts: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.bmm(parts, blocks.mT)
    return torch.baddbmm(bias.reshape(len(blocks), 1, -1), parts, blocks.mT)


def _room(blocks: Tensor) -> int:
    """Entries of the dense gradient that there are not here."""
    return (len(blocks) - 1) * blocks.numel()


def _product(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    rows, (count, outputs, _) = rows_of(x), blocks.shape
    answers = rows.new_empty(len(rows), count, outputs)
    for few in row_blocks(len(rows), count * outputs, _room(blocks)):
        answers[few] = _multiplied(_parts(rows[few], count), blocks, bias).transpose(0, 1)
    return shaped_like(answers.view(len(rows), count * outputs), x)


def _gradients(
    needs: Sequence[bool], gradient: Tensor, x: Tensor, blocks: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    answers, rows, (count, _, inputs) = rows_of(gradient), rows_of(x), blocks.shape
    of_x = rows.new_empty(len(rows), count, inputs) if needs[0] else None
    of_blocks = torch.zeros_like(blocks) if needs[1] else None
    some = needs[0] or needs[1]
    for few in row_blocks(len(rows), count * inputs, _room(blocks)) if some else ():
        parts = _parts(answers[few], count)
        if of_blocks is not None:
            of_blocks.baddbmm_(parts.mT, _parts(rows[few], count))
        if of_x is not None:
            of_x[few] = torch.bmm(parts, blocks).transpose(0, 1)
    of_x = None if of_x is None else of_x.view(x.shape)
    return of_x, of_blocks, answers.sum(0) if needs[2] else None


def _parts(rows: Tensor, count: int) -> Tensor:
    return rows.view(len(rows), count, -1).transpose(0, 1)


_IN_BLOCKS: Opaque = Opaque(
    "block_diagonal_product(Tensor x, Tensor blocks, Tensor? bias) -> Tensor",
    _product,
    _gradients,
    lambda x, blocks, bias: x.new_empty(*x.shape[:-1], blocks.shape[0] * blocks.shape[1]),
)
