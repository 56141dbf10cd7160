"""Laws of matrices whose diagonals are constant: each row is the last one, moved by one place.

So such a matrix is a view of the values along its edge, one copy away from being its own; and
folding it is a sum of its rows, each of which was moved back by padding it. A gradient has the
same bits at every run, on every device.
"""

from __future__ import annotations

import functools
from math import log2
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tiedparam.laws.forms import Call, Use, form
from tiedparam.laws.layout import Layout, why_no_matrix
from tiedparam.laws.linear_map import LinearMap
from tiedparam.laws.look_up import SMALL
from tiedparam.laws.orbits import Orbits
from tiedparam.laws.times import Making, Time, is_trained, relative_time
from tiedparam.products.fourier import Diagonal, diagonal_product, length_of
from tiedparam.util.errors import Reason

Compute = Literal["auto", "dense", "fft"]
"""The forms of laws that convolve, and ``"auto"`` for the fastest."""

_FEW = 65_536
"""Up to so many entries all rows are summed at once. The padding makes them twice as many, which
for larger matrices takes longer than to sum strips of rows first, and then the strips."""
_STRIP = 32


def _cost_of_fourier(rule: OfDiagonals, use: Use) -> float:
    """From layers of 32 to 4,096 features and 1 to 512 rows in either form.

    ``python -m benchmarks --case goals --only fourier`` compares some of them again.
    """
    outputs, inputs = use.layout.canonical_shape
    if outputs * inputs <= SMALL:
        return 1.0  # a small weight is looked up at once
    length = length_of(rule.matrix, outputs, inputs)
    call = _PER_CALL if length == outputs else _EMBEDDED
    row = length * log2(length) / _SPEED
    if length & (length - 1):
        row *= _NOT_OF_TWOS
    if is_trained(use):
        call, row = 4.4 * call, 3.3 * row
    time = Time(call + _AT_ONCE * row, product=0, row=row)
    return relative_time(use, time, rule.making, trained=time)


_PER_CALL = 38.0
_EMBEDDED = 66.0
_SPEED = 4_500.0  # of length · log₂(length)
_NOT_OF_TWOS = 2.0  # at most, for the lengths that are taken
_AT_ONCE = 4  # rows that take as long as what is done once: plans, and the values


def _multiply_adds(rule: OfDiagonals, use: Use) -> int:
    """Of two real transforms, and the product of their spectra."""
    length = length_of(rule.matrix, *use.layout.canonical_shape)
    return round(length * (2.5 * log2(length) + 2))


