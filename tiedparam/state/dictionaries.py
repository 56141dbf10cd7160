"""Dense ⇄ tied checkpoints: what a tied layer loads and signs, and pure dictionary functions.

A tied layer stores ``<layer>.parametrizations.<tensor>.original<i>``. A dense entry
``<layer>.<tensor>`` is accepted as well and projected (S9), whatever ``strict``, ``assign``
or the device. A layer sees only its own entries, so a copy's dense entry is judged again
when its source has been loaded, whichever comes first.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.laws.linked import Linked
from tiedparam.laws.rule import Rule
from tiedparam.tie.lookup import (
    free_values,
    is_stacked,
    is_tied,
    key_prefix,
    named_ties,
    origins,
    ties_of,
)
from tiedparam.tie.torch_callers import refuse_loading_by_key
from tiedparam.tie.wrapped import has_fsdp1
from tiedparam.tie.write_guard import unguard
from tiedparam.util.bits import same_bits
from tiedparam.util.errors import TieError, TieWarning, quoted, shown_shape, some_of
from tiedparam.util.sharded import computed, gathered, is_sharded, whole
from tiedparam.util.torch_private import effective, has_values, parametrization_list

RESIDUAL_TO_WARN = 1e-3
"""A loaded weight that is further from the law than this is projected with a `TieWarning`."""

_SIGNATURE = "tiedparam"


def dense_state_dict(model: nn.Module) -> OrderedDict[str, Tensor]:
    """The state dict that the model would have without its ties.

    Every entry of a tied tensor is its effective weight, contiguous and in storage of its
    own, so ``torch.save``, safetensors and any plain copy of the model take it. Other
    entries are the model's own tensors, as in ``state_dict()``.

    Args:
        model: a model or a part of it. A source outside of the part is read where it is.

    Returns:
        A dictionary with the dense model's keys in the dense model's order.

    Raises:
        TieError: if the source of a copy was exchanged, or has lost its tensor.
    """
    if has_fsdp1(model):  # its layers hold parts, and state_dict gathers them
        return untie_state_dict(model, model.state_dict())
    return untie_with(model, model.state_dict(), _present)


def _present(layer: nn.Module, name: str, rule: Rule) -> Tensor:
    """What a tied tensor is now; of a copy whose source was resized, in that size."""
    if not isinstance(rule, Linked):
        return effective(layer, name)
    rule.refuse_exchanged()
    with rule.untying():
        return effective(layer, name)


def untie_state_dict(model: nn.Module, tied: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Expand a tied state dict to the dense one. A pure function: no layer is touched.

    Args:
        model: the tied model, for names and rules only; its values are not read.
        tied: a state dict of that model.

    Returns:
        A dictionary with dense keys; `tie_state_dict` brings it back to the bit.

    Raises:
        TieError: if free values are missing or misshapen, or a copy's source is not in the
            model.
    """
    return untie_with(model, tied, _Expander(model, tied).effective)


