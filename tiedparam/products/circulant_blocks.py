"""Products with matrices of circulant blocks, frequency by frequency.

Fourier's transform of every block turns circulant blocks of ``b × b`` into ``b`` numbers, and the
product into one of small matrices for each frequency, all of them at once: ``2 / b`` of the dense
product's multiplications. Short transforms are products with a matrix themselves, whose rows are
the frequencies' cosines and sines; so the parts of one frequency lie together, and no number is
complex. For long blocks that would take more than it saves, and `torch.fft` takes over.

Rows are taken in blocks, so that the parts take less memory than the matrix would; nothing but the
input and the values is kept for gradients, and their parts are computed again.

An output differs from the exact one by at most ``2·log₂(4·b)·√(n / b)·ε·max ‖w‖₂·max ‖x‖₂`` in all
that was tried, for the largest of its row's ``n / b`` blocks ``w`` of values and ``x`` of inputs.
It serves float32 and float64, where torch runs eagerly on a CPU.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tiedparam.products.linear_rows import row_blocks
from tiedparam.products.opaque import Opaque
from tiedparam.util.torch_modes import plain_numbers

LONG = 48
"""From here on blocks are transformed by `torch.fft`."""


def block_circulant_product(
    input: Tensor, values: Tensor, bias: Tensor | None, block: int
) -> Tensor:
    """Every row of the input times the transposed matrix, plus the bias.

    Args:
        input: ``(*, n)``.
        values: ``(m / b, n)``, the first row of every block.
        bias: ``(m,)`` or None.
        block: ``b``, which divides ``m`` and ``n``.

    As in:
        >>> from tiedparam.products.circulant_blocks import block_circulant_product
        >>> values = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> block_circulant_product(torch.tensor([0.0, 1.0, 0.0, 0.0]), values, None, 2).round()
        tensor([2., 1.])
    """
    return _PRODUCT(input, values, bias, block)


def _forward(input: Tensor, values: Tensor, bias: Tensor | None, block: int) -> Tensor:
    transform = _transform(block)
    matrices = transform.parts(values)
    output = _output(input, values, bias, block)
    rows, outputs = input.reshape(-1, input.shape[-1]), output.view(-1, output.shape[-1])
    for few in _blocks(rows, values, block):
        product = transform.times(transform.parts(rows[few]), matrices, turn_right=True)
        if bias is None:
            outputs[few] = transform.back(product)
        else:
            torch.add(transform.back(product), bias, out=outputs[few])
    return output


def _backward(
    needs: Sequence[bool],
    gradient: Tensor,
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    block: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    of_input, of_values, of_bias = needs
    gradients, rows = gradient.reshape(-1, gradient.shape[-1]), input.reshape(-1, input.shape[-1])
    d_bias = gradients.sum(0) if of_bias else None
    if not of_input and not of_values:
        return None, None, d_bias
    transform = _transform(block)
    d_input = input.new_empty(input.shape) if of_input else None
    matrices = transform.parts(values) if of_input else None
    total = None
    for few in _blocks(rows, values, block):
        parts = transform.parts(gradients[few])
        if d_input is not None and matrices is not None:
            d_input.view(rows.shape)[few] = transform.back(transform.times(parts, matrices))
        if of_values:
            share = transform.times(parts, transform.parts(rows[few]), turn_left=True)
            total = share if total is None else total.add_(share)
            del share  # or the next one would be made beside it
        del parts
    del matrices
    if not of_values:
        return d_input, None, d_bias
    d_values = values.new_zeros(values.shape) if total is None else transform.back(total)
    return d_input, d_values, d_bias


def _output(input: Tensor, values: Tensor, bias: Tensor | None, block: int) -> Tensor:
    return input.new_empty(*input.shape[:-1], values.shape[0] * block)


_PRODUCT: Opaque = Opaque(
    "block_circulant_product(Tensor input, Tensor values, Tensor? bias, int block) -> Tensor",
    _forward,
    _backward,
    output=_output,
)


def _blocks(rows: Tensor, values: Tensor, block: int) -> Iterator[slice]:
    """Rows that are transformed together, whose parts lie beside those of the values."""
    outputs, inputs = values.shape[0] * block, values.shape[1]
    # those of outputs and inputs, and copies of the one or the other on the way there and back
    each = outputs + inputs + max(outputs, inputs)
    room = min(outputs * inputs - 3 * values.numel(), min(outputs, inputs) // 8 * each)
    return row_blocks(len(rows), each, room)


# Transforms -------------------------------------------------------------------------------


class _Transform(ABC):
    """Fourier's transform of blocks, and products of what it gives."""

    def __init__(self, block: int) -> None:
        self.block = block

    @abstractmethod
    def parts(self, rows: Tensor) -> Tensor:
        """Of every block: ``(r, k·b)`` → ``(parts, r, k)``."""

    @abstractmethod
    def back(self, parts: Tensor) -> Tensor:
        """The inverse of `parts`."""

    @abstractmethod
    def times(
        self, left: Tensor, right: Tensor, *, turn_left: bool = False, turn_right: bool = False
    ) -> Tensor:
        """The products of complex matrices, each turned to its adjoint or not."""


