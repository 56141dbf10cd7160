"""Matrices symmetric about the other diagonal: W = JWᵀJ, J the exchange matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from tiedparam.laws import Reason
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout, why_no_matrix
from tiedparam.laws.registry import register_rule
from tiedparam.laws.times import Making
from tiedparam.rules.flip_sym import FlipSym


@register_rule("persymmetric")
class Persymmetric(FlipSym):
    """Symmetric about the other diagonal: ``W = JWᵀJ``, ``W[i, j] = W[n − 1 − j, n − 1 − i]``.

    ``J`` is the exchange matrix, which reverses an order; ``WJ`` is an ordinary symmetric matrix.
    Toeplitz matrices are persymmetric. What a step of a recurrence does forwards in time, the
    transpose does backwards: ``⟨Wx, y⟩ = ⟨Jx, W(Jy)⟩``.

    Shapes: ``free``: one tensor of ``n(n + 1)/2`` values, those of ``WJ`` as `flip_sym` stores
    them; ``weight``: a square matrix ``(n, n)``.

    Multiplicity 2, and 1 on that diagonal.

    Source: Golub, Van Loan 2013, "Matrix computations", section 4.7, on Toeplitz systems.

    Example:
        >>> layer = tp.register_tie(nn.Linear(3, 3), "persymmetric")
        >>> torch.equal(layer.weight, layer.weight.T.flip(0, 1)), tp.get_tie(layer).free_count
        (True, 6)
    """

    family = "symmetries"
    law: str = "W = JWᵀJ"
    making: Making = Making(1.6, 4.2, call=0)

    def __init__(self) -> None:
        super().__init__(1)
        self.law = type(self).law

    def check(self, layout: Layout) -> Reason | None:
        """The tensor must be a square matrix."""
        reason = why_no_matrix(layout)
        if reason is None and layout.shape[0] != layout.shape[1]:
            rows, columns = layout.shape
            return Reason(
                f"the matrix has {rows} rows and {columns} columns, and must be square.",
                "Tie a square layer, or use 'centrosymmetric'.",
            )
        return reason

    def forward(self, *free: Tensor) -> Tensor:
        """The symmetric matrix, its columns reversed."""
        return super().forward(*free).flip(1)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Of the nearest symmetric matrix."""
        return super().right_inverse(weight.flip(1))

    def representatives(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Of the matrix with its columns reversed."""
        return super().representatives(weight.flip(1))

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The reflection in the diagonal that rises to the right."""
        yield weight.transpose(0, 1).flip(0, 1)

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """The law has no options."""
        return ({},)

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Odd and even sizes; an embedding."""
        return (
            Example(lambda: nn.Linear(4, 4)),
            Example(lambda: nn.Linear(5, 5)),
            Example(lambda: nn.Embedding(6, 6)),
        )