def tie_state_dict(model: nn.Module, dense: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Project a dense state dict to the tied one. A pure function: no layer is touched.

    For sharded and offline use, where hooks come too late. Entries that are tied already
    pass through.

    Args:
        model: the tied model, for names and rules only; its values are not read.
        dense: a state dict of the model without ties.

    Returns:
        A dictionary with the tied model's keys.

    Raises:
        TieError: listing every entry that does not fit: wrong shape, or a copy's entry that
            disagrees with its source's.

    Warns:
        TieWarning: naming the layers whose residual exceeds 1e-3.
    """
    problems: list[str] = []
    projected: list[tuple[str, float]] = []
    result: OrderedDict[str, Tensor] = OrderedDict(dense)
    expander = _Expander(model, dense)
    _copy_metadata(dense, result)
    for prefix, layer, name, rule in named_ties(model):
        key = prefix + name
        if key not in dense:
            continue
        problem = _unfit(layer, name, rule, key, dense[key])
        if problem is None and isinstance(rule, Linked):
            try:
                entry = expander.effective(layer, name, rule)
            except TieError as error:
                problem = str(error)
            else:
                problem = None if _agree(dense[key], entry) else _disagreement(key, rule)
        elif problem is None and any(k in dense for k in free_keys(layer, name, prefix)):
            problem = f"'{key}' stands in it both dense and tied. Remove one of the two."
        if problem is not None:
            problems.append(problem)
            continue
        value = _as_float(result.pop(key))
        if isinstance(rule, Linked):
            continue
        residual = rule.residual(value)
        if not residual <= RESIDUAL_TO_WARN:
            projected.append((key, residual))
        with torch.no_grad():
            free = rule.right_inverse(value)
        result.update(zip(free_keys(layer, name, prefix), free, strict=True))
    problems += _foreign_prefix(model, dense)
    if problems:
        raise TieError(
            "the dense state dict does not fit the tied model:\n" + some_of(problems, "\n")
        )
    _warn_projected(projected)
    return result


def free_keys(layer: nn.Module, name: str, prefix: str = "") -> list[str]:
    """The state-dict keys of a tied tensor's free values."""
    count = parametrization_list(layer, name).ntensors
    return [f"{prefix}parametrizations.{name}.original{index}" for index in range(count)]


# What a tied layer does when torch loads and saves it ------------------------------------


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
    for name, rule in ties_of(layer).items():
        key, keys = prefix + name, free_keys(layer, name, prefix)
        present = [k for k in keys if k in state_dict]
        problem = None
        if key in state_dict:
            value = state_dict.pop(key)
            problem = _unfit(layer, name, rule, key, value)
            if any(is_sharded(parameter) for parameter in origins(layer, name)):
                problem = (
                    f"'{key}' is dense and the layer is sharded. Convert the dictionary first, "
                    "with tiedparam.tie_state_dict(model, dense), and load the result with "
                    "torch.distributed.checkpoint.state_dict.set_model_state_dict."
                )
            elif problem is None and not _are_its_own(layer, name, keys, state_dict):
                problem = (
                    f"'{key}' stands in it both dense and tied. Load the dense entries alone, or "
                    "the result of tiedparam.tie_state_dict(model, dense)."
                )
            elif problem is None and isinstance(rule, Linked):
                _judge_now_and_later(layer, name, rule, key, value, error_msgs)
            elif problem is None:
                value = _as_float(value)
                residual = rule.residual(value) if has_values(value) else 0.0
                if not residual <= RESIDUAL_TO_WARN:
                    _warn_projected([(key, residual)])
                with torch.no_grad():
                    state_dict.update(zip(keys, rule.right_inverse(value), strict=True))
        elif present:
            problem = _unfit_free(layer, name, rule, key, keys, state_dict, signatures)
        if problem is not None:
            error_msgs.append(problem)
            state_dict.update(zip(keys, free_values(layer, name), strict=True))


def _are_its_own(
    layer: nn.Module, name: str, keys: list[str], state_dict: Mapping[str, Any]
) -> bool:
    """Whether those free values that a dictionary has are what the layer holds anyway.

    torch's ``full_state_dict=True`` and accelerate complete a dense dictionary from the model
    (S46): what the model has itself says nothing, and the dense entry counts.
    """
    return all(
        k not in state_dict
        or (isinstance(state_dict[k], Tensor) and same_bits(unguard(state_dict[k]), own))
        for k, own in zip(keys, map(unguard, free_values(layer, name)), strict=True)
    )


def sign(layer: nn.Module, destination: Any, prefix: str) -> None:
    """Note rule and options in the state dict's metadata; no key is added (S28)."""
    refuse_loading_by_key(layer, [prefix + name for name in ties_of(layer)], sys._getframe(1))
    metadata = getattr(destination, "_metadata", None)
    if metadata is not None:
        signatures = {name: str(rule) for name, rule in ties_of(layer).items()}
        metadata.setdefault(prefix[:-1], {})[_SIGNATURE] = signatures


def signatures_of(local_metadata: Mapping[str, Any]) -> Mapping[str, str]:
    """The rules that `sign` has noted for one layer, by tensor name."""
    signatures = local_metadata.get(_SIGNATURE)
    return signatures if isinstance(signatures, Mapping) else {}


class SourceWatch:
    """A load hook on a copy's source: judges the copy's dense entry once the source is in.

    It lives as long as the rule: however the tie ends, the hook is gone with it.
    """

    def __init__(self) -> None:
        self.pending: list[_PendingCopy] = []
        self.source: weakref.ref[nn.Module] | None = None

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        """Judge what has waited for the source, which is loaded now."""
        for copy in self.pending:
            copy.judge()
        self.pending.clear()

    def __reduce__(self) -> Any:
        return SourceWatch, ()  # what is pending belongs to a load that is over by then

    def end_with(self, rule: Linked, source: nn.Module) -> None:
        """Leave ``source`` when ``rule`` is gone."""
        self.source = weakref.ref(source)
        weakref.finalize(rule, self.leave).atexit = False

    def leave(self) -> None:
        """Take the hook away from the source."""
        source = self.source() if self.source is not None else None
        hooks = source._load_state_dict_post_hooks if source is not None else {}
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key]


