"""Laws that pair entries: expanded fast in eager mode, by plain operations in a trace.

The entries of a pair are equal, or one is minus the other. A law gives two formulas, that of the
expansion (free values → weight) and that of its adjoint (the sum over each orbit). In eager mode a
weight is made by one node of the graph (`LinearMap`): a large one by the formula; one of middle
size, or a part of that size of a large one, by one look-up, and its gradient by two, since there
the number of operations is all that counts. The tables are made once for all weights of a shape,
and belong to no layer and no checkpoint. `TABLE_ENTRIES` bounds them, so that they stay far below
what a large weight takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from tiedparam.laws.linear_map import LinearMap
from tiedparam.laws.look_up import SMALL
from tiedparam.util.torch_modes import is_eager

TABLE_ENTRIES = 147_456
"""Up to so many entries are looked up: the weight of 128 × 128 channels with a 3×3 kernel."""
_SHAPES = 16  # whose tables are kept: 10 MB at most, and as much for their adjoints


@dataclass(frozen=True)
class Expansion(LinearMap):
    """A linear map from free values to a weight, by formulas.

    Attributes:
        formula: ``(free, sizes) → weight``, differentiable.
        adjoint: ``(weight, sizes) → free``, called without gradients only.
        sizes: what both need to know.
        shape: the weight's shape.
        count: how many free values there are.
        looked_up: whether that is faster than the formula.
        small: whether the weight is small enough for torch's own ``take``.
    """

    formula: Callable[[Tensor, Any], Tensor]
    adjoint: Callable[[Tensor, Any], Tensor]
    sizes: Any
    shape: tuple[int, ...]
    count: int
    looked_up: bool
    small: bool

    def __call__(self, free: Tensor) -> Tensor:
        """Expand, by the way that is fastest here."""
        if not is_eager(free):
            return self.formula(free, self.sizes).reshape(self.shape)
        look_up = self.look_up(free) if self.small else None
        if look_up is not None:
            return look_up(free)
        if free.requires_grad and torch.is_grad_enabled():
            return self.recorded(free)
        return self.expand(free)

    def expand(self, free: Tensor) -> Tensor:
        """By a look-up or by the formula."""
        if not self.looked_up:
            return self.formula(free, self.sizes).view(self.shape)
        places = _places(self.formula, self.sizes, self.count)
        values = _beside_negatives(free.reshape(1, -1)) if places.signed else free
        # of one row: a look-up along the last of two axes costs more
        return values.reshape(-1).index_select(0, places.columns).view(self.shape)

    def fold(self, weight: Tensor) -> Tensor:
        """By two look-ups or by the formula of the adjoint."""
        if not self.looked_up:
            return self.adjoint(weight, self.sizes)
        return fold_pairs(self.formula, weight.view(-1), self.sizes, self.count)


@functools.lru_cache(_SHAPES)
def shared_expansion(
    expand: Callable[[Tensor, Any], Tensor],
    fold: Callable[[Tensor, Any], Tensor],
    sizes: Any,
    shape: tuple[int, ...],
    count: int,
    most_entries: int = TABLE_ENTRIES,
) -> Expansion:
    """One for all layers of a shape: torch 2.6 compiles them anew for another object.

    Args:
        expand: the formula.
        fold: that of the adjoint.
        sizes: what both need to know.
        shape: the weight's shape.
        count: how many free values there are.
        most_entries: weights of so many are looked up, larger ones are made by the formula.
    """
    entries = prod(shape)
    return Expansion(expand, fold, sizes, shape, count, entries <= most_entries, entries <= SMALL)


def look_up(
    expand: Callable[[Tensor, Any], Tensor],
    free: Tensor,
    sizes: Any,
    entries: int,
    unrecorded: bool,
) -> Tensor:
    """``expand(row, sizes)`` for every row of ``(n, free values)``, as ``(n, entries)``."""
    if unrecorded:
        places = _places(expand, sizes, free.shape[1])
        values = _beside_negatives(free) if places.signed else free
        return values.index_select(1, places.columns)
    return expand(free, sizes).reshape(len(free), entries)


def fold_pairs(
    expand: Callable[[Tensor, Any], Tensor], weight: Tensor, sizes: Any, count: int
) -> Tensor:
    """The adjoint of `look_up`, if no free value stands for more than two entries.

    Args:
        expand: the formula.
        weight: ``(n, entries)``, or the entries of one weight.
        sizes: what the formula needs to know.
        count: how many free values there are.
    """
    members = _members(expand, sizes, count)
    first, second = (weight.index_select(-1, places) for places in (members.first, members.last))
    if members.signs is not None:
        first, second = first * members.signs[0], second * members.signs[1, : members.paired]
    if members.single is None:
        first.narrow(-1, 0, members.paired).add_(second)
        return first
    # where, since for a single entry the sum would count it twice
    return torch.where(members.single, first, first + second)


@dataclass(frozen=True)
class _Places:
    """Where each entry's value stands in what is looked up.

    Attributes:
        columns: for each entry; int32.
        signed: whether that is the free values, their negatives and a 0, or the free values alone.
    """

    columns: Tensor
    signed: bool


@dataclass(frozen=True)
class _Members:
    """The two entries of each free value.

    Attributes:
        first: the first one's place, in int32.
        last: the last one's, of the first ``paired`` values.
        paired: how many values come before those that all have one entry only.
        single: whether the two are the same; None if that is so from ``paired`` on alone.
        signs: ``(2, values)``, those of the first and of the last one; None if all are 1.
    """

    first: Tensor
    last: Tensor
    paired: int
    single: Tensor | None
    signs: Tensor | None


def _beside_negatives(free: Tensor) -> Tensor:
    """``(n, values)`` → ``(n, 2 · values + 1)``: the values, their negatives, and a 0."""
    return torch.cat([free, -free, free.new_zeros(len(free), 1)], 1)


@functools.lru_cache(_SHAPES)
def _places(expand: Callable[[Tensor, Any], Tensor], sizes: Any, count: int) -> _Places:
    """For each entry of the weight the place of its free value."""
    labels = _labels(expand, sizes, count)
    with torch.inference_mode(False), torch.no_grad():
        columns = torch.where(labels < 0, count - labels, labels) - 1
        columns = torch.where(labels == 0, 2 * count, columns)
        return _Places(columns, bool((labels <= 0).any()))


def _labels(expand: Callable[[Tensor, Any], Tensor], sizes: Any, count: int) -> Tensor:
    """The number of each entry's free value, from 1, negative where it is minus it; or 0."""
    with torch.inference_mode(False), torch.enable_grad():
        # recorded, so that the formula itself is used; float64 counts exactly
        numbers = torch.arange(1, count + 1, dtype=torch.float64, device="cpu", requires_grad=True)
        return expand(numbers[None], sizes).detach().flatten().to(torch.int32)


@functools.lru_cache(_SHAPES)
def _members(expand: Callable[[Tensor, Any], Tensor], sizes: Any, count: int) -> _Members:
    """The first and the last entry of each free value."""
    labels = _labels(expand, sizes, count)
    with torch.inference_mode(False), torch.no_grad():
        entries = labels.nonzero()[:, 0]
        places = labels[entries].abs().long() - 1
        first, last = (
            torch.zeros(count, dtype=torch.int64, device="cpu").scatter_reduce_(
                0, places, entries, which, include_self=False
            )
            for which in ("amin", "amax")
        )
        signs = torch.stack([labels[first], labels[last]]).sign().to(torch.int8)
        signed = bool((signs < 0).any())
        single, paired = first == last, int((first != last).sum())
        if bool(single[:paired].any()):
            paired = count
        return _Members(
            first.to(torch.int32),
            last[:paired].to(torch.int32),
            paired,
            single if paired == count and bool(single.any()) else None,
            signs if signed else None,
        )
