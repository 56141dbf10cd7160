"""Laws whose free values once lay in another order, and how those of before are told.

Files, state dicts and optimizers hold free values in a law's order, and most of them say nothing
of versions. So a law that changes its order changes a shape, or the number of tensors, as well: by
that alone values of an earlier order are told, wherever they come from, and cannot be taken for
today's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiedparam.laws.mirrored_kernels import Kernels
from tiedparam.laws.rule import Rule


class ReorderedLaw(Rule):
    """A law that knows an earlier order of its free values."""

    @abstractmethod
    def from_earlier(self, free: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """These free values in today's order; None if they are not those of an earlier one.

        Whatever has the shape of the free values follows in the same way: an optimizer's averages.
        """


def renewed(rule: Rule, free: Sequence[Any]) -> tuple[Tensor, ...] | None:
    """Free values of an earlier order in today's; None if these are not such, or have no values."""
    if not isinstance(rule, ReorderedLaw) or not all(type(value) in _ORDINARY for value in free):
        return None
    with torch.no_grad():
        return rule.from_earlier([value.detach() for value in free])


_ORDINARY = Tensor, torch.nn.Parameter  # not those of which a process has a part


# flip_sym ---------------------------------------------------------------------------------------


def shape_of_layout_2(sizes: Kernels) -> tuple[int, int]:
    """That of the one tensor."""
    columns = sizes.c if sizes.free_count % sizes.c == 0 else sizes.c // 2
    return sizes.free_count // columns, columns


def shapes_of_layout_1(sizes: Kernels) -> list[tuple[int, ...]]:
    """Those of the first half of the positions, and of the middle."""
    groups, c, positions, _ = sizes
    halves = [(groups * c, c, positions // 2)] if positions > 1 else []
    return [*halves, (groups, c * (c + 1) // 2)] if positions % 2 else [*halves]


def of_layout_1(free: Sequence[Tensor], sizes: Kernels) -> Tensor:
    """The canonical weight ``(groups, c, c, positions)``: halves kernel by kernel, then the middle.

    The middle is in rectangular full packed format (LAPACK working note 199): the lower triangle
    ``[[A, 0], [B, D]]`` is a rectangle of ``A`` and ``B``, and in the corner that ``A`` leaves free
    is ``Dᵀ``.
    """
    groups, c, positions, _ = sizes
    parts = []
    if positions > 1:
        halves = free[0].reshape(groups, c, c, positions // 2)
        parts = [halves, halves.transpose(1, 2).flip(-1)]
    if positions % 2:
        even, columns = 1 - c % 2, (c + 1) // 2
        rectangle = free[-1].reshape(groups, c + even, columns)
        corner = rectangle[:, : c // 2, 1 - even :].transpose(1, 2)
        lower = torch.cat([rectangle[:, even:], F.pad(corner, (0, 0, columns, 0))], 2)
        middle = lower.tril() + lower.tril(-1).transpose(1, 2)
        parts.insert(1, middle[..., None])
    return torch.cat(parts, -1)


def of_layout_2(halves: Tensor, middle: Tensor | None, sizes: Kernels) -> Tensor:
    """The weight ``(groups, c, c, positions)``: slices of the first half of the positions.

    Args:
        halves: those, one after the other.
        middle: the slice in the middle of odd kernels, ``(groups, c, c)``.
        sizes: of the weight.
    """
    groups, c, _, sign = sizes
    slices = halves.reshape(-1, groups, c, c)
    images = slices.transpose(2, 3).flip(0)
    between = [] if middle is None else [middle[None]]
    every = [slices, *between, images if sign == 1 else -images]
    return torch.cat(every).permute(1, 2, 3, 0)
