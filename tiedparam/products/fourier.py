"""Products with circulant, Toeplitz and Hankel matrices by fast Fourier transforms.

A matrix that is constant along its diagonals convolves, so its product is one of spectra: n·log n
operations for each row instead of n². Such a matrix is part of a circulant one whose length is
free, and lengths differ much: the transform of 1,021 values takes nine times as long as that of
1,024. Rows are taken in blocks that caches hold; nothing but the input and the values is kept for
gradients, and their spectra are computed again.

An output differs from the exact one by at most ``2·log₂(length)·ε·‖w‖₂·‖x‖₂``, for the row ``x``
it came from and the values ``w``, in all that was tried; so a small output beside large ones has
fewer correct digits than the dense product gives it. A row with an infinite value is NaN
throughout, as with most dense products.

It serves float32 and float64, where torch runs eagerly on a CPU.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tiedparam.products.linear_rows import row_blocks
from tiedparam.products.opaque import Opaque
from tiedparam.util.torch_modes import answered_while_tracing

Diagonal = Literal["circulant", "toeplitz", "hankel"]
"""What is constant along its diagonals, or along its anti-diagonals."""
BLOCK_BYTES = 1 << 20
"""Of rows that are transformed at once: what a core's cache holds."""


def diagonal_product(
    input: Tensor, values: Tensor, bias: Tensor | None, matrix: Diagonal
) -> Tensor:
    """Every row of the input times the transposed matrix, plus the bias.

    Args:
        input: ``(*, n)``.
        values: ``(1, n)`` or ``(1, m + n − 1)``, along the edge of the matrix.
        bias: ``(m,)`` or None.
        matrix: what the values say.

            * ``"circulant"``: ``W[o, c] = w[(o − c) mod n]``.
            * ``"toeplitz"``: ``W[o, c] = w[o − c]``, from ``w[−(n − 1)]`` to ``w[m − 1]``.
            * ``"hankel"``: ``W[o, c] = w[o + c]``, from ``w[0]`` to ``w[m + n − 2]``.

    As in:
        >>> from tiedparam.products.fourier import diagonal_product
        >>> x, values = torch.tensor([0.0, 1.0, 0.0]), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> diagonal_product(x, values[:, :3], None, "circulant").round()  # the second column
        tensor([3., 1., 2.])
        >>> diagonal_product(x, values, None, "toeplitz").round()
        tensor([2., 3.])
    """
    return _PRODUCT(input, values, bias, matrix)


def _forward(input: Tensor, values: Tensor, bias: Tensor | None, matrix: Diagonal) -> Tensor:
    return _circle_of(matrix, input, values).product(input, values, bias)


def _backward(
    needs: Sequence[bool],
    gradient: Tensor,
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    matrix: Diagonal,
) -> tuple[Tensor | None, ...]:
    of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if needs[2] else None
    if not needs[0] and not needs[1]:
        return None, None, of_bias
    circle = _circle_of(matrix, input, values)
    return *circle.gradients(input, values, gradient, needs[0], needs[1]), of_bias


def _output(input: Tensor, values: Tensor, bias: Tensor | None, matrix: Diagonal) -> Tensor:
    return input.new_empty(*input.shape[:-1], _outputs(matrix, input, values))


_PRODUCT: Opaque = Opaque(
    "diagonal_product(Tensor input, Tensor values, Tensor? bias, str matrix) -> Tensor",
    _forward,
    _backward,
    output=_output,
)


# Lengths ----------------------------------------------------------------------------------


