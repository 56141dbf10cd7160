"""The input of a Linear layer as a matrix of rows, and back."""

from __future__ import annotations

from torch import Tensor

from tiedparam.util.torch_private import reshaped_in_place


def rows_of(x: Tensor) -> Tensor:
    """``(*, n)`` as ``(rows, n)``, contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def shaped_like(rows: Tensor, x: Tensor) -> Tensor:
    """A fresh ``(rows, m)`` with the leading axes of ``x``; no view to autograd."""
    return reshaped_in_place(rows, (*x.shape[:-1], rows.shape[1]))


def plus(rows: Tensor, bias: Tensor | None) -> Tensor:
    """The bias added to fresh rows, in place."""
    return rows if bias is None else rows.add_(bias)
