"""The best approximation of several tensors by a few that they share (Eckart and Young, 1936)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiedparam.products.low_rank import truncated


def best_templates(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The few templates whose sums come nearest to the rows, and the coefficients of the sums.

    ``coefficients @ templates`` is the rank-``count`` matrix nearest to ``rows`` in the Frobenius
    norm: the truncated singular value decomposition. The factors alone are free up to an
    invertible matrix; these have orthogonal templates, coefficients with a mean square of 1 in
    every column, and the largest coefficient of a column (the first of equal ones) positive.

    If the rows have a smaller rank, the templates that are left over are fixed directions
    orthogonal to the others, with coefficients of zero: with zeros in both factors neither would
    ever receive a gradient.

    Args:
        rows: a real matrix, one tensor a row.
        count: how many templates, from 1 to the number of rows, which is at most that of columns.

    Returns:
        Templates (count × columns) and coefficients (rows × count), in float64.

    As in:
        >>> rows = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
        >>> templates, coefficients = best_templates(rows, 1)
        >>> torch.allclose(coefficients @ templates, rows.double())
        True
    """
    left, sizes, right = truncated(rows, count)
    rank = int((sizes > 0).sum())
    spread = math.sqrt(len(rows))
    coefficients = left * spread * _signs(left)
    templates = right * (sizes * _signs(left) / spread)[:, None]
    if rank < count:
        scale = sizes[0] / spread if rank else sizes.new_ones(())
        coefficients[:, rank:] = 0.0
        templates[rank:] = _left_over(right[:rank], count - rank) * scale
    return templates, coefficients


def _signs(left: Tensor) -> Tensor:
    """Of each column, the sign of its largest entry; of equal ones up to rounding, the first."""
    sizes = left.abs()
    first = (sizes >= sizes.amax(0) * (1 - 1e-9)).to(torch.int8).argmax(0)
    return torch.sign(left.gather(0, first[None])[0])


def _left_over(kept: Tensor, count: int) -> Tensor:
    """Orthonormal directions orthogonal to the kept ones, which are orthonormal: cosines."""
    found = list(kept)
    while len(found) < len(kept) + count:
        found.append(_next_direction(found, kept))
    return torch.stack(found[len(kept) :])


def _next_direction(found: list[Tensor], like: Tensor) -> Tensor:
    """The first cosine of which a good part is orthogonal to what was found, and that part."""
    size = like.shape[1]
    places = torch.arange(size, dtype=like.dtype, device=like.device) + 0.5
    for wave in range(size):
        cosine = torch.cos(places * (math.pi * wave / size))
        direction = torch.nn.functional.normalize(cosine, dim=0)
        for _ in range(2):  # once more, for what rounding leaves
            for other in found:
                direction = direction - other * (other @ direction)
        # the cosines are an orthonormal basis: one of them keeps as much as this
        if direction.norm() ** 2 >= (size - len(found)) / size / 2:
            return torch.nn.functional.normalize(direction, dim=0)
    raise ValueError("there are as many directions as columns already")
