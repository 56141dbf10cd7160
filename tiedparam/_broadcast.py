"""Laws that repeat a small base along some axes: the mathematics they share."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from tiedparam._rule import Rule


class Broadcast(Rule):
    """A base, repeated along the shared axes of a blocked view of the canonical weight.

    A subclass states `blocks`: the canonical weight ``V[o, c, x]`` viewed with its axes
    split, and which of those axes are shared. Then ``V = base`` expanded along them.
    """

    complex_valued = True

    def blocks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The blocked shape of the canonical weight, and the axes of it that are shared."""
        raise NotImplementedError(f"{type(self).__name__} must say which axes are shared")

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """One base: the blocked shape without its shared axes."""
        shape, shared = self.blocks()
        return (tuple(size for axis, size in enumerate(shape) if axis not in shared),)

    def forward(self, *free: Tensor) -> Tensor:
        """Expand the base along the shared axes."""
        (base,) = free
        shape, shared = self.blocks()
        layout = self.bound_layout
        kept = [1 if axis in shared else size for axis, size in enumerate(shape)]
        return layout.native(base.reshape(kept).expand(shape).reshape(layout.canonical_shape))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The mean over the shared axes, taken relative to the first member of each orbit."""
        self.bind_shape(weight)
        values, first = self._members(weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        values, first = values.to(wide), first.to(wide)
        _, shared = self.blocks()
        # where: equal infinities differ by 0, not by nan
        difference = torch.where(values == first, 0, values - first)
        mean = first + difference.mean(shared, keepdim=True)
        (shape,) = self.free_shapes()
        return (mean.to(weight.dtype).reshape(shape),)

    def representatives(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The first member of each orbit."""
        (shape,) = self.free_shapes()
        _, first = self._members(weight.detach())
        # clone: a slice would keep the full weight's storage alive (S15)
        return (first.clone(memory_format=torch.contiguous_format).reshape(shape),)

    def multiplicities(self) -> tuple[Tensor, ...]:
        """The product of the shared sizes, everywhere."""
        shape, shared = self.blocks()
        copies = prod(shape[axis] for axis in shared)
        return tuple(torch.full(s, copies, dtype=torch.float64) for s in self.free_shapes())

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The weight with its entries moved by one along each shared axis."""
        shape, shared = self.blocks()
        layout = self.bound_layout
        blocked = layout.canonical(weight).reshape(shape)
        for axis in shared:
            yield layout.native(blocked.roll(1, axis).reshape(layout.canonical_shape))

    def _members(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The blocked weight, and its first member along every shared axis."""
        shape, shared = self.blocks()
        values = self.bound_layout.canonical(weight).reshape(shape)
        first = values
        for axis in shared:
            first = first.narrow(axis, 0, 1)
        return values, first
