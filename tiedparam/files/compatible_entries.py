"""Whether a checkpoint fits a model: everything that can be known before a thing is changed.

`ties_to_make` judges the ties of a file's header, `entries_for` its names, shapes, dtypes and
values. All reasons are listed at once.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.files import header as _header
from tiedparam.files.header import Header, StoredTie
from tiedparam.formats.checkpoint import StoredCheckpoint
from tiedparam.formats.checkpoint_files import index_beside
from tiedparam.laws.functions import Functions, function_name
from tiedparam.laws.layout import Layout
from tiedparam.laws.linked import Linked
from tiedparam.laws.rule import Rule
from tiedparam.state.dictionaries import tie_state_dict
from tiedparam.state.loading import signatures_of
from tiedparam.tie.binding import bind
from tiedparam.tie.lookup import free_values, get_tie, is_stacked, is_tied, named_ties
from tiedparam.util.bits import same_bits
from tiedparam.util.errors import TieError, TieWarning, quoted, shown_shape, some_of
from tiedparam.util.torch_private import effective


def ties_to_make(
    header: Header,
    model: nn.Module,
    module_metadata: Mapping[str, Mapping[str, object]],
    functions: Functions,
) -> list[tuple[StoredTie, Rule]]:
    """The ties that the model lacks, once all that the file speaks of are known to fit."""
    new, problems = [], []
    for tie in header.ties:
        try:
            rule = _fitting_rule(tie, model, functions)
        except TieError as error:
            problems.append(f"{quoted(tie.key)} was saved tied by {quoted(tie.rule)}: {error}")
            continue
        if rule is not None:
            new.append((tie, rule))
    for prefix, _, name, present in named_ties(model):
        written = signatures_of(module_metadata.get(prefix[:-1], {})).get(name)
        if written is not None and written != str(present):
            problems.append(
                f"'{prefix}{name}' was saved under the rule {quoted(written)} and is tied by "
                f"'{present}' here. Tie it as it was."
            )
    _raise(problems)
    return new


def _fitting_rule(tie: StoredTie, model: nn.Module, functions: Functions) -> Rule | None:
    """The rule to tie a tensor with, or None if it is tied by it already."""
    layer = _submodule(model, tie.layer)
    if layer is None:
        raise TieError("the model has no such layer. Build the model that was saved.")
    if is_tied(layer, tie.tensor):
        rule = tie.make({**_function_of(get_tie(layer, tie.tensor)), **functions})
        _refuse_another_tie(tie, rule, layer, model)
        return None
    rule = tie.make(functions)
    if tie.stacked:
        raise TieError(
            "another parametrization was stacked on it. Tie the model and register that one first."
        )
    if parametrize.is_parametrized(layer, tie.tensor):
        raise TieError("it has another parametrization here. Build the model that was saved.")
    if not isinstance(layer._parameters.get(tie.tensor), nn.Parameter):
        raise TieError("the model has no such Parameter. Build the model that was saved.")
    probe = tie.make(functions)  # binding leaves its traces
    reason = bind(probe, layer, tie.tensor, model)
    if reason is not None:
        raise TieError("", *reason)
    if probe.bound_layout != tie.layout:
        raise TieError(_another_layout(tie.layout, probe.bound_layout))
    return rule


def _function_of(present: Rule) -> Functions:
    """The function of a copy in the model, by its name: the model's own code brought it."""
    try:
        return {
            function_name(getattr(present, name)): getattr(present, name)
            for name in present.functions
        }
    except TieError:  # one without a name
        return {}


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _another_layout(there: Layout, here: Layout) -> str:
    """How the axes differ, and what to do where the file could not know it."""
    fact = f"it was {_shown(there)} and is {_shown(here)} here."
    if there.shape != here.shape:
        return fact
    return (
        f"{fact} Build the model that was saved; if a file was tied in the shell, do it again with "
        "--groups or --transposed for this layer."
    )


def _shown(layout: Layout) -> str:
    groups = f" in {layout.groups} groups" if layout.groups > 1 else ""
    return f"{shown_shape(layout.shape)}{groups}{', transposed' if layout.transposed else ''}"


def _refuse_another_tie(tie: StoredTie, rule: Rule, layer: nn.Module, model: nn.Module) -> None:
    present = get_tie(layer, tie.tensor)
    if not _header.same_law(present, rule):
        raise TieError(f"it was '{rule}' and is '{present}' here. Tie it as it was, or not at all.")
    if present.bound_layout != tie.layout:
        raise TieError(_another_layout(tie.layout, present.bound_layout))
    if is_stacked(layer, tie.tensor) != tie.stacked:
        raise TieError("another parametrization is stacked on it in one of the two. Drop it.")
    if isinstance(present, Linked):
        path, name = str(tie.options["source"]), tie.options["source_name"]
        ((source, source_name),) = present.sources()
        if _submodule(model, path) is not source or source_name != name:
            raise TieError(f"it reads {quoted(f'{path}.{name}')} there and another tensor here.")


