"""Convolutions whose groups have one input channel and share their filters, as products.

Every kernel position sees a window of the input, and the output is the matrix of filters times
the windows. torch's kernels for such layers are slow, above all backward: the gradient of the
input takes several times as long as the product with the transposed filters. The output is much
larger than the input and than the caches, so everything is done block by block.

It is an `Opaque` product, for ordinary tensors on a CPU.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from tiedparam.products.opaque import Opaque

FEW_FILTERS = 8
"""Up to so many, the windows of a signal are added up one by one; a product has too few rows."""
BLOCK_BYTES = 2 << 20
"""Of output: as much as a core's own caches hold, here and on machines with smaller ones."""


@dataclass(frozen=True)
class Geometry:
    """What a convolution does along its spatial axes; it pads ``padding`` zeros on both sides."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


@functools.lru_cache(1024)
class _Frame:
    """What follows from a geometry and the input's sizes, counted once."""

    def __init__(self, geometry: Geometry, sizes: tuple[int, ...]) -> None:
        self.geometry, self.sizes = geometry, sizes
        self.padded_sizes = [s + 2 * p for s, p in zip(sizes, geometry.padding, strict=True)]
        self.outputs = outputs_of(geometry, sizes)
        self.padding = [p for p in geometry.padding[::-1] for _ in range(2)]
        strides = [prod(self.padded_sizes[axis:]) for axis in range(len(sizes) + 1)]
        self._strides = (
            strides[0],
            *(d * t for d, t in zip(geometry.dilation, strides[1:], strict=True)),
            *(s * t for s, t in zip(geometry.stride, strides[1:], strict=True)),
        )
        self.positions: list[Any] = [
            (slice(None), *position) for position in itertools.product(*map(range, geometry.kernel))
        ]
        self._inner: Any = (
            slice(None),
            *(slice(p, p + size) for size, p in zip(sizes, geometry.padding, strict=True)),
        )

    def windows(self, inputs: Tensor) -> Tensor:
        """``(n, *sizes)`` as ``(n, *kernel, *outputs)``: a view of all windows."""
        padded = torch.constant_pad_nd(inputs, self.padding) if any(self.padding) else inputs
        return self._view(padded.contiguous())

    def scattered(self, shares: Tensor) -> Tensor:
        """The adjoint of `windows`: ``(n, positions, entries)`` → ``(n, *sizes)``."""
        geometry = self.geometry
        if len(self.sizes) == 2:
            image: Tensor = torch.ops.aten.col2im.default(
                shares,
                self.sizes,
                geometry.kernel,
                geometry.dilation,
                geometry.padding,
                geometry.stride,
            )
            return image.squeeze(1)
        total = shares.new_zeros(shares.shape[0], *self.padded_sizes)
        views = self._view(total)
        shares = shares.view(views.shape)
        for position in self.positions:
            views[position] += shares[position]
        return total[self._inner]

    def _view(self, padded: Tensor) -> Tensor:
        shape = (padded.shape[0], *self.geometry.kernel, *self.outputs)
        return padded.as_strided(shape, self._strides)


def outputs_of(geometry: Geometry, sizes: Sequence[int]) -> tuple[int, ...]:
    """The output's sizes; some are 0 or less if the kernel is larger than the input."""
    around = zip(
        sizes,
        geometry.kernel,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        strict=True,
    )
    return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in around)


def pays(
    n: int, groups: int, m: int, positions: int, outputs: tuple[int, ...], *, grad: bool
) -> bool:
    """Whether torch's own convolution is slower.

    The bounds come from ``python -m benchmarks --case forms``.

    Args:
        n: samples.
        groups: how many channels `convolve` will get: all, or one that is their sum.
        m: filters.
        positions: of the kernel.
        outputs: the output's sizes along its spatial axes.
        grad: whether gradients are recorded.
    """
    if m == 1:
        return False
    axes, entries = len(outputs), prod(outputs)
    total = n * groups * m * entries
    if groups == 1:
        return _pays_summed(n, total, positions, axes, grad)
    return (_pays_trained if grad else _pays_in_groups)(groups, m, total, entries, axes)


def _pays_summed(n: int, total: int, positions: int, axes: int, grad: bool) -> bool:
    """Against one channel that is convolved with m filters; one sample is one block."""
    if n == 1:
        long = axes == 2 and positions > _FEW_POSITIONS
        return grad and long and total * positions >= _MANY_TAPS
    if positions == 1:
        return n >= _SAMPLES and total >= _SOME
    if grad:
        return total >= (_SOME if axes == 2 else _MORE)
    return axes == 1 and positions <= _FEW_POSITIONS and total >= _MANY


def _pays_in_groups(groups: int, m: int, total: int, entries: int, axes: int) -> bool:
    """Against groups of one channel, each convolved with the same m filters."""
    if groups < _FEW_GROUPS and m % 8 == 0:
        return False  # oneDNN has kernels for them
    if axes == 1:
        return total >= _MORE // 2 and m <= FEW_FILTERS
    if axes == 2:
        return total + _GROUP * groups >= _ENOUGH
    return total >= _MORE // 2 and m >= FEW_FILTERS and entries >= _LONG


def _pays_trained(groups: int, m: int, total: int, entries: int, axes: int) -> bool:
    if axes == 1:
        return total >= _MORE // 4
    if axes == 2 and entries >= _LONG:
        return total + _GROUP * groups >= _ENOUGH
    return axes == 2 and m >= FEW_FILTERS and total >= _MANY // 2


