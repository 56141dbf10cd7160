"""The tables of laws, found once for each law, options and shape, and shared by all layers."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.laws.cells import Cells
from tiedparam.laws.entry_table import EntryTable
from tiedparam.laws.layout import Layout
from tiedparam.laws.pattern import Symmetries, find_pattern
from tiedparam.laws.rule import Rule
from tiedparam.util.errors import Reason

_KEPT = 32
"""So many tables outlive the layers that use them, the last ones asked for."""

_tables: OrderedDict[Hashable, EntryTable] = OrderedDict()
_writing = Lock()


def find_table(
    key: Hashable, symmetries: Symmetries, cells: Cells, layout: Layout, *, group: bool
) -> EntryTable | Reason:
    """The table of a law, or why its symmetries give none.

    Args:
        key: law, options and layout.
        symmetries: those of one cell.
        cells: the cells of the weight.
        layout: that of the weight.
        group: whether the symmetries are all elements of a group.
    """
    with _writing:
        known = _tables.get(key)
        if known is not None:
            _tables.move_to_end(key)
            return known
    pattern = find_pattern(symmetries, cells.layout.shape, group=group)
    if isinstance(pattern, Reason):
        return pattern
    table = EntryTable(pattern, cells.count, layout.shape)
    with _writing:
        _tables[key] = table
        while len(_tables) > _KEPT:
            _tables.popitem(last=False)
    return table


def law_key(rule: Rule) -> Hashable:
    """What a law's symmetries can depend on, apart from its layout.

    By the attributes of the rule and not by its `options`, which a user may have left out.
    """
    held = {name: value for name, value in vars(rule).items() if name not in _OF_EVERY_RULE}
    buffers = rule.named_buffers(recurse=False)
    return (
        type(rule),
        _frozen(held),
        _frozen({name: value for name, value in buffers if name not in _OF_EVERY_RULE}),
        _frozen(dict(rule.named_children())),
    )


_OF_EVERY_RULE = frozenset(vars(nn.Module())) | {"layout", "compute", "law", "_table", "_none"}


def _frozen(value: Any) -> Hashable:
    """The same for equal contents; what cannot be compared is like nothing else."""
    if isinstance(value, Rule):
        return law_key(value)
    if isinstance(value, Tensor):
        return _contents(value)
    if isinstance(value, dict):
        return dict, tuple((_frozen(key), _frozen(each)) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_frozen(each) for each in value)
    if isinstance(value, (set, frozenset)):
        return frozenset, frozenset(_frozen(each) for each in value)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
        return type(value), value
    if isinstance(value, slice):
        return slice, value.start, value.stop, value.step
    return object()


def _contents(tensor: Tensor) -> Hashable:
    """Shape, dtype and a checksum of the numbers."""
    if tensor.is_meta:
        return object()
    numbers = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
    digest = hashlib.sha256(bytes(numbers.untyped_storage())[: numbers.numel()]).digest()
    return Tensor, tuple(tensor.shape), tensor.dtype, digest
