"""What a tied layer does when torch loads and saves it.

A tied layer stores ``<layer>.parametrizations.<tensor>.original<i>``. A dense entry
``<layer>.<tensor>`` is accepted as well and projected (S9), whatever ``strict``, ``assign`` or the
device. A layer sees only its own entries, so a dense entry that depends on a source is judged
again when that has been loaded, whichever comes first.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.laws.coded import Coded
from tiedparam.laws.distance import relative_distance
from tiedparam.laws.sharing import refitted
from tiedparam.state.entries import (
    RESIDUAL_TO_WARN,
    SIGNATURE,
    agree,
    as_float,
    both_forms,
    data_in,
    disagreement,
    note_projected,
    renew_entries,
    start_load,
    why_other_data,
    why_unfit,
    why_unfit_free,
)
from tiedparam.state.together import fitted_in_load, why_alone
from tiedparam.tie.lookup import find_tie, origins, ties_in
from tiedparam.tie.record import Tie
from tiedparam.tie.sources import chain, depth
from tiedparam.tie.stages import is_cutting, refuse_cut
from tiedparam.tie.torch_callers import beyond_modules, refuse_loading_by_key
from tiedparam.tie.write_guard import unguard
from tiedparam.util.bits import same_bits
from tiedparam.util.callers import caller
from tiedparam.util.errors import Reason
from tiedparam.util.sharded import is_sharded, write
from tiedparam.util.torch_private import has_values, metadata_of, parameters_of


def accept(
    layer: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    error_msgs: list[str],
) -> None:
    """Turn the dense entries of one layer into tied ones, before torch loads the layer.

    What does not fit is reported through ``error_msgs``, and the tied tensor keeps all of its
    old values: torch is given those to load, so that it does not complain of missing keys.
    """
    signatures = signatures_of(local_metadata)
    for tie in ties_in(layer):
        key, keys = prefix + tie.tensor_name, tie.keys(prefix)
        reason: Reason | None = None
        renew_entries(tie.rule, key, state_dict)
        if key in state_dict:
            start_load(caller())
            value = state_dict.pop(key)
            reason = _why_not_loaded(tie, key, value, keys, state_dict)
            fit = fitted_in_load(tie, caller()) if reason is None else None
            if reason is None and fit is None and has_values(value):
                lacks_values = not all(map(has_values, tie.free))
                reason = why_alone(tie, key) if lacks_values else None
            if fit is not None:
                _take(fit, keys, key, as_float(value), state_dict)
            elif reason is None and tie.rule.reads_layers:
                _judge_now_and_later(tie, keys, key, value, state_dict, local_metadata, error_msgs)
            elif reason is None:
                _project(tie, keys, key, as_float(value), state_dict)
        elif any(k in state_dict for k in keys):
            reason = why_unfit_free(tie, prefix, state_dict, signatures)
        else:
            reason = why_other_data(tie, prefix, state_dict)
        if reason is None and isinstance(tie.rule, Coded):
            tie.rule.adopt(data_in(tie, prefix, state_dict))
        if reason is not None:
            error_msgs.append(str(reason))
            state_dict.update(zip(keys, tie.free, strict=True))
            state_dict.update(tie.data(prefix))
        elif local_metadata.get("assign_to_params_buffers"):
            _follow(tie, prefix, state_dict)


def _follow(tie: Tie, prefix: str, state_dict: Mapping[str, Any]) -> None:
    """Let a law compute where the layer will be, even if it has no value to be assigned."""
    names = [*tie.keys(prefix), *tie.data(prefix), *(prefix + n for n in parameters_of(tie.layer))]
    for value in map(state_dict.get, names):
        if isinstance(value, Tensor) and has_values(value):
            tie.rule.bind_device(value.device)
            return


def _why_not_loaded(
    tie: Tie, key: str, value: Any, keys: list[str], state_dict: Mapping[str, Any]
) -> Reason | None:
    if any(is_sharded(parameter) for parameter in origins(tie.layer, tie.tensor_name)):
        return Reason(
            f"'{key}' is dense and the layer is sharded.",
            "Convert the dictionary first, with tiedparam.tie_state_dict(model, dense), and load "
            "the result with torch.distributed.checkpoint.state_dict.set_model_state_dict.",
        )
    reason = why_unfit(tie, key, value)
    if reason is None:
        reason = why_other_data(tie, key.removesuffix(tie.tensor_name), state_dict)
    if reason is None and not _are_its_own(tie, keys, state_dict):
        return both_forms(
            key,
            "Load the dense entries alone, or the result of "
            "tiedparam.tie_state_dict(model, dense).",
        )
    return reason


def _are_its_own(tie: Tie, keys: list[str], state_dict: Mapping[str, Any]) -> bool:
    """Whether those free values that a dictionary has are what the layer holds anyway.

    torch's ``full_state_dict=True`` and accelerate complete a dense dictionary from the model
    (S46): values that the model has already tell nothing, and the dense entry counts.
    """
    return all(
        k not in state_dict
        or (isinstance(state_dict[k], Tensor) and same_bits(unguard(state_dict[k]), own))
        for k, own in zip(keys, map(unguard, tie.free), strict=True)
    )


def _take(
    fit: tuple[tuple[Tensor, ...], Tensor],
    keys: list[str],
    key: str,
    value: Tensor,
    state_dict: dict[str, Any],
) -> None:
    """Put fitted values into the place of a dense entry."""
    free, lawful = fit
    residual = relative_distance(value, lawful.to(value)) if has_values(value) else 0.0
    if not residual <= RESIDUAL_TO_WARN:
        note_projected(key, residual, caller())
    state_dict.update(zip(keys, free, strict=True))


def _project(
    tie: Tie, keys: list[str], key: str, value: Tensor, state_dict: dict[str, Any]
) -> None:
    with torch.no_grad():
        free = refitted(tie.rule, value, tie.free)
        _take((free, tie.rule(*free)), keys, key, value, state_dict)
    for name, own in tie.data(key.removesuffix(tie.tensor_name)).items():
        state_dict[name] = own.to(value.device) if has_values(value) else own


def sign(layer: nn.Module, destination: Any, prefix: str) -> None:
    """Note rule and options in the state dict's metadata; no key is added (S28)."""
    ties = ties_in(layer)
    asker = beyond_modules(caller())
    if asker is not None:
        refuse_loading_by_key(layer, [prefix + tie.tensor_name for tie in ties], asker)
        if is_cutting(asker):
            for tie in ties:
                if tie.rule.reads_layers:
                    behind = origins(layer, tie.tensor_name)
                    refuse_cut(prefix + tie.tensor_name, tie.rule, behind, asker)
    metadata = metadata_of(destination)
    if metadata is not None:
        signatures = {tie.tensor_name: str(tie.rule) for tie in ties}
        metadata.setdefault(prefix[:-1], {})[SIGNATURE] = signatures


