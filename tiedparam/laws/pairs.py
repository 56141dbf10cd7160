"""Laws that pair entries: expanded fast in eager mode, by plain operations in a trace.

A law gives two formulas, that of the expansion (free values → weight) and that of its adjoint (the
sum over each orbit). In eager mode

* a large weight is made by one node of the graph (`LinearMap`);
* a small weight, or a small part of a large one, is one look-up, since there the number of
  operations is all that counts. The table is made once for all weights of a shape, and belongs
  to no layer and no checkpoint. `TABLE_ENTRIES` bounds it, so that it stays far below what a
  large weight takes.
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
from tiedparam.laws.matrices import is_eager

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
    """

    formula: Callable[[Tensor, Any], Tensor]
    adjoint: Callable[[Tensor, Any], Tensor]
    sizes: Any
    shape: tuple[int, ...]

    def __call__(self, free: Tensor) -> Tensor:
        """Expand, by the way that is fastest here."""
        if not is_eager(free):
            return self.expand(free).reshape(self.shape)
        if prod(self.shape) <= TABLE_ENTRIES:
            places = _places(self.formula, self.sizes, free.numel())
            return free.view(-1).index_select(0, places).view(self.shape)
        return self.recorded(free).view(self.shape)

    def expand(self, free: Tensor) -> Tensor:
        """By the formula."""
        return self.formula(free, self.sizes)

    def fold(self, weight: Tensor) -> Tensor:
        """By the formula of the adjoint."""
        return self.adjoint(weight, self.sizes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Expansion:
        return self  # nothing in it changes


@functools.lru_cache(_SHAPES)
def shared_expansion(
    expand: Callable[[Tensor, Any], Tensor],
    fold: Callable[[Tensor, Any], Tensor],
    sizes: Any,
    shape: tuple[int, ...],
) -> Expansion:
    """One for all layers of a shape: torch 2.6 compiles them anew for another object."""
    return Expansion(expand, fold, sizes, shape)


def look_up(
    expand: Callable[[Tensor, Any], Tensor],
    free: Tensor,
    sizes: Any,
    entries: int,
    unrecorded: bool,
) -> Tensor:
    """``expand(row, sizes)`` for every row of ``(n, free values)``, as ``(n, entries)``."""
    if unrecorded:
        return free.index_select(1, _places(expand, sizes, free.shape[1]))
    return expand(free, sizes).reshape(len(free), entries)


def fold_pairs(
    expand: Callable[[Tensor, Any], Tensor], weight: Tensor, sizes: Any, count: int
) -> Tensor:
    """The adjoint of `look_up`, if no free value stands for more than two entries."""
    first, second, single = _members(expand, sizes, count)
    values = weight.index_select(1, first)
    # where, since for a single entry the sum would count it twice
    return torch.where(single, values, values + weight.index_select(1, second))


@functools.lru_cache(_SHAPES)
def _places(expand: Callable[[Tensor, Any], Tensor], sizes: Any, count: int) -> Tensor:
    """For each entry of the weight the place of its free value."""
    with torch.inference_mode(False), torch.enable_grad():
        # recorded, so that the formula itself is used; float64 counts exactly
        places = torch.arange(count, dtype=torch.float64, device="cpu", requires_grad=True)
        return expand(places[None], sizes).detach().flatten().to(torch.int32)


@functools.lru_cache(_SHAPES)
def _members(
    expand: Callable[[Tensor, Any], Tensor], sizes: Any, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The first and the last entry of each free value, and whether they are the same."""
    with torch.inference_mode(False), torch.no_grad():
        places = _places(expand, sizes, count).long()
        entries = torch.arange(len(places), device="cpu")
        first, last = (
            torch.zeros(count, dtype=torch.int64, device="cpu").scatter_reduce_(
                0, places, entries, which, include_self=False
            )
            for which in ("amin", "amax")
        )
        return first.to(torch.int32), last.to(torch.int32), first == last