def entries_for(
    model: nn.Module,
    stored: StoredCheckpoint,
    header: Header,
    new: list[tuple[StoredTie, Rule]],
    functions: Functions,
) -> OrderedDict[str, Tensor]:
    """What ``load_state_dict`` will be given, once the model is known to take it."""
    entries: OrderedDict[str, Tensor] = OrderedDict(stored)
    for alias, kept in header.aliases.items():
        if kept not in stored or alias in stored:
            raise TieError(
                f"its alias {quoted(alias)} of {quoted(kept)} is wrong. Fetch or save it again."
            )
        entries[alias] = entries[kept]
    slots = _slots(model, new, functions)
    _raise(_misfits(entries, slots))
    for key in [prefix + name for prefix, _, name, _ in named_ties(model)]:
        if key in entries:  # widened before it is projected, not after
            entries[key] = entries[key].to(slots[key].dtype)
    if stored.module_metadata:
        entries._metadata = stored.module_metadata  # type: ignore[attr-defined]
    elif header.versions or header.ties:
        entries._metadata = {  # type: ignore[attr-defined]
            path: {"version": header.versions.get(path, 1)} for path, _ in model.named_modules()
        }
    entries = tie_state_dict(model, entries)
    wanted = {key: slot for key, slot in slots.items() if not slot.dense}
    _raise(_disagreeing(entries, wanted))
    holders = {slot.tensor: key for key, slot in wanted.items() if key in entries}
    for key, slot in wanted.items():
        if key not in entries and slot.tensor in holders:
            entries[key] = entries[holders[slot.tensor]]  # one of its other names
    missing = [f"'{key}' is missing." for key in wanted if key not in entries]
    index = index_beside(stored.path)
    if missing and index is not None:
        missing.insert(0, f"the file is one of several. Name their index, '{index}'.")
    _raise(missing)
    _warn_unshared(header.aliases, wanted)
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


def _slots(
    model: nn.Module, new: list[tuple[StoredTie, Rule]], functions: Functions
) -> dict[str, _Slot]:
    """All names that the model will take, the ties that will be made included."""
    slots = {
        key: _Slot(value.shape, value.dtype, id(value))
        for key, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }
    for prefix, layer, name, rule in named_ties(model):
        place = placeholder(layer, name, rule)
        slots[prefix + name] = _Slot(place.shape, place.dtype, (id(layer), name), dense=True)
    for tie, _ in new:
        slot = slots.pop(tie.key)
        probe = tie.make(functions)
        bind(probe, model.get_submodule(tie.layer), tie.tensor, model)
        for number, shape in enumerate(probe.free_shapes()):
            key = f"{tie.layer}.parametrizations.{tie.tensor}.original{number}".removeprefix(".")
            slots[key] = _Slot(shape, slot.dtype, (slot.tensor, number))
    return slots


_FREE_KEY = re.compile(r"(^|\.)parametrizations\.[^.]+\.original\d+$")


def _misfits(entries: Mapping[str, Tensor], slots: Mapping[str, _Slot]) -> list[str]:
    problems = []
    for key, value in entries.items():
        slot = slots.get(key)
        if slot is None and _FREE_KEY.search(key):
            problems.append(
                f"the model has no {quoted(key)}: that is a free value of a tied model. Tie the "
                "model as that one was, or write the file with tiedparam.save, which says how."
            )
        elif slot is None:
            problems.append(f"the model has no {quoted(key)}.")
        elif tuple(value.shape) != slot.shape:
            problems.append(
                f"size mismatch for '{key}': {shown_shape(value.shape)} there, {slot.shape} here."
            )
        elif not _holds(slot.dtype, value.dtype):
            problems.append(
                f"'{key}' is {value.dtype} there and {slot.dtype} here, which would change its "
                "values. Convert the model first, such as model.to(dtype)."
            )
    return problems


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


def _disagreeing(entries: Mapping[str, Tensor], slots: Mapping[str, _Slot]) -> list[str]:
    """Names of one tensor of the model for which the file has different values."""
    first: dict[object, str] = {}
    problems = []
    for key, value in entries.items():
        earlier = first.setdefault(slots[key].tensor, key)
        if earlier != key and not same_bits(value, entries[earlier]):
            problems.append(
                f"'{earlier}' and '{key}' are one tensor here and have different values there."
            )
    return problems


def _warn_unshared(aliases: Mapping[str, str], slots: Mapping[str, _Slot]) -> None:
    apart = [
        f"'{alias}' and '{kept}'"
        for alias, kept in aliases.items()
        if slots[alias].tensor != slots[kept].tensor
    ]
    if apart:
        warnings.warn(
            f"these were one tensor when they were saved and are two in this model: "
            f"{some_of(apart)}. They get equal values and will train apart. Share them "
            "in the model before you load, or tie one to the other by 'copy'.",
            TieWarning,
            stacklevel=4,
        )


def _raise(problems: list[str]) -> None:
    if len(problems) == 1:
        raise TieError(problems[0])
    if problems:
        raise TieError("it does not fit the model:\n  " + some_of(problems, "\n  "))


def placeholder(layer: nn.Module, name: str, rule: Rule) -> Tensor:
    """A tensor without memory that has the shape and dtype of the effective one."""
    stored = free_values(layer, name)
    if stored and not is_stacked(layer, name):
        return torch.empty(rule.bound_layout.shape, dtype=stored[0].dtype, device="meta")
    with torch.no_grad():  # what a function or another parametrization makes, it alone knows
        return effective(layer, name).to("meta")
