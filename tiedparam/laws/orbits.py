"""Laws that make entries equal, opposite or fixed: what follows from their symmetries alone."""

from __future__ import annotations

from collections.abc import Hashable
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tiedparam.laws.cells import consecutive_cells, why_no_cell
from tiedparam.laws.dtypes import why_not_in
from tiedparam.laws.entry_table import EntryTable
from tiedparam.laws.layout import Layout
from tiedparam.laws.pattern import Pattern, find_pattern
from tiedparam.laws.rule import Rule
from tiedparam.laws.shared_tables import find_table, frozen
from tiedparam.util.errors import Reason, TieError
from tiedparam.util.torch_modes import beside, plain_numbers

CACHED_ENTRIES = 65_536
"""From so many entries on ``cache=True`` keeps the weight: 256 × 256, or 86 × 86 channels, 3×3.

Comparing the free values takes as long as computing the weight up to about 10,000 entries, and
little more than half as long at this bound, a quarter from 300,000 on. In between it gains, but in
a convolution it cannot be felt.
"""


_OF_EVERY_RULE = frozenset(vars(nn.Module())) | {"layout", "compute"}
"""Attributes on which no symmetry depends."""


class Orbits(Rule):
    """A law by which every entry is a free value, minus one, or a fixed number such as 0.

    A subclass states `law`, `check`, `symmetries` and `examples`; and `cell`, if it can. That is
    the whole law: `symmetries` is run once on the numbers 1, 2, …, which shows every equality.
    Orbits, exact count, expansion and its adjoint, the nearest lawful weight, multiplicities and
    labels follow. The table that expands is found once for each law, options and shape, and shared
    by all layers; no layer and no checkpoint holds it.

    Free values are numbered by the first entry that each of them has, in the tensor's own order,
    and are stored as they are there (minus signs belong to later entries). Their shape is
    ``(cells, values of a cell)``, or ``(values,)`` for a vector.

    A subclass may override `forward`, and `free_shapes`, for speed. It then numbers its free values
    as it likes, and `tiedparam.testing.check_rule` compares it with what is derived.

    Example:
        >>> from tiedparam.laws import Orbits
        >>> class Mirrored(Orbits):
        ...     law = "W[o, c, x] = W[o, c, k − 1 − x]"
        ...     def symmetries(self, weight): yield weight.flip(-1)
        ...     def cell(self): return (1, 1, *self.bound_layout.kernel)
        >>> conv = tp.register_tie(nn.Conv1d(2, 4, 5), Mirrored)
        >>> torch.equal(conv.weight, conv.weight.flip(-1)), tp.get_tie(conv).free_shapes()
        (True, ((8, 3),))
    """

    complex_valued = True
    states_whole_group: ClassVar[bool] = False
    """Whether `symmetries` yields every element of a group (the identity may be left out): then
    one pass over them is enough. It is for speed alone: where it is not so, nothing changes."""
    may_leave_nothing: ClassVar[bool] = False
    """Whether the law may fix every entry, so that no value is left to train. Else it is refused.
    """

    holds_laws: ClassVar[tuple[str, ...]] = ()
    """The names of options that are laws themselves, which files hold by names and options."""

    apart: ClassVar[frozenset[str]] = frozenset({"_table", "_none"})
    """Further attributes on which no symmetry depends."""
    _inner: ClassVar[tuple[str, ...]] = (
        "find_pattern",
        "is_derived",
        "law_key",
        "numbers_of_law",
        "why_no_such_cells",
    )
    _table: EntryTable
    _none: Tensor

    # The law ------------------------------------------------------------------------------------

    def cell(self) -> tuple[int, ...] | None:
        """The shape, in the canonical layout, of a part of the weight that the law treats alone.

        The weight is made of such parts side by side, and each obeys the same law as a weight of
        that shape by itself would. For a law of kernel positions it is ``(1, 1, *kernel)``. None
        stands for the whole weight. Pattern and tables are made for one cell only.
        """
        return None

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """``(cells, values of a cell)``, so that optimizers see a matrix in what was one."""
        count = self._table.count
        if not count:
            return ()
        if len(self.bound_layout.shape) < 2:
            return ((self._table.cells * count,),)
        return ((self._table.cells, count),)

    def forward(self, *free: Tensor) -> Tensor:
        """Look up every entry among the free values."""
        (values,) = free or (self._none,)
        return self._table(values)

    @property
    def gains_from_cache(self) -> bool:
        """Whether the weight has so many entries that comparing is much faster than computing.

        ``python -m benchmarks --case cache`` repeats the measurement.
        """
        return prod(self.bound_layout.shape) >= CACHED_ENTRIES

    # What follows from it -----------------------------------------------------------------------

    @property
    def is_derived(self) -> bool:
        """Whether the expansion follows from the symmetries, and is not the subclass's own."""
        return type(self).forward is _EXPAND

    def derived_labels(self) -> Tensor:
        """`orbit_labels` as the symmetries alone give them, numbered by first occurrence.

        Raises:
            TieError: if the symmetries state no law of this kind, which is seen only here where a
                law has a `forward` of its own.
        """
        found = self._found(self.bound_layout)
        if isinstance(found, Reason):
            raise TieError(f"the symmetries of '{self}'", *found)
        return _labels(found)

    def orbit_labels(self) -> Tensor:
        """The number of each entry's free value, from 1; negative where the entry is minus it.

        Returns:
            An int64 tensor of the weight's shape; 0 stands for fixed entries.
        """
        return _labels(self._table) if self.is_derived else super().orbit_labels()

    @property
    def has_orbits(self) -> bool:
        """It is such a law."""
        return True

    def spread(self, *free: Tensor) -> Tensor:
        """`forward` with zeros in the place of fixed numbers."""
        if not self.is_derived:
            return super().spread(*free)
        (values,) = free or (self._none,)
        return self._table.linear(values)

    def adjoint(self, weight: Tensor) -> tuple[Tensor, ...]:
        """``BᵀW``: the (signed) sum of ``weight`` over each orbit, as free values."""
        if not self.is_derived:
            return super().adjoint(weight)
        if not self.free_shapes():
            return ()
        with torch.inference_mode(False), torch.no_grad():
            return self._shaped(self._table.fold(weight.detach().contiguous()))

    def multiplicities(self) -> tuple[Tensor, ...]:
        """How many entries share each free value, as float64 tensors shaped like them."""
        if not self.is_derived:
            shapes = self.free_shapes()
            ones = (torch.ones(shape, dtype=torch.float64, device="cpu") for shape in shapes)
            return self.adjoint(self.spread(*ones))  # BᵀB1: the signs cancel
        sizes = self._table.sizes().double()
        return self._shaped(sizes.expand(self._table.cells, -1).contiguous())

    def representatives(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The first member of each orbit, with its sign, in storage of its own."""
        if not self.is_derived:
            return super().representatives(weight)
        cells = weight.detach().contiguous().view(self._table.cells, -1)
        first = self._table.first_entries()
        signs = self._table.labels()[first].sign().to(weight.device)
        chosen = cells.index_select(1, beside(first.to(weight.device), cells))
        return self._shaped(torch.where(beside(signs, cells) < 0, -chosen, chosen))

    def _shaped(self, values: Tensor) -> tuple[Tensor, ...]:
        return tuple(values.reshape(shape) for shape in self.free_shapes())

    # Binding ------------------------------------------------------------------------------------

    def bind(self, layout: Layout, dtype: torch.dtype) -> Reason | None:
        """Fit the rule to one tensor, and find the pattern of its entries."""
        reason = super().bind(layout, dtype)
        if reason is not None or not self.is_derived:
            return reason
        found = self._found(layout)
        reason = found if isinstance(found, Reason) else self._why_not_in(dtype, found)
        if isinstance(found, Reason) or reason is not None:
            self.layout: Layout | None = None
            return reason
        self._table = found
        if not found.count:
            # where no Parameter tells dtype and device, this does, which a layer moves and casts
            none = torch.empty(found.cells, 0, dtype=dtype, device="cpu")
            self.register_buffer("_none", none, persistent=False)
        return None

    def _why_not_in(self, dtype: torch.dtype, table: EntryTable) -> Reason | None:
        """Why a dtype cannot hold the fixed numbers, or None."""
        return None if table.constants is None else why_not_in(dtype, table.constants)

    def bind_device(self, device: torch.device) -> None:
        """Compute there also where no free value says where."""
        if "_none" in self._buffers:
            self._none = torch.empty_like(self._none, device=device)  # also from the meta device

    def _found(self, layout: Layout) -> EntryTable | Reason:
        """The table for a weight of this layout, or why there is none."""
        cell = self.cell()
        reason = why_no_cell(cell, layout)
        if reason is not None:
            return reason
        cells = consecutive_cells(cell, layout)
        # the groups of the layer apart, by which layouts are not told apart
        key = (self.law_key(), layout, layout.layer_groups, cells.layout)
        of_cell = self.for_layout(cells.layout)
        whole = self.for_layout(layout)
        found = find_table(key, of_cell.find_pattern, whole.why_no_such_cells, cells, layout)
        nothing = isinstance(found, EntryTable) and not found.count
        if not nothing or self.may_leave_nothing:
            return found
        return Reason(
            "the law fixes every entry, so no value is left to train.",
            "Leave out the law, or a part of it.",
        )

    def law_key(self) -> Hashable:
        """What the symmetries can depend on, apart from the layout.

        By the attributes of the rule and not by its `options`, which a user may have left out.
        """
        found = {**vars(self), **self.numbers_of_law(), **dict(self.named_children())}
        apart = _OF_EVERY_RULE | self.apart
        return type(self), frozen({k: value for k, value in found.items() if k not in apart})

    def numbers_of_law(self) -> dict[str, Tensor]:
        """The buffers on which the symmetries can depend, for which no other attribute stands."""
        return dict(self.named_buffers(recurse=False))

    def find_pattern(self) -> Pattern | Reason:
        """The orbits of the weight, or of one cell, that the rule is bound to.

        A subclass whose pattern is written down already may give it: any order of the free values
        is right, and any of their entries may be minus them.
        """
        shape = self.bound_layout.shape
        return find_pattern(self.symmetries, shape, group=self.states_whole_group)

    def why_no_such_cells(self, table: EntryTable) -> Reason | None:
        """Why a weight that is made cell by cell breaks the law, or None."""
        if table.cells == 1:
            return None
        with plain_numbers():
            random = torch.Generator("cpu").manual_seed(0)
            free = torch.rand(table.cells, table.count, device="cpu", generator=random)
            weight = table.expand(free).view(table.shape)
            if all(torch.equal(image, weight) for image in self.symmetries(weight.clone())):
                return None
        return Reason(
            f"its cell() is {self.cell()}, and a weight made of such cells breaks the law.",
            "Correct the rule: name all axes that the law mixes, or leave out cell().",
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the table, which is found again."""
        return {name: value for name, value in self.__dict__.items() if name != "_table"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.layout is not None and self.is_derived:
            found = self._found(self.layout)
            if isinstance(found, Reason):
                raise TieError(f"a copy of '{self}'", *found)
            self._table = found


_EXPAND = Orbits.forward  # as it is without a patch


def _labels(table: EntryTable) -> Tensor:
    """The labels of all cells."""
    with plain_numbers():
        labels = table.labels().long()
        before = torch.arange(table.cells, device="cpu")[:, None] * table.count
        return (labels + labels.sign() * before).view(table.shape)
