"""A weight as a matrix to look at: outputs down, inputs across, a kernel in each block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def blocks(tensor: Tensor) -> Tensor:
    """A tensor of any number of axes as ``(outputs, inputs, rows, columns of the kernel)``."""
    while tensor.dim() < 4:  # (out, in) and (out, in, length) have one row to a block
        tensor = tensor.unsqueeze(2 if tensor.dim() > 2 else tensor.dim())
    return tensor.flatten(3)


def mosaic(tensor: Tensor, corner: int, gap: int = 1) -> Tensor:
    """The corner of a tensor as a matrix: blocks of kernels, zeros between them."""
    four = blocks(tensor)[:corner, :corner]
    outputs, inputs, height, width = four.shape
    if height * width == 1:
        gap = 0  # a matrix is drawn without gaps
    padded = four.new_zeros(outputs, height + gap, inputs, width + gap)
    padded[:, :height, :, :width] = four.transpose(1, 2)
    matrix = padded.reshape(outputs * (height + gap), inputs * (width + gap))
    return matrix[: len(matrix) - gap, : matrix.shape[1] - gap]


def mosaic_with_gaps(value: Tensor, corner: int) -> Tensor:
    """`mosaic` of numbers, with NaN between the kernels, which is not drawn."""
    between = mosaic(value.new_ones(value.shape, dtype=torch.bool), corner)
    return mosaic(value, corner).masked_fill(~between, float("nan"))


def shape_text(shape: Sequence[int]) -> str:
    """``4×4``; ``one number`` has no axes."""
    return "×".join(map(str, shape)) or "one number"
