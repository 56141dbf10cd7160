"""Whether single entries of a state dict fit a tie: reasons, and what is said of misfits."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Mapping, MutableMapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tiedparam.laws.coded import Coded
from tiedparam.laws.distance import relative_distance
from tiedparam.laws.earlier import renewed
from tiedparam.laws.fitted import is_fitted, why_no_numbers
from tiedparam.laws.rule import Rule
from tiedparam.tie.record import Tie
from tiedparam.tie.torch_callers import load_call
from tiedparam.tie.write_guard import unguard
from tiedparam.util.callers import caller
from tiedparam.util.errors import Reason, quoted, shown_shape, some_of, warn
from tiedparam.util.sharded import whole
from tiedparam.util.torch_private import has_values, original_key

RESIDUAL_TO_WARN = 1e-3
"""A loaded weight that is further from the law than this is projected with a `TieWarning`."""

SIGNATURE = "tiedparam"
"""The key of the rules in a state dict's metadata."""


def renew_entries(rule: Rule, key: str, entries: MutableMapping[str, Any]) -> None:
    """Bring free values of an earlier layout into today's order and place.

    Args:
        rule: the law of the tensor.
        key: the tensor's key in a dense model.
        entries: a dictionary that may have its free values.
    """
    layer, _, name = key.rpartition(".")
    keys = (original_key(layer, name, number) for number in itertools.count())
    there = list(itertools.takewhile(entries.__contains__, keys))
    free = renewed(rule, [unguard(entries[k]) for k in there]) if there else None
    if free is not None:
        for k in there:
            del entries[k]
        entries.update({original_key(layer, name, i): value for i, value in enumerate(free)})


def why_unfit(tie: Tie, key: str, value: Any) -> Reason | None:
    """Why a dense entry cannot become the tie's free values, or None."""
    if tie.is_stacked:
        return Reason(
            f"'{key}' is dense, and another parametrization is stacked on '{tie.rule}' here.",
            "Remove that one first.",
        )
    if not isinstance(value, Tensor):
        return Reason(f"'{key}' is a {type(value).__name__}, not a tensor.")
    stale = tie.rule.why_stale() if isinstance(tie.rule, Coded) else None
    if stale is not None:
        return Reason(f"'{key}' is dense, and the law has no pattern: {stale.fact}", stale.remedy)
    if value.is_complex() and any(not parameter.is_complex() for parameter in tie.free):
        return Reason(f"'{key}' is complex in the checkpoint, and real here.")
    shape = tie.rule.bound_layout.shape
    if tuple(value.shape) != shape:
        return _another_size(key, value, shape)
    if is_fitted(tie.rule) and why_no_numbers(value, ()) is not None:
        return Reason(
            f"'{key}' is dense with entries that are not finite numbers, and '{tie.rule}' solves "
            "for its free values: all of them would be lost.",
            "Load another checkpoint.",
        )
    return None


def why_unfit_free(
    tie: Tie, prefix: str, state_dict: Mapping[str, Any], signatures: Mapping[str, str]
) -> Reason | None:
    """Why the free values in a state dict are not those of the tie, or None.

    Args:
        tie: the tie.
        prefix: what the keys of its layer begin with.
        state_dict: the entries.
        signatures: the rules that were noted with them, by tensor name.
    """
    key, keys, rule = prefix + tie.tensor_name, tie.keys(prefix), tie.rule
    missing = [k for k in keys if k not in state_dict]
    if missing:
        return Reason(
            f"free values of '{key}' are missing: {', '.join(missing)}.", "Load all or none."
        )
    more = tie.keys(prefix, len(keys) + 1)[-1]
    if more in state_dict:
        return Reason(
            f"'{more}' is one free value more than '{rule}' has.", "Load another checkpoint."
        )
    written = signatures.get(tie.tensor_name)
    if written is not None and written != str(rule):
        return Reason(
            f"'{key}' was saved under the rule {quoted(written)} and is tied by '{rule}' here."
        )
    for k, shape in zip(keys, rule.free_shapes(), strict=True):
        entry = state_dict[k]
        if not isinstance(entry, Tensor):
            return Reason(f"'{k}' is a {type(entry).__name__}, not a tensor.")
        if tuple(entry.shape) != tuple(shape):
            return _another_size(k, entry, tuple(shape))
    return why_other_data(tie, prefix, state_dict)


def why_other_data(tie: Tie, prefix: str, state_dict: Mapping[str, Any]) -> Reason | None:
    """Why the data in a state dict is not that of the tie's law, or None; it may be missing."""
    if not isinstance(tie.rule, Coded):
        return None
    here = tie.data(prefix)
    there = {key: state_dict[key] for key in here if key in state_dict}
    for key, entry in there.items():
        if not isinstance(entry, Tensor):
            return Reason(f"'{key}' is a {type(entry).__name__}, not a tensor.")
        if entry.dtype.is_floating_point != here[key].dtype.is_floating_point:
            return Reason(f"'{key}' is {entry.dtype} there and {here[key].dtype} here.")
        if entry.shape != here[key].shape:
            return _another_size(key, entry, tuple(here[key].shape))
    if not there:
        return None
    complete = {key.rpartition(".")[2]: whole(value) for key, value in {**here, **there}.items()}
    reason = tie.rule.why_other_data(complete)
    if reason is None:
        return None
    return Reason(f"'{prefix}{tie.tensor_name}': {reason.fact}", reason.remedy)


