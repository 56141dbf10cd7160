"""The tables of laws, found once for each law, options and shape, and shared by all layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from tiedparam.laws.cells import Cells
from tiedparam.laws.entry_table import EntryTable
from tiedparam.laws.layout import Layout
from tiedparam.laws.pattern import Pattern
from tiedparam.util.bits import checksum_of
from tiedparam.util.errors import Reason

_KEPT = 32
"""At most so many tables outlive the layers that use them, the last ones asked for."""
_KEPT_BYTES = 2**26
"""And at most so many bytes of them."""

_used: WeakValueDictionary[Hashable, EntryTable] = WeakValueDictionary()
_last: OrderedDict[Hashable, EntryTable] = OrderedDict()
_writing = Lock()


def find_table(
    key: Hashable,
    find: Callable[[], Pattern | Reason],
    why_wrong: Callable[[EntryTable], Reason | None],
    cells: Cells,
    layout: Layout,
) -> EntryTable | Reason:
    """The table of a law, or why there is none.

    Args:
        key: law, options and layout.
        find: finds the pattern of one cell.
        why_wrong: judges a table that was just made.
        cells: the cells of the weight.
        layout: that of the weight.
    """
    with _writing:
        known = _used.get(key)
        if known is not None:
            _keep(key, known)
            return known
    pattern = find()
    if isinstance(pattern, Reason):
        return pattern
    table = EntryTable(pattern, cells.count, layout.shape)
    reason = why_wrong(table)
    if reason is not None:
        return reason
    with _writing:
        _used[key] = table
        _keep(key, table)
    return table


def _keep(key: Hashable, table: EntryTable) -> None:
    """Let it outlive its layers for a while, and forget those that were asked for before."""
    _last[key] = table
    _last.move_to_end(key)
    while len(_last) > _KEPT or sum(each.nbytes for each in _last.values()) > _KEPT_BYTES:
        _last.popitem(last=False)


def frozen(value: Any) -> Hashable:
    """The same for equal contents; what cannot be compared is like nothing else."""
    if isinstance(value, nn.Module):
        found: Hashable = getattr(value, "law_key", object)()
        return found
    if isinstance(value, Tensor):
        return _contents(value)
    if isinstance(value, dict):
        return dict, tuple((frozen(key), frozen(each)) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(frozen(each) for each in value)
    if isinstance(value, (set, frozenset)):
        return frozenset, frozenset(frozen(each) for each in value)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
        return type(value), value
    if isinstance(value, slice):
        return slice, value.start, value.stop, value.step
    return object()


def _contents(tensor: Tensor) -> Hashable:
    """A checksum, of shape and dtype too."""
    if tensor.is_meta:
        return object()
    return Tensor, checksum_of({"": tensor})
