"""The free values of a tied tensor: what is stored, trained and may be given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.tie.lookup import tie_of
from tiedparam.tie.record import Tie
from tiedparam.tie.write_guard import unguard
from tiedparam.util.errors import Reason, TieError, nearest, quoted, raise_if
from tiedparam.util.sharded import is_sharded, whole, write
from tiedparam.util.torch_private import has_values, is_traceable_wrapper_subclass

FreeValues = Tensor | Iterable[Tensor] | Mapping[str, Tensor]
"""What `assign_` takes: the one, all in their order, or some by the names of `free_values`."""


def free_values(layer: nn.Module, tensor_name: str = "weight") -> dict[str, nn.Parameter]:
    """The Parameters that a tied tensor is computed from, by name.

    Args:
        layer: the tied layer.
        tensor_name: which tensor.

    Returns:
        The Parameters themselves, in the order in which `Rule.forward` takes them, named as in
        ``layer.named_parameters()``. None for a copy, whose numbers are its source's.

    Raises:
        TieError: if the tensor is not tied.

    Example:
        >>> layer = tp.register_tie(nn.Linear(3, 4), "row_repeat")
        >>> {name: value.shape for name, value in tp.free_values(layer).items()}
        {'parametrizations.weight.original0': torch.Size([1, 3])}
    """
    return _named(tie_of(layer, tensor_name))


def _named(tie: Tie) -> dict[str, nn.Parameter]:
    return dict(zip(tie.keys(), tie.free, strict=True))


def assign_free_values(tie: Tie, given: FreeValues, place: str) -> None:
    """Write free values into a tie.

    Raises:
        TieError: if one of them does not fit. Nothing was changed then.
        TypeError: if one of them is not a tensor.
    """
    stored = _named(tie)
    values = {name: unguard(value) for name, value in _by_name(stored, given, place).items()}
    for name, value in values.items():
        raise_if(place, _why_other_than(stored[name], value, name))
    # clone: one free value may be given in the place of another
    contents = {name: whole(value.detach()).clone() for name, value in values.items()}
    with torch.no_grad():
        for name, content in contents.items():
            if has_values(content):
                write(stored[name], content)


def _by_name(
    stored: Mapping[str, nn.Parameter], given: FreeValues, place: str
) -> dict[str, Tensor]:
    """What was given, by the names of the Parameters that it is for."""
    if isinstance(given, Mapping):
        named: dict[Any, Any] = dict(given)
        for name in named:
            if name not in stored:
                known = f"The free values are {', '.join(map(quoted, stored)) or 'none'}."
                fact = f"there is no free value {quoted(name)}."
                raise TieError(place, fact, nearest(name, stored) or known)
    else:
        if not isinstance(given, Iterable):
            raise TypeError(f"free= takes tensors, one or several, not {type(given).__name__}")
        listed = [given] if isinstance(given, Tensor) else list(given)
        _refuse_other_than_tensors(listed)  # the rows of an array would be counted as values
        if len(listed) != len(stored):
            counted = "1 was" if len(listed) == 1 else f"{len(listed)} were"
            shapes = ", ".join(str(tuple(value.shape)) for value in stored.values())
            remedy = f"Give them in this order: {shapes}." if stored else ""
            if not stored:
                remedy = "Its numbers are those of its source; assign to the source."
            plural = "" if len(stored) == 1 else "s"
            fact = f"it has {len(stored)} free value{plural}, and {counted} given."
            raise TieError(place, fact, remedy)
        named = dict(zip(stored, listed, strict=True))
    _refuse_other_than_tensors(named.values())
    return named


def _refuse_other_than_tensors(values: Iterable[object]) -> None:
    for value in values:
        if not isinstance(value, Tensor):
            raise TypeError(f"a free value is a tensor, not {type(value).__name__}")


def _why_other_than(present: Tensor, value: Tensor, name: str) -> Reason | None:
    """Why a value cannot be written into the Parameter that is there."""
    if is_traceable_wrapper_subclass(value) and not is_sharded(value):
        fact = f"the value is a {type(value).__name__}, and the free values are plain numbers."
        return Reason(fact, "Give it as an ordinary tensor.")
    reason = why_not_dense(value)
    if reason is not None:
        return reason
    if value.shape != present.shape or value.dtype != present.dtype:
        remedy = "Convert the value first; a weight is given as value=, not as free=."
        if value.numel() == present.numel():
            shape = "" if value.shape == present.shape else f".reshape{tuple(present.shape)}"
            cast = "" if value.dtype == present.dtype else f".to({present.dtype})"
            remedy = f"Convert the value first: value{shape}{cast}."
        return Reason(
            f"the value for '{name}' is {value.dtype} {tuple(value.shape)}, and the free value "
            f"{present.dtype} {tuple(present.shape)}.",
            remedy,
        )
    return why_without_numbers(present, value)


def why_not_dense(value: Tensor) -> Reason | None:
    """Why nothing is copied from a sparse or nested tensor: torch would raise midway."""
    if value.is_nested:
        return Reason("the value is a nested tensor.", "Give it as an ordinary tensor.")
    if value.layout is not torch.strided:
        return Reason(f"the value is {value.layout}.", "Convert the value first: value.to_dense().")
    return None


def why_without_numbers(present: Tensor, value: Tensor) -> Reason | None:
    """Why no numbers can be written, if one of the two has none."""
    if has_values(value) and not has_values(present):
        return Reason("it is on the meta device, where numbers are lost.", "Call to_empty first.")
    if has_values(present) and not has_values(value):
        return Reason(
            "the value is on the meta device and has no numbers.",
            "Give it some first, or move the layer with to('meta').",
        )
    return None
