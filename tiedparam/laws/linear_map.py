"""A linear map and its adjoint, as one node of the graph each.

They are each other's derivative. Recorded operation by operation they would cost several times as
much, and their gradients would be scattered where they can be gathered. Small weights are looked
up all the same: see `tiedparam.laws.look_up`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from tiedparam.laws.look_up import LookedUp
from tiedparam.products.matrices import is_eager
from tiedparam.util.batched import one_by_one
from tiedparam.util.torch_modes import is_traced_or_transformed, may_carry_tangents


class LinearMap(LookedUp):
    """From free values to a weight, up to a constant weight, and back by the adjoint."""

    @abstractmethod
    def expand(self, free: Tensor) -> Tensor:
        """The weight; no gradient is recorded. Some maps take the numbers of the constant, too."""

    @abstractmethod
    def fold(self, weight: Tensor) -> Tensor:
        """The sum over each orbit; ``weight`` is contiguous, and no gradient is recorded."""

    @property
    def linear(self) -> LinearMap:
        """Without the constant."""
        return self

    def made(self, free: Tensor, *constants: Tensor) -> Tensor:
        """The weight: plain operations where torch traces or transforms them, else one node."""
        if is_eager(free):
            look_up = self.look_up(free)
            return self.recorded(free, *constants) if look_up is None else look_up(free)
        if is_traced_or_transformed() or may_carry_tangents():
            return self.in_plain_operations(free, *constants)
        return self.recorded(free, *constants)

    def in_plain_operations(self, free: Tensor, *constants: Tensor) -> Tensor:
        """The weight by operations that have gradients, for traces; `expand`, where that does."""
        return self.expand(free, *constants)

    def recorded(self, free: Tensor, *constants: Tensor) -> Tensor:
        """`expand`, whose gradient is `fold`, whose gradient is `expand`."""
        weight: Tensor = _Expand.apply(free, self, *constants)
        return weight


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, free: Tensor, linear_map: LinearMap, *constants: Tensor) -> Tensor:
        ctx.map, ctx.shape, ctx.others = linear_map, free.shape, (None,) * (1 + len(constants))
        return linear_map.expand(free, *constants).view(linear_map.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        def fold(gradient: Tensor) -> tuple[Tensor]:
            folded: Tensor
            if torch.is_grad_enabled():
                folded = _Fold.apply(gradient, ctx.map)
            else:  # nobody will differentiate again
                folded = ctx.map.fold(gradient.contiguous())
            return (folded.view(ctx.shape),)

        return *one_by_one(fold, gradient), *ctx.others


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, linear_map: LinearMap) -> Tensor:
        ctx.map = linear_map
        return linear_map.fold(weight.contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        def expand(gradient: Tensor) -> tuple[Tensor]:
            weight: Tensor = _Expand.apply(gradient.contiguous(), ctx.map.linear)
            return (weight,)

        return *one_by_one(expand, gradient), None