class _Products(_Transform):
    """Of short blocks: real parts, imaginary ones, and those of the frequencies without."""

    def __init__(self, block: int) -> None:
        super().__init__(block)
        pairs = (block - 1) // 2
        self.real, self.imaginary = slice(pairs), slice(pairs, 2 * pairs)
        self.alone = slice(2 * pairs, block)

    def parts(self, rows: Tensor) -> Tensor:
        table, _ = self._tables(rows)
        return torch.mm(table, rows.reshape(-1, self.block).t()).view(self.block, len(rows), -1)

    def back(self, parts: Tensor) -> Tensor:
        _, table = self._tables(parts)
        return torch.mm(parts.reshape(self.block, -1).t(), table).view(parts.shape[1], -1)

    def times(
        self, left: Tensor, right: Tensor, *, turn_left: bool = False, turn_right: bool = False
    ) -> Tensor:
        of_left, of_right = -1 if turn_left else 1, -1 if turn_right else 1
        left, right = left.mT if turn_left else left, right.mT if turn_right else right
        result = left.new_empty(self.block, left.shape[1], right.shape[2])
        real, imaginary, alone = self.real, self.imaginary, self.alone
        result[alone].baddbmm_(left[alone], right[alone], beta=0)
        if self.block > 2:
            a, b, c, d = left[real], left[imaginary], right[real], right[imaginary]
            result[real].baddbmm_(a, c, beta=0).baddbmm_(b, d, alpha=-of_left * of_right)
            result[imaginary].baddbmm_(b, c, beta=0, alpha=of_left).baddbmm_(a, d, alpha=of_right)
        return result

    def _tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return _tables(self.block, like.dtype, like.device)


class _Frequencies(_Transform):
    """Of long blocks: complex numbers."""

    def parts(self, rows: Tensor) -> Tensor:
        spectra: Tensor = torch.fft.rfft(rows.reshape(-1, self.block))
        return spectra.t().contiguous().view(-1, len(rows), rows.shape[1] // self.block)

    def back(self, parts: Tensor) -> Tensor:
        spectra = parts.reshape(len(parts), -1).t().contiguous()  # takes less than to read columns
        rows: Tensor = torch.fft.irfft(spectra, self.block)
        return rows.view(parts.shape[1], -1)

    def times(
        self, left: Tensor, right: Tensor, *, turn_left: bool = False, turn_right: bool = False
    ) -> Tensor:
        return torch.bmm(left.mH if turn_left else left, right.mH if turn_right else right)


@functools.lru_cache(64)
def _transform(block: int) -> _Transform:
    return (_Products if block < LONG else _Frequencies)(block)


@functools.lru_cache(64)
def _tables(block: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The transform of one block as a matrix, and the transposed inverse.

    Rows: the cosines of the frequencies in between, the sines, and the frequencies that have none:
    0, and ``b / 2`` if there is one.
    """
    with plain_numbers():
        place = torch.arange(block, dtype=torch.float64, device="cpu")
        inner = torch.arange(1, (block + 1) // 2, dtype=torch.float64, device="cpu")
        angles = 2 * math.pi / block * torch.outer(inner, place).remainder(block)
        alone = [torch.ones_like(place), torch.cos(math.pi * place)][: 2 - block % 2]
        table = torch.cat([angles.cos(), -angles.sin(), torch.stack(alone)])
        inverse = table / table.square().sum(1, keepdim=True)
        return table.to(device, dtype), inverse.to(device, dtype)
