"""The expansion by a table: each entry of a cell is looked up among the free values.

One small table serves all cells of a weight. It belongs to no layer and no checkpoint, so that
``to_empty()``, pickles and files cannot spoil it. The adjoint gathers the members of each orbit
and adds them in a fixed order, so that a gradient has the same bits at every run, on every device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tiedparam.laws.linear_map import LinearMap
from tiedparam.laws.pattern import Pattern
from tiedparam.util.torch_modes import (
    beside,
    is_traced_or_transformed,
    may_carry_tangents,
    plain_numbers,
)

_SIZES = 3
"""So many sizes of orbits are gathered apart; if there are more, they are filled up to powers of
two, which adds less than as many members again."""


@dataclass(frozen=True)
class _Members:
    """The orbits of about one size.

    Attributes:
        entries: ``(size, orbits)`` flattened, the entries of each orbit.
        signs: ``(size, orbits)``, or None if all are members as they are.
        absent: ``(size, orbits)``, where there is no member any more; None if all are there.
        size: how many members each orbit has.
    """

    entries: Tensor
    signs: Tensor | None
    absent: Tensor | None
    size: int


class EntryTable(LinearMap):
    """A pattern, ready to expand and fold any number of cells.

    Args:
        pattern: that of one cell.
        cells: how many cells lie one after the other in the weight.
        shape: the weight's shape.
    """

    def __init__(self, pattern: Pattern, cells: int, shape: tuple[int, ...]) -> None:
        self.pattern: Pattern = pattern
        self.cells: int = cells
        self.shape: tuple[int, ...] = shape
        with plain_numbers():
            labels = pattern.labels
            self._signed: bool = bool((labels < 0).any())
            columns = pattern.count * (2 if self._signed else 1)
            places = torch.where(labels < 0, pattern.count - labels, labels) - 1
            self._constants: Tensor | None = None
            apart = labels == 0
            if bool(apart.any()):
                given = (
                    torch.zeros(len(labels), device="cpu")
                    if pattern.fixed is None
                    else pattern.fixed
                )
                self._constants, which = given[apart].double().unique(return_inverse=True)
                places[apart] = (columns + which).to(places.dtype)
            self._places: Tensor = places.contiguous()
        self._linear: EntryTable = self if pattern.fixed is None else self._without_constants()
        self._moved: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._members: dict[torch.device, tuple[list[_Members], Tensor | None]] = {}

    def _without_constants(self) -> EntryTable:
        return EntryTable(replace(self.pattern, fixed=None), self.cells, self.shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> EntryTable:
        return self  # nothing in it changes

    @property
    def linear(self) -> EntryTable:
        """Zeros in the place of the fixed numbers."""
        return self._linear

    def __call__(self, free: Tensor) -> Tensor:
        """The weight. Recorded as plain operations where torch traces or transforms them."""
        if is_traced_or_transformed() or may_carry_tangents():
            return self.expand(free).view(self.shape)
        return self.recorded(free).view(self.shape)

    def expand(self, free: Tensor) -> Tensor:
        """``(cells, values of a cell)`` → ``(cells, entries of a cell)``."""
        free = free.reshape(self.cells, self.pattern.count)
        columns = [free, -free] if self._signed else [free]
        if self._constants is not None and self.pattern.fixed is None:
            columns.append(free.new_zeros(self.cells, 1))
        elif self._constants is not None:
            constants = self._on(self._constants, free.device, free.dtype)
            columns.append(beside(constants, free).expand(self.cells, -1))
        joined = columns[0] if len(columns) == 1 else torch.cat(columns, 1)
        places = beside(self._on(self._places, free.device, torch.int32), free)
        if self.cells == 1:
            return joined.view(-1).index_select(0, places)
        return joined.index_select(1, places)

    def fold(self, weight: Tensor) -> Tensor:
        """The sums over the orbits of each cell, members in the order of their entries."""
        if weight.device not in self._members:
            self._members[weight.device] = self._gathered(weight.device)
        weight, (groups, order) = weight.view(self.cells, -1), self._members[weight.device]
        sums = []
        for group in groups:
            orbits = len(group.entries) // group.size
            values = weight.index_select(1, group.entries).view(self.cells, group.size, orbits)
            if group.signs is not None:
                values *= group.signs
            if group.absent is not None:
                values.masked_fill_(group.absent, 0)
            sums.append(values.sum(1) if group.size > 1 else values[:, 0])
        return sums[0] if order is None else torch.cat(sums, 1).index_select(1, order)

    def sizes(self) -> Tensor:
        """How many members each orbit has, in int64."""
        with plain_numbers():
            labels = self.pattern.labels.abs().long()
            return torch.bincount(labels, minlength=self.pattern.count + 1)[1:]

    def first_entries(self) -> Tensor:
        """The first member of each orbit, which is never a negative one; in int64."""
        with plain_numbers():
            entry = torch.arange(len(self.pattern.labels), device="cpu")
            first = torch.full((self.pattern.count + 1,), len(entry), device="cpu")
            first.scatter_reduce_(0, self.pattern.labels.abs().long(), entry, "amin")
            return first[1:]

    def _on(self, table: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A table where, and in what dtype, it is needed. The key names the table by its dtype."""
        if table.device == device and table.dtype == dtype:
            return table
        if torch.compiler.is_compiling():
            return table.to(device, dtype)
        if (device, dtype) not in self._moved:
            self._moved[device, dtype] = table.to(device, dtype)
        return self._moved[device, dtype]

    def _gathered(self, device: torch.device) -> tuple[list[_Members], Tensor | None]:
        """The orbits by their sizes; and the places of all orbits in what is gathered."""
        with plain_numbers():
            labels, sizes = self.pattern.labels, self.sizes()
            by_orbit = labels.abs().argsort(stable=True)
            start = (labels == 0).sum() + sizes.cumsum(0) - sizes
            filled = sizes
            if len(sizes.unique()) > _SIZES:
                filled = 2 ** torch.log2(sizes.double()).ceil().long()
            groups, orbits = [], []
            for size in filled.unique().tolist():
                orbit = (filled == size).nonzero()[:, 0]
                member = torch.arange(size, device="cpu")[:, None]
                place = start[orbit] + torch.minimum(member, sizes[orbit] - 1)
                entries, absent = by_orbit[place], member >= sizes[orbit]
                signs = labels[entries].sign().to(torch.int8)
                groups.append(
                    _Members(
                        entries.flatten().to(device, torch.int32),
                        signs.to(device) if bool((signs < 0).any()) else None,
                        absent.to(device) if bool(absent.any()) else None,
                        size,
                    )
                )
                orbits.append(orbit)
            order = torch.cat(orbits).argsort().to(device, torch.int32)
            return groups, None if len(groups) == 1 else order
