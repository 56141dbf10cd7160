"""Flip-transpose symmetry: W[i, j, x] = ±W[j, i, flip(x)]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tiedparam.laws import Call, Reason, Use, form, mirrored_kernels
from tiedparam.laws.earlier import ReorderedLaw
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.mirrored_kernels import (
    Kernels,
    of_layout_1,
    of_layout_2,
    shape_of_layout_2,
    shapes_of_layout_1,
)
from tiedparam.laws.orbits import Orbits
from tiedparam.laws.pairs import (
    TABLE_ENTRIES,
    Expansion,
    fold_pairs,
    look_up,
    shared_expansion,
)
from tiedparam.laws.registry import register_rule
from tiedparam.laws.times import Making, Time, relative_time, rows_multiplied
from tiedparam.products.packed_tiles import TILE, Sign, packed_count, tiles
from tiedparam.products.packed_triangles import packed_triangle, unpacked, unpacked_skew
from tiedparam.products.panels import symmetric_product
from tiedparam.products.transposition import transposed
from tiedparam.util.errors import TieError
from tiedparam.util.torch_modes import is_unrecorded

Compute = Literal["auto", "dense", "panels"]


def _panels_cost(rule: FlipSym, use: Use) -> float | None:
    """What ``python -m benchmarks --case goals --only panels`` found.

    Products by panels are a little slower; the dense form expands, and folds backward.
    """
    c = use.layout.canonical_shape[1]
    if prod(use.layout.kernel) > 1 or use.kind == "transposed" or c <= TILE:
        return None
    product, squares = 1 + 250 / c, 0.11 + 225 / c
    if use.training and c < 2 * TILE:
        # numbers of rows stand for up to twice as many, with which it could lose
        use = replace(use, rows=2 * rows_multiplied(use))
    trained = Time(0, 3 * product, entries=3 * squares + 0.68)
    return relative_time(use, Time(0, product, entries=squares), rule.making, trained)


@register_rule("flip_sym")
class FlipSym(Orbits, ReorderedLaw):
    """A kernel that is its own flip-transpose, or minus it: ``W[i, j, x] = ±W[j, i, flip(x)]``.

    ``flip`` mirrors a kernel position along every spatial axis; ``i, j`` are channels of
    one group. A Linear weight is the case without spatial axes: a symmetric matrix, or a skew one.
    With an odd kernel, stride 1 and padding ``dilation·(k//2)`` (zeros or circular) the
    convolution, bias aside, is self-adjoint: ``⟨Ax, y⟩ = ⟨x, Ay⟩``; or skew-adjoint,
    ``⟨Ax, y⟩ = −⟨x, Ay⟩``, so that ``⟨Ax, x⟩ = 0``.

    Args:
        sign: 1 or −1.
        compute: ``"auto"``, the fastest way; ``"dense"``, with the expanded weight; or, for a
            Linear layer or a 1×1 convolution, ``"panels"``, with the free values as they are.

    Shapes, with ``c`` channels per group, ``g`` groups and ``P`` kernel positions:

    * ``free``: one tensor of ``g·(c²P + sign·f)/2`` values, ``f = c`` if every kernel size is odd,
      else 0. Of kernels of several positions they are the half of the kernels that
      `tiedparam.laws.mirrored_kernels` describes, one after the other; of matrices the lower
      triangles ``(g, c(c + sign)/2)``, by tiles (see `_centre`), with ``sign=-1`` without the
      diagonal, which is 0.
    * ``weight``: the layer's own, ``O == C`` in every group.

    Multiplicity 2, and 1 on the centre's diagonal.

    Source: the projection is the mean of a kernel and its flip-transpose (Ravanbakhsh et al. 2017).
    Skew ones: "AntisymmetricRNN" (Chang et al. 2019), "Skew orthogonal convolutions" (Singla and
    Feizi 2021).

    Example:
        >>> conv = tp.register_tie(nn.Conv2d(2, 2, 3), "flip_sym")
        >>> torch.equal(conv.weight, conv.weight.transpose(0, 1).flip(2, 3))
        True
        >>> tp.get_tie(conv).free_count  # of 36
        19
    """

    family = "symmetries"
    law: str = "W[i, j, x] = ±W[j, i, flip(x)]"
    complex_valued = False
    _expansion: Expansion
    _free_shape: tuple[int, ...]

    def __init__(self, sign: Sign = 1, compute: Compute = "auto") -> None:
        super().__init__()
        self.sign: Sign = sign
        self.compute = compute
        if _is_sign(sign):
            self.law = f"W[i, j, x] = {'' if sign == 1 else '−'}W[j, i, flip(x)]"

    @property
    def making(self) -> Making:
        """Of matrices too large for a table it takes the longer, the less is left of the tiles."""
        c = self.bound_layout.canonical_shape[1]
        if prod(self.bound_layout.kernel) > 1 or c <= TILE:
            return Making(1.1, 3.2)
        return Making(0.68 + 1000 / c, 2.7 + 2000 / c, call=0, trained_call=0)

    def options(self) -> dict[str, Any]:
        """``sign``, where it is not 1."""
        return {} if self.sign == 1 else {"sign": self.sign}

    def check(self, layout: Layout) -> Reason | None:
        """Inputs and outputs of a group must be the same channels, and ``sign`` known."""
        if not _is_sign(self.sign):
            return Reason(f"sign={self.sign!r} is unknown.", "Choose 1 or -1.")
        if len(layout.shape) < 2:
            return Reason(
                "the tensor has no input channels to swap with its outputs.", "Tie a weight."
            )
        outputs, inputs = layout.canonical_shape[:2]
        if outputs != inputs * layout.groups:
            return Reason(
                f"out_channels ({outputs}) must equal in_channels ({inputs * layout.groups}).",
                "Tie a square layer, or use 'channel_shared'.",
            )
        if self.sign == -1 and inputs * prod(layout.kernel) == 1:
            return Reason(
                "with sign=-1 an entry that is its own mirror image is 0, and each group has no "
                "other one.",
                "Tie a layer of more channels or kernel positions.",
            )
        return None

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """One matrix, so that optimizers which spare vectors from decay treat it as a weight.

        Its shape tells in which order the values are: see `from_earlier`.
        """
        sizes = self._sizes()
        if sizes.positions == 1:
            return (shape_of_layout_2(sizes),)
        rows = sizes.groups * (sizes.c if sizes.c % 2 else sizes.c // 2)
        if sizes.free_count == rows * sizes.c:
            rows = sizes.groups
        return ((rows, sizes.free_count // rows),)

    def forward(self, *free: Tensor) -> Tensor:
        """Reverse the free kernels to their images; unpack a matrix."""
        (values,) = free
        if values.shape != self._free_shape:  # those of an earlier layout would fit in number
            raise TieError(
                f"'{self}'",
                f"the free values have the shape {tuple(values.shape)}, not {self._free_shape}.",
                "Load those of an earlier tiedparam with load_state_dict, which brings them into "
                "today's order.",
            )
        return self._expansion(values)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The mean of the weight and its flip-transpose, cut to the free half."""
        self.bind_shape(weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        blocks = self._blocks(weight).to(wide)
        mirror = self._signed(blocks.transpose(1, 2).flip(-1))
        # relative to one member, so that equal members stay what they are to the bit;
        # halves before the difference, so that it cannot overflow
        mean = torch.where(blocks == mirror, blocks, blocks + (mirror / 2 - blocks / 2))
        return self._free_half(mean.to(weight.dtype))

    def representatives(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The members that lie where the free values are read."""
        return self._free_half(self._blocks(weight.detach()))

    def from_earlier(self, free: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """Those of layout 2, which were slices at positions, and of layout 1, two tensors."""
        sizes, shapes = self._sizes(), [tuple(values.shape) for values in free]
        if shapes == list(self.free_shapes()):
            return None  # where shapes of two layouts are equal, so is the order
        if shapes == [shape_of_layout_2(sizes)]:
            split = sizes.positions // 2 * sizes.groups * sizes.c**2
            halves, packed = free[0].flatten().tensor_split([split])
            middle = _expand(packed, sizes) if sizes.positions % 2 else None
            return self._free_half(of_layout_2(halves, middle, sizes))
        if sizes.sign == 1 and shapes == shapes_of_layout_1(sizes):
            layout = self.bound_layout
            canonical = of_layout_1(free, sizes).reshape(layout.canonical_shape)
            return self._free_half(self._blocks(layout.native(canonical)))
        return None

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The flip-transpose, group by group."""
        layout = self.bound_layout
        axes = tuple(range(2, len(layout.shape)))
        groups = layout.canonical(weight).chunk(layout.groups)
        images = torch.cat([group.transpose(0, 1).flip(axes) for group in groups])
        yield layout.native(self._signed(images))

    @form("panels", cost=_panels_cost, where="compiled")
    def by_panels(self, call: Call) -> Tensor | None:
        """A matrix times every position's channels, of which only the lower half is read."""
        axes, layer = len(call.use.layout.kernel), call.layer
        if axes:
            moved = isinstance(layer.padding, tuple) and any(layer.padding)
            if moved or any(step != 1 for step in layer.stride) or not call.input.is_contiguous():
                return None  # torch's own convolution knows best, as of other memory formats
        free, groups = call.free[0].reshape(-1), self.bound_layout.groups
        return symmetric_product(call.input, free, call.bias, self.sign, groups=groups, axes=axes)

    def bind(self, layout: Layout, dtype: torch.dtype) -> Reason | None:
        """Fit the rule to one tensor, and choose how to expand its weight."""
        reason = super().bind(layout, dtype)
        if reason is None:
            self._choose_expansion()
        return reason

    def __setstate__(self, state: Any) -> None:
        """A pickle may be older than the expansion."""
        super().__setstate__(state)
        if self.layout is not None:
            self._choose_expansion()

    def _choose_expansion(self) -> None:
        sizes, shape = self._sizes(), self.bound_layout.shape
        if sizes.positions == 1:
            formulas, most = (_expand, _fold), TABLE_ENTRIES
        else:
            formulas, most = (mirrored_kernels.expand, mirrored_kernels.fold), _LOOKED_UP
        self._expansion = shared_expansion(*formulas, sizes, shape, sizes.free_count, most)
        (self._free_shape,) = self.free_shapes()

    def _sizes(self) -> Kernels:
        """Groups, channels per group, kernel positions, and the sign."""
        layout = self.bound_layout
        return Kernels(layout.groups, layout.canonical_shape[1], prod(layout.kernel), self.sign)

    def _signed(self, images: Tensor) -> Tensor:
        return images if self.sign == 1 else -images

    def _blocks(self, weight: Tensor) -> Tensor:
        """The weight as ``(groups, c, c, positions)``.

        A transposed convolution stores the transposed blocks. By the law these are the flipped
        ones, or minus these, which obey it too, so that no rearranging is needed.
        """
        sizes = self._sizes()
        return weight.reshape(sizes.groups, sizes.c, sizes.c, sizes.positions)

    def _free_half(self, blocks: Tensor) -> tuple[Tensor, ...]:
        sizes, (shape,) = self._sizes(), self.free_shapes()
        if sizes.positions == 1:
            free = _triangles(blocks[..., 0], self.sign)
        else:
            free = mirrored_kernels.free_of(blocks, sizes)
        return (free.reshape(shape),)

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """Both signs."""
        return ({}, {"sign": -1})

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Odd, even and mixed kernels of 0 to 3 dimensions, grouped and transposed; both signs."""
        return (
            Example(lambda: nn.Conv2d(3, 3, 3, padding=1)),
            Example(lambda: nn.Conv2d(4, 4, 2)),
            Example(lambda: nn.Conv2d(2, 2, (3, 2))),
            Example(lambda: nn.Conv2d(3, 3, 1)),
            Example(lambda: nn.Conv2d(6, 6, 3, groups=2)),
            Example(lambda: nn.Conv2d(4, 4, 3, groups=4)),
            Example(lambda: nn.Conv1d(4, 4, 5)),
            Example(lambda: nn.Conv3d(2, 2, (3, 1, 3))),
            Example(lambda: nn.ConvTranspose2d(6, 6, 3, groups=2)),
            Example(lambda: nn.Linear(5, 5)),
            Example(lambda: nn.Linear(4, 4)),
            Example(lambda: nn.Conv2d(3, 3, 3, padding=1), {"sign": -1}),
            Example(lambda: nn.Conv1d(4, 4, 2), {"sign": -1}),
            Example(lambda: nn.Conv1d(4, 4, 3, groups=4), {"sign": -1}),
            Example(lambda: nn.ConvTranspose2d(6, 6, 3, groups=2), {"sign": -1}),
            Example(lambda: nn.Linear(4, 4), {"sign": -1}),
        )


_LOOKED_UP = 82_944
"""Up to so many entries kernels are looked up one by one: 96 × 96 channels with a 3×3 kernel."""


def _is_sign(sign: object) -> bool:
    return isinstance(sign, int) and not isinstance(sign, bool) and sign in (1, -1)


def _expand(free: Tensor, sizes: Kernels) -> Tensor:
    """The matrices of `FlipSym` as ``(groups, c, c)``."""
    packed = free.reshape(sizes.groups, -1)
    return _centre(packed, sizes.c, sizes.sign, is_unrecorded(free))


def _fold(weight: Tensor, sizes: Kernels) -> Tensor:
    """The adjoint of `_expand`: each entry plus its mirror image, or minus it."""
    groups, c, _, sign = sizes
    return _fold_centre(weight.reshape(groups, c, c), sign)


# A symmetric or skew matrix: squares along the diagonal, and below each a panel ---------------


def _pieces(packed: Tensor, c: int, sign: Sign) -> list[tuple[Tensor, Tensor]]:
    """Views of ``(n, c(c + sign)/2)``: for each tile its triangle and the panel below it.

    The last tile's panel is empty, and is left as it is: DTensor cannot reshape it.
    """
    sizes = [(stop - start, c - stop) for start, stop in tiles(c)]
    counts = [count for size, below in sizes for count in (packed_count(size, sign), below * size)]
    parts = packed.split(counts, 1)
    return [
        (triangle, panel.reshape(-1, c - stop, stop - start) if stop < c else panel)
        for (start, stop), triangle, panel in zip(tiles(c), parts[::2], parts[1::2], strict=True)
    ]


def _centre(packed: Tensor, c: int, sign: Sign, unrecorded: bool) -> Tensor:
    """Symmetric or skew ``(n, c, c)`` from ``(n, c(c + sign)/2)``, by rows of tiles."""
    n = packed.shape[0]
    pieces = _pieces(packed, c, sign)
    # written in place where nobody records: joining the rows would copy the whole again
    matrices = packed.new_empty(n, c, c) if unrecorded and len(pieces) > 1 else None
    rows = []
    for number, (start, stop) in enumerate(tiles(c)):
        triangle, panel = pieces[number]
        size = stop - start
        tile = look_up(_UNPACKED[sign], triangle, size, size * size, unrecorded).reshape(
            n, size, size
        )
        row = [
            earlier[:, start - before : stop - before]
            for (_, before), (_, earlier) in zip(tiles(c)[:number], pieces[:number], strict=True)
        ]
        row.append(tile)
        if stop < c:
            above = transposed(panel, unrecorded)
            row.append(above if sign == 1 else -above)
        out = None if matrices is None else matrices[:, start:stop]
        rows.append(torch.cat(row, 2, out=out))
    return torch.cat(rows, 1) if matrices is None else matrices


def _fold_centre(matrices: Tensor, sign: Sign) -> Tensor:
    """The adjoint of `_centre`."""
    n, c, _ = matrices.shape
    packed = matrices.new_empty(n, packed_count(c, sign))
    for (start, stop), (triangle, panel) in zip(tiles(c), _pieces(packed, c, sign), strict=True):
        tile = matrices[:, start:stop, start:stop].reshape(n, -1)
        triangle.copy_(fold_pairs(_UNPACKED[sign], tile, stop - start, triangle.shape[1]))
        if stop < c:
            above = matrices[:, start:stop, stop:].contiguous()
            below = matrices[:, stop:, start:stop]
            torch.add(below, transposed(above, True), alpha=sign, out=panel)
    return packed


def _triangles(matrices: Tensor, sign: Sign) -> Tensor:
    """The inverse of `_centre`, reading the lower triangles."""
    parts = []
    for start, stop in tiles(matrices.shape[1]):
        tile = matrices[:, start:stop, start:stop]
        # below the diagonal there is the triangle of a tile that is smaller by one
        parts.append(packed_triangle(tile if sign == 1 else tile[:, 1:, :-1]))
        parts.append(matrices[:, stop:, start:stop])
    return torch.cat([part.flatten(1) for part in parts], 1)


_UNPACKED = {1: unpacked, -1: unpacked_skew}
