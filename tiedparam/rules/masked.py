"""Zeros off a mask: W[e] = 0 wherever the mask is False."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from tiedparam.laws import Call, Reason, Use, form
from tiedparam.laws.choices import is_whole
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.masks import OnMask, mask_of, numbered, spread_over
from tiedparam.laws.pattern import Pattern
from tiedparam.laws.registry import register_rule
from tiedparam.laws.times import Time, relative_time
from tiedparam.products.blocks import block_diagonal_product
from tiedparam.util.torch_modes import plain_numbers

Zeros = Literal["lower", "upper", "block_diagonal", "banded"]
Compute = Literal["auto", "dense", "blocks"]
_PATTERNS = get_args(Zeros)
_NAMES = ", ".join(f"'{name}'" for name in _PATTERNS)


def _cost_of_blocks(rule: Masked, use: Use) -> float | None:
    count = rule.block_count
    if count is None or use.kind != "linear":
        return None
    narrow = min(use.layout.shape) / count  # such products are slow
    values = 0.35 + 6 / narrow
    trained = Time(125, 3 / count, values=3 * values, entries=0.2)  # of the whole weight
    return relative_time(use, Time(26, 1 / count, values), rule.making, trained)


@register_rule("masked")
class Masked(OnMask):
    """Only some entries are there, and all others are zero: triangles, blocks, bands, any mask.

    ====================  ================================================  ======================
    ``pattern``           what is left                                      as others say it
    ====================  ================================================  ======================
    ``"lower"``           ``c ≤ o``                                         torch.tril
    ``"upper"``           ``c ≥ o``                                         torch.triu
    ``"block_diagonal"``  ``blocks`` blocks of equal size                   groups of a convolution
    ``"banded"``          ``o − below ≤ c ≤ o + above``                     scipy's band matrices
    ====================  ================================================  ======================

    A pattern is one of outputs and inputs (within a group, for a grouped convolution); kernel
    positions are all free, or all zero. Zeros are zeros, whatever stands in the free values, and
    no gradient and no optimizer reaches them.

    Args:
        pattern: one of the names above.
        mask: instead of a pattern, which entries are free: True there. Of the tensor's own shape,
            or of its first axes, such as ``(O, C)`` for a convolution; 1 stands for any size, as in
            ``(1, 1, *kernel)``. It is stored with the layer, a bit for each of its entries.
        blocks: how many blocks; must divide the outputs and the inputs.
        width: how many diagonals beside the main one a band has on each side, or such numbers
            ``(below, above)``.
        compute: how a Linear layer with ``"block_diagonal"``, or with a mask of such blocks,
            computes: ``"auto"``, the fastest way; ``"blocks"``, each block by itself, or
            ``"dense"`` force one, for measuring.

    Shapes: ``free``: ``(1, entries that are True)``, in the order of the tensor; ``weight``: any
    with two axes or more, or with ``mask=`` any.

    Source: masked matrices as in MADE (Germain et al. 2015) and PixelCNN (van den Oord et al.
    2016); the projection sets the other entries to zero.

    Example:
        >>> layer = tp.register_tie(nn.Linear(3, 3), "masked", pattern="lower")
        >>> torch.equal(layer.weight, layer.weight.tril()), tp.get_tie(layer).free_count
        (True, 6)
    """

    family = "zeros and fixed values"
    law: str = "W[e] = 0 off the mask"
    complex_valued = True

    apart: ClassVar[frozenset[str]] = OnMask.apart | {"_blocks_of_mask"}
    _blocks_of_mask: int | None = None

    def __init__(
        self,
        pattern: Zeros | None = None,
        *,
        mask: Tensor | str | None = None,
        blocks: int | None = None,
        width: int | Sequence[int] | None = None,
        compute: Compute = "auto",
    ) -> None:
        super().__init__()
        self.compute = compute
        self.pattern: Zeros | None = pattern
        self.blocks = blocks
        self.width: Any = list(width) if isinstance(width, tuple) else width
        if isinstance(mask, str):
            self.expect(mask)
        elif mask is not None:
            self.keep_mask(mask_of(mask))
        if (pattern is None) == (mask is None):
            both = (
                "pattern= and mask= are both"
                if mask is not None
                else "neither pattern= nor mask= is"
            )
            self.fault: Reason | None = Reason(
                f"{both} given.", f"Give mask=, or one of {_NAMES} as pattern=."
            )

    def options(self) -> dict[str, Any]:
        """The pattern with its sizes, or the tag of the mask."""
        given = {"pattern": self.pattern, "blocks": self.blocks, "width": self.width}
        said = {name: value for name, value in given.items() if value is not None}
        return said | ({"mask": self.tag} if self.checksum else {})

    def check(self, layout: Layout) -> Reason | None:
        """The mask must fit the tensor; the blocks must divide it."""
        reason = super().check(layout)
        if reason is not None or self.checksum:
            return reason
        return self._why_no_pattern(layout) or self._why_other_sizes(layout)

    def _why_no_pattern(self, layout: Layout) -> Reason | None:
        if not isinstance(self.pattern, str) or self.pattern not in _PATTERNS:
            return Reason(f"pattern={self.pattern!r} is unknown.", f"Choose one of {_NAMES}.")
        if len(layout.shape) < 2:
            return Reason(
                f"pattern='{self.pattern}' is one of outputs and inputs, and the tensor is "
                f"{layout.shape}.",
                "Give mask=.",
            )
        wanted = {"block_diagonal": "blocks", "banded": "width"}.get(self.pattern)
        given = {"blocks": self.blocks, "width": self.width}
        for name, value in given.items():
            if name == wanted and value is None:
                return Reason(f"pattern='{self.pattern}' needs {name}=.", f"Give {name}=.")
            if name != wanted and value is not None:
                return Reason(
                    f"{name}={value!r} says nothing of pattern='{self.pattern}'.", "Leave it out."
                )
        return None

    def _why_other_sizes(self, layout: Layout) -> Reason | None:
        outputs, inputs, *_ = layout.canonical_shape
        blocks, width = self.blocks, self.width
        if blocks is not None and not is_whole(blocks, 1):
            return Reason(f"blocks must be a positive integer, not {blocks!r}.")
        if blocks is not None and (outputs % blocks or inputs % blocks):
            return Reason(
                f"{outputs} outputs and {inputs} inputs cannot be cut into blocks={blocks}.",
                "Choose a number that divides both.",
            )
        if width is not None and not (
            is_whole(width, 0)
            or (
                isinstance(width, list)
                and len(width) == 2
                and all(is_whole(each, 0) for each in width)
            )
        ):
            return Reason(
                f"width={width!r} is no number of diagonals.", "Give one from 0 on, or two of them."
            )
        return None

    @property
    def free_entries(self) -> Tensor:
        """Which entries are free: truth values of the tensor's shape, on the CPU."""
        layout = self.bound_layout
        with plain_numbers():
            if self.checksum:
                return spread_over(self.given_mask(), layout.shape)
            outputs, inputs, *_ = shape = layout.canonical_shape
            free = torch.ones(outputs, inputs, dtype=torch.bool, device="cpu")
            if self.pattern == "lower":
                free = free.tril()
            elif self.pattern == "upper":
                free = free.triu()
            elif self.blocks is not None:
                free = _diagonal(self.blocks, outputs, inputs)
            else:
                below, above = self.width if isinstance(self.width, list) else [self.width] * 2
                free = free.triu(-min(below, outputs)).tril(min(above, inputs))
            return layout.native(spread_over(free, shape))

    @property
    def block_count(self) -> int | None:
        """Of how many blocks of equal size a matrix is made; None if it is not."""
        return self._blocks_of_mask if self.checksum else self.blocks

    def bind(self, layout: Layout, dtype: torch.dtype) -> Reason | None:
        """Fit the rule to one tensor, and see whether its mask is one of blocks."""
        reason = super().bind(layout, dtype)
        if reason is None and self.checksum and len(layout.shape) == 2:
            with plain_numbers():
                self._blocks_of_mask = _blocks_of(self.free_entries)
        return reason

    def part(self, axis: int, parts: int, number: int) -> Masked:
        """The same with a slice of the mask."""
        return Masked(mask=self.free_entries.chunk(parts, axis)[number])

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The weight with zeros off the mask."""
        yield torch.where(self.free_entries.to(weight.device), weight, torch.zeros_like(weight))

    @form(
        "blocks",
        cost=_cost_of_blocks,
        where="anywhere",
        multiply_adds=lambda rule, use: rule.free_count,
    )
    def by_blocks(self, call: Call) -> Tensor:
        """Multiply each block by itself; row by row, the free values are the blocks."""
        if self.checksum:
            _ = self._table  # which sees whether the mask is still there
        (outputs, inputs), count = self.bound_layout.shape, self.block_count or 1
        shape = (count, outputs // count, inputs // count)
        return block_diagonal_product(call.input, call.free[0].view(shape), call.bias)

    def find_pattern(self) -> Pattern:
        """Read off the mask."""
        return numbered(self.free_entries)

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """Both triangles, and two blocks."""
        if len(layout.shape) < 2:
            return ()
        return (
            {"pattern": "lower"},
            {"pattern": "upper"},
            {"pattern": "block_diagonal", "blocks": 2},
        )

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Patterns on matrices and convolutions of every kind; masks of all and of some axes."""
        chess = torch.arange(12, device="cpu").view(4, 3).remainder(2).bool()
        rows = torch.tensor([True, False, True, True, False], device="cpu")
        causal = torch.tensor([[[True, True, False]]], device="cpu")
        return (
            Example(lambda: nn.Linear(5, 5), {"pattern": "lower"}),
            Example(lambda: nn.Linear(3, 4), {"mask": chess}),
            Example(lambda: nn.Linear(6, 4), {"pattern": "block_diagonal", "blocks": 2}),
            Example(lambda: nn.Conv1d(4, 5, 2), {"pattern": "banded", "width": [1, 0]}),
            Example(lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), {"pattern": "upper"}),
            Example(lambda: nn.Conv1d(2, 3, 3), {"mask": causal}),
            Example(lambda: nn.Linear(2, 5), {"mask": rows}, "", "bias"),
        )


def _blocks_of(free: Tensor) -> int | None:
    """Of how many blocks of equal size, on the diagonal, a mask of a matrix is made, or None."""
    outputs, inputs = free.shape
    count, rest = divmod(inputs, max(1, int(free[0].sum())))
    if rest or outputs % count:
        return None
    return count if torch.equal(free, _diagonal(count, outputs, inputs)) else None


def _diagonal(count: int, outputs: int, inputs: int) -> Tensor:
    """The mask of so many blocks."""
    free = torch.eye(count, dtype=torch.bool, device="cpu")
    free = free.repeat_interleave(outputs // count, 0)
    return free.repeat_interleave(inputs // count, 1)