def watch_source(rule: Linked) -> None:
    """Put a `SourceWatch` on the layer that ``rule`` reads."""
    rule.watch = SourceWatch()
    rule.source.register_load_state_dict_post_hook(rule.watch)
    rule.watch.end_with(rule, rule.source)


class _PendingCopy:
    """A copy's dense entry, whose verdict stands in ``error_msgs`` of the load in progress."""

    def __init__(
        self, layer: nn.Module, name: str, value: Tensor, key: str, error_msgs: list[str]
    ) -> None:
        # weakly: the checkpoint's tensors live as long as the load, not as long as the model
        self.layer, self.value = weakref.ref(layer), weakref.ref(value)
        self.name, self.key, self.error_msgs = name, key, error_msgs

    def judge(self) -> None:
        """Add or withdraw the complaint, by what the source holds now."""
        layer, value = self.layer(), self.value()
        if layer is None or value is None or not is_tied(layer, self.name):
            return
        rule = ties_of(layer)[self.name]
        with torch.no_grad():
            agree = _agree(value, rule())
        complaint = _disagreement(self.key, rule)
        if not agree and complaint not in self.error_msgs:
            self.error_msgs.append(complaint)
        elif agree and complaint in self.error_msgs:
            self.error_msgs.remove(complaint)


def _judge_now_and_later(
    layer: nn.Module, name: str, rule: Linked, key: str, value: Tensor, error_msgs: list[str]
) -> None:
    copy = _PendingCopy(layer, name, value, key, error_msgs)
    copy.judge()
    link: Rule | None = rule
    while isinstance(link, Linked):  # along the chain, to the layer that has the numbers
        if link.watch is not None:
            link.watch.pending.append(copy)
        link = ties_of(link.source).get(link.source_name or "weight")


# What fits ---------------------------------------------------------------------------------


def _unfit(layer: nn.Module, name: str, rule: Rule, key: str, value: Any) -> str | None:
    shape = rule.bound_layout.shape
    if is_stacked(layer, name):
        return (
            f"'{key}' is dense, and another parametrization is stacked on '{rule}' here. Remove "
            "that one first."
        )
    if not isinstance(value, Tensor):
        return f"'{key}' is a {type(value).__name__}, not a tensor."
    stored = free_values(layer, name)
    if value.is_complex() and any(not parameter.is_complex() for parameter in stored):
        return f"'{key}' is complex in the checkpoint, and real here."
    if tuple(value.shape) != shape:
        there = shown_shape(value.shape)
        return f"size mismatch for '{key}': {there} in the checkpoint, {shape} here."
    return None


