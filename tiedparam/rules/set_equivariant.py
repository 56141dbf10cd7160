"""Layers on sets of items: W = A ⊗ I + B ⊗ 11ᵀ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import gcd
from typing import Any

from torch import Tensor, nn

from tiedparam.laws import Reason
from tiedparam.laws.layout import Layout
from tiedparam.laws.orbits import Orbits
from tiedparam.laws.registry import register_rule
from tiedparam.laws.rule import Example


@register_rule("set_equivariant")
class SetEquivariant(Orbits):
    """Each item by one matrix, and all items together by another: ``W = A ⊗ I + B ⊗ 11ᵀ``.

    Features are (channel, item), the item fastest: feature ``items·c + i``. The law is that of all
    layers that commute with every permutation of the items: an item's output depends on the item
    by ``A``, and on the sum over all items by ``B``. The bias must be the same for all items, which
    is ``repeat`` with ``outputs=items``.

    Args:
        items: how many items a set has, at least 2; it must divide outputs and inputs.

    Shapes: for ``O`` output and ``I`` input channels in a group of the convolution, and ``P``
    kernel positions, ``free``: ``(O, 2·I·P)``; a transposed convolution stores them by input
    channels. ``weight``: a matrix ``(O·items, I·items)``, or that of a convolution, every position
    by itself. Free values are the entries ``A + B`` of an item with itself, and ``B`` of two items.

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

    def __init__(self, items: int) -> None:
        super().__init__()
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

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The exchange of two items, and all items moved by one: they generate all permutations."""
        layout = self.bound_layout
        outputs, inputs, *kernel = layout.canonical_shape
        sets = (outputs // self.items, self.items, inputs // self.items, self.items)
        canonical = layout.canonical(weight).reshape(*sets, *kernel)
        exchanged = [1, 0, *range(2, self.items)]
        for image in (canonical[:, exchanged][:, :, :, exchanged], canonical.roll((1, 1), (1, 3))):
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