# entries of the output
_SOME, _ENOUGH, _MORE, _MANY = 1 << 14, 5 << 14, 1 << 18, 1 << 20
_GROUP = 1 << 10  # of them take as long as to begin with a group
_LONG = 512  # entries of one channel
_FEW_GROUPS, _FEW_POSITIONS = 8, 9
_SAMPLES = 16  # so many 1×1 convolutions torch leaves to oneDNN, which is slower
_MANY_TAPS = 1 << 19  # multiplications


def summed_channels(input: Tensor) -> Tensor:
    """``(n, channels, *sizes)`` → ``(n, 1, *sizes)``."""
    n, channels, *sizes = input.shape
    if prod(sizes) < _LONG or (torch.is_grad_enabled() and input.requires_grad):
        return input.sum(1, keepdim=True)  # whose gradient is a view
    # a matrix product reads long channels faster
    ones = input.new_ones(1, 1, channels).expand(n, 1, channels)
    return torch.bmm(ones, input.reshape(n, channels, -1)).view(n, 1, *sizes)


def convolve(input: Tensor, filters: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution of every channel with the same filters.

    Args:
        input: ``(n, groups, *sizes)``.
        filters: ``(m, positions)``.
        bias: ``(groups·m,)`` or None.
        geometry: of the kernel.

    Returns:
        ``(n, groups·m, *output sizes)``, in memory of its own.
    """
    return _product(
        input,
        filters,
        bias,
        geometry.kernel,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
    )


def _forward(
    input: Tensor, filters: Tensor, bias: Tensor | None, *geometry: Sequence[int]
) -> Tensor:
    n, groups, *sizes = input.shape
    m, positions = filters.shape
    frame = _Frame(Geometry(*map(tuple, geometry)), tuple(sizes))
    output = input.new_empty(n, groups * m, *frame.outputs)
    offsets = None if bias is None else bias.reshape(groups, m, 1)
    if offsets is not None:  # one for each sample and group
        offsets = offsets.repeat(n, 1, 1) if groups > 1 else offsets.expand(n, m, 1)
    inputs, outputs = input.reshape(n * groups, *sizes), output.view(n * groups, m, -1)
    few = _adds_up(m, sizes)
    for start, stop in _blocks(outputs, positions, copied=not few):
        windows, block = frame.windows(inputs[start:stop]), outputs[start:stop]
        added = None if offsets is None else offsets[start:stop]
        if few:
            _add_up(frame, windows, filters, block.view(stop - start, m, *frame.outputs))
            if added is not None:
                block += added
            continue
        flat = windows.reshape(stop - start, positions, -1)
        each = filters.expand(stop - start, m, positions)
        if added is None:
            torch.bmm(each, flat, out=block)
        else:
            torch.baddbmm(added, each, flat, out=block)
    return output


def _backward(
    needs: Sequence[bool],
    gradient: Tensor,
    input: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    *geometry: Sequence[int],
) -> tuple[Tensor | None, ...]:
    # recorded operation by operation for second derivatives
    of_input, of_filters, of_bias = needs
    n, groups, *sizes = input.shape
    m, positions = filters.shape
    frame = _Frame(Geometry(*map(tuple, geometry)), tuple(sizes))
    inputs = input.reshape(n * groups, *sizes)
    gradients = gradient.reshape(n * groups, m, -1)
    d_inputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    d_filters, sums = None, []
    columns = filters.t().contiguous()
    for start, stop in _blocks(gradients, positions):
        block = gradients[start:stop]
        if of_input:
            shares = torch.bmm(columns.expand(stop - start, positions, m), block)
            d_inputs[start:stop] = frame.scattered(shares)
            del shares  # or the windows would be made beside them
        if of_filters:
            flat = frame.windows(inputs[start:stop]).reshape(stop - start, positions, -1)
            part = torch.bmm(flat, block.transpose(1, 2)).sum(0)
            d_filters = part if d_filters is None else d_filters.add_(part)
            del flat
        if of_bias:
            sums.append(block.sum(2))
    return (
        d_inputs.view(input.shape) if of_input else None,
        None if d_filters is None else d_filters.t(),
        torch.cat(sums).view(n, -1).sum(0) if of_bias else None,
    )


def _output(input: Tensor, filters: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    n, groups, *sizes = input.shape
    return input.new_empty(n, groups * filters.shape[0], *outputs_of(Geometry(*geometry), sizes))


_product: Opaque = Opaque(
    "convolve_by_windows(Tensor input, Tensor filters, Tensor? bias,"
    " int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor",
    _forward,
    _backward,
    _output,
)


def _add_up(frame: _Frame, windows: Tensor, filters: Tensor, output: Tensor) -> None:
    """``output = Σ filters[:, x] · windows[:, x]``, one kernel position after another."""
    columns = filters.reshape(*filters.shape, *(1,) * len(frame.sizes))
    for number, position in enumerate(frame.positions):
        window = windows[position].unsqueeze(1)
        if number == 0:
            torch.mul(window, columns[:, 0], out=output)
        else:
            output.addcmul_(window, columns[:, number])


def _adds_up(m: int, sizes: list[int]) -> bool:
    return m <= FEW_FILTERS and len(sizes) == 1


def _blocks(output: Tensor, positions: int, copied: bool = True) -> Iterator[tuple[int, int]]:
    """Rows of ``(rows, m, entries)`` that are computed together.

    Their output takes no more than `BLOCK_BYTES`, nor do the windows, of which there are as many
    as positions, if they are ``copied``.
    """
    rows, m, entries = output.shape
    bytes_of_row = max(m, positions if copied else 1) * entries * output.element_size()
    step = max(1, min(rows, BLOCK_BYTES // bytes_of_row))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
