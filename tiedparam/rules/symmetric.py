"""Symmetric matrices: W[i, j] = W[j, i]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tiedparam.laws import Reason
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout, why_no_matrix
from tiedparam.laws.registry import register_rule
from tiedparam.rules.flip_sym import Compute, FlipSym


@register_rule("symmetric")
class Symmetric(FlipSym):
    """A matrix that is its own transpose: ``W[i, j] = W[j, i]``.

    The name of `flip_sym` for matrices alone. Its eigenvalues are real, and ``⟨Ax, y⟩ = ⟨x, Ay⟩``.

    Args:
        compute: as `flip_sym` takes it.

    Shapes: ``free``: one tensor of ``n(n + 1)/2`` values, as `flip_sym` stores them; ``weight``:
    ``(n, n)``. Multiplicity 2, and 1 on the diagonal.

    Source: "symmetric weight matrix", the PyTorch forum; the projection is ``(W + Wᵀ)/2``.

    Example:
        >>> layer = tp.register_tie(nn.Linear(4, 4), "symmetric")
        >>> torch.equal(layer.weight, layer.weight.t()), tp.get_tie(layer).free_count
        (True, 10)
    """

    family = "matrices"
    law: str = "W[i, j] = W[j, i]"

    def __init__(self, compute: Compute = "auto") -> None:
        super().__init__(1, compute)
        self.law = type(self).law

    def check(self, layout: Layout) -> Reason | None:
        """The weight must be a square matrix."""
        return why_no_matrix(layout) or super().check(layout)

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """None: `scan` tries `flip_sym`, which is this law."""
        return ()

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Odd and even sizes."""
        return (Example(lambda: nn.Linear(4, 4)), Example(lambda: nn.Linear(5, 5)))
