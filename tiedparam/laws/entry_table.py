"""The expansion by a table: each entry of a cell is looked up among the free values.

One small table serves all cells of a weight. It belongs to no layer and no checkpoint, so that
``to_empty()``, pickles and files cannot spoil it. The adjoint gathers the members of each orbit
and adds them in a fixed order, so that a gradient has the same bits at every run, on every device.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from tiedparam.laws.linear_map import LinearMap
from tiedparam.laws.look_up import LookUp
from tiedparam.laws.pattern import Pattern
from tiedparam.products.transposition import transposed
from tiedparam.util.torch_modes import (
    beside,
    is_transformed,
    is_unrecorded,
    plain_numbers,
)

_ROWS = 16
"""From so many cells on, the entries of all cells are gathered as rows, which turns the weight."""
_ONE_BY_ONE = 8
"""Up to so many members of an orbit are added one after the other; of larger orbits, all are
gathered and summed."""
_SIZES = 3
"""So many sizes of large orbits are gathered apart; if there are more, those between two powers of
two are filled up to the largest, which adds less than as many members again."""


@dataclass(frozen=True)
class _Members:
    """Members that are gathered at once.

    Attributes:
        entries: ``(size, orbits)`` flattened, the entries of each orbit.
        orbits: which orbits these are; None if all.
        signs: of ``entries``, or None if all are members as they are.
        absent: where in ``entries`` there is no member any more; None if all are there.
        size: how many members of each orbit.
    """

    entries: Tensor
    orbits: Tensor | None
    signs: Tensor | None
    absent: Tensor | None
    size: int

    def gathered(self, values: Tensor) -> Tensor:
        """The sums of these members; ``values`` has an entry in each row."""
        found = values.index_select(0, self.entries)
        if self.signs is not None:
            found *= self.signs.view(-1, *(1,) * (values.dim() - 1))
        if self.absent is not None:
            found.index_fill_(0, self.absent, 0)  # not by a product, which makes NaN of infinity
        return found if self.size == 1 else found.view(self.size, -1, *values.shape[1:]).sum(0)


class EntryTable(LinearMap):
    """A pattern, ready to expand and fold any number of cells.

    Args:
        pattern: that of one cell.
        cells: how many cells lie one after the other in the weight.
        shape: the weight's shape.
    """

    def __init__(self, pattern: Pattern, cells: int, shape: tuple[int, ...]) -> None:
        self.count: int = pattern.count
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
                self._constants = torch.zeros(1, dtype=torch.float64, device="cpu")
                places[apart] = columns
            if pattern.fixed is not None:
                self._constants, which = pattern.fixed[apart].unique(return_inverse=True)
                places[apart] += which.to(places.dtype)
            self._places: Tensor = places.contiguous()
        self._is_linear: bool = pattern.fixed is None
        self._moved: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._members: dict[torch.device, list[_Members]] = {}
        self._linear: EntryTable = self if self._is_linear else self._without_constants()

    def _without_constants(self) -> EntryTable:
        """The same tables, in which the numbers are zeros."""
        linear = copy(self)
        linear.__dict__.update(_is_linear=True, _linear=linear)
        return linear

    @property
    def linear(self) -> EntryTable:
        """Zeros in the place of the fixed numbers."""
        return self._linear

    def __call__(self, free: Tensor, *constants: Tensor) -> Tensor:
        """The weight in its shape."""
        return self.made(free, *constants)

    def look_up(self, free: Tensor) -> LookUp | None:
        """Not where there are fixed numbers."""
        return super().look_up(free) if self._is_linear else None

    def in_plain_operations(self, free: Tensor, *constants: Tensor) -> Tensor:
        """`expand`, which has gradients."""
        return self.expand(free, *constants).view(self.shape)

    def expand(self, free: Tensor, *constants: Tensor) -> Tensor:
        """``(cells, values of a cell)`` → ``(cells, entries of a cell)``.

        Args:
            free: the free values.
            *constants: a vector of numbers in the place of those that entries are fixed to: the
                first for the smallest, and so on.
        """
        free = free.reshape(self.cells, self.count)
        columns = [free, -free] if self._signed else [free]
        if self._constants is not None and self._is_linear:
            columns.append(free.new_zeros(self.cells, len(self._constants)))
        elif self._constants is not None:
            known = constants or (self._on(self._constants, free.device, free.dtype),)
            columns.append(beside(known[0], free).expand(self.cells, -1))
        joined = columns[0] if len(columns) == 1 else torch.cat(columns, 1)
        # vmap of torch 2.6 gathers, which takes no other indices
        integers = torch.int64 if is_transformed() else torch.int32
        places = beside(self._on(self._places, free.device, integers), free)
        if self.cells == 1:
            return joined.view(-1).index_select(0, places)
        return joined.index_select(1, places)

    def fold(self, weight: Tensor) -> Tensor:
        """The sums over the orbits of each cell, members in the order of their entries."""
        if weight.device not in self._members:
            self._members[weight.device] = self._gathered(weight.device)
        members, weight = self._members[weight.device], weight.view(self.cells, -1)
        if self.cells < _ROWS:
            return torch.stack([self._sums(cell, members) for cell in weight])
        return _turned(self._sums(_turned(weight), members))

    def _sums(self, values: Tensor, members: list[_Members]) -> Tensor:
        """The sums over the orbits, of one entry in each row."""
        first, *others = members
        sums = first.gathered(values)
        if first.orbits is not None:
            sums = sums.new_zeros(self.count, *values.shape[1:]).index_copy_(0, first.orbits, sums)
        for more in others:
            found = more.gathered(values)
            sums = (
                sums.add_(found) if more.orbits is None else sums.index_add_(0, more.orbits, found)
            )
        return sums

    def labels(self) -> Tensor:
        """The pattern's, told from the places."""
        with plain_numbers():
            label = self._places + 1
            if self._signed:
                label = torch.where(label > self.count, self.count - label, label)
            return torch.where(label.abs() > self.count, 0, label)

    @property
    def constants(self) -> Tensor | None:
        """The numbers to which entries are fixed, in float64; None if all are free."""
        return self._constants

    @property
    def nbytes(self) -> int:
        """How many bytes the table takes, and its adjoint will."""
        return 2 * self._places.nbytes

    def sizes(self) -> Tensor:
        """How many members each orbit has, in int64."""
        with plain_numbers():
            labels = self.labels().abs().long()
            return torch.bincount(labels, minlength=self.count + 1)[1:]

    def first_entries(self) -> Tensor:
        """The first member of each orbit, in int64."""
        with plain_numbers():
            entry = torch.arange(len(self._places), device="cpu")
            first = torch.full((self.count + 1,), len(entry), device="cpu")
            first.scatter_reduce_(0, self.labels().abs().long(), entry, "amin")
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

    def _gathered(self, device: torch.device) -> list[_Members]:
        """All members of all orbits: of small ones one by one, of large ones by their sizes."""
        with plain_numbers():
            sizes = self.sizes()
            if int(sizes.max()) == 1:
                every = self.first_entries(), torch.ones_like(sizes, dtype=torch.bool)
                return [self._chosen(*every, sizes, range(1), device)]
            labels = self.labels()
            by_orbit = labels.abs().argsort(stable=True)[int((labels == 0).sum()) :]
            found, small = [], sizes <= _ONE_BY_ONE
            for member in range(int(sizes[small].max()) if bool(small.any()) else 0):
                there = small & (sizes > member)
                # filling up costs less than adding in places, where most are there
                if 2 * int(there.sum()) >= int(small.sum()):
                    there = small
                members = range(member, member + 1)
                found.append(self._chosen(by_orbit, there, sizes, members, device))
            filled = sizes
            if len(sizes[~small].unique()) > _SIZES:
                filled = torch.log2(sizes.double()).ceil().long()
            for size in filled[~small].unique().tolist():
                alike = ~small & (filled == size)
                members = range(int(sizes[alike].max()))
                found.append(self._chosen(by_orbit, alike, sizes, members, device))
            return found

    def _chosen(
        self,
        by_orbit: Tensor,
        which: Tensor,
        sizes: Tensor,
        members: range,
        device: torch.device,
    ) -> _Members:
        """Some members of some orbits; ``by_orbit`` has all entries, orbit by orbit."""
        orbits = which.nonzero()[:, 0]
        first, size = (sizes.cumsum(0) - sizes)[orbits], sizes[orbits]
        member = torch.arange(members.start, members.stop, device="cpu")[:, None]
        entries = by_orbit[first + torch.minimum(member, size - 1)].flatten()
        absent = (member >= size).flatten().nonzero()[:, 0]
        signs = self.labels()[entries].sign().to(torch.int8) if self._signed else None
        return _Members(
            entries.to(device, torch.int32),
            None if bool(which.all()) else orbits.to(device),
            signs.to(device) if signs is not None and bool((signs < 0).any()) else None,
            absent.to(device) if len(absent) else None,
            len(members),
        )


def _turned(matrix: Tensor) -> Tensor:
    return transposed(matrix[None], is_unrecorded(matrix))[0]
