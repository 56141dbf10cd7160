"""Batches of matrices on the CPU: transposed at the speed of memory.

torch transposes by copying element for element, which for large matrices takes many times as
long as a clone. Its channel shuffle is the same permutation of a contiguous batch, and has a
vectorized kernel. It has no gradient, so it serves where nothing is recorded, traced or
transformed; elsewhere ordinary operations are used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiedparam.util.torch_modes import is_ordinary

_FEW = 1024  # entries: below, the shuffle's fixed cost is the larger one


def is_eager(tensor: Tensor) -> bool:
    """Whether this is an ordinary CPU tensor that is not traced, transformed or dual."""
    return tensor.is_cpu and is_ordinary(tensor)


def is_unrecorded(tensor: Tensor) -> bool:
    """Whether, besides, no gradient of it is being recorded."""
    return is_eager(tensor) and not (torch.is_grad_enabled() and tensor.requires_grad)


def transposed(matrices: Tensor, unrecorded: bool) -> Tensor:
    """Contiguous ``(n, k, g)`` from ``(n, g, k)``; a view of contiguous vectors.

    Args:
        matrices: ``(n, g, k)``.
        unrecorded: whether `is_unrecorded` holds; the caller asks once for all.
    """
    count, rows, columns = matrices.shape
    if rows == 1 or columns == 1:
        return matrices.reshape(count, columns, rows)
    if rows * columns < _FEW or not unrecorded:
        return matrices.transpose(1, 2).contiguous()
    # the channels of pixel n are matrix n: [row][column] is shuffled to [column][row]
    pixels = matrices.reshape(1, count, 1, rows * columns).permute(0, 3, 1, 2)
    shuffled: Tensor = torch.ops.aten.native_channel_shuffle.default(pixels, rows)
    return shuffled.permute(0, 2, 3, 1).view(count, columns, rows)
