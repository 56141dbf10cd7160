"""Triangles of symmetric and skew matrices, packed into rectangles and unpacked, differentiably."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unpacked(packed: Tensor, c: int) -> Tensor:
    """A symmetric tile ``(n, c, c)`` from ``(n, c(c+1)/2)``."""
    lower, order = _lower(packed, c), torch.arange(c, device=packed.device)
    return torch.where(order[:, None] >= order, lower, lower.transpose(1, 2))


def unpacked_skew(packed: Tensor, c: int) -> Tensor:
    """A skew tile ``(n, c, c)`` from ``(n, c(c−1)/2)``: zeros, and not −0.0, on its diagonal."""
    if c == 1:  # torch 2.6 cannot compile the gradient of a tile without entries
        return packed.new_zeros(len(packed), 1, 1)
    # below the diagonal there is the triangle of a tile that is smaller by one
    lower, order = F.pad(_lower(packed, c - 1), (0, 1, 1, 0)), torch.arange(c, device=packed.device)
    signed = torch.where(order[:, None] > order, lower, -lower.transpose(1, 2))
    return torch.where(order[:, None] == order, packed.new_zeros(()), signed)


def _lower(packed: Tensor, c: int) -> Tensor:
    """``(n, c, c)`` whose lower triangles are packed in ``(n, c(c+1)/2)``; above is anything.

    A row of the packed rectangle holds a row of the lower triangle's bottom half, and, backwards
    from the rectangle's end, the row of its top half that has just the missing length. So the
    rectangle is the bottom half, and turned by 180° it is the top half.
    """
    top = c // 2
    rectangle = packed.reshape(packed.shape[0], c - top, c + 1 - c % 2)
    turned = rectangle.flip(1, 2)
    halves = [turned[:, 1:], rectangle] if c % 2 else [turned[..., :c], rectangle[..., :c]]
    return torch.cat(halves, 1)


def packed_triangle(matrices: Tensor) -> Tensor:
    """The inverse of `_lower`, reading the lower triangles."""
    n, c, _ = matrices.shape
    top = c // 2
    lower = matrices.tril()
    rectangle = lower.new_zeros(n, c - top, c + 1 - c % 2)
    turned = lower[:, :top].flip(1, 2)
    if c % 2:
        rectangle[:, :top] = turned
    else:
        rectangle[..., 1:] = turned
    rectangle[..., :c] += lower[:, top:]
    return rectangle
