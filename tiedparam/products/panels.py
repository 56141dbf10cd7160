"""Products with symmetric and skew matrices that are stored as panels, and never made whole.

Of a symmetric matrix only the part below the diagonal is stored. Each panel of it serves twice,
once as it is and once transposed, so that a product reads half of the memory that it would read
of the whole matrix, and nothing need be expanded, nor folded backward. Only small squares along
the diagonal are looked up, one tile after the other, so that they stay in the cache. How the values
lie is said in `tiedparam.products.packed_tiles`.

The gradient of the input is the same product; that of the values has as many multiplications as
the dense one, and half of its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from tiedparam.products.opaque import Opaque
from tiedparam.products.packed_tiles import Frame, Sign, frame_of, packed_count
from tiedparam.products.transposition import transposed

_PAGE = 4096  # bytes; rows of a matrix that lie so far apart meet in the same places of a cache
_PAD = 32  # entries after each row, which move them apart


def symmetric_product(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    sign: Sign = 1,
    *,
    groups: int = 1,
    axes: int = 0,
) -> Tensor:
    """``W · input + bias`` for the symmetric or skew ``W`` whose values are ``packed``.

    Second derivatives are products of the same kind. For CPU tensors of one dtype; in compiled
    graphs it is one operator.

    Args:
        input: ``(..., groups · n, *positions)``.
        packed: ``(groups · n(n + sign)/2,)``, in the order of `tiedparam.products.packed_tiles`.
        bias: ``(groups · n,)`` or None.
        sign: of ``W[j, i] = sign · W[i, j]``.
        groups: of features, each with a matrix of its own.
        axes: how many positions' axes follow the features'; 0 for a Linear layer.

    Returns:
        The input's shape, contiguous and in memory of its own.

    As in:
        >>> from tiedparam.products.panels import symmetric_product
        >>> symmetric_product(torch.eye(2), torch.tensor([2.0, 0.0, 1.0]))
        tensor([[0., 2.],
                [2., 1.]])
    """
    return _PRODUCT(input, packed, bias, sign, groups, axes)


def _forward(
    input: Tensor, packed: Tensor, bias: Tensor | None, sign: Sign, groups: int, axes: int
) -> Tensor:
    output = input.new_empty(input.shape)
    if not input.numel():
        return output
    x, y = _by_groups(input, groups, axes), _by_groups(output, groups, axes)
    for group, values in enumerate(packed.view(groups, -1).unbind()):
        frame = frame_of(x.shape[2], sign)
        offset = None if bias is None else bias.view(groups, -1)[group]
        for part in _parts(x):
            _multiply(frame, x[part, group], values, offset, y[part, group])
    return output


def _backward(
    needs: Sequence[bool],
    gradient: Tensor,
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    sign: Sign,
    groups: int,
    axes: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    d_input = d_packed = d_bias = None
    if needs[1]:  # first, while the room of the input's gradient is free
        d_packed = _OUTER(gradient, input, sign, groups, axes)
    if needs[0]:
        d_input = _PRODUCT(gradient, packed, None, sign, groups, axes)
        d_input = d_input if sign == 1 else d_input.neg_()
    if needs[2]:
        d_bias = _by_groups(gradient, groups, axes).sum((0, 3)).flatten()
    return d_input, d_packed, d_bias


_PRODUCT: Opaque = Opaque(
    "symmetric_product"
    "(Tensor input, Tensor packed, Tensor? bias, int sign, int groups, int axes) -> Tensor",
    _forward,
    _backward,
    lambda input, *rest: input.new_empty(input.shape),
)


def _forward_outer(left: Tensor, right: Tensor, sign: Sign, groups: int, axes: int) -> Tensor:
    """The values of ``left · rightᵀ``, each with its mirror image's: the gradient of ``packed``."""
    packed = _values_like(left, right, sign, groups, axes)
    if not left.numel():
        return packed.zero_()
    a, b = _by_groups(left, groups, axes), _by_groups(right, groups, axes)
    for group, values in enumerate(packed.view(groups, -1).unbind()):
        frame = frame_of(a.shape[2], sign)
        for number, part in enumerate(_parts(a)):
            _fold_product(frame, a[part, group], b[part, group], values, add=number > 0)
    return packed