def signatures_of(local_metadata: Mapping[str, Any]) -> Mapping[str, str]:
    """The rules that `sign` has noted for one layer, by tensor name."""
    signatures = local_metadata.get(SIGNATURE)
    return signatures if isinstance(signatures, Mapping) else {}


# Ties that read other layers --------------------------------------------------------------------


def _loaded_later(tie: Tie) -> int:
    """How many sources, all along the chain, will be loaded after the layer, by their places."""
    read = [
        (source, place.common_root)
        for each in chain(tie.values)
        for (source, _), place in zip(each.law.sources(), each.own_reading().places, strict=True)
    ]
    # roots of one chain lie in each other, since each holds a link: the largest holds them all
    order: dict[int, int] = {}
    for root in (root for _, root in read if root is not None):
        there = {id(part): number for number, part in enumerate(root.modules())}
        order = max(order, there, key=len)
    own = order.get(id(tie.layer), len(order))
    # of the layer itself, what stands beside the tied tensor is loaded later, too
    return sum(order.get(id(s), -1) > own or s is tie.layer for s, _ in read)


class _PendingEntry:
    """A dense entry whose verdict, or whose fit, depends on sources that may be loaded later.

    Attributes:
        depth: how many ties are behind its tie, which are judged before it.
    """

    def __init__(
        self,
        tie: Tie,
        keys: list[str],
        key: str,
        value: Tensor,
        state_dict: dict[str, Any],
        error_msgs: list[str],
    ) -> None:
        # weakly: the checkpoint's tensors live as long as the load, not as long as the model
        self._layer, self._value = weakref.ref(tie.layer), weakref.ref(value)
        self._tensor_name, self._key, self._error_msgs = tie.tensor_name, key, error_msgs
        self._awaited, self.depth = _loaded_later(tie), depth(tie.values)
        # a source inside of the layer is loaded next, perhaps before the free values are; and
        # nobody else may hold the entry until then
        within = set(tie.layer.modules())
        is_within = any(source in within for source, _ in tie.rule.sources())
        self._held = (value, state_dict, keys) if is_within else None

    def fitted(self) -> tuple[Tensor, ...]:
        """The free values that are nearest now, after adding or withdrawing the complaint."""
        layer, value = self._layer(), self._value()
        tie = find_tie(layer, self._tensor_name) if layer is not None else None
        if tie is None or value is None:
            return ()
        if tie.free:
            return self._nearest(tie, as_float(value))
        with torch.no_grad():
            computed = tie.tied()
        complaint = str(disagreement(self._key, tie))
        agrees = agree(value, computed, fitted=any(each.ntensors for each in chain(tie.values)))
        if not agrees and complaint not in self._error_msgs:
            self._error_msgs.append(complaint)
        elif agrees and complaint in self._error_msgs:
            self._error_msgs.remove(complaint)
        return ()

    def _nearest(self, tie: Tie, value: Tensor) -> tuple[Tensor, ...]:
        """The free values that are nearest to the entry; what is left cannot be helped."""
        with torch.no_grad():
            sources = tuple(tie.record.own_reading().read_all(tie.record.law))
            if has_values(value) and not all(map(has_values, sources)):
                # the source's values come later; by then the free values have a place for theirs
                return tuple(value.new_zeros(shape) for shape in tie.rule.free_shapes())
            like = value.to(sources[0].device, sources[0].dtype)
            free = tie.rule.fit_to(like, sources)
            if has_values(value) and self._awaited <= 0:
                residual = relative_distance(like, tie.rule(*sources, *free))
                if not residual <= RESIDUAL_TO_WARN:
                    note_projected(self._key, residual, caller())
        return free

    def __call__(self) -> None:
        """Judge, and fit, by what the source holds now that it is loaded."""
        self._awaited -= 1
        free = self.fitted()
        layer = self._layer()
        tie = find_tie(layer, self._tensor_name) if layer is not None else None
        if tie is not None and free:
            if self._held is not None:
                _, entries, keys = self._held
                entries.update(zip(keys, free, strict=True))
            with torch.no_grad():
                for parameter, content in zip(tie.free, free, strict=True):
                    write(parameter, content)


def _judge_now_and_later(
    tie: Tie,
    keys: list[str],
    key: str,
    value: Tensor,
    state_dict: dict[str, Any],
    local_metadata: Mapping[str, Any],
    error_msgs: list[str],
) -> None:
    entry = _PendingEntry(tie, keys, key, value, state_dict, error_msgs)
    free = entry.fitted()
    if free and local_metadata.get("assign_to_params_buffers"):
        # they become the Parameters: of the checkpoint's dtype, whatever the source still has
        dtype = as_float(value).dtype
        free = tuple(content.to(dtype) for content in free)
    state_dict.update(zip(keys, free, strict=True))
    for each in chain(tie.values):  # to the layers that have the numbers
        for watch in each.reading.watches if each.reading is not None else ():
            watch.waiting.append(entry)
