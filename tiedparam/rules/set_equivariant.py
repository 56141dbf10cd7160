"""Layers on sets of items: W = A ⊗ I + B ⊗ 11ᵀ."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from math import gcd
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tiedparam.laws import Call, Reason, Use, form
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.linear_map import LinearMap
from tiedparam.laws.orbits import Orbits
from tiedparam.laws.registry import register_rule
from tiedparam.laws.times import Making, Time, relative_time
from tiedparam.products.sets import set_product

Compute = Literal["auto", "dense", "items"]


def _cost_of_items(rule: SetEquivariant, use: Use) -> float | None:
    if use.kind != "linear":
        return None
    few = rule.items  # short runs of items are slow to move
    items = Time(65, (few + 1) / few**2, values=0.3 + 6 / few)
    return relative_time(use, items, rule.making)


@register_rule("set_equivariant")
class SetEquivariant(Orbits):
    """Each item by one matrix, and all items together by another: ``W = A ⊗ I + B ⊗ 11ᵀ``.

    Features are (channel, item), the item fastest: feature ``items·c + i``. The law is that of all
    layers that commute with every permutation of the items: an item's output depends on the item
    by ``A``, and on the sum over all items by ``B``. The bias must be the same for all items, which
    is ``repeat`` with ``outputs=items``.

    Args:
        items: how many items a set has, at least 2; it must divide outputs and inputs.
        compute: how a Linear layer computes: ``"auto"``, the fastest way; ``"items"``, each item
            by itself and their sum, or ``"dense"`` force one, for measuring.

    Shapes: for ``O`` output channels, ``I`` input channels in a group of the convolution, ``free``:
    ``(2·O, I, *kernel)`` in the canonical layout, first the entries ``A + B`` of an item with
    itself, below them those of two items, ``B``. ``weight``: a matrix ``(O·items, I·items)``, or
    that of a convolution, every kernel position by itself.

    Multiplicity ``items`` of the first, and ``items·(items − 1)`` of the second.

    Source: Zaheer et al. 2017, "Deep sets"; Hartford et al. 2018, "Deep models of interactions
    across sets".

    Example:
        >>> layer = tp.register_tie(nn.Linear(10, 15, bias=False), "set_equivariant", items=5)
        >>> items = torch.randn(2, 5)  # two channels
        >>> shuffled = torch.randperm(5)
        >>> answer = layer(items.flatten()).view(3, 5)
        >>> torch.allclose(
        ...     layer(items[:, shuffled].flatten()).view(3, 5), answer[:, shuffled], atol=1e-6
        ... )
        True
    """

    family = "equivariance"
    law = "W = A ⊗ I + B ⊗ 11ᵀ"
    making: Making = Making(0.3, 1.2, call=59, trained_call=130)

    def __init__(self, items: int, compute: Compute = "auto") -> None:
        super().__init__()
        self.compute = compute
        self.items = items

    def options(self) -> dict[str, Any]:
        """``items``."""
        return {"items": self.items}

    def check(self, layout: Layout) -> Reason | None:
        """``items`` must divide outputs and inputs, those of a group."""
        if type(self.items) is not int or self.items < 2:
            return Reason(f"items must be an integer of at least 2, not {self.items!r}.")
        if len(layout.shape) < 2:
            return Reason(
                f"the tensor {layout.shape} has no inputs.",
                "Tie a weight; for a bias use 'repeat' with outputs=items.",
            )
        outputs, inputs = layout.canonical_shape[0] // layout.groups, layout.canonical_shape[1]
        of_group = " of a group" if layout.groups > 1 else ""
        for side, features in (("outputs", outputs), ("inputs", inputs)):
            if features % self.items:
                return Reason(
                    f"the {features} {side}{of_group} are not made of sets of {self.items} items.",
                    f"Choose a divisor of {features}.",
                )
        return None

    def cell(self) -> tuple[int, ...]:
        """One channel to one channel, for all items."""
        return (self.items, self.items, *self.bound_layout.kernel)

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Two entries for each pair of channels and each kernel position."""
        outputs, inputs, *kernel = self.bound_layout.canonical_shape
        return ((2 * outputs // self.items, inputs // self.items, *kernel),)

    def forward(self, *free: Tensor) -> Tensor:
        """One entry on the diagonals of all blocks, another beside them."""
        (values,) = free
        return _blocks(self.bound_layout, self.items).made(values)

    @form(
        "items",
        cost=_cost_of_items,
        where="compiled",
        multiply_adds=lambda rule, use: rule.free_count * (rule.items + 1) // 2,
    )
    def by_items(self, call: Call) -> Tensor:
        """Multiply every item by ``A``, and the sum of all by ``B``."""
        return set_product(call.input, call.free[0], call.bias, self.items)

    def adjoint(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The sums over the diagonals, and over what is beside them."""
        with torch.inference_mode(False), torch.no_grad():
            # contiguous, for the order of a sum goes by the strides
            return (_blocks(self.bound_layout, self.items).fold(weight.detach().contiguous()),)

    def representatives(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The first item with itself, and with the second."""
        blocks = _in_blocks(weight.detach(), self.bound_layout, self.items)
        return (torch.cat([blocks[:, 0, :, 0], blocks[:, 0, :, 1]]),)

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The exchange of two items, and all items moved by one: they generate all permutations."""
        layout = self.bound_layout
        blocks = _in_blocks(weight, layout, self.items)
        exchanged = [1, 0, *range(2, self.items)]
        for image in (blocks[:, exchanged][:, :, :, exchanged], blocks.roll((1, 1), (1, 3))):
            yield layout.native(image.reshape(layout.canonical_shape))

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """The largest sets that fit; how many items a smaller one has is a choice."""
        if len(layout.shape) < 2:
            return ({"items": 2},)  # which is refused, as every number is
        outputs, inputs = layout.canonical_shape[0] // layout.groups, layout.canonical_shape[1]
        return ({"items": gcd(outputs, inputs)},)

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Several and single channels, two items, convolutions of every kind."""
        return (
            Example(lambda: nn.Linear(6, 9), {"items": 3}),
            Example(lambda: nn.Linear(5, 5), {"items": 5}),
            Example(lambda: nn.Linear(2, 4), {"items": 2}),
            Example(lambda: nn.Conv1d(3, 6, 2), {"items": 3}),
            Example(lambda: nn.Conv2d(8, 4, 1, groups=2), {"items": 2}),
            Example(lambda: nn.ConvTranspose1d(4, 8, 3, groups=2), {"items": 2}),
        )


def _in_blocks(weight: Tensor, layout: Layout, items: int) -> Tensor:
    """``(output channel, item, input channel, item, *kernel)``."""
    outputs, inputs, *kernel = layout.canonical_shape
    return layout.canonical(weight).reshape(
        outputs // items, items, inputs // items, items, *kernel
    )


class _Blocks(LinearMap):
    """From the two entries of each block to the whole weight."""

    def __init__(self, layout: Layout, items: int) -> None:
        self.layout, self.items, self.shape = layout, items, layout.shape

    def in_plain_operations(self, free: Tensor, *constants: Tensor) -> Tensor:
        """`expand` without a write in place, which ONNX does not have."""
        same, other = (part[:, None, :, None] for part in free.chunk(2))
        item = torch.arange(self.items, device=free.device)
        diagonal = (item[:, None] == item).view(
            1, self.items, 1, self.items, *(1,) * (free.dim() - 2)
        )
        blocks = torch.where(diagonal, same, other)
        return self.layout.native(blocks.reshape(self.layout.canonical_shape))

    def expand(self, free: Tensor) -> Tensor:
        same, other = free.chunk(2)
        # a row of items first, which is then copied in long runs, and the diagonals over it
        row = other[:, None, :, None]
        rows = row.expand(-1, -1, -1, self.items, *other.shape[2:]).contiguous()
        blocks = rows.expand(-1, self.items, *rows.shape[2:]).clone(
            memory_format=torch.contiguous_format
        )
        blocks.diagonal(dim1=1, dim2=3).copy_(same[..., None])
        return self.layout.native(blocks.reshape(self.layout.canonical_shape)).contiguous()

    def fold(self, weight: Tensor) -> Tensor:
        blocks = _in_blocks(weight, self.layout, self.items)
        same = blocks.diagonal(dim1=1, dim2=3).sum(-1)
        # not the difference of two sums: a gradient that is infinite on the diagonal would spread
        beside = blocks.clone()
        beside.diagonal(dim1=1, dim2=3).zero_()
        return torch.cat([same, beside.sum(1).sum(2)])


@functools.lru_cache(64)
def _blocks(layout: Layout, items: int) -> _Blocks:
    """One for all layers of a shape: torch 2.6 compiles them anew for another object."""
    return _Blocks(layout, items)