def _unfit_free(
    layer: nn.Module,
    name: str,
    rule: Rule,
    key: str,
    keys: list[str],
    state_dict: Mapping[str, Any],
    signatures: Mapping[str, str],
) -> str | None:
    missing = [k for k in keys if k not in state_dict]
    if missing:
        return f"free values of '{key}' are missing: {', '.join(missing)}. Load all or none."
    more = f"{key.removesuffix(name)}parametrizations.{name}.original{len(keys)}"
    if more in state_dict:
        return f"'{more}' is one free value more than '{rule}' has. Load another checkpoint."
    written = signatures.get(name)
    if written is not None and written != str(rule):
        return f"'{key}' was saved under the rule {quoted(written)} and is tied by '{rule}' here."
    for k, shape in zip(keys, rule.free_shapes(), strict=True):
        entry = state_dict[k]
        if not isinstance(entry, Tensor):
            return f"'{k}' is a {type(entry).__name__}, not a tensor."
        if tuple(entry.shape) != tuple(shape):
            return (
                f"size mismatch for '{k}': {shown_shape(entry.shape)} in the checkpoint, "
                f"{shape} here."
            )
    return None


def _foreign_prefix(model: nn.Module, entries: Mapping[str, Tensor]) -> list[str]:
    """A complaint if no tied tensor is in ``entries``, but all under one prefix (DDP's, say)."""
    keys = [
        {prefix + name, *free_keys(layer, name, prefix)}
        for prefix, layer, name, _ in named_ties(model)
    ]
    if not keys or any(k in entries for wanted in keys for k in wanted):
        return []
    for entry in entries:
        found = next((k for k in keys[0] if entry.endswith(f".{k}")), None)
        if found is not None:
            prefix = entry.removesuffix(found)
            return [
                f"its keys begin with {quoted(prefix)}, as in {quoted(entry)}. Take that away "
                "first."
            ]
    return []


def _agree(entry: Tensor, computed: Tensor) -> bool:
    """Equal up to the rounding of the coarser of the two dtypes."""
    if not (has_values(entry) and has_values(computed)):
        return True
    entry, computed = _as_float(entry).detach(), _as_float(computed).detach()
    if entry.shape != computed.shape:
        return False
    tolerance = 4 * max(torch.finfo(entry.dtype).eps, torch.finfo(computed.dtype).eps)
    wide = torch.promote_types(torch.promote_types(entry.dtype, computed.dtype), torch.float32)
    return torch.allclose(
        entry.to(computed.device, wide), computed.to(wide), rtol=tolerance, atol=0, equal_nan=True
    )


def _disagreement(key: str, rule: Rule) -> str:
    return (
        f"'{key}' is tied by '{rule}' and disagrees with its source. Load a checkpoint that "
        "keeps the law, or remove the entry to take the source's values. Parts of a checkpoint "
        "are put together first: tiedparam.tie_state_dict(model, dense)."
    )


def _as_float(value: Tensor) -> Tensor:
    value = whole(unguard(value))
    return value if value.is_floating_point() or value.is_complex() else value.float()


def _warn_projected(projected: list[tuple[str, float]]) -> None:
    if projected:
        names = some_of([f"'{key}' (residual {residual:.2e})" for key, residual in projected])
        warnings.warn(
            f"these weights were not lawful and were projected while loading: {names}. "
            "Fine-tune, or look at tiedparam.residual before you tie.",
            TieWarning,
            stacklevel=3,
        )


# Expanding a dictionary --------------------------------------------------------------------


def _through(
    module: nn.Module, index: int, entries: Mapping[str, Tensor], *values: Tensor
) -> Tensor:
    """What one parametrization makes of ``values``, with its own state from ``entries``."""
    prefix = f"{index}."
    # copies: spectral_norm, say, writes into its buffers in training mode
    own = {
        key.removeprefix(prefix): value.clone()
        for key, value in entries.items()
        if key.startswith(prefix)
    }
    return cast(Tensor, torch.func.functional_call(module, own, values))


