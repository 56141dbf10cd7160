"""Products over the group of quarter turns, ``y[o, g] = Σ w[o, i, h − g] x[i, h]``, by Fourier.

Over four elements the transform is real: ``a + b + c + d``, ``a − b + c − d``, and the pair
``a − c``, ``b − d``, which is one complex number. What was a convolution over the group is there
one product for the first, one for the second and a complex one: 6 products of ``(O, I)`` and not
16. Images are transformed some at a time, so that they stay in the caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tiedparam.products.opaque import Opaque
from tiedparam.util.torch_private import reshaped_in_place

BLOCK_BYTES = 2 << 20
"""Of the images that are transformed at a time."""

_Matrices = tuple[Tensor, Tensor, Tensor]
"""Of the sums and of the alternating sums, ``(O, I)``, and of the differences, ``(2·O, 2·I)``."""


def _product(x: Tensor, free: Tensor, bias: Tensor | None) -> Tensor:
    outputs = free.shape[0]
    answers = _through(_fields(x), _matrices(free))
    if bias is not None:
        answers += bias.view(outputs, 4, 1)
    return reshaped_in_place(answers, (*x.shape[:-3], 4 * outputs, *x.shape[-2:]))


def _gradients(
    needs: Sequence[bool], gradient: Tensor, x: Tensor, free: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    answers = _fields(gradient)
    of_x = of_free = None
    if needs[0]:
        sums, alternating, differences = _matrices(free)
        of_x = _through(answers, (sums.t(), alternating.t(), differences.t())).view(x.shape)
    if needs[1]:
        of_free = _of_free(answers, _fields(x))
    return of_x, of_free, answers.sum((0, 3)).view(-1) if needs[2] else None


def _fields(x: Tensor) -> Tensor:
    """``(*, 4·fields, height, width)`` → ``(samples, fields, 4, positions)``."""
    channels, height, width = x.shape[-3:]
    samples = x.numel() // max(1, channels * height * width) if x.dim() > 3 else 1
    return x.reshape(samples, channels // 4, 4, height * width)


def _transformed(fields: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, alternating sums, and differences in pairs."""
    near, far = fields[:, :, :2], fields[:, :, 2:]
    first, second = (near + far).unbind(2)
    samples, count, _, positions = fields.shape
    return first + second, first - second, (near - far).reshape(samples, 2 * count, positions)


def _through(fields: Tensor, matrices: _Matrices) -> Tensor:
    """Transform, multiply, transform back."""
    if torch.is_grad_enabled():
        even, odd = _multiplied(fields, matrices)
        return torch.cat([even + odd, even - odd], 2)
    samples, _, _, positions = fields.shape
    answers = fields.new_empty(samples, matrices[0].shape[0], 4, positions)
    for start, stop in _blocks(fields):
        even, odd = _multiplied(fields[start:stop], matrices)
        torch.add(even, odd, out=answers[start:stop, :, :2])
        torch.sub(even, odd, out=answers[start:stop, :, 2:])
    return answers


def _multiplied(fields: Tensor, matrices: _Matrices) -> tuple[Tensor, Tensor]:
    """What answers ``g`` and ``g + 2`` have in common, and in what they are opposite."""
    total, alternating, odd = (
        torch.matmul(matrix, part)
        for matrix, part in zip(matrices, _transformed(fields), strict=True)
    )
    even = torch.stack([total + alternating, total - alternating], 2)
    return even, odd.view(even.shape)


def _matrices(free: Tensor) -> _Matrices:
    """The transform of ``(O, I, 4)``, with the factors of the way back."""
    outputs, inputs, _ = free.shape
    a, b, c, d = free.permute(2, 0, 1).contiguous().unbind(0)
    even, odd = (a + c) / 4, (b + d) / 4
    p, q = (a - c) / 2, (b - d) / 2
    pairs = torch.stack([torch.stack([p, q], 2), torch.stack([-q, p], 2)], 1)
    return even + odd, even - odd, pairs.view(2 * outputs, 2 * inputs)


def _of_free(answers: Tensor, fields: Tensor) -> Tensor:
    """The adjoint of `_matrices`, of the products of the gradients with the inputs."""
    outputs, inputs = answers.shape[1], fields.shape[1]
    every: list[list[Tensor]] = [[], [], []]
    for start, stop in _blocks(fields):
        parts = zip(
            every, _transformed(answers[start:stop]), _transformed(fields[start:stop]), strict=True
        )
        for products, answer, field in parts:
            products.append(torch.bmm(answer, field.transpose(1, 2)).sum(0))
    total, alternating, pairs = (torch.stack(products).sum(0) for products in every)
    pairs = pairs.view(outputs, 2, inputs, 2)
    even, odd = (total + alternating) / 4, (total - alternating) / 4
    p = (pairs[:, 0, :, 0] + pairs[:, 1, :, 1]) / 2
    q = (pairs[:, 0, :, 1] - pairs[:, 1, :, 0]) / 2
    return torch.stack([even + p, odd + q, even - p, odd - q], 2)


def _blocks(fields: Tensor) -> Iterator[tuple[int, int]]:
    samples, count, _, positions = fields.shape
    step = max(1, BLOCK_BYTES // max(1, 4 * count * positions * fields.element_size()))
    for start in range(0, max(1, samples), step):  # one at least, from which zeros follow
        yield start, min(samples, start + step)


quarter_turn_product: Opaque = Opaque(
    "quarter_turn_product(Tensor x, Tensor free, Tensor? bias) -> Tensor",
    _product,
    _gradients,
    lambda x, free, bias: x.new_empty(*x.shape[:-3], 4 * free.shape[0], *x.shape[-2:]),
)
"""``(x, free, bias)``: ``(*, 4·I, height, width)``, ``(O, I, 4)``, ``(4·O,)`` → ``(*, 4·O, …)``.

Channels are (field, turn), the turn fastest; ``free[o, i, k]`` is what input ``k`` turns on does to
an output. It rounds sums of four before they are multiplied: the error is at most a few times the
dense layer's bound, ``4·I·ε·|W||x|``, in the norm of each field.
"""
