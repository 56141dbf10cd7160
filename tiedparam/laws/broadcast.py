"""Laws that repeat a small base along some axes: the mathematics they share."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tiedparam.laws.broadcast_costs import cost_of_reduced, cost_of_windows
from tiedparam.laws.distance import halved_difference
from tiedparam.laws.forms import Call, form
from tiedparam.laws.layout import Layout
from tiedparam.laws.look_up import LookedUp
from tiedparam.laws.orbits import Orbits
from tiedparam.laws.reduction import Reduction, equal_outputs, summed_inputs
from tiedparam.laws.times import Making
from tiedparam.products.reduced import (
    convolution_by_sums,
    convolution_by_windows,
    linear_by_sums,
)
from tiedparam.util.errors import Reason
from tiedparam.util.torch_modes import is_eager

Compute = Literal["auto", "dense", "reduced", "windows"]
"""The forms of a law that repeats a base, and ``"auto"`` for the fastest."""


@dataclass(frozen=True)
class Blocks:
    """A blocked view of the canonical weight, and which of its axes are shared.

    Attributes:
        outputs: the output axis, split; the product is the number of outputs.
        rest: the input axis and the kernel axes: a size, or a tuple of sizes if it is split.
        shared: axes of `shape` along which all entries are equal.

    Example:
        >>> from tiedparam.laws import Blocks
        >>> Blocks(outputs=(2, 3), rest=(4,), shared=(1,)).shape  # 2 runs of 3 equal rows
        (2, 3, 4)
        >>> Blocks(outputs=(6,), rest=((2, 2), 3), shared=(2,)).shape  # pairs of equal inputs
        (6, 2, 2, 3)
    """

    outputs: tuple[int, ...]
    rest: tuple[int | tuple[int, ...], ...]
    shared: tuple[int, ...]

    @property
    def axes(self) -> tuple[tuple[int, ...], ...]:
        """Into which sizes each axis of the canonical weight is split."""
        return (self.outputs, *(n if isinstance(n, tuple) else (n,) for n in self.rest))

    @property
    def shape(self) -> tuple[int, ...]:
        """The blocked shape: the sizes of all axes, one after the other."""
        return tuple(size for sizes in self.axes for size in sizes)

    def together(self, shape: Sequence[int]) -> tuple[int, ...]:
        """A blocked shape with the parts of each canonical axis as one axis."""
        sizes = iter(shape)
        return tuple(prod(islice(sizes, len(axis))) for axis in self.axes)


@dataclass(frozen=True)
class _Sizes:
    """Shapes on the way from the base to the full and to the reduced weight."""

    kept: tuple[int, ...]
    reduced: tuple[int, ...]
    smaller: tuple[int, ...]
    smaller_layout: Layout | None
    reduction: Reduction
    views: _Views


class _Views(LookedUp):
    """The base, expanded along the shared axes.

    Args:
        kept: the blocked shape of the base.
        halfway: that of all but the outputs expanded, or None.
        full: the blocked shape of the weight.
        layout: of the weight.
    """

    def __init__(
        self,
        kept: tuple[int, ...],
        halfway: tuple[int, ...] | None,
        full: tuple[int, ...],
        layout: Layout,
    ) -> None:
        self.kept, self.halfway, self.full, self.layout = kept, halfway, full, layout
        self.shape = layout.shape

    def __call__(self, base: Tensor) -> Tensor:
        """The weight: a view of the base where it is large."""
        if is_eager(base):
            look_up = self.look_up(base)
            if look_up is not None:
                return look_up(base)
        return self.expand(base)

    def expand(self, free: Tensor) -> Tensor:
        values = free.reshape(self.kept)
        if self.halfway is not None:
            values = values.expand(self.halfway).contiguous()
        canonical = values.expand(self.full).reshape(self.layout.canonical_shape)
        return self.layout.native(canonical)


@functools.lru_cache(64)
def _views(
    kept: tuple[int, ...],
    halfway: tuple[int, ...] | None,
    full: tuple[int, ...],
    layout: Layout,
) -> _Views:
    """One for all layers of a shape: they share its table."""
    return _Views(kept, halfway, full, layout)


class Broadcast(Orbits):
    """A base, repeated along the shared axes of a blocked view of the canonical weight.

    A subclass states `blocks`: the canonical weight ``V[o, c, x]`` viewed with its axes
    split, and which of those axes are shared. Then ``V = base`` expanded along them.

    Args:
        compute: the form that computes the layer. ``"auto"`` picks the fastest; ``"dense"``,
            ``"reduced"`` and ``"windows"`` force one, for measuring.

    Example:
        >>> from tiedparam.laws import Blocks, Broadcast
        >>> class EqualInputs(Broadcast):
        ...     law = "W[o, c] = w[o]"
        ...     def blocks(self):
        ...         outputs, inputs = self.bound_layout.canonical_shape
        ...         return Blocks((outputs,), (inputs,), shared=(1,))
        >>> tp.get_tie(tp.register_tie(nn.Linear(4, 3), EqualInputs)).free_shapes()
        ((3, 1),)
    """

    _inner: ClassVar[tuple[str, ...]] = ("by_sums", "by_windows")
    gains_from_cache = False  # expanding is a view
    making: Making = Making(0.2, 0.6, call=14, trained_call=50)
    _sizes: _Sizes

    def __init__(self, compute: Compute = "auto") -> None:
        super().__init__()
        self.compute = compute

    def blocks(self) -> Blocks:
        """The blocked view of the canonical weight, and the axes of it that are shared."""
        raise NotImplementedError(f"{type(self).__name__} must say which axes are shared")

    def reduction(self) -> Reduction:
        """What the law lets a layer save that computes with its weight."""
        return self._sizes.reduction

    @form(
        "reduced",
        cost=cost_of_reduced,
        where="anywhere",
        multiply_adds=lambda rule, use: rule.reduction().entries,
    )
    def by_sums(self, call: Call) -> Tensor:
        """Sum the inputs that share, multiply by the base, spread the outputs that are equal."""
        how, weight = self._sizes.reduction, self.reduced(call.free[0])
        if call.use.kind == "linear":
            return linear_by_sums(call.input, weight, call.bias, how.inputs, how.outputs)
        return convolution_by_sums(
            call.stock, call.input, weight, call.bias, how.inputs, how.outputs
        )

    @form(
        "windows",
        cost=cost_of_windows,
        where="compiled",
        multiply_adds=lambda rule, use: rule.reduction().entries,
    )
    def by_windows(self, call: Call) -> Tensor | None:
        """Convolve the one channel that is left, or each with the same filters, by products."""
        summed = self._sizes.reduction.summed
        return convolution_by_windows(
            call.layer,
            call.input,
            self.reduced(call.free[0]) if summed else call.free[0],
            call.bias,
            summed=summed,
            where_it_pays=not call.asked,
        )

    @staticmethod
    def _kept(blocks: Blocks) -> tuple[int, ...]:
        """The blocked shape of the base."""
        return tuple(1 if axis in blocks.shared else n for axis, n in enumerate(blocks.shape))

    def reduced(self, base: Tensor) -> Tensor:
        """The weight of the smaller layer: one row for those that are equal, and one column."""
        sizes = self._sizes
        if base.shape == sizes.smaller and sizes.smaller_layout is None:
            return base  # every view would cost time, forward and back
        canonical = base.reshape(sizes.kept).expand(sizes.reduced).reshape(sizes.smaller)
        layout = sizes.smaller_layout
        return canonical if layout is None else layout.native(canonical)

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """One base: the different outputs, and the other axes with 1 where they are shared.

        It has as many axes as the weight, so that a conversion to channels_last, which goes
        by the number of axes, treats both alike.
        """
        blocks = self.blocks()
        return (blocks.together(self._kept(blocks)),)

    def forward(self, *free: Tensor) -> Tensor:
        """Expand the base along the shared axes."""
        (base,) = free
        return self._sizes.views(base)

    def bind(self, layout: Layout, dtype: torch.dtype) -> Reason | None:
        """Fit the rule to one tensor, and count the sizes on the way to its weight."""
        reason = super().bind(layout, dtype) or self._why_misblocked(layout)
        if reason is None:
            self._sizes = self._measure()
        return reason

    def _why_misblocked(self, layout: Layout) -> Reason | None:
        """What is wrong with a subclass's `blocks`."""
        blocks = self.blocks()
        if blocks.together(blocks.shape) == layout.canonical_shape:
            return None
        return Reason(
            f"its blocks() give {blocks.outputs} outputs and the other axes {blocks.rest}, and "
            f"the canonical weight is {layout.canonical_shape}.",
            "Correct the rule: every axis stands as one number, or split as a tuple.",
        )

    def _measure(self) -> _Sizes:
        """The sizes that every forward needs, counted once."""
        blocks, layout = self.blocks(), self.bound_layout
        *before, last = blocks.outputs
        first, in_parts = len(blocks.outputs), (*blocks.axes, (1,))[1]  # a bias has no inputs
        outputs = equal_outputs(blocks.outputs, blocks.shared, layout)
        inputs = summed_inputs(in_parts, [axis - first for axis in blocks.shared], layout)
        run = (*before, last // outputs.copies)
        reduced = outputs.kept if outputs.sizes == blocks.outputs else run
        if len(blocks.axes) > 1:
            reduced += inputs.kept[-len(blocks.axes[1]) :]
        reduced += blocks.shape[len(reduced) :]  # kernel positions as they are
        smaller = blocks.together(reduced)
        rows, columns, *kernel = (*smaller, 1) if len(smaller) == 1 else smaller
        groups, split = layout.groups, len(blocks.outputs) > 1
        kept = self._kept(blocks)
        return _Sizes(
            kept=kept,
            reduced=reduced,
            smaller=smaller,
            smaller_layout=Layout((groups * columns, rows // groups, *kernel), groups, True)
            if layout.transposed
            else None,
            reduction=Reduction(
                inputs=inputs,
                outputs=outputs,
                summed=columns == 1 < (*layout.canonical_shape, 1)[1],
                # blocks of outputs that are the layer's groups, each with the same bank
                shared_banks=split and 0 in blocks.shared and blocks.outputs[0] == groups,
                entries=prod(smaller),
            ),
            views=_views(kept, self._halfway(blocks), blocks.shape, layout),
        )

    def _halfway(self, blocks: Blocks) -> tuple[int, ...] | None:
        """All but the outputs expanded, where that is worth a copy.

        If outputs share, and parts of another axis too, the gradient is a sum over axes that are
        apart. In one step torch takes up to ten times as long for it as in two.
        """
        outputs = len(blocks.outputs)
        parts = any(len(axis) > 1 for axis in blocks.axes[1:])
        if not parts or not any(axis < outputs for axis in blocks.shared):
            return None
        return (*self._kept(blocks)[:outputs], *blocks.shape[outputs:])

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The mean over the shared axes, taken relative to the first member of each orbit."""
        self.bind_shape(weight)
        values, first = self._members(weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        values, first = values.to(wide), first.to(wide)
        shared = self.blocks().shared
        # halves, so that the difference of large values cannot overflow
        difference = halved_difference(values, first)
        mean = first + 2 * difference.mean(shared, keepdim=True)
        (shape,) = self.free_shapes()
        return (mean.to(weight.dtype).reshape(shape).contiguous(),)

    def representatives(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The first member of each orbit."""
        (shape,) = self.free_shapes()
        _, first = self._members(weight.detach())
        # clone: a slice would keep the full weight's storage alive (S15)
        return (first.clone(memory_format=torch.contiguous_format).reshape(shape),)

    def multiplicities(self) -> tuple[Tensor, ...]:
        """The product of the shared sizes, everywhere."""
        blocks = self.blocks()
        copies = prod(blocks.shape[axis] for axis in blocks.shared)
        (shape,) = self.free_shapes()
        return (torch.full(shape, copies, dtype=torch.float64, device="cpu"),)

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The weight with its entries moved by one along each shared axis."""
        shape, shared = self.blocks().shape, self.blocks().shared
        layout = self.bound_layout
        blocked = layout.canonical(weight).reshape(shape)
        for axis in shared:
            yield layout.native(blocked.roll(1, axis).reshape(layout.canonical_shape))

    def _members(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The blocked weight, and its first member along every shared axis."""
        shape, shared = self.blocks().shape, self.blocks().shared
        # contiguous: how a mean is rounded must not depend on the memory format
        values = self.bound_layout.canonical(weight).reshape(shape).contiguous()
        first = values
        for axis in shared:
            first = first.narrow(axis, 0, 1)
        return values, first