class _Expander:
    """Effective weights computed from a dictionary, following copies to their sources."""

    def __init__(self, model: nn.Module, entries: Mapping[str, Tensor]) -> None:
        self.entries = entries
        self.prefixes = {id(module): key_prefix(path) for path, module in model.named_modules()}

    def effective(self, layer: nn.Module, name: str, rule: Rule | None) -> Tensor:
        """The tensor ``name`` of ``layer``, tied by ``rule`` or not at all."""
        if not parametrize.is_parametrized(layer, name):
            return self._entry(self.prefixes[id(layer)] + name)
        first, *others = parametrization_list(layer, name)
        if rule is not None:
            weight = self._tied(layer, name, rule)
        else:  # a parametrization of torch's, or of the user's
            own = self._own(layer, name)
            originals = [value for key, value in own.items() if key.startswith("original")]
            weight = _through(first, 0, own, *originals)
        if others:
            own = self._own(layer, name)
            for index, module in enumerate(others, start=1):
                weight = _through(module, index, own, weight)
        return weight

    def _entry(self, key: str) -> Tensor:
        if key not in self.entries:
            raise TieError(f"the state dict has no '{key}', which a copy reads.")
        entry = self.entries[key]
        if not isinstance(entry, Tensor):
            raise TieError(f"'{key}', which a copy reads, is a {type(entry).__name__}.")
        return cast(Tensor, gathered(entry))

    def _own(self, layer: nn.Module, name: str) -> dict[str, Tensor]:
        """The entries of one tensor's parametrizations."""
        prefix = f"{self.prefixes[id(layer)]}parametrizations.{name}."
        return {k: self._entry(prefix + k) for k in parametrization_list(layer, name).state_dict()}

    def _tied(self, layer: nn.Module, name: str, rule: Rule) -> Tensor:
        if isinstance(rule, Linked):
            ((source, source_name),) = rule.sources()
            present = self._source(source, source_name)
            try:
                return rule.fn(present)
            except Exception as error:
                raise TieError(
                    f"'{rule}' raised {type(error).__name__} on its source's entry "
                    f"{tuple(present.shape)}: {error}. Correct that entry."
                ) from error
        prefix = self.prefixes[id(layer)]
        keys = free_keys(layer, name, prefix)
        problem = _unfit_free(layer, name, rule, prefix + name, keys, self.entries, {})
        if problem is not None:
            raise TieError(problem)
        return computed(rule.forward, map(self._entry, keys))

    def _source(self, layer: nn.Module, name: str) -> Tensor:
        rule = ties_of(layer).get(name)
        if not isinstance(rule, Linked):
            prefix = self.prefixes.get(id(layer))
            if prefix is None:
                raise TieError(
                    f"the source of a copied tensor, a {type(layer).__name__}, is not in this "
                    "model. Pass the whole model and its whole state dict."
                )
            if prefix + name in self.entries:  # dense already
                return self._entry(prefix + name)
        return self.effective(layer, name, rule)


def untie_with(
    model: nn.Module,
    tied: Mapping[str, Tensor],
    effective_weight: Callable[[nn.Module, str, Rule], Tensor],
) -> OrderedDict[str, Tensor]:
    """A tied state dict with dense entries, each by ``effective_weight`` of layer, name, rule."""
    available: dict[str, Tensor] = dict(tied)
    for prefix, layer, name, rule in named_ties(model):
        if prefix + name in tied:
            continue
        with torch.no_grad():
            weight = effective_weight(layer, name, rule)
        dense = weight.detach().clone(memory_format=torch.contiguous_format)
        for key in [k for k in available if k.startswith(f"{prefix}parametrizations.{name}.")]:
            del available[key]
        available[prefix + name] = dense
    # in the order of the dense model; what the modules do not name keeps its place behind
    result: OrderedDict[str, Tensor] = OrderedDict()
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = key_prefix(path)
        parameters = module.__dict__.get("_parameter_order", module._parameters)
        for name in (*parameters, *ties_of(module), *module._buffers, "_extra_state"):
            if prefix + name in available:
                result[prefix + name] = available.pop(prefix + name)
    result.update(available)
    _copy_metadata(tied, result)
    return result


def _copy_metadata(source: Any, target: Any) -> None:
    metadata = getattr(source, "_metadata", None)
    if metadata is not None:
        target._metadata = OrderedDict(
            (path, {k: v for k, v in entry.items() if k != _SIGNATURE})
            for path, entry in metadata.items()
        )
