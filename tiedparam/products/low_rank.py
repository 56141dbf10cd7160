"""A matrix of small rank beside another one: its sum, its product, and the nearest one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tiedparam.util.torch_modes import autocast_dtype


def plus_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``base + left @ right``, in the precision of the three whatever autocast says.

    As in:
        >>> from tiedparam.products.low_rank import plus_product
        >>> plus_product(torch.eye(2), torch.ones(2, 1), torch.ones(1, 2))
        tensor([[2., 1.],
                [1., 2.]])
    """
    if autocast_dtype(base.device) is None:
        return torch.addmm(base, left, right)
    with torch.autocast(base.device.type, enabled=False):
        return torch.addmm(base, left, right)


def product_beside(
    operation: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    input: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    groups: int,
) -> Tensor:
    """What a layer gives with ``base + left @ right``, by three smaller weights.

    Args:
        operation: of the layer, ``(input, weight, bias) → output``.
        input: of the layer.
        weight: ``base`` as the layer takes it; ``left``, outputs × rank; and ``right`` as the layer
            would take it if each of its groups had ``rank`` outputs.
        bias: of the layer.
        groups: of the layer.

    As in:
        >>> from tiedparam.products.low_rank import product_beside
        >>> parts = torch.eye(2), torch.ones(2, 1), torch.ones(1, 2)
        >>> product_beside(nn.functional.linear, torch.tensor([[1.0, 2.0]]), parts, None, 1)
        tensor([[4., 5.]])
    """
    base, left, right = weight
    output, hidden = operation(input, base, bias), operation(input, right, None)
    axes = base.dim() - 2
    if not axes:
        return output + F.linear(hidden, left)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    return output + convolve(hidden, left.reshape(*left.shape, *(1,) * axes), groups=groups)


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest parts of the singular value decomposition, in float64 or complex128.

    Args:
        matrix: in any precision.
        rank: at most the smaller of its sizes, and at least 1.

    Returns:
        Left vectors as columns, singular values, of which those that rounding made are 0, and right
        vectors as rows.

    As in:
        >>> from tiedparam.products.low_rank import truncated
        >>> _, sizes, _ = truncated(torch.tensor([[0.0, 3.0], [0.0, 4.0]]), 2)
        >>> sizes.tolist()
        [5.0, 0.0]
    """
    wide = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float64))
    left, sizes, right = torch.linalg.svd(wide, full_matrices=False)
    left, sizes, right = left[:, :rank], sizes[:rank], right[:rank]
    smallest = sizes[0] * torch.finfo(sizes.dtype).eps * max(wide.shape)
    return left, torch.where(sizes > smallest, sizes, 0), right


def nearest_product(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the nearest matrix of a rank: the truncated singular value decomposition.

    Where the matrix has a smaller rank the columns that are left over are zero on the left, and
    unit vectors orthogonal to the others on the right: with zeros on both sides neither would ever
    receive a gradient.

    Args:
        matrix: in any precision; it is decomposed in float64.
        rank: at most the smaller of its sizes.

    Returns:
        Rows × rank, and rank × columns with orthonormal rows, of which the largest entry is
        positive.

    Source: Eckart and Young 1936, "The approximation of one matrix by another of lower rank".

    As in:
        >>> from tiedparam.products.low_rank import nearest_product
        >>> nearest_product(torch.tensor([[0.0, 3.0], [0.0, 4.0]]), 1)
        (tensor([[3.],
                [4.]]), tensor([[0., 1.]]))
    """
    left, sizes, right = truncated(matrix, rank)
    turn = torch.sgn(right.gather(1, right.abs().argmax(1, keepdim=True)))
    left, right = left * sizes * turn.mT, right * turn.conj()
    return left.to(matrix.dtype).contiguous(), right.to(matrix.dtype).contiguous()
