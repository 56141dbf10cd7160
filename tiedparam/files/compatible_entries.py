"""Whether the tensors of a file fit a model: names, shapes, dtypes and values, before any change.

All reasons are listed at once.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tiedparam.files.header import Header
from tiedparam.files.placeholder import placeholder
from tiedparam.files.stored_tie import StoredTie
from tiedparam.formats.checkpoint import StoredCheckpoint
from tiedparam.formats.checkpoint_files import index_beside
from tiedparam.laws.coded import data_of
from tiedparam.laws.functions import Functions
from tiedparam.laws.rule import Rule
from tiedparam.state.dictionaries import tie_state_dict
from tiedparam.state.entries import renew_entries
from tiedparam.tie.binding import bind
from tiedparam.tie.lookup import named_ties_in
from tiedparam.tie.target import Target
from tiedparam.util.bits import same_bits
from tiedparam.util.errors import (
    Reason,
    TieError,
    quoted,
    refuse,
    shown_shape,
    some_of,
    warn,
)
from tiedparam.util.torch_private import original_key, set_metadata

DOES_NOT_FIT = "it does not fit the model"
"""What a list of reasons stands below."""


def entries_for(
    model: nn.Module,
    stored: StoredCheckpoint,
    header: Header,
    new: list[tuple[StoredTie, Rule]],
    functions: Functions,
) -> OrderedDict[str, Tensor]:
    """What ``load_state_dict`` will be given, once the model is known to take it.

    Args:
        model: the model, not changed yet.
        stored: the file.
        header: what it says of ties.
        new: the ties that will be made.
        functions: what copies in the file may have as ``fn=``.

    Raises:
        TieError: listing what does not fit.
    """
    where = f"'{stored.path}'"
    entries = _with_aliases(stored, header)
    probes = [(tie, _probe(tie, model, stored, header, functions)) for tie, _ in new]
    for prefix, present in named_ties_in(model):
        renew_entries(present.rule, prefix + present.tensor_name, entries)
    for tie, rule in probes:
        renew_entries(rule, tie.key, entries)
    slots = _slots(model, probes)
    refuse(where, _misfits(entries, slots), DOES_NOT_FIT)
    for key in [prefix + tie.tensor_name for prefix, tie in named_ties_in(model)]:
        if key in entries:  # widened before it is projected, not after
            entries[key] = entries[key].to(slots[key].dtype)
    if stored.module_metadata:
        set_metadata(entries, stored.module_metadata)
    elif header.versions or header.ties:
        paths = [path for path, _ in model.named_modules()]
        set_metadata(entries, {path: {"version": header.versions.get(path, 1)} for path in paths})
    entries = tie_state_dict(model, entries)
    wanted = {key: slot for key, slot in slots.items() if not slot.dense}
    refuse(where, _disagreeing(entries, wanted), DOES_NOT_FIT)
    holders = {slot.tensor: key for key, slot in wanted.items() if key in entries}
    for key, slot in wanted.items():
        if key not in entries and slot.tensor in holders:
            entries[key] = entries[holders[slot.tensor]]  # one of its other names
    missing = [Reason(f"'{key}' is missing.") for key in wanted if key not in entries]
    index = index_beside(stored.path)
    if missing and index is not None:
        missing.insert(0, Reason("the file is one of several.", f"Name their index, '{index}'."))
    refuse(where, missing, DOES_NOT_FIT)
    _warn_unshared(header.aliases, wanted)
    return entries


def _with_aliases(stored: StoredCheckpoint, header: Header) -> OrderedDict[str, Tensor]:
    """The tensors of the file, under all of their names."""
    entries: OrderedDict[str, Tensor] = OrderedDict(stored)
    for alias, kept in header.aliases.items():
        if kept not in stored or alias in stored:
            raise TieError(
                f"its alias {quoted(alias)}",
                f"its alias {quoted(alias)} of {quoted(kept)} is wrong.",
                "Fetch or save it again.",
            )
        entries[alias] = entries[kept]
    return entries


class _Slot:
    """A place for a tensor of the file.

    Attributes:
        shape: the shape that fits.
        dtype: the model's dtype.
        tensor: equal for the names of one tensor.
        dense: whether it is a tied tensor's dense form, which has no place of its own.
    """

    def __init__(
        self, shape: Iterable[int], dtype: torch.dtype, tensor: object, dense: bool = False
    ) -> None:
        self.shape, self.dtype, self.tensor, self.dense = tuple(shape), dtype, tensor, dense


def _probe(
    tie: StoredTie,
    model: nn.Module,
    file: StoredCheckpoint,
    header: Header,
    functions: Functions,
) -> Rule:
    """The rule of a tie that will be made, bound to its tensor."""
    rule = tie.make(functions, tie.data_in(file, header.aliases))
    bind(rule, Target(model.get_submodule(tie.layer), tie.tensor, model))
    return rule


def _slots(model: nn.Module, new: list[tuple[StoredTie, Rule]]) -> dict[str, _Slot]:
    """All names that the model will take, the ties that will be made included."""
    slots = {
        key: _Slot(value.shape, value.dtype, id(value))
        for key, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }
    for prefix, tie in named_ties_in(model):
        name, place = tie.tensor_name, placeholder(tie)
        slots[prefix + name] = _Slot(place.shape, place.dtype, (id(tie.layer), name), dense=True)
    for stored, rule in new:
        slot = slots.pop(stored.key)
        for number, shape in enumerate(rule.free_shapes()):
            key = original_key(stored.layer, stored.tensor, number)
            slots[key] = _Slot(shape, slot.dtype, (slot.tensor, number))
        for name, value in data_of(rule).items():
            slots[stored.path_of_rule + name] = _Slot(value.shape, value.dtype, (slot.tensor, name))
    return slots


_FREE_KEY = re.compile(r"(^|\.)parametrizations\.[^.]+\.original\d+$")


def _misfits(entries: Mapping[str, Tensor], slots: Mapping[str, _Slot]) -> list[Reason]:
    found = [_misfit(key, value, slots.get(key)) for key, value in entries.items()]
    return [reason for reason in found if reason is not None]


def _misfit(key: str, value: Tensor, slot: _Slot | None) -> Reason | None:
    """Why an entry has no place in the model, or does not fit it; or None."""
    if slot is None and _FREE_KEY.search(key):
        return Reason(
            f"the model has no {quoted(key)}: that is a free value of a tied model.",
            "Tie the model as that one was, or write the file with tiedparam.save, which says how.",
        )
    if slot is None:
        return Reason(f"the model has no {quoted(key)}.")
    if tuple(value.shape) != slot.shape:
        there = shown_shape(value.shape)
        return Reason(f"size mismatch for '{key}': {there} there, {slot.shape} here.")
    if not _holds(slot.dtype, value.dtype):
        return Reason(
            f"'{key}' is {value.dtype} there and {slot.dtype} here, which would change its values.",
            "Convert the model first, such as model.to(dtype).",
        )
    return None


def _holds(here: torch.dtype, stored: torch.dtype) -> bool:
    """Whether every value of the stored dtype is one of the model's."""
    if here == stored:
        return True
    if here.is_floating_point == stored.is_floating_point and here.is_complex == stored.is_complex:
        if torch.bool in (here, stored):
            return False
        if here.is_floating_point or here.is_complex:
            wide, narrow = torch.finfo(here), torch.finfo(stored)
            return (
                wide.max >= narrow.max
                and wide.eps <= narrow.eps
                and wide.smallest_normal <= narrow.smallest_normal
            )
        return (
            torch.iinfo(here).min <= torch.iinfo(stored).min
            and torch.iinfo(here).max >= torch.iinfo(stored).max
        )
    return False


def _disagreeing(entries: Mapping[str, Tensor], slots: Mapping[str, _Slot]) -> list[Reason]:
    """Names of one tensor of the model for which the file has different values."""
    first: dict[object, str] = {}
    problems = []
    for key, value in entries.items():
        earlier = first.setdefault(slots[key].tensor, key)
        if earlier != key and not same_bits(value, entries[earlier]):
            fact = f"'{earlier}' and '{key}' are one tensor here and have different values there."
            problems.append(Reason(fact))
    return problems


def _warn_unshared(aliases: Mapping[str, str], slots: Mapping[str, _Slot]) -> None:
    apart = [
        f"'{alias}' and '{kept}'"
        for alias, kept in aliases.items()
        if slots[alias].tensor != slots[kept].tensor
    ]
    if apart:
        warn(
            "these were one tensor when they were saved and are two in this model: "
            f"{some_of(apart)}. They get equal values and will train apart.",
            "Share them in the model before you load, or tie one to the other by 'copy'.",
        )
