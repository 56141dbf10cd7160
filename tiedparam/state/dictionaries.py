"""Dense ⇄ tied state dicts: functions from one dictionary to another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.laws.coded import Coded
from tiedparam.laws.distance import relative_distance
from tiedparam.state.entries import (
    RESIDUAL_TO_WARN,
    SIGNATURE,
    agree,
    as_float,
    both_forms,
    disagreement,
    renew_entries,
    warn_projected,
    why_unfit,
    why_unfit_free,
)
from tiedparam.state.together import fitted_together, why_alone
from tiedparam.tie.lookup import find_tie, key_prefix, named_ties_in, ties_in
from tiedparam.tie.record import Tie
from tiedparam.tie.sources import overlooking_sources, refuse_exchanged
from tiedparam.tie.wrapped import has_fsdp1
from tiedparam.util.errors import Reason, TieError, quoted, raise_if, some_of
from tiedparam.util.parametrized import parametrization_list
from tiedparam.util.sharded import computed, gathered
from tiedparam.util.torch_private import buffers_of, metadata_of, parameters_of, set_metadata


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

    Example:
        >>> layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
        >>> {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        {'bias': (4,), 'parametrizations.weight.original0': (5, 2)}
        >>> {name: tuple(tensor.shape) for name, tensor in tp.dense_state_dict(layer).items()}
        {'weight': (4, 4), 'bias': (4,)}
    """
    if has_fsdp1(model):  # its layers hold parts, and state_dict gathers them
        return untie_state_dict(model, model.state_dict())
    return untie_with(model, model.state_dict(), _present)


def _present(tie: Tie) -> Tensor:
    """What a tied tensor is now; of a copy whose source was resized, in that size."""
    refuse_exchanged(tie.values)
    with overlooking_sources(tie.values):
        return tie.weight()


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

    Example:
        >>> layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
        >>> dense = tp.untie_state_dict(layer, layer.state_dict())
        >>> nn.Linear(4, 4).load_state_dict(dense)
        <All keys matched successfully>
    """
    tied = _renewed(model, tied)
    return untie_with(model, tied, _Expander(model, tied).weight)


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

    Example:
        >>> layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
        >>> tied = tp.tie_state_dict(layer, tp.dense_state_dict(layer))
        >>> layer.load_state_dict(tied)
        <All keys matched successfully>
    """
    problems: list[Reason] = []
    projected: list[tuple[str, float]] = []
    dense = _renewed(model, dense)
    result: OrderedDict[str, Tensor] = OrderedDict(dense)
    expander, together = _Expander(model, dense), fitted_together(model, dense)
    _copy_metadata(dense, result)
    for prefix, tie in named_ties_in(model):
        if prefix + tie.tensor_name in dense:
            fit = together.get(tie.values)
            reason = _tie_entry(tie, prefix, dense, result, expander, projected, fit)
            problems += [reason] if reason is not None else []
    problems += _foreign_prefix(model, dense)
    if problems:
        place = "the dense state dict"
        listed = some_of([str(reason) for reason in problems], "\n")
        raise TieError(place, f"{place} does not fit the tied model:\n{listed}", "")
    warn_projected(projected)
    return result


