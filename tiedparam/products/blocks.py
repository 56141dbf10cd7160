"""Products with block-diagonal matrices: one batch of small products, and nothing for the zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from tiedparam.util.torch_modes import is_traced
from tiedparam.util.torch_private import reshaped_in_place


def block_diagonal_product(x: Tensor, blocks: Tensor, bias: Tensor | None) -> Tensor:
    """Each part of the input by its own matrix, by plain operations.

    Args:
        x: ``(*, count·inputs)``.
        blocks: ``(count, outputs, inputs)``.
        bias: ``(count·outputs,)`` or None.

    Returns:
        ``(*, count·outputs)``, in memory of its own.
    """
    count, outputs, inputs = blocks.shape
    parts = x.reshape(-1, count, inputs).transpose(0, 1)
    if bias is None:
        y = torch.bmm(parts, blocks.mT)
    else:
        y = torch.baddbmm(bias.reshape(count, 1, outputs), parts, blocks.mT)
    y = y.transpose(0, 1).contiguous()
    if is_traced():  # which would write the sizes down as constants
        return y.flatten(1).unflatten(0, x.shape[:-1]) if x.dim() != 2 else y.flatten(1)
    return reshaped_in_place(y, (*x.shape[:-1], count * outputs))