def _backward_outer(
    needs: Sequence[bool],
    gradient: Tensor,
    left: Tensor,
    right: Tensor,
    sign: Sign,
    groups: int,
    axes: int,
) -> tuple[Tensor | None, Tensor | None]:
    d_left = d_right = None
    if needs[0]:
        d_left = _PRODUCT(right, gradient, None, sign, groups, axes)
    if needs[1]:
        d_right = _PRODUCT(left, gradient, None, sign, groups, axes)
        d_right = d_right if sign == 1 else -d_right
    return d_left, d_right


def _values_like(left: Tensor, right: Tensor, sign: Sign, groups: int, axes: int) -> Tensor:
    n = left.shape[left.dim() - axes - 1] // groups
    return left.new_empty(groups * packed_count(n, sign))


_OUTER: Opaque = Opaque(
    "symmetric_outer(Tensor left, Tensor right, int sign, int groups, int axes) -> Tensor",
    _forward_outer,
    _backward_outer,
    _values_like,
)


# One product, on some samples -------------------------------------------------------------


def _by_groups(tensor: Tensor, groups: int, axes: int) -> Tensor:
    """``(..., groups · n, *positions)`` → ``(samples, groups, n, positions)``."""
    before = tensor.dim() - axes - 1
    shape, sizes = tensor.shape[:before], tensor.shape[before + 1 :]
    n = tensor.shape[before] // groups
    return tensor.reshape(prod(shape), groups, n, prod(sizes))


def _parts(x: Tensor) -> Iterator[slice]:
    """Samples that are multiplied at a time: their buffers take less than the packed values."""
    samples, _, n, positions = x.shape
    step = max(1, max(64, n // 8) // positions)
    for start in range(0, samples, step):
        yield slice(start, min(samples, start + step))


def _multiply(
    frame: Frame, input: Tensor, packed: Tensor, bias: Tensor | None, output: Tensor
) -> None:
    """``output = W · input + bias``; both are ``(samples, n, positions)``."""
    samples, n, positions = input.shape
    x = _rows(input)
    y = _empty(input, samples * positions).zero_()
    for tile in frame.tiles:
        for (first, stop), square in tile.squares_of(packed):
            y[:, first:stop].addmm_(x[:, first:stop], square.t())
        for (top, bottom), (left, right), panel in tile.panels_of(packed):
            y[:, top:bottom].addmm_(x[:, left:right], panel.t())
            y[:, left:right].addmm_(x[:, top:bottom], panel, alpha=frame.sign)
    # positions last, as they are in the output
    products = y[:, :, None]
    if positions > 1:
        products = transposed(y.reshape(samples, positions, n), True)
    if bias is None:
        output.copy_(products)
    else:
        torch.add(products, bias[:, None], out=output)


def _fold_product(frame: Frame, left: Tensor, right: Tensor, packed: Tensor, *, add: bool) -> None:
    """``packed`` = the values of ``left · rightᵀ``, or more by them.

    Both products of a panel are one, of twice as many rows.
    """
    count = len(left) * left.shape[2]
    rows = _empty(left, 3 * count)
    rows[:count] = _flat(left)
    rows[count : 2 * count] = _flat(right)
    torch.mul(rows[:count], frame.sign, out=rows[2 * count :])
    a, b = rows[: 2 * count].t(), rows[count:]
    for tile in frame.tiles:
        squares = tile.empty_squares(packed)
        for (start, stop), square in squares:
            torch.mm(a[start:stop], b[:, start:stop], out=square)
        tile.pack([square for _, square in squares], packed, add=add)
        for (top, bottom), (start, stop), panel in tile.panels_of(packed):
            panel.addmm_(a[top:bottom], b[:, start:stop], beta=int(add))


def _rows(part: Tensor) -> Tensor:
    """``(samples, n, positions)`` → ``(samples · positions, n)``."""
    rows = _flat(part)
    apart = _empty(part, len(rows))
    return apart.copy_(rows) if apart.stride(0) > rows.shape[1] else rows.contiguous()


def _flat(part: Tensor) -> Tensor:
    """The same as it comes: a view where there is one position."""
    if part.shape[2] == 1:
        return part[:, :, 0]
    return transposed(part, True).view(-1, part.shape[1])


def _empty(like: Tensor, count: int) -> Tensor:
    """``(count, n)`` for rows that do not all meet in the same place of a cache."""
    n = like.shape[1]
    pad = _PAD if n * like.element_size() % _PAGE == 0 else 0
    return like.new_empty(count, n + pad)[:, :n]