def _renewed(model: nn.Module, entries: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """A copy of a dictionary in which free values of an earlier layout lie as today's do."""
    result: OrderedDict[str, Tensor] = OrderedDict(entries)
    _copy_metadata(entries, result)
    for prefix, tie in named_ties_in(model):
        renew_entries(tie.rule, prefix + tie.tensor_name, result)
    return result


def _tie_entry(
    tie: Tie,
    prefix: str,
    dense: Mapping[str, Tensor],
    result: OrderedDict[str, Tensor],
    expander: _Expander,
    projected: list[tuple[str, float]],
    fit: tuple[tuple[Tensor, ...], Tensor] | None,
) -> Reason | None:
    """Put free values into the place of one dense entry, or return why that cannot be."""
    key, keys, rule = prefix + tie.tensor_name, tie.keys(prefix), tie.rule
    reason = why_unfit(tie, key, dense[key])
    if reason is None and any(k in dense for k in keys):
        reason = both_forms(key, "Remove one of the two.")
    if reason is not None:
        return reason
    sources: tuple[Tensor, ...] = ()
    if fit is None and (reason := why_alone(tie, key)) is not None:
        return reason
    if fit is None and rule.reads_layers:
        try:
            sources = expander.sources(tie)
            if not keys and not agree(dense[key], expander.law(tie, sources)):
                return disagreement(key, tie)
        except TieError as error:
            return error.reason
    value = as_float(result.pop(key))
    if not keys:
        return None
    with torch.no_grad():
        if fit is not None:
            free, lawful = fit
        else:
            free = rule.fit_to(value, sources)
            lawful = rule.forward(*sources, *free)
        residual = relative_distance(value, lawful.to(value))
    if not residual <= RESIDUAL_TO_WARN:
        projected.append((key, residual))
    result.update(zip(keys, free, strict=True))
    result.update(tie.data(prefix))
    return None


def _foreign_prefix(model: nn.Module, entries: Mapping[str, Tensor]) -> list[Reason]:
    """A complaint if no tied tensor is in ``entries``, but all under one prefix (DDP's, say)."""
    keys = [{prefix + tie.tensor_name, *tie.keys(prefix)} for prefix, tie in named_ties_in(model)]
    if not keys or any(k in entries for wanted in keys for k in wanted):
        return []
    for entry in entries:
        found = next((k for k in keys[0] if entry.endswith(f".{k}")), None)
        if found is not None:
            prefix = entry.removesuffix(found)
            return [
                Reason(
                    f"its keys begin with {quoted(prefix)}, as in {quoted(entry)}.",
                    "Take that away first.",
                )
            ]
    return []


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
        self._entries = entries
        self._prefixes = {id(module): key_prefix(path) for path, module in model.named_modules()}

    def weight(self, tie: Tie) -> Tensor:
        """The tensor that a layer of the dictionary's model would compute with."""
        return self._effective(tie.layer, tie.tensor_name, tie)

    def sources(self, tie: Tie) -> tuple[Tensor, ...]:
        """The tensors that a law reads, out of the dictionary."""
        refuse_exchanged(tie.values)
        return tuple(self._source(*source) for source in tie.rule.sources())

    def law(self, tie: Tie, sources: tuple[Tensor, ...], *free: Tensor) -> Tensor:
        """What the law makes of these sources."""
        try:
            return tie.rule.forward(*sources, *free)
        except Exception as error:
            shapes = " and ".join(str(tuple(source.shape)) for source in sources)
            raise TieError(
                f"'{tie.rule}'",
                f"'{tie.rule}' raised {type(error).__name__} on its source's entry {shapes}: "
                f"{error}.",
                "Correct that entry.",
            ) from error

    def _effective(self, layer: nn.Module, name: str, tie: Tie | None) -> Tensor:
        if not parametrize.is_parametrized(layer, name):
            return self._entry(self._prefixes[id(layer)] + name)
        first, *others = parametrization_list(layer, name)
        if tie is not None:
            weight = self._tied(tie)
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
        if key not in self._entries:
            raise TieError(f"'{key}'", f"the state dict has no '{key}', which a copy reads.", "")
        entry = self._entries[key]
        if not isinstance(entry, Tensor):
            kind = type(entry).__name__
            raise TieError(f"'{key}'", f"'{key}', which a copy reads, is a {kind}.", "")
        return cast(Tensor, gathered(entry))

    def _own(self, layer: nn.Module, name: str) -> dict[str, Tensor]:
        """The entries of one tensor's parametrizations."""
        prefix = f"{self._prefixes[id(layer)]}parametrizations.{name}."
        return {k: self._entry(prefix + k) for k in parametrization_list(layer, name).state_dict()}

    def _tied(self, tie: Tie) -> Tensor:
        prefix = self._prefixes[id(tie.layer)]
        raise_if(f"'{prefix}{tie.tensor_name}'", why_unfit_free(tie, prefix, self._entries, {}))
        free = [self._entry(key) for key in tie.keys(prefix)]
        if tie.rule.reads_layers:
            return self.law(tie, self.sources(tie), *free)
        if isinstance(tie.rule, Coded):
            data = {key: self._entries.get(key, own) for key, own in tie.data(prefix).items()}
            named = {key.rpartition(".")[2]: gathered(value) for key, value in data.items()}
            return computed(tie.rule.with_data(named).forward, free)
        return computed(tie.rule.forward, free)

    def _source(self, layer: nn.Module, name: str) -> Tensor:
        tie = find_tie(layer, name)
        if tie is None or tie.free or not tie.rule.reads_layers:
            prefix = self._prefixes.get(id(layer))
            if prefix is None:
                kind = type(layer).__name__
                raise TieError(
                    f"a {kind}",
                    f"the source of a copied tensor, a {kind}, is not in this model.",
                    "Pass the whole model and its whole state dict.",
                )
            if prefix + name in self._entries:  # dense already
                return self._entry(prefix + name)
        return self._effective(layer, name, tie)


def untie_with(
    model: nn.Module, tied: Mapping[str, Tensor], weight_of: Callable[[Tie], Tensor]
) -> OrderedDict[str, Tensor]:
    """A tied state dict with dense entries, each as ``weight_of`` gives it."""
    available: dict[str, Tensor] = dict(tied)
    for prefix, tie in named_ties_in(model):
        key = prefix + tie.tensor_name
        if key in tied:
            continue
        with torch.no_grad():
            weight = weight_of(tie)
        dense = weight.detach().clone(memory_format=torch.contiguous_format)
        own = f"{prefix}parametrizations.{tie.tensor_name}."
        for name in [name for name in available if name.startswith(own)]:
            del available[name]
        available[key] = dense
    # in the order of the dense model; what the modules do not name keeps its place behind
    result: OrderedDict[str, Tensor] = OrderedDict()
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = key_prefix(path)
        parameters = module.__dict__.get("_parameter_order", parameters_of(module))
        ties = [tie.tensor_name for tie in ties_in(module)]
        for name in (*parameters, *ties, *buffers_of(module), "_extra_state"):
            if prefix + name in available:
                result[prefix + name] = available.pop(prefix + name)
    result.update(available)
    _copy_metadata(tied, result)
    return result


def _copy_metadata(source: Any, target: Any) -> None:
    metadata = metadata_of(source)
    if metadata is not None:
        set_metadata(
            target,
            OrderedDict(
                (path, {k: v for k, v in entry.items() if k != SIGNATURE})
                for path, entry in metadata.items()
            ),
        )
