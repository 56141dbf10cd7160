"""Batches of matrices on the CPU: transposed at the speed of memory.

torch transposes by copying element for element, which for large matrices takes many times as
long as a clone. Its channel shuffle is the same permutation of a contiguous batch, and has a
vectorized kernel. It has no gradient, so it serves where nothing is recorded, traced or
transformed; elsewhere ordinary operations are used.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FEW = 1024  # entries: below, the shuffle's fixed cost is the larger one


def transposed(matrices: Tensor, unrecorded: bool) -> Tensor:
    """Contiguous ``(n, k, g)`` from ``(n, g, k)``; a view of contiguous vectors.

    Args:
        matrices: ``(n, g, k)``.
        unrecorded: whether `tiedparam.util.torch_modes.is_unrecorded` holds, which the caller
            asks once for all.
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
