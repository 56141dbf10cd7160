"""Cyclic convolution: W[o, c] = w[(o − c) mod n]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from tiedparam.laws import Reason
from tiedparam.laws.diagonals import AntiDiagonals, OfDiagonals, WrappedDiagonals
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.registry import register_rule
from tiedparam.products.fourier import Diagonal


@register_rule("circulant")
class Circulant(OfDiagonals):
    """A square matrix whose columns are the first one, turned: ``W[o, c] = w[(o − c) mod n]``.

    As ``scipy.linalg.circulant(first column)``: the cyclic convolution of the inputs with ``w``.
    Such matrices are those that commute with a turn of all features by one place. For a matrix of
    circulant blocks, and one that is not square, there is `block_circulant`.

    Args:
        compute: the form that computes a Linear layer. ``"auto"`` picks the fastest; ``"dense"``
            and ``"fft"`` force one, for measuring.

    Shapes: ``free``: ``(1, n)``, the first column; ``weight``: the layer's own, ``(n, n)``.
    Multiplicity ``n``.

    Source: ``scipy.linalg.circulant``; "An exploration of parameter redundancy in deep networks
    with circulant projections" (Cheng et al. 2015); the projection is the mean of each wrapped
    diagonal (Ravanbakhsh et al. 2017).

    Example:
        >>> layer = tp.register_tie(nn.Linear(3, 3), "circulant")
        >>> layer.parametrizations.weight.original0 = nn.Parameter(torch.tensor([[1., 2, 3]]))
        >>> layer.weight.tolist()
        [[1.0, 3.0, 2.0], [2.0, 1.0, 3.0], [3.0, 2.0, 1.0]]
    """

    family = "matrices"
    law = "W[o, c] = w[(o − c) mod n]"
    expansion: ClassVar[type[AntiDiagonals]] = WrappedDiagonals
    matrix: ClassVar[Diagonal] = "circulant"

    def check(self, layout: Layout) -> Reason | None:
        """The weight must be a square matrix."""
        reason = super().check(layout)
        if reason is None and layout.shape[0] != layout.shape[1]:
            outputs, inputs = layout.canonical_shape
            return Reason(
                f"a circulant matrix is square, and this one has {outputs} outputs and {inputs} "
                "inputs.",
                "Tie a square layer, or use 'block_circulant' or 'toeplitz'.",
            )
        return reason

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """Outputs and inputs turned by one place."""
        yield weight.roll((1, 1), (0, 1))

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Odd and even sizes, and an embedding."""
        return (
            Example(lambda: nn.Linear(5, 5)),
            Example(lambda: nn.Linear(4, 4)),
            Example(lambda: nn.Embedding(6, 6)),
        )
