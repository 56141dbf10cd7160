"""Dense entries of layers that share values: what is shared follows from all of them at once."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.laws.sharing import Sharing
from tiedparam.state.entries import as_float, why_unfit
from tiedparam.tie.lookup import named_ties_in
from tiedparam.tie.record import Tie
from tiedparam.tie.sharing import readers_of, shared_by
from tiedparam.tie.torch_callers import load_call
from tiedparam.util.errors import Reason

Fits = dict[nn.Module, tuple[tuple[Tensor, ...], Tensor]]
"""By the list of a tie, its free values, and the weight that they give."""


def fitted_together(model: nn.Module, entries: Mapping[str, Any]) -> Fits:
    """The free values of all ties that share some, where a dictionary has them all dense.

    Ties of which some entries are missing, or are tied already, are left out.

    Args:
        model: the tied model.
        entries: a dictionary for it.
    """
    found: Fits = {}
    prefixes = {tie.values: (prefix, tie) for prefix, tie in named_ties_in(model)}
    for prefix, owner in list(prefixes.values()):
        if shared_by(owner) is not owner.values:
            continue
        weights = [_dense(prefix, owner, entries)]
        readers = readers_of(owner)
        for reader in readers:
            there = prefixes.get(reader.values)
            weights.append(_dense(*there, entries) if there is not None else None)
        if all(weight is not None for weight in weights):
            found.update(_fit([owner, *readers], weights))  # type: ignore[arg-type]
    return found


def _dense(prefix: str, tie: Tie, entries: Mapping[str, Any]) -> Tensor | None:
    """The dense entry of a tie in the canonical layout, if it is there and fits."""
    key = prefix + tie.tensor_name
    if key not in entries or why_unfit(tie, key, entries[key]) is not None:
        return None
    return tie.rule.bound_layout.canonical(as_float(entries[key]).detach())


def _fit(ties: list[Tie], weights: list[Tensor]) -> Fits:
    owner: Any = ties[0].rule
    weights = [weight.to(weights[0].device, weights[0].dtype) for weight in weights]
    started = owner.start(weights)
    if started is None:
        return {}
    shared, fitted = started
    found: Fits = {}
    for tie, values in zip(ties, fitted, strict=True):
        free = values if tie.rule.reads_layers else (shared, *values)
        with torch.no_grad():
            found[tie.values] = free, tie.rule.forward(shared, *values)
    return found


def why_alone(tie: Tie, key: str) -> Reason | None:
    """The reason against a dense entry without those of the others, if it owns what they share."""
    if not isinstance(tie.rule, Sharing) or tie.rule.reads_layers:
        return None
    return Reason(
        f"'{key}' is dense, and what '{tie.rule}' shares follows from the entries of all layers "
        "that share it.",
        "Give all of them dense, of finite numbers, or none.",
    )


# While a model is loaded ------------------------------------------------------------------------

_loads: dict[int, Fits] = {}
"""By the ``id`` of the dictionary that `load_state_dict` loads from, as long as it lives."""


def fitted_in_load(tie: Tie, frame: FrameType | None) -> tuple[tuple[Tensor, ...], Tensor] | None:
    """What `fitted_together` gives for a tie that is being loaded; None where it says nothing.

    A layer is given its own entries. All of them are in the call of ``load_state_dict``.

    Args:
        tie: the tie.
        frame: that of a function which that call has called.
    """
    if not isinstance(tie.rule, Sharing):
        return None
    call = load_call(frame)
    if call is None:
        return None
    model, entries = call
    if id(entries) not in _loads:
        _loads[id(entries)] = fitted_together(model, entries)
        # torch has made this dictionary for the one call
        weakref.finalize(entries, _loads.pop, id(entries), None).atexit = False
    return _loads[id(entries)].get(tie.values)