class OfDiagonals(Orbits):
    """A law of whole matrices, whose expansion is one of the maps below.

    A subclass states `law`, `symmetries`, `examples`, which map it is, and how
    `tiedparam.products.fourier` calls its matrix; `check` too, if it needs more than a matrix.

    Args:
        compute: the form that computes a Linear layer. ``"auto"`` picks the fastest; ``"dense"``
            and ``"fft"`` force one, for measuring.
    """

    expansion: ClassVar[type[AntiDiagonals]]
    matrix: ClassVar[Diagonal]
    making: Making = Making(0.065, 0.7, call=32, trained_call=132)
    _expansion: AntiDiagonals

    def __init__(self, compute: Compute = "auto") -> None:
        super().__init__()
        self.compute = compute

    @form("fft", cost=_cost_of_fourier, where="compiled", multiply_adds=_multiply_adds)
    def by_fourier(self, call: Call) -> Tensor:
        """Multiply spectra, since such a matrix convolves."""
        return diagonal_product(call.input, call.free[0], call.bias, self.matrix)

    def check(self, layout: Layout) -> Reason | None:
        """The weight must be a matrix."""
        return why_no_matrix(layout)

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """One row of values, so that optimizers see a matrix in what was one."""
        return ((1, self._expansion.count),)

    def forward(self, *free: Tensor) -> Tensor:
        """Lay the values along the diagonals."""
        (values,) = free
        matrix = self._expansion.made(values)
        layout = self.bound_layout
        return layout.native(matrix).contiguous() if layout.transposed else matrix

    def representatives(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The first member of each orbit."""
        members = self._expansion.members(self.bound_layout.canonical(weight.detach()))
        return (members.view(1, -1),)

    def bind(self, layout: Layout, dtype: torch.dtype) -> Reason | None:
        """Fit the rule to one tensor, and choose the map."""
        reason = super().bind(layout, dtype)
        if reason is None:
            self._expansion = _shared(type(self).expansion, *layout.canonical_shape)
        return reason


@functools.lru_cache(64)
def _shared(kind: type[AntiDiagonals], rows: int, columns: int) -> AntiDiagonals:
    """One for all layers of a shape: torch 2.6 compiles them anew for another object."""
    return kind(rows, columns)


class AntiDiagonals(LinearMap):
    """``W[o, c] = w[o + c]``, of ``m × n`` entries and ``m + n − 1`` values."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows: int = rows
        self.columns: int = columns
        self.shape: tuple[int, ...] = (rows, columns)

    @property
    def count(self) -> int:
        """How many values there are."""
        return self.rows + self.columns - 1

    def expand(self, free: Tensor) -> Tensor:
        """Row ``o`` is the window that begins at ``w[o]``."""
        return free.reshape(-1).unfold(0, self.columns, 1).contiguous()

    def in_plain_operations(self, free: Tensor, *constants: Tensor) -> Tensor:
        """`expand`, differentiable, by copies whose gradients are sums.

        The gradient of windows is scattered, in no fixed order. Here the values are laid one after
        the other again and again, and cut into rows that are longer by one.
        """
        rows, period = self.rows, self.rows + self.columns - 1
        laid = free.reshape(-1).expand(rows + 1, period).reshape(-1)
        return laid[: rows * (period + 1)].reshape(rows, -1)[:, : self.columns].contiguous()

    def fold(self, weight: Tensor) -> Tensor:
        """The sums over the anti-diagonals."""
        # the shorter side as rows, for then less is padded
        return _sum_moved(weight if self.rows <= self.columns else weight.t(), "right")

    def members(self, weight: Tensor) -> Tensor:
        """The first member of each anti-diagonal: the first row, and on along the last column."""
        return torch.cat([weight[0], weight[1:, -1]])


class Diagonals(AntiDiagonals):
    """``W[o, c] = w[o − c]``, the values in the order from ``w[−(n − 1)]`` to ``w[m − 1]``.

    Turned round, every row is one of an anti-diagonal matrix.
    """

    def expand(self, free: Tensor) -> Tensor:
        """Row ``o`` is the window that begins at ``w[o − n + 1]``, turned round."""
        return _turned(free.reshape(-1).unfold(0, self.columns, 1), 1)

    def in_plain_operations(self, free: Tensor, *constants: Tensor) -> Tensor:
        """`expand`, differentiable, by copies whose gradients are sums."""
        return _turned(super().in_plain_operations(free), 1)

    def fold(self, weight: Tensor) -> Tensor:
        """The sums over the diagonals."""
        if self.rows <= self.columns:
            return _turned(_sum_moved(weight, "left"), 0)
        return _sum_moved(weight.t(), "left")

    def members(self, weight: Tensor) -> Tensor:
        """The first member of each diagonal: the first row from its end, and the first column."""
        return torch.cat([_turned(weight[0], 0), weight[1:, 0]])


class WrappedDiagonals(Diagonals):
    """``W[o, c] = w[(o − c) mod n]``, ``n × n``: the diagonals ``k`` and ``k − n`` are ``w[k]``."""

    @property
    def count(self) -> int:
        """How many values there are."""
        return self.rows

    def expand(self, free: Tensor) -> Tensor:
        """The diagonals above the main one begin with ``w[1]``."""
        return super().expand(_twice(free.reshape(-1)))

    def in_plain_operations(self, free: Tensor, *constants: Tensor) -> Tensor:
        """`expand`, differentiable, by copies whose gradients are sums."""
        return super().in_plain_operations(_twice(free.reshape(-1)))

    def fold(self, weight: Tensor) -> Tensor:
        """The sums over both diagonals of each value."""
        sums = super().fold(weight)
        folded = sums[self.rows - 1 :].clone()
        folded[1:] += sums[: self.rows - 1]
        return folded

    def members(self, weight: Tensor) -> Tensor:
        """The first column."""
        return weight[:, 0].clone()


def _turned(values: Tensor, axis: int) -> Tensor:
    """Backwards along an axis, and contiguous, which torch promises of no flip of a view."""
    if values.dtype == torch.complex32:  # which torch does not flip on a CPU
        return torch.view_as_complex(_turned(torch.view_as_real(values), axis))
    return values.flip(axis).contiguous()


def _twice(values: Tensor) -> Tensor:
    return torch.cat([values[1:], values])


Direction = Literal["left", "right"]


def _sum_moved(matrix: Tensor, to_the: Direction) -> Tensor:
    """The sum of the rows of ``(m, n)``, each moved by one place from the one before."""
    count, length = matrix.shape
    if matrix.numel() <= _FEW:
        return _sum_of_strip(matrix, 1, to_the)
    strips = -(-count // _STRIP)
    if count % _STRIP:
        matrix = F.pad(matrix, (0, 0, 0, strips * _STRIP - count))
    sums = _sum_of_strip(matrix.reshape(strips, _STRIP, length), 1, to_the)
    moved = _sum_of_strip(sums, _STRIP, to_the)
    size = count + length - 1  # without the rows that were filled in
    return moved[:size] if to_the == "right" else moved[-size:]


def _sum_of_strip(rows: Tensor, step: int, to_the: Direction) -> Tensor:
    """The sum of the rows ``(*, k, n)``, each moved by ``step`` places from the one before.

    Laid one after the other with gaps of zeros, and cut into rows that are shorter than a row with
    its gap by ``step``, or longer, they begin further to the right each time, or to the left.
    """
    *outer, count, length = rows.shape
    if count == 1:
        return rows.sum(-2)
    width = length + (count - 1) * step
    start, stride = (0, width + step) if to_the == "right" else (width - length, width - step)
    laid = rows.new_zeros(*outer, count * max(width, stride))
    place = laid[..., start : start + count * stride].view(*outer, count, stride)
    place[..., :length] = rows
    return laid[..., : count * width].view(*outer, count, width).sum(-2)
