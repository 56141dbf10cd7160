"""Convolutions of every channel with one and the same filter, of stride 1.

torch's convolution of separate channels is near the speed of memory, with three exceptions that
are avoided here:

- Its fast kernel takes a few entries of padding along the last axis and no more: six with
  AVX-512, four with AVX2; beyond, a plain loop takes ten times as long. Channels that come with
  their padding are computed by the fast one, whatever the kernel or dilation.
- The gradient of the input takes longer than the same thing as a convolution.
- The gradient of the filter has a fast kernel for up to three taps per axis. Here it is a matrix
  product: of the output's gradient in pieces of 16 and the windows that these pieces saw, whose
  diagonals are the taps. There are as many multiplications as taps plus 15 for each tap.

Everything is done in blocks of channels, so that no copy is larger than a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiedparam.products.opaque import Opaque

FEW_TAPS = 3
"""Up to so many along each of at most two axes, torch's gradient of the filter is the faster."""
_PIECE = 16  # entries of the gradient; fewer make the product slow, more make it large
_PADDED_BYTES, _BAND_BYTES = 1 << 20, 256 << 10  # of input in a block, as caches hold it
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


MOST_PADDING = 6 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 4
"""How many entries of padding along the last axis torch's fast kernel takes."""


def gains(kernel: Sequence[int], padding: Sequence[int], entries: int, *, training: bool) -> bool:
    """Whether `one_filter` is faster than torch's own convolution in float32.

    The bounds come from ``python -m benchmarks --case goals --only streams``.

    Args:
        kernel: its sizes.
        padding: along each axis.
        entries: of the output.
        training: whether gradients are recorded.
    """
    long = padding[-1] > MOST_PADDING and kernel[-1] > 1
    taps = entries * prod(kernel)
    if training:
        return taps >= _MANY_TAPS and (long or not _few(kernel))
    return long and taps >= _SOME_TAPS


_SOME_TAPS, _MANY_TAPS = 1 << 17, 1 << 19


def _few(kernel: Sequence[int]) -> bool:
    return len(kernel) <= 2 and max(kernel) <= FEW_TAPS


