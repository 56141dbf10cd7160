"""Kernels of which ``W[j, i]`` is ``W[i, j]`` reversed, or minus that, made as whole rows.

Read kernel by kernel, a block of ``c × c`` channels is a diagonal kernel, then ``c`` others, then
the next diagonal kernel, and so on. The first half of each such run is free, and the second half
holds images: that of place ``e`` of run ``r`` is place ``c − 1 − e`` of run ``r + e``, counted
modulo the ``c − 1`` runs. So the free kernels lie in the weight as a rectangle, and half of the
weight is copied in long rows; the images are one look-up of whole kernels, by a table of half as
many places as there are kernels, in a buffer that is reversed as a whole, which costs a third of
reversing kernel by kernel. With an odd ``c`` the place in the middle is free in the first half of
the runs, and has their images in the others.

The free values, flat: for each group the free kernels, run by run; then of every diagonal kernel
its first half; then, if the kernel has a middle, that of every diagonal kernel, but not with the
sign −1, where it is 0.

The table belongs to all weights of a shape, to no layer and to no checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tiedparam.util.torch_modes import is_unrecorded, plain_numbers


class Kernels(NamedTuple):
    """The sizes of a weight whose kernels mirror each other.

    Attributes:
        groups: how many blocks.
        c: channels of each, inputs and outputs.
        positions: entries of a kernel.
        sign: that of the image.
    """

    groups: int
    c: int
    positions: int
    sign: Literal[1, -1]

    @property
    def pairs(self) -> int:
        """Free kernels of a block, the diagonal aside."""
        return self.c * (self.c - 1) // 2

    @property
    def half(self) -> int:
        """Entries of a diagonal kernel that have an image in it."""
        return self.positions // 2

    @property
    def middles(self) -> int:
        """Entries of all diagonal kernels that are their own images, and free."""
        return self.groups * self.c if self.positions % 2 and self.sign == 1 else 0

    @property
    def free_count(self) -> int:
        """Of a weight."""
        of_pairs = self.groups * self.pairs * self.positions
        return of_pairs + self.groups * self.c * self.half + self.middles


def free_of(weight: Tensor, sizes: Kernels) -> Tensor:
    """The free values that lie in a weight, flat, in memory of their own (S15)."""
    groups, c, positions, _ = sizes
    kernels = weight.reshape(groups, c * c, positions)
    diagonal = kernels[:, :: c + 1]
    between = _between(kernels, sizes)
    runs = [between[:, first:last, : free * positions].flatten(1) for first, last, free in _runs(c)]
    values = [torch.cat(runs, 1).flatten()] if runs else []
    values.append(diagonal[..., : sizes.half].flatten())
    if sizes.middles:
        values.append(diagonal[..., sizes.half].flatten())
    return torch.cat(values)


def expand(free: Tensor, sizes: Kernels) -> Tensor:
    """The weight, ``(groups·c, c, positions)``, from its free values in any shape."""
    groups, c, positions, sign = sizes
    if not is_unrecorded(free):
        return _in_plain_operations(free.reshape(-1), sizes)
    values, plan = free.contiguous().view(-1), _plan(sizes)
    weight = values.new_empty(groups * c, c, positions)
    if plan.runs:
        reversed_ = values.narrow(0, 0, plan.split).flip(0)
        images = reversed_.view(-1, positions).index_select(0, plan.images)
    for run in plan.runs:  # as_strided: one small step instead of four, which take as long as these
        weight.as_strided(*run.own).copy_(values.as_strided(*run.free))
        if sign == 1:
            weight.as_strided(*run.images).copy_(images.as_strided(*run.looked_up))
        else:
            torch.neg(images.as_strided(*run.looked_up), out=weight.as_strided(*run.images))
    if sign == 1:
        diagonal = values.index_select(0, plan.diagonal).view(plan.on_diagonal[0])
    else:
        diagonal = _diagonal(values[plan.split :], sizes)
    weight.as_strided(*plan.on_diagonal).copy_(diagonal)
    return weight


def fold(weight: Tensor, sizes: Kernels) -> Tensor:
    """The adjoint of `expand`: each free value's entry plus its image's, or minus it; flat."""
    positions, sign, plan, flat = sizes.positions, sizes.sign, _plan(sizes), weight.view(-1)
    free = weight.new_empty(sizes.free_count)
    if plan.runs:
        mirrors = weight.view(-1, positions).index_select(0, plan.mirrors).view(-1).flip(0)
    for run in plan.runs:
        own, mirrored = flat.as_strided(*run.own), mirrors.as_strided(*run.free)
        torch.add(own, mirrored, alpha=sign, out=free.as_strided(*run.free))
    torch.index_select(flat, 0, plan.first, out=free.narrow(0, plan.split, len(plan.first)))
    halves = free.narrow(0, plan.split, len(plan.last))
    halves.add_(flat.index_select(0, plan.last), alpha=sign)
    return free


def _in_plain_operations(values: Tensor, sizes: Kernels) -> Tensor:
    """The same for traces: no tables, and gradients that are no scatter."""
    groups, c, positions, sign = sizes
    pairs = values[: groups * sizes.pairs * positions].reshape(groups, -1, positions)
    diagonal = _diagonal(values[groups * sizes.pairs * positions :], sizes)
    if c == 1:
        return diagonal.reshape(groups, 1, positions)
    rows, taken = [], 0
    for first, last, free in _runs(c):
        count = (last - first) * free
        own = pairs[:, taken : taken + count].reshape(groups, last - first, free, positions)
        empty = own.new_zeros(groups, last - first, c - free, positions)
        rows.append(torch.cat([diagonal[:, first:last, None], own, empty], 2).flatten(1, 2))
        taken += count
    kernels = torch.cat([*rows, diagonal[:, -1:]], 1).reshape(groups, c, c, positions)
    images = kernels.transpose(1, 2).flip(-1)
    # run by run, as an exporter may write each step into the file: truth values take least there
    place = torch.arange(c + 1, device=pairs.device)
    masks = [(place <= free).expand(last - first, -1).flatten() for first, last, free in _runs(c)]
    is_free = torch.cat([*masks, place[:1] == 0]).reshape(c, c, 1)
    return torch.where(is_free, kernels, images if sign == 1 else -images).reshape(
        groups * c, c, positions
    )


def _diagonal(values: Tensor, sizes: Kernels) -> Tensor:
    """The diagonal kernels, ``(groups, c, positions)``."""
    groups, c, positions, sign = sizes
    count = groups * c * sizes.half
    halves = values[:count].reshape(groups, c, sizes.half)
    images = halves.flip(-1)
    parts = [halves, images if sign == 1 else -images]
    if sizes.middles:
        parts.insert(1, values[count:].reshape(groups, c, 1))
    elif positions % 2:
        parts.insert(1, halves.new_zeros(groups, c, 1))
    return torch.cat(parts, -1)


def _runs(c: int) -> list[tuple[int, int, int]]:
    """First run, last but one, and how many kernels of each are free."""
    if c % 2 == 0:
        return [(0, c - 1, c // 2)]
    return [(0, c // 2, c // 2 + 1), (c // 2, c - 1, c // 2)] if c > 1 else []


def _between(kernels: Tensor, sizes: Kernels) -> Tensor:
    """What lies between the diagonal kernels, ``(groups, c − 1, c · positions)``."""
    groups, c, positions, _ = sizes
    rows = kernels[:, :-1].reshape(groups, c - 1, (c + 1) * positions)
    return rows[..., positions:]


_View = tuple[tuple[int, int, int], tuple[int, int, int], int]  # of `Tensor.as_strided`


class _Run(NamedTuple):
    """Runs that have as many free kernels: views of flat, contiguous tensors.

    Attributes:
        own: of the weight, the free kernels.
        free: of the free values, the same.
        images: of the weight, the images.
        looked_up: of what is looked up, the same.
    """

    own: _View
    free: _View
    images: _View
    looked_up: _View


class _Plan(NamedTuple):
    """Where what is copied to. The tables are int32.

    Attributes:
        split: where the free values of the diagonal begin.
        runs: what is copied in rows.
        images: for each image of the weight its free kernel, in the reversed free kernels.
        mirrors: for each free kernel, in reversed order, the place of its image in the weight.
        on_diagonal: a view of the weight, the kernels ``(groups, c, positions)``.
        diagonal: for each entry of these its free value; its image's, if it has none.
        first: for each free value of the diagonal its entry in the weight.
        last: its image's, of those that have one.
    """

    split: int
    runs: tuple[_Run, ...]
    images: Tensor
    mirrors: Tensor
    on_diagonal: _View
    diagonal: Tensor
    first: Tensor
    last: Tensor


@functools.lru_cache(16)
def _plan(sizes: Kernels) -> _Plan:
    """That of a shape."""
    groups, c, positions, _ = sizes
    kernel, block, count = (c + 1) * positions, c * c * positions, sizes.pairs * positions
    runs, taken, looked_up = [], 0, 0
    for first, last, free in _runs(c):
        own, other = (n * positions for n in (free, c - free))
        start, rows = first * kernel + positions, last - first
        runs.append(
            _Run(
                ((groups, rows, own), (block, kernel, 1), start),
                ((groups, rows, own), (count, own, 1), taken),
                ((groups, rows, other), (block, kernel, 1), start + own),
                ((groups, rows, other), (count, other, 1), looked_up),
            )
        )
        taken, looked_up = taken + rows * own, looked_up + rows * other
    split = groups * count
    with plain_numbers():
        group, channel = (
            torch.arange(groups, device="cpu")[:, None, None],
            torch.arange(c, device="cpu")[:, None],
        )
        position = torch.arange(positions, device="cpu")
        entries = group * block + channel * kernel + position
        mirrored = torch.minimum(position, positions - 1 - position)
        of_halves = split + (group * c + channel) * sizes.half + mirrored
        of_middles = split + (groups * sizes.half + group) * c + channel
        diagonal = torch.where(mirrored < sizes.half, of_halves, of_middles)
        halves = entries[..., : sizes.half].flatten()
        middles = entries[..., sizes.half : positions - sizes.half].flatten()
        images_of_own = entries.flip(-1)[..., : sizes.half]
        tables = (
            *_kernel_tables(groups, c),
            diagonal.flatten(),
            torch.cat([halves, middles]) if sizes.middles else halves,
            images_of_own.flatten(),
        )
        images, mirrors, *of_diagonal = (table.to(torch.int32) for table in tables)
    on_diagonal = (groups, c, positions), (block, kernel, 1), 0
    return _Plan(split, tuple(runs), images, mirrors, on_diagonal, *of_diagonal)


def _kernel_tables(groups: int, c: int) -> tuple[Tensor, Tensor]:
    """``images`` and ``mirrors`` of `_Plan`."""
    runs = _runs(c)
    if not runs:
        return torch.empty(0, device="cpu"), torch.empty(0, device="cpu")
    between = torch.arange(c * c, device="cpu")[:-1].view(c - 1, c + 1)[:, 1:]
    own = torch.cat([between[first:last, :free].flatten() for first, last, free in runs])
    others = torch.cat([between[first:last, free:].flatten() for first, last, free in runs])
    mirrors = own % c * c + own // c
    number, group = (
        torch.empty(c * c, dtype=torch.int64, device="cpu"),
        torch.arange(groups, device="cpu")[:, None],
    )
    number[mirrors] = torch.arange(len(own), device="cpu")
    images = (groups - group) * len(own) - 1 - number[others]
    return images.flatten(), (group * c * c + mirrors).flatten().flip(0)


# Earlier orders of flip_sym's values, of matrices too ------------------------------------


def shape_of_layout_2(sizes: Kernels) -> tuple[int, int]:
    """That of the one tensor."""
    columns = sizes.c if sizes.free_count % sizes.c == 0 else sizes.c // 2
    return sizes.free_count // columns, columns


def shapes_of_layout_1(sizes: Kernels) -> list[tuple[int, ...]]:
    """Those of the first half of the positions, and of the middle."""
    groups, c, positions, _ = sizes
    halves = [(groups * c, c, positions // 2)] if positions > 1 else []
    return [*halves, (groups, c * (c + 1) // 2)] if positions % 2 else [*halves]


def of_layout_1(free: Sequence[Tensor], sizes: Kernels) -> Tensor:
    """The canonical weight ``(groups, c, c, positions)``: halves kernel by kernel, then the middle.

    The middle is in rectangular full packed format (LAPACK working note 199): the lower triangle
    ``[[A, 0], [B, D]]`` is a rectangle of ``A`` and ``B``, and in the corner that ``A`` leaves free
    is ``Dᵀ``.
    """
    groups, c, positions, _ = sizes
    parts = []
    if positions > 1:
        halves = free[0].reshape(groups, c, c, positions // 2)
        parts = [halves, halves.transpose(1, 2).flip(-1)]
    if positions % 2:
        even, columns = 1 - c % 2, (c + 1) // 2
        rectangle = free[-1].reshape(groups, c + even, columns)
        corner = rectangle[:, : c // 2, 1 - even :].transpose(1, 2)
        lower = torch.cat([rectangle[:, even:], F.pad(corner, (0, 0, columns, 0))], 2)
        middle = lower.tril() + lower.tril(-1).transpose(1, 2)
        parts.insert(1, middle[..., None])
    return torch.cat(parts, -1)


def of_layout_2(halves: Tensor, middle: Tensor | None, sizes: Kernels) -> Tensor:
    """The weight ``(groups, c, c, positions)``: slices of the first half of the positions.

    Args:
        halves: those, one after the other.
        middle: the slice in the middle of odd kernels, ``(groups, c, c)``.
        sizes: of the weight.
    """
    groups, c, _, sign = sizes
    slices = halves.reshape(-1, groups, c, c)
    images = slices.transpose(2, 3).flip(0)
    between = [] if middle is None else [middle[None]]
    every = [slices, *between, images if sign == 1 else -images]
    return torch.cat(every).permute(1, 2, 3, 0)
