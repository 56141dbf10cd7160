"""Constant anti-diagonals: W[o, c] = w[o + c]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from tiedparam.laws.diagonals import AntiDiagonals, OfDiagonals
from tiedparam.laws.example import Example
from tiedparam.laws.registry import register_rule
from tiedparam.products.fourier import Diagonal


@register_rule("hankel")
class Hankel(OfDiagonals):
    """A matrix with one value on each anti-diagonal: ``W[o, c] = w[o + c]``.

    As ``scipy.linalg.hankel(first column, last row)``: every output sees a window of one sequence
    of weights, one place further on each time. It is square or not.

    Args:
        compute: the form that computes a Linear layer. ``"auto"`` picks the fastest; ``"dense"``
            and ``"fft"`` force one, for measuring.

    Shapes, for ``m`` outputs and ``n`` inputs:

    * ``free``: ``(1, m + n − 1)``, in the order ``w[0]``, …, ``w[m + n − 2]``: the first row, and
      on down the last column.
    * ``weight``: the layer's own, of two axes.

    An anti-diagonal has as many entries as fit, from 1 in the corners to ``min(m, n)``.

    Source: ``scipy.linalg.hankel``; the projection is the mean of each anti-diagonal (Ravanbakhsh
    et al. 2017).

    Example:
        >>> layer = tp.register_tie(nn.Linear(3, 2), "hankel")
        >>> layer.parametrizations.weight.original0 = nn.Parameter(torch.tensor([[1., 2, 3, 4]]))
        >>> layer.weight.tolist()
        [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]]
    """

    family = "matrices"
    law = "W[o, c] = w[o + c]"
    expansion: ClassVar[type[AntiDiagonals]] = AntiDiagonals
    matrix: ClassVar[Diagonal] = "hankel"

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The matrix moved by one along its anti-diagonals, where it has entries to move."""
        matrix = self.bound_layout.canonical(weight)
        moved = torch.cat([matrix[:-1, 1:], matrix[1:, -1:]], 1)
        yield self.bound_layout.native(torch.cat([matrix[:1], moved]))

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Linear weights, square and not, and an embedding."""
        return (
            Example(lambda: nn.Linear(5, 4)),
            Example(lambda: nn.Linear(3, 6)),
            Example(lambda: nn.Linear(4, 4)),
            Example(lambda: nn.Embedding(6, 3)),
        )