def _filtered(
    input: Tensor,
    filter: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The convolution, by torch's fast kernel."""
    convolve: Any = _CONVOLUTIONS[filter.dim() - 1]
    n, channels, *sizes = input.shape
    weight = filter.expand(channels, 1, *filter.shape).contiguous()
    if padding[-1] <= MOST_PADDING:
        plain: Tensor = convolve(input, weight, bias, 1, padding, dilation, channels)
        return plain.contiguous()
    rows = n * channels
    outputs = _sizes_of_output(sizes, filter.shape, padding, dilation)
    output = input.new_empty(n, channels, *outputs)
    inputs, flat = input.reshape(rows, *sizes), output.view(rows, *outputs)
    offsets = None if bias is None else bias.repeat(n)
    padded = _Padded(input, padding, _PADDED_BYTES)
    # blocks end anywhere: all channels have the same filter
    weight = filter.expand(padded.rows, 1, *filter.shape).contiguous()
    for start, stop in padded.blocks(rows):
        count = stop - start
        flat[start:stop] = convolve(
            padded.filled(inputs[start:stop]).unsqueeze(0),
            weight[:count],
            None if offsets is None else offsets[start:stop],
            dilation=dilation,
            groups=count,
        ).squeeze(0)
    return output


def _backward(
    needs: Sequence[bool],
    gradient: Tensor,
    input: Tensor,
    filter: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor | None, ...]:
    of_input, of_filter, of_bias = needs
    if torch.is_grad_enabled():
        return _recorded(needs, gradient, input, filter, padding, dilation)
    before = [d * (k - 1) - p for k, p, d in zip(filter.shape, padding, dilation, strict=True)]
    d_input = d_filter = d_bias = None
    if of_input:
        if min(before) >= 0:
            mirrored = filter.flip(*range(filter.dim()))
            d_input = _filtered(gradient, mirrored, None, before, dilation)
        else:  # more padding than the kernel reaches
            needed = (True, False, False)
            d_input = _recorded(needed, gradient, input, filter, padding, dilation)[0]
    if of_filter:
        span = dilation[-1] * (filter.shape[-1] - 1)
        if _few(filter.shape) or span > 4 * _PIECE:
            needed = (False, True, False)
            d_filter = _recorded(needed, gradient, input, filter, padding, dilation)[1]
        else:
            d_filter = _taps(gradient, input, filter.shape, padding, dilation)
    if of_bias:
        d_bias = gradient.sum((0, *range(2, gradient.dim())))
    return d_input, d_filter, d_bias


def _output(
    input: Tensor,
    filter: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    n, channels, *sizes = input.shape
    outputs = _sizes_of_output(sizes, filter.shape, padding, dilation)
    return input.new_empty(n, channels, *outputs)


one_filter: Opaque = Opaque(
    "one_filter(Tensor input, Tensor filter, Tensor? bias, int[] padding, int[] dilation)"
    " -> Tensor",
    _filtered,
    _backward,
    _output,
)
"""``(n, channels, *sizes)``, ``(*kernel)``, ``(channels,)`` → ``(n, channels, *output sizes)``."""


def _sizes_of_output(
    sizes: Sequence[int], kernel: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    return [
        s + 2 * p - d * (k - 1) for s, k, p, d in zip(sizes, kernel, padding, dilation, strict=True)
    ]


def _recorded(
    needs: Sequence[bool],
    gradient: Tensor,
    input: Tensor,
    filter: Tensor,
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor | None, ...]:
    """The gradients by torch's own operation, which has derivatives."""
    channels, axes = input.shape[1], filter.dim()
    weight = filter.expand(channels, 1, *filter.shape)
    given: Any = torch.ops.aten.convolution_backward.default(
        gradient,
        input,
        weight,
        [channels],
        [1] * axes,
        padding,
        dilation,
        False,
        [0] * axes,
        channels,
        list(needs),
    )
    of_weight = given[1]
    return given[0], of_weight.sum((0, 1)) if needs[1] else None, given[2]


class _Padded:
    """Room for a block of channels between zeros.

    Attributes:
        rows: how many channels a block has.
        sizes: of a channel and its padding.
        room: ``(rows, entries)``, with ``spare`` zeros behind each channel.
    """

    def __init__(self, like: Tensor, padding: Sequence[int], bytes: int, spare: int = 0) -> None:
        n, channels, *sizes = like.shape
        self.sizes = [s + 2 * p for s, p in zip(sizes, padding, strict=True)]
        entries = prod(self.sizes)
        fitting = bytes // ((entries + spare) * like.element_size())
        # torch's fast kernel takes channels by 16
        self.rows = max(1, min(n * channels, fitting // 16 * 16 or fitting))
        self.room = like.new_zeros(self.rows, entries + spare)
        self._all = self.room[:, :entries].view(self.rows, *self.sizes)
        inner = self._all
        for axis, (size, before) in enumerate(zip(sizes, padding, strict=True), 1):
            inner = inner.narrow(axis, before, size)
        self._inner = inner

    def blocks(self, rows: int) -> Iterator[tuple[int, int]]:
        """From where to where each block goes."""
        for start in range(0, rows, self.rows):
            yield start, min(rows, start + self.rows)

    def filled(self, channels: Tensor) -> Tensor:
        """Some channels with their padding."""
        count = len(channels)
        self._inner[:count] = channels
        return self._all[:count]


def _taps(
    gradient: Tensor,
    input: Tensor,
    kernel: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The gradient of the filter."""
    n, channels, *sizes = input.shape
    *over, outputs = gradient.shape[2:]
    padded_sizes = [s + 2 * p for s, p in zip(sizes, padding, strict=True)]
    steps = [prod(padded_sizes[axis:]) for axis in range(1, len(sizes) + 1)]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    # the gradient lies on the grid of the padded input, with zeros where that has no output
    grid = [*over[:1], *padded_sizes[1:]] if over else [outputs]
    pieces = -(-prod(grid) // _PIECE)
    window = _PIECE + reach[-1]
    # the last window of the last place of the kernel ends here
    end = sum(r * s for r, s in zip(reach[:-1], steps, strict=False)) + pieces * _PIECE + reach[-1]
    padded = _Padded(input, padding, _BAND_BYTES, max(0, end - prod(padded_sizes)))
    rows, length = padded.room.shape
    laid = input.new_zeros(rows, pieces * _PIECE)
    places = laid[:, : prod(grid)].view(rows, *grid)
    for axis, size in enumerate(gradient.shape[2:], 1):
        places = places.narrow(axis, 0, size)
    inputs = input.reshape(n * channels, *sizes)
    gradients = gradient.reshape(n * channels, *over, outputs)
    leading = list(kernel[:-1])
    strides = [d * s for d, s in zip(dilation[:-1], steps, strict=False)]
    total = input.new_zeros(_PIECE, prod(leading) * window)
    for start, stop in padded.blocks(len(inputs)):
        count = stop - start
        padded.filled(inputs[start:stop])
        places[:count] = gradients[start:stop]
        windows = padded.room.as_strided(
            (count, pieces, *leading, window), (length, _PIECE, *strides, 1)
        )
        total.addmm_(laid[:count].view(-1, _PIECE).t(), windows.reshape(count * pieces, -1))
    total = total.view(_PIECE, prod(leading), window)
    taps = [total.diagonal(dilation[-1] * tap, 0, 2).sum(1) for tap in range(kernel[-1])]
    return torch.stack(taps, 1).view(*kernel)
