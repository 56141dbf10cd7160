"""Matrices that are their own half turn: W = JWJ, J the exchange matrix."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from tiedparam.laws import Call, Reason, Use, form
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout, why_no_matrix
from tiedparam.laws.linear_map import LinearMap
from tiedparam.laws.orbits import Orbits
from tiedparam.laws.registry import register_rule
from tiedparam.laws.times import Making, Time, relative_time
from tiedparam.products.half_turns import halved_product, turned_product

Compute = Literal["auto", "dense", "halves", "turned"]


def _cost_of_turned(rule: Centrosymmetric, use: Use) -> float | None:
    outputs, _ = use.layout.shape
    if use.kind != "linear" or outputs % 2:
        return None
    return relative_time(use, Time(60, values=0.4), rule.making)


def _cost_of_halves(rule: Centrosymmetric, use: Use) -> float | None:
    outputs, inputs = use.layout.shape
    if use.kind != "linear" or outputs % 2 or inputs % 2:
        return None
    sums = 0.4 if use.training else 0.33
    return relative_time(use, Time(78, 0.5, values=0.4, entries=sums), rule.making)


@register_rule("centrosymmetric")
class Centrosymmetric(Orbits):
    """A matrix that is its own half turn: ``W = JWJ``, ``W[i, j] = W[m − 1 − i, n − 1 − j]``.

    ``J`` is the exchange matrix, which reverses an order. So reversing the inputs reverses the
    outputs: ``W(Jx) = J(Wx)``. If the bias is a palindrome, the layer commutes with reversal.

    Shapes: ``free``: ``(1, ⌈mn/2⌉)``, the first half of the entries, row by row as the tensor
    stores them; ``weight``: any matrix ``(m, n)``.

    Multiplicity 2, and 1 in the middle of a matrix of odd sizes.

    Args:
        compute: how a Linear layer computes: ``"auto"``, the fastest way; ``"halves"``, sums and
            differences of inputs each by half of the matrix (for even sizes), ``"turned"``, the
            input and its reverse by the upper half (for an even number of outputs), or
            ``"dense"`` force one, for measuring.

    Source: Weaver 1985, "Centrosymmetric (cross-symmetric) matrices, their basic properties,
    eigenvalues, and eigenvectors".

    Example:
        >>> layer = tp.register_tie(nn.Linear(4, 3, bias=False), "centrosymmetric")
        >>> x = torch.randn(2, 4)
        >>> torch.allclose(layer(x.flip(-1)), layer(x).flip(-1), atol=1e-6)
        True
    """

    family = "symmetries"
    law = "W = JWJ"
    making: Making = Making(0.3, 0.9, call=43, trained_call=110)
    states_whole_group = True

    def __init__(self, compute: Compute = "auto") -> None:
        super().__init__()
        self.compute = compute

    def check(self, layout: Layout) -> Reason | None:
        """The tensor must be a matrix."""
        return why_no_matrix(layout)

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """One row."""
        return ((1, (prod(self.bound_layout.shape) + 1) // 2),)

    def forward(self, *free: Tensor) -> Tensor:
        """The first half, and the same in reverse: read row by row the matrix is a palindrome."""
        (half,) = free
        return _palindrome(self.bound_layout.shape).made(half)

    @form("turned", cost=_cost_of_turned, where="compiled")
    def by_turning(self, call: Call) -> Tensor:
        """Multiply the input and its reverse by the upper half: ``W(Jx) = J(Wx)``."""
        return turned_product(call.input, self._upper(call.free[0]), call.bias)

    @form(
        "halves",
        cost=_cost_of_halves,
        where="compiled",
        multiply_adds=lambda rule, use: rule.free_count,
    )
    def by_halves(self, call: Call) -> Tensor:
        """Multiply sums and differences of inputs, each by a quarter of the matrix."""
        return halved_product(call.input, self._upper(call.free[0]), call.bias)

    def _upper(self, half: Tensor) -> Tensor:
        """The rows above the middle."""
        rows, columns = self.bound_layout.shape
        return half.view(rows // 2, columns)

    def adjoint(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Each entry of the first half plus its image."""
        with torch.inference_mode(False), torch.no_grad():
            half = _palindrome(self.bound_layout.shape).fold(weight.detach())
            return (half.view(self.free_shapes()[0]),)

    def representatives(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The first half of the entries."""
        ((_, half),) = self.free_shapes()
        # clone: a slice would keep the whole weight's storage alive (S15)
        return (weight.detach().reshape(1, -1)[:, :half].clone(),)

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The half turn."""
        yield weight.flip(0, 1)

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Odd and even sizes, oblong and square; an embedding."""
        return (
            Example(lambda: nn.Linear(4, 3)),
            Example(lambda: nn.Linear(5, 5)),
            Example(lambda: nn.Embedding(6, 3)),
        )


class _Palindrome(LinearMap):
    """The entries, row by row, from the first half of them."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def expand(self, free: Tensor) -> Tensor:
        half = free.reshape(-1)
        return torch.cat([half, half[: prod(self.shape) // 2].flip(0)]).view(self.shape)

    def fold(self, weight: Tensor) -> Tensor:
        numbers = weight.reshape(-1)
        half = numbers[: -(len(numbers) // -2)].clone()
        half[: len(numbers) // 2] += numbers[len(half) :].flip(0)
        return half


@functools.lru_cache(64)
def _palindrome(shape: tuple[int, ...]) -> _Palindrome:
    """One for all layers of a shape: torch 2.6 compiles them anew for another object."""
    return _Palindrome(shape)