def data_in(tie: Tie, prefix: str, state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a state dict has of the data of a tie's law, by the law's own names."""
    keys = [key for key in tie.data(prefix) if key in state_dict]
    return {key.rpartition(".")[2]: whole(state_dict[key]) for key in keys}


def _another_size(key: str, entry: Tensor, shape: tuple[int, ...]) -> Reason:
    there = shown_shape(entry.shape)
    return Reason(f"size mismatch for '{key}': {there} in the checkpoint, {shape} here.")


def agree(entry: Tensor, computed: Tensor, *, fitted: bool = False) -> bool:
    """Whether two tensors are equal up to the rounding of the coarser of their dtypes.

    Args:
        entry: what a dictionary has.
        computed: what the tie makes of its sources.
        fitted: whether these were fitted to the dictionary, which is less exact than rounding.
    """
    if not (has_values(entry) and has_values(computed)):
        return True
    entry, computed = as_float(entry).detach(), as_float(computed).detach()
    if entry.shape != computed.shape:
        return False
    tolerance = 4 * max(torch.finfo(entry.dtype).eps, torch.finfo(computed.dtype).eps)
    wide = torch.promote_types(torch.promote_types(entry.dtype, computed.dtype), torch.float32)
    entry, computed = entry.to(computed.device, wide), computed.to(wide)
    if fitted and relative_distance(entry, computed) <= RESIDUAL_TO_WARN:
        return True
    return torch.allclose(entry, computed, rtol=tolerance, atol=0, equal_nan=True)


def disagreement(key: str, tie: Tie) -> Reason:
    """The reason against a dense entry that is not what the tie's sources give."""
    return Reason(
        f"'{key}' is tied by '{tie.rule}' and disagrees with its source.",
        "Load a checkpoint that keeps the law, or remove the entry to take the source's values. "
        "Join the parts of a checkpoint first: tiedparam.tie_state_dict(model, dense).",
    )


def both_forms(key: str, remedy: str) -> Reason:
    """The reason against a tensor that a state dict has twice."""
    return Reason(f"it has '{key}' both dense and tied.", remedy)


def as_float(value: Tensor) -> Tensor:
    """An entry as numbers that a law can average, whole where it is sharded."""
    value = whole(unguard(value))
    return value if value.is_floating_point() or value.is_complex() else value.float()


# What was projected --------------------------------------------------------------------------


def warn_projected(projected: list[tuple[str, float]]) -> None:
    """Say which loaded weights were not lawful, by key and residual, the worst first."""
    if not projected:
        return
    worst = sorted(projected, key=lambda each: -math.inf if math.isnan(each[1]) else -each[1])
    names = some_of([f"'{key}' (residual {residual:.2e})" for key, residual in worst])
    weights = "these weights" if len(worst) == 1 else f"{len(worst)} weights"
    warn(
        f"{weights} were not lawful and were projected while loading: {names}.",
        "Fine-tune, or look at tiedparam.residual before you tie.",
    )


class _Projected:
    """The hook on a model that is being loaded: one warning for all layers, at the end.

    A layer sees only its own entries. The call of ``load_state_dict`` is found among the callers.

    Attributes:
        found: keys and residuals so far.
    """

    def __init__(self) -> None:
        self.found: list[tuple[str, float]] = []

    def __call__(self, model: nn.Module, incompatible: object) -> None:
        found, self.found = self.found, []
        if _hook_in(load_call(caller())) is self:  # not of a load that an error has ended
            warn_projected(found)

    def __reduce__(self) -> Any:
        return type(self), ()


_loads: dict[int, _Projected] = {}
"""By the ``id`` of the dictionary that `load_state_dict` loads from, as long as it lives."""


def start_load(frame: FrameType) -> None:
    """Prepare for projected weights in the load whose call is above this frame, if there is one.

    Before any is found: by then torch may be running the hooks of the model itself.
    """
    call = load_call(frame)
    if call is not None and _hook_in(call) is None:
        model, entries = call
        hook = _loads[id(entries)] = _Projected()
        handle = model.register_load_state_dict_post_hook(hook)
        # torch has made this dictionary for the one call
        weakref.finalize(entries, _end_load, id(entries), handle).atexit = False


def note_projected(key: str, residual: float, frame: FrameType) -> None:
    """Warn of a weight when the load ends whose call is above this frame; else now."""
    hook = _hook_in(load_call(frame))
    if hook is None:
        warn_projected([(key, residual)])
    else:
        hook.found.append((key, residual))


def _hook_in(call: tuple[nn.Module, dict[str, Any]] | None) -> _Projected | None:
    return _loads.get(id(call[1])) if call is not None else None


def _end_load(entries: int, handle: RemovableHandle) -> None:
    del _loads[entries]
    handle.remove()
