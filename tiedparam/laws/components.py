"""Which entries an orbit has: the connected components of signed equalities.

An equality says that one entry is another, or minus it. So the graph has two nodes for each
entry, it and its negative, and an entry that is connected with its own negative is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def of_equalities(images: Sequence[Tensor], count: int) -> Tensor:
    """The first member of the orbit of each entry, from 1; negative if it is minus that, or 0.

    Args:
        images: for each symmetry the number of the entry that each entry equals, from 1, negative
            where it is minus that entry, 0 where nothing is said.
        count: how many entries there are.
    """
    node = _smallest_nodes(images, count).view(count, 2)
    first = node[:, 0] // 2 + 1
    signed = torch.where(node[:, 0] % 2 == 1, -first, first)
    return torch.where(node[:, 0] == node[:, 1], 0, signed)


def of_group(images: Sequence[Tensor], count: int) -> Tensor:
    """`of_equalities`, in one pass: the symmetries are all elements of a group."""
    beyond = count + 1
    positive = torch.arange(1, count + 1, device="cpu")
    negative = torch.full((count,), beyond, device="cpu")
    for image in images:
        positive = torch.where((image > 0) & (image < positive), image, positive)
        negative = torch.where((image < 0) & (-image < negative), -image, negative)
    signed = torch.where(positive <= negative, positive, -negative)
    return torch.where(positive == negative, 0, signed)


def are_closed(first: Tensor, images: Sequence[Tensor]) -> bool:
    """Whether every equality holds among these orbits.

    Args:
        first: for each entry a member of its orbit that is not later, as `of_equalities` gives it.
        images: the equalities, of which every one says something of every entry.
    """
    return all(torch.equal(first[image.abs() - 1] * image.sign(), first) for image in images)


def _smallest_nodes(images: Sequence[Tensor], count: int) -> Tensor:
    """For each node, two for each entry, the smallest one that it is connected with.

    Each node points to a smaller one or to itself. Nodes and what they point to are hung below the
    smallest that their neighbours reach in two steps, until nothing moves, which takes O(log n)
    rounds (Zhang, Azad, Buluç 2020, "FastSV: a distributed-memory connected component algorithm
    with fast convergence").
    """
    left, right = _edges(images, count)
    parent = torch.arange(2 * count, device="cpu")
    while True:
        above = parent[parent]
        smaller = torch.minimum(above[left], above[right])
        moved = above.clone()
        for node in (parent[left], parent[right], left, right):
            moved.scatter_reduce_(0, node, smaller, "amin")
        if torch.equal(moved, parent):
            return parent
        parent = moved


def _edges(images: Sequence[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The equalities as pairs of nodes: entry ``e`` is node ``2e``, its negative ``2e + 1``."""
    entry = torch.arange(count, device="cpu")
    lefts, rights = [], []
    for image in images:
        said = (image != 0) & (image != entry + 1)
        left, number = 2 * entry[said], image[said]
        right = 2 * (number.abs() - 1) + (number < 0)
        lefts += [left, left + 1]
        rights += [right, right ^ 1]
    if not lefts:
        return entry[:0], entry[:0]
    return torch.cat(lefts), torch.cat(rights)