@functools.lru_cache(256)
def good_length(least: int) -> int:
    """A length of at least ``least`` that is transformed fast.

    Real transforms are fast for multiples of 8 whose other factors are 2, 3, 5 and 7, and faster
    by a quarter for powers of 2; odd lengths take three times as long.

    As in:
        >>> from tiedparam.products.fourier import good_length
        >>> good_length(2047), good_length(1999), good_length(1100), good_length(3)
        (2048, 2048, 1120, 8)
    """
    power = max(8, 1 << (least - 1).bit_length())
    smooth = -(-least // 8) * 8
    while _largest_factor(smooth) > 7:
        smooth += 8
    return power if 4 * power <= 5 * smooth else smooth


def _largest_factor(number: int) -> int:
    factor = 2
    while factor * factor <= number:
        if number % factor:
            factor += 1
        else:
            number //= factor
    return number


# Matrices as part of circulant ones -------------------------------------------------------


class _Circle(ABC):
    """A matrix ``(outputs, inputs)`` as the upper left part of a circulant one of ``length``."""

    turned: ClassVar[bool] = False
    """Whether the inputs go round the other way."""

    def __init__(self, outputs: int, inputs: int, length: int) -> None:
        self.outputs, self.inputs, self.length = outputs, inputs, length

    @abstractmethod
    def laid(self, values: Tensor) -> Tensor:
        """The values laid round the circle: ``(1, length)``, or less if zeros follow."""

    @abstractmethod
    def collected(self, around: Tensor) -> Tensor:
        """The adjoint of `laid`, from ``(1, length)``."""

    def product(self, input: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Of every row of the input with the matrix."""
        spectrum, blocks = self.spectrum(values), self.blocks(input)
        if blocks is None:
            return self._block(input, spectrum, bias)
        output = input.new_empty(*input.shape[:-1], self.outputs)
        rows, outputs = input.reshape(-1, self.inputs), output.view(-1, self.outputs)
        for block in blocks:
            outputs[block] = self._block(rows[block], spectrum, bias)
        return output

    def gradients(
        self, input: Tensor, values: Tensor, gradient: Tensor, of_input: bool, of_values: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of a product's input and values, by recorded operations."""
        spectrum = self.spectrum(values).conj_physical_() if of_input else None
        blocks, total = self.blocks(input), None
        if blocks is None:
            d_input, total = self._gradients_of_block(input, gradient, spectrum, of_values)
        else:
            d_input = input.new_empty(input.shape) if of_input else None
            d_rows = d_input.view(-1, self.inputs) if d_input is not None else None
            rows, gradients = input.reshape(-1, self.inputs), gradient.reshape(-1, self.outputs)
            for block in blocks:
                of_rows, part = self._gradients_of_block(
                    rows[block], gradients[block], spectrum, of_values
                )
                if d_rows is not None and of_rows is not None:
                    d_rows[block] = of_rows
                total = part if total is None or part is None else total + part
                del of_rows  # or the next one would be made beside it
        if not of_values:
            return d_input, None
        if total is None:  # no rows
            return d_input, values.new_zeros(values.shape)
        return d_input, self.collected(torch.fft.irfft(total, self.length))

    def spectrum(self, values: Tensor) -> Tensor:
        """Of the values, ``(1, count)``."""
        return self.spectra(self.laid(values))

    def spectra(self, rows: Tensor) -> Tensor:
        """Of rows that zeros follow."""
        spectra: Tensor = torch.fft.rfft(rows.contiguous(), self.length)  # so is the output then
        return spectra

    def blocks(self, input: Tensor) -> list[slice] | None:
        """Rows that are transformed together; None if all of them are, in the input's shape."""
        rows = input.numel() // self.inputs
        each = 2 * self.length  # spectra, and what is made of them, which is cut
        if self.length > self.outputs:
            each += max(self.inputs, self.outputs)
        saved = self.outputs * self.inputs - 2 * self.length
        room = min(saved, BLOCK_BYTES // input.element_size() * each // self.length)
        blocks = list(row_blocks(rows, each, room))
        return None if len(blocks) == 1 and input.dim() > 1 else blocks

    def _block(self, rows: Tensor, spectrum: Tensor, bias: Tensor | None) -> Tensor:
        spectra = self.spectra(rows)
        if self.turned:
            spectra.conj_physical_()
        return self._back(spectra.mul_(spectrum), self.outputs, bias)

    def _back(self, spectra: Tensor, size: int, bias: Tensor | None = None) -> Tensor:
        """The first ``size`` values of each row."""
        rows: Tensor = torch.fft.irfft(spectra, self.length)
        if size == self.length:
            return rows if bias is None else rows.add_(bias)
        rows = rows[..., :size]
        # a single row would be contiguous as it is, and a view
        return rows.clone(memory_format=torch.contiguous_format) if bias is None else rows + bias

    def _gradients_of_block(
        self, rows: Tensor, gradients: Tensor, spectrum: Tensor | None, of_values: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        spectra, recorded = self.spectra(gradients), torch.is_grad_enabled()
        d_rows = total = None
        if of_values:
            of_rows = self.spectra(rows)
            if not self.turned:
                of_rows.conj_physical_()
            total = of_rows.mul_(spectra).flatten(0, -2).sum(0, keepdim=True)
            del of_rows
        if spectrum is not None:
            # what is recorded stays as it is
            shares = spectra * spectrum if recorded else spectra.mul_(spectrum)
            if self.turned:
                shares.conj_physical_()
            d_rows = self._back(shares, self.inputs)
        return d_rows, total


class _Circulant(_Circle):
    """A circulant matrix of a good length."""

    def laid(self, values: Tensor) -> Tensor:
        return values

    def collected(self, around: Tensor) -> Tensor:
        return around


class _Wrapped(_Circle):
    """A circulant matrix within a longer one, where two diagonals have each value but one."""

    def laid(self, values: Tensor) -> Tensor:
        gap = values.new_zeros(1, self.length - 2 * self.inputs + 1)
        return torch.cat([values, gap, values[:, 1:]], 1)

    def collected(self, around: Tensor) -> Tensor:
        above = around[:, self.length - self.inputs + 1 :]
        return around[:, : self.inputs] + F.pad(above, (1, 0))


class _Toeplitz(_Circle):
    """A Toeplitz matrix, whose diagonals above the main one come last on the circle."""

    def laid(self, values: Tensor) -> Tensor:
        above = self.inputs - 1
        gap = values.new_zeros(1, self.length - self.outputs - above)
        return torch.cat([values[:, above:], gap, values[:, :above]], 1)

    def collected(self, around: Tensor) -> Tensor:
        above = around[:, self.length - self.inputs + 1 :]
        return torch.cat([above, around[:, : self.outputs]], 1)


class _Hankel(_Circle):
    """A Hankel matrix: a convolution with the inputs in the other order."""

    turned = True

    def laid(self, values: Tensor) -> Tensor:
        return values

    def collected(self, around: Tensor) -> Tensor:
        return around[:, : self.outputs + self.inputs - 1].clone()


_KINDS: dict[Diagonal, Callable[[int, int, int], _Circle]] = {
    "circulant": _Wrapped,
    "toeplitz": _Toeplitz,
    "hankel": _Hankel,
}


@functools.lru_cache(256)
def _circle(matrix: Diagonal, outputs: int, inputs: int) -> _Circle:
    """The circle that holds a matrix: a circulant one's own, unless that takes twice as long."""
    if matrix == "circulant" and inputs % 2 == 0 and _largest_factor(inputs) <= 13:
        return _Circulant(outputs, inputs, inputs)
    return _KINDS[matrix](outputs, inputs, good_length(outputs + inputs - 1))


@answered_while_tracing
def length_of(matrix: Diagonal, outputs: int, inputs: int) -> int:
    """How long the transforms are by which a matrix is multiplied."""
    return _circle(matrix, outputs, inputs).length


def _circle_of(matrix: Diagonal, input: Tensor, values: Tensor) -> _Circle:
    return _circle(matrix, _outputs(matrix, input, values), input.shape[-1])


def _outputs(matrix: Diagonal, input: Tensor, values: Tensor) -> int:
    """How many; a symbol in graphs for any size."""
    inputs = input.shape[-1]
    return inputs if matrix == "circulant" else values.numel() - inputs + 1
